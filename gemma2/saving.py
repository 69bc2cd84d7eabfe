"""Saving a model in the hub's layout, so that a reader finds the old, the new, or a clear error."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma2.config import Gemma2Config
from gemma2.staging import staged_folder
from gemma2.weights import (
    CONFIG,
    DTYPES,
    GENERATION_CONFIG,
    LM_HEAD,
    SAFE,
    SAFE_INDEX,
    PathLike,
    progress_bar,
    slots_of,
)

HUB_ENTRIES = (SAFE, SAFE_INDEX)
HUB_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SAVED_AS = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def parse_size(size: int | str) -> int:
    """Give the bytes that a max_shard_size means: 5, "5GB" = 5e9, "5GiB" = 5 * 2**30."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    text = str(size).strip().upper()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", text)
    if isinstance(size, bool) or not found or found[2] not in units:
        raise ValueError(f'max_shard_size is {size!r}: it must be bytes, or like "5GB"')
    count = int(float(found[1]) * units[found[2]])
    if count < 1:
        raise ValueError(f"max_shard_size is {size!r}: it must be at least 1 byte")
    return count


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Give what is written: every parameter and persistent buffer once, under its first name."""
    out = {}
    for slot in slots_of(model):
        name, tensor = slot.names[0], slot.tensor
        if tensor.is_meta:
            raise ValueError(f"save_pretrained: {name} is on the meta device: it has no values yet")
        if tensor.dtype not in _SAVED_AS:
            raise ValueError(f"save_pretrained: {name} has dtype {tensor.dtype}, which has no name")
        out[name] = tensor.detach()
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False) and LM_HEAD in out:
        embedding = out.get("model.embed_tokens.weight")
        if embedding is None or not torch.equal(embedding, out[LM_HEAD]):
            raise ValueError(
                "save_pretrained: lm_head.weight differs from the embedding while "
                "config.tie_word_embeddings is True: a reader would drop it. Set it to False first"
            )
        del out[LM_HEAD]
    return out


def in_shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Give the names shard by shard, in order; one is above `limit` only with one tensor."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        count = tensor.numel() * tensor.element_size()
        if groups[-1] and size + count > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    return groups


def index_text(tensors: Mapping[str, Tensor], shards: Mapping[str, list[str]]) -> str:
    """Give the text of the index of `shards`, which maps files to the names of their tensors."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    parts: Callable[[str], Iterable[Tensor]],
    advance: Callable[[int], object],
) -> None:
    """Write one file part by part, so that the peak is one tensor or less and not one shard.

    The format: uint64 length of the header, the header as JSON padded with spaces, the data. Wider
    types come first and the data begins at a multiple of 64 bytes, so that each tensor is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAVED_AS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, _ in ordered:
            for part in parts(name):
                advance(file.write(bytes_of(part)))


def bytes_of(tensor: Tensor) -> memoryview:
    """Give the bytes of a tensor's elements in order; of a dense one on the CPU without a copy."""
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode())


def write_hub(
    folder: Path,
    texts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    parts: Callable[[str], Iterable[Tensor]],
    limit: int,
    advance: Callable[[int], object],
) -> None:
    """Write a checkpoint in the hub's layout into the empty `folder`.

    texts: the small files and what is in them.
    tensors: what is written, in order; only shapes and dtypes count, so that they may be on meta.
    parts: gives a tensor's elements in order, in one part or several.
    limit: bytes in a shard.
    advance: is told of bytes written.
    """
    groups = in_shards(tensors, limit)
    shards = {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
        for i, names in enumerate(groups, start=1)
    }
    if len(groups) == 1:
        shards = {SAFE: groups[0]}
    else:
        texts = {**texts, SAFE_INDEX: index_text(tensors, shards)}
    for file, names in shards.items():
        _write_safetensors(folder / file, {name: tensors[name] for name in names}, parts, advance)
    for file, text in texts.items():
        _write_text(folder / file, text)


def save_pretrained(
    model: nn.Module,
    folder: PathLike,
    max_shard_size: int | str = "5GB",
    progress: bool | None = None,
) -> None:
    """Write `model` into `folder` in the hub's layout, readable by transformers 4 and 5.

    Writes ``config.json`` (with the class and the weights' dtype), ``generation_config.json`` if
    the model has a `generation_config`, and ``model.safetensors`` or shards of at most
    `max_shard_size` (bytes, "5GB" = 5e9, "5GiB" = 5 * 2**30) with their index. A tied head is not
    written.

    Everything is first written and synced in a hidden folder; a new folder then gets its name, and
    in an existing one the files are moved into place by renaming, with the file that makes the
    weights visible removed first and moved last. Interrupted before that moment, the folder is as
    it was; during it, loading says what happened. Other files in the folder stay; shards of an
    older checkpoint are removed.

    Raises:
        ValueError: a size that cannot be read, a model on the meta device, a head that is no longer
            equal to the embedding to which the configuration ties it.
        OSError: the disk refused; the folder is as it was.
    """
    limit = parse_size(max_shard_size)
    tensors = _saved_tensors(model)
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"save_pretrained: {path} is a file: give a folder")
    texts = {CONFIG: _config_text(model)}
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        texts[GENERATION_CONFIG] = generation_text(generation)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with (
        staged_folder(path, HUB_ENTRIES, HUB_SHARD) as writing,
        progress_bar(total, f"Saving {path.name}", progress) as advance,
    ):
        write_hub(writing, texts, tensors, lambda name: [tensors[name]], limit, advance)


def generation_text(generation: Any) -> str:
    """Give the text of a ``generation_config.json``."""
    return json.dumps(generation.to_dict(), indent=2, allow_nan=False) + "\n"


def _config_text(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    if not isinstance(config, Gemma2Config):
        raise TypeError(f"save_pretrained: model.config is {config!r}: it must be a Gemma2Config")
    return config_text(config, type(model).__name__, next(model.parameters()).dtype)


def config_text(config: Gemma2Config, architecture: str, dtype: torch.dtype) -> str:
    """Give the text of the ``config.json`` of a model of class `architecture` in `dtype`."""
    name = str(dtype).removeprefix("torch.")
    return dataclasses.replace(config, architectures=[architecture], dtype=name).to_json()

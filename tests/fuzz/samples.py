"""Small healthy model folders, kept as a dictionary of names and contents until one is written."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma2 import Gemma2Config, Gemma2ForCausalLM
from gemma2.checkpoint import save_pretrained

# What stands in place of a file's content: a name of `ODD`, written as something else than a file.
Folder = dict[str, "bytes | str"]

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "sliding_window": 8,
    "max_position_embeddings": 64,
}


def _socket(path: Path) -> None:
    # The name of a socket may have about 100 characters: bound where it is short, then moved.
    short = tempfile.mkdtemp()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{short}/s")
    os.replace(f"{short}/s", path)
    os.rmdir(short)


ODD: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "a link to /etc/passwd": lambda path: path.symlink_to("/etc/passwd"),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to the folder": lambda path: path.symlink_to(path.parent),
}


def write(folder: Folder, path: Path) -> int:
    """Write `folder` to the new directory `path`; give its size in bytes."""
    path.mkdir(parents=True)
    size = 0
    for name, content in folder.items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
            size += len(content)
        else:
            ODD[content](path / name)
    return size


def read(path: Path) -> Folder:
    return {item.name: item.read_bytes() for item in sorted(path.iterdir())}


@functools.cache
def model() -> nn.Module:
    """A tiny causal model; every weight is different from the others."""
    generator = torch.Generator().manual_seed(1)
    made = Gemma2ForCausalLM(Gemma2Config(**SIZES))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return made


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype) for name, value in model().named_parameters()}


def _saved(shard: str) -> Folder:
    with tempfile.TemporaryDirectory() as place:
        save_pretrained(model(), place, max_shard_size=shard)
        return read(Path(place))


@functools.cache
def one_file() -> Folder:
    return {
        **_saved("5GB"),
        "generation_config.json": b'{"temperature": 0.7, "top_k": 5, "eos_token_id": [1, 3]}',
    }


@functools.cache
def shards() -> Folder:
    return _saved("1KB")


def pickled(value: object, **options: Any) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "pytorch_model.bin"
        torch.save(value, path, **options)
        return path.read_bytes()


@functools.cache
def pickle_file() -> Folder:
    return {"config.json": one_file()["config.json"], "pytorch_model.bin": pickled(tensors())}


@functools.cache
def pickle_shards() -> Folder:
    names = sorted(tensors())
    folder: Folder = {"config.json": one_file()["config.json"]}
    weight_map = {}
    for i, part in enumerate((names[:7], names[7:]), start=1):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        folder[file] = pickled({name: tensors()[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    return {**folder, "pytorch_model.bin.index.json": index.encode()}


@functools.cache
def originals() -> dict[str, Tensor]:
    """The model's weights by the names of Google's PyTorch code."""
    found = {}
    for name, value in tensors().items():
        if name == "model.embed_tokens.weight":
            found["embedder.weight"] = value
        elif "q_proj" in name:
            rows = [
                tensors()[name.replace("q_proj", kind)] for kind in ("q_proj", "k_proj", "v_proj")
            ]
            found[name.replace("q_proj", "qkv_proj")] = torch.cat(rows)
        elif "k_proj" not in name and "v_proj" not in name:
            found[name] = value
    found["freqs_cis"] = torch.polar(torch.ones(64, 2), torch.zeros(64, 2))
    return found


@functools.cache
def original_file() -> Folder:
    content = pickled({"model_state_dict": originals()})
    return {"config.json": one_file()["config.json"], "model.ckpt": content}


@functools.cache
def original_shards() -> Folder:
    """Shards without an index, and int8 weights with a scaler for each row."""
    quantised = {}
    for name, value in originals().items():
        quantised[name] = value
        if value.dim() == 2 and name != "freqs_cis":
            scaler = value.abs().amax(dim=1) / 127
            quantised[name] = (value / scaler[:, None]).round().to(torch.int8)
            quantised[name.replace("weight", "weight_scaler")] = scaler
    names = sorted(quantised)
    folder: Folder = {"config.json": one_file()["config.json"]}
    for i, part in enumerate((names[:9], names[9:])):
        folder[f"pytorch_model-{i}.bin"] = pickled({name: quantised[name] for name in part})
    return folder


@functools.cache
def tokenizer() -> Folder:
    """A tokenizer of the hub's kind: byte fallback, merges, special tokens with their roles."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    words += [f"<0x{i:02X}>" for i in range(256)]
    words += ["\N{LOWER ONE EIGHTH BLOCK}", *"abcdeinorst", "an", "er", "in", "st"]
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [("a", "n"), ("e", "r"), ("i", "n"), ("s", "t")]
    made = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
    )
    made.add_special_tokens(words[:6])
    roles = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}
    roles["chat_template"] = "{{ messages }}"
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": json.dumps(roles).encode(),
    }


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)

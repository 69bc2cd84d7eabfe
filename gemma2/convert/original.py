"""Google's original PyTorch checkpoints, as google/gemma_pytorch reads and names them.

2B and 9B are one file of torch.save with the weights under ``model_state_dict``; the 27B is a
folder of shards with ``pytorch_model.bin.index.json``, in older ones without. The rows of query,
key and value lie in one matrix, the embedding is called ``embedder``, and the constant
``freqs_cis`` may lie beside them. A quantised matrix is int8 with a ``weight_scaler`` for each row.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gemma2.config import Gemma2Config
from gemma2.convert.source import (
    SIZES,
    Source,
    check_tensors,
    generation_beside,
    generation_of,
    hub_shapes,
    layout_of,
    parts_of,
    stale_files,
    tokenizer_beside,
    verify,
)
from gemma2.convert.torch_file import write_torch_file
from gemma2.generation import GenerationConfig
from gemma2.saving import config_text, generation_text, in_shards, index_text
from gemma2.staging import check_space, staged_file, staged_folder
from gemma2.weights import (
    BIN_INDEX,
    CONFIG,
    GENERATION_CONFIG,
    LM_HEAD,
    CheckpointError,
    PickleFile,
    TensorInfo,
    check_finished,
    from_index,
    progress_bar,
    shown,
)

ONE_FILE = "model.ckpt"
EMBEDDER = "embedder.weight"
_STATE = "model_state_dict"
SCALER = "weight_scaler"
_FREQS = "freqs_cis"
_ENTRIES = (ONE_FILE, BIN_INDEX)
_SHARD = re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin")
_MATRIX = re.compile(r"embedder\.weight|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
# Above the 9B in float32, which is 37 GB, there are shards.
_ONE_FILE_BYTES = 40 * 10**9


def keys_of(config: Gemma2Config) -> dict[str, list[str]]:
    """Give Google's keys, each with the hub's names of the tensors whose rows make it, in order."""
    keys: dict[str, list[str]] = {}
    for name in hub_shapes(config):
        key = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name)
        keys.setdefault(EMBEDDER if name == "model.embed_tokens.weight" else key, []).append(name)
    return keys


def _shapes(config: Gemma2Config) -> dict[str, tuple[int, ...]]:
    shapes = hub_shapes(config)
    return {
        key: (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])
        for key, names in keys_of(config).items()
    }


# ---- reading -------------------------------------------------------------------------------------


@dataclasses.dataclass
class OriginalSource:
    """An original checkpoint; see `gemma2.convert.source.Source`."""

    config: Gemma2Config
    tensors: dict[str, TensorInfo]
    dtype: torch.dtype
    generation: GenerationConfig | None
    tokenizer: list[Path]
    found: dict[str, TensorInfo]  # by Google's keys
    rows: dict[str, tuple[str, int, int]]  # the hub's name -> Google's key, first row, last + 1
    files: dict[Path, PickleFile]

    def read(self, name: str) -> Tensor:
        key, first, end = self.rows[name]
        weight = self._tensor(key)[first:end]
        if self.found[key].dtype is not torch.int8:
            return weight
        scaler = self._tensor(_scaler(key))[first:end]
        return weight.float().mul_(scaler.float().unsqueeze(-1))

    def _tensor(self, key: str) -> Tensor:
        return self.files[self.found[key].file].tensor(key)


def open_source(path: Path, config: Gemma2Config | None) -> OriginalSource:
    """Open a ``.ckpt``, or a folder that holds one or Google's shards.

    Without `config`, the model must have the shapes of a published size.

    Raises:
        CheckpointError: the files are damaged or are not Google's; no published size has these
            shapes; all that is missing, unknown or mis-shaped.
    """
    entry, found, problems = _find(path)
    found.pop(_FREQS, None)
    if config is None:
        config = _published(entry, found)
    expected = _shapes(config)
    for key in [key for key in expected if _MATRIX.fullmatch(key)]:
        info = found.get(key)
        if info is None or (info.dtype_name != "int8" and _scaler(key) not in found):
            continue
        expected[_scaler(key)] = expected[key][:1]
        if info.dtype_name == "int8":
            found[key] = dataclasses.replace(info, dtype=torch.int8)
        else:
            problems.append(f"{key} is {info.dtype_name} and has a {SCALER}: it must be int8")
    check_tensors(entry, found, expected, problems)

    shapes, tensors, rows = hub_shapes(config), {}, {}
    for key, names in keys_of(config).items():
        first = 0
        for name in names:
            end = first + shapes[name][0]
            rows[name] = key, first, end
            first = end
            read = torch.float32 if found[key].dtype == torch.int8 else found[key].dtype
            tensors[name] = dataclasses.replace(found[key], shape=shapes[name], dtype=read)
    largest = found[EMBEDDER].dtype
    assert largest is not None  # `check_tensors` refuses a tensor without one
    return OriginalSource(
        config,
        {name: tensors[name] for name in shapes},
        torch.bfloat16 if largest == torch.int8 else largest,
        generation_beside(path),
        tokenizer_beside(path),
        found,
        rows,
        {info.file: PickleFile(info.file, _STATE) for info in found.values()},
    )


def _scaler(key: str) -> str:
    return key.removesuffix("weight") + SCALER


def is_original(path: Path) -> bool:
    """Tell whether the pickles in a folder have Google's keys, and not the hub's."""
    if (path / BIN_INDEX).is_file():
        keys = set(from_index(path, path / BIN_INDEX).tensors)
    else:
        keys = {key for file in path.glob("*.bin") for key in PickleFile(file, _STATE).infos()}
    return EMBEDDER in keys or any(".qkv_proj." in key for key in keys)


def _find(path: Path) -> tuple[Path, dict[str, TensorInfo], list[str]]:
    """Give the file or folder that counts, what is in it, and sentences about its faults."""
    if path.is_file():
        return path, PickleFile(path, _STATE).infos(), []
    check_finished(path)
    files = sorted(path.glob("*.ckpt"))
    if len(files) > 1:
        names = ", ".join(shown(file.name) for file in files)
        raise CheckpointError(f"{path}: it holds {names}: give the path of one of them")
    if files:
        return files[0], PickleFile(files[0], _STATE).infos(), []
    if (path / BIN_INDEX).is_file():
        weights = from_index(path, path / BIN_INDEX)
        return weights.entry, weights.tensors, list(weights.problems)
    found: dict[str, TensorInfo] = {}
    problems = []
    for file in sorted(path.glob("*.bin")):
        for key, info in PickleFile(file, _STATE).infos().items():
            if key in found and key != _FREQS:
                problems.append(f"{shown(key)} is in {found[key].file.name} and in {file.name}")
            found[key] = info
    return path, found, problems


def _published(entry: Path, found: Mapping[str, TensorInfo]) -> Gemma2Config:
    """Give the configuration of the published model that has the shapes in the file."""
    held = {key: info.shape for key, info in found.items()}
    for preset in SIZES.values():
        config = preset()
        if _signature(held) == _signature(_shapes(config)):
            return config
    raise CheckpointError(
        f"{entry}: it has the shapes of no published Gemma 2 ({_signature(held)}), and there is no "
        f'{CONFIG} beside it: pass config= with one, or size="2b", "9b" or "27b"'
    )


def _signature(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Give what tells the sizes of a model apart, so that a single missing key does not matter."""
    layers = {key.split(".")[2] for key in shapes if re.match(r"model\.layers\.\d+\.", key)}
    parts = [f"{len(layers)} layers"]
    for key in (
        EMBEDDER,
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
    ):
        parts.append(f"{key} {list(shapes[key]) if key in shapes else 'missing'}")
    return ", ".join(parts)


# ---- writing -------------------------------------------------------------------------------------


def names_a_file(target: Path) -> bool:
    """Tell whether `target` names a single file, and not a folder."""
    return target.suffix == ".ckpt"


def beside_ours(folder: Path) -> list[str]:
    """Give the names of the files in `folder` that a reader would take, and `write` would leave."""
    return sorted(file.name for file in folder.glob("*.ckpt") if file.name != ONE_FILE)


def is_one_file(config: Gemma2Config, dtype: torch.dtype, shard_bytes: int | None) -> bool:
    """Tell whether a model is written as one file, and not in shards."""
    _, size = layout_of(_shapes(config), dtype)
    if shard_bytes is not None:
        return size <= shard_bytes
    return size <= _ONE_FILE_BYTES and hub_shapes(config) != hub_shapes(SIZES["27b"]())


def write(
    source: Source,
    target: Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int | None,
    progress: bool | None = None,
) -> list[Path]:
    """Write `source` as Google's original checkpoint; give the files.

    A `target` that ends in ``.ckpt`` is the file, and nothing else is written. Any other is a
    folder with ``model.ckpt``, or with shards and their index for the 27B, for more than 40 GB, and
    where `shard_bytes` is given and less than the whole; beside them lie the configuration, the
    generation settings and the tokenizer. All is read back and compared before it is moved into
    place (see staging.py).

    Raises:
        ValueError: the format cannot say the model, or the model does not go into one file.
        OSError: the disk is full, or refused; the target is as it was.
        CheckpointError: values beyond `dtype`, or the disk gives back something else.
    """
    config = source.config
    if LM_HEAD in source.tensors:
        raise ValueError(
            f"convert: {LM_HEAD} is a matrix of its own: Google's layout has only the embedding"
        )
    tensors, size = layout_of(_shapes(config), dtype)
    in_one = is_one_file(config, dtype, shard_bytes)
    if names_a_file(target) and not in_one:
        raise ValueError(
            f"convert: target is {target}: {size / 1e9:.1f} GB of this model are written in "
            "shards: give a folder"
        )
    freqs = torch.empty(
        2 * config.max_position_embeddings,
        config.head_dim // 2,
        dtype=torch.complex64,
        device="meta",
    )
    keys = keys_of(config)

    def parts(key: str) -> Iterator[Tensor]:
        if key == _FREQS:
            yield from _rotations(config)
        for name in keys.get(key, ()):
            yield from parts_of(source, name, dtype)

    check_space(target, size + freqs.numel() * freqs.element_size())
    with progress_bar(2 * size, f"Writing {target.name}", progress) as advance:
        if names_a_file(target):
            with staged_file(target) as file:
                write_torch_file(file, {_FREQS: freqs, **tensors}, parts, advance, _STATE)
                verify(source, open_source(file, config), dtype, advance)
            return [target]
        with staged_folder(target, _ENTRIES, stale_files(_SHARD, source)) as folder:
            if in_one:
                everything = {_FREQS: freqs, **tensors}
                write_torch_file(folder / ONE_FILE, everything, parts, advance, _STATE)
            else:
                _write_shards(folder, tensors, parts, shard_bytes or 5 * 10**9, advance)
            text = config_text(config, "Gemma2ForCausalLM", dtype)
            (folder / CONFIG).write_text(text, encoding="utf-8")
            text = generation_text(generation_of(source))
            (folder / GENERATION_CONFIG).write_text(text, encoding="utf-8")
            for item in source.tokenizer:
                shutil.copyfile(item, folder / item.name)
            verify(source, open_source(folder, config), dtype, advance)
            names = [item.name for item in folder.iterdir()]
    return sorted(target / name for name in names)


def _write_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    parts: Callable[[str], Iterator[Tensor]],
    limit: int,
    advance: Callable[[int], object],
) -> None:
    groups = in_shards(tensors, limit)
    shards = {
        f"pytorch_model-{i:05d}-of-{len(groups):05d}.bin": keys
        for i, keys in enumerate(groups, start=1)
    }
    for file, keys in shards.items():
        write_torch_file(folder / file, {key: tensors[key] for key in keys}, parts, advance)
    (folder / BIN_INDEX).write_text(index_text(tensors, shards), encoding="utf-8")


def _rotations(config: Gemma2Config) -> Iterator[Tensor]:
    """Give the constant exp(i p theta^(-2j / head_dim)) for positions p, [P, head_dim / 2].

    Readers of this layout compute it themselves, but some expect it in the file. It is as long as
    theirs, twice the positions of the model.
    """
    halves = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**halves
    for first in range(0, 2 * config.max_position_embeddings, 8192):
        end = min(first + 8192, 2 * config.max_position_embeddings)
        angles = torch.outer(torch.arange(first, end), frequencies)
        yield torch.polar(torch.ones_like(angles), angles)

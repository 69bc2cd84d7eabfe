"""GGUF files of the architecture "gemma2", as llama.cpp writes and reads them, to and from the hub.

What differs from the hub's layout (llama.cpp: conversion/gemma.py, src/models/gemma2.cpp):
norm weights are stored as 1 + w in float32; there is no lm_head, the embedding is tied; nothing
says `query_pre_attn_scalar`, which follows from the shape; the tokenizer is inside the file. q and
k are not permuted: Gemma 2's halves are rotated in llama.cpp too.

Read: float32, float16, bfloat16, and every quantised type that the library `gguf` can expand.
Written: float32, float16, bfloat16, q8_0.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma2.config import Gemma2Config, default_layer_types
from gemma2.convert.gguf_file import ALIGNMENT, File, Stored, shortest
from gemma2.convert.gguf_tokenizer import add_tokenizer, read_tokenizer
from gemma2.convert.source import Source, check_tensors, generation_of, hub_shapes
from gemma2.convert.vocabulary import UnfaithfulError
from gemma2.generation import GenerationConfig
from gemma2.saving import bytes_of
from gemma2.staging import check_space, staged_file
from gemma2.weights import (
    LM_HEAD,
    CheckpointError,
    PathLike,
    TensorInfo,
    cast,
    progress_bar,
    shown,
)

ARCHITECTURE = "gemma2"
TYPES = ("float32", "float16", "bfloat16", "q8_0")

_EMBEDDING = "model.embed_tokens.weight"
_OUTPUT = "output.weight"
_TOP = {_EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight"}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# config's field -> the key, and what llama.cpp takes where it is absent (None: it must be there)
_KEYS: dict[str, tuple[str, float | None]] = {
    "max_position_embeddings": ("context_length", None),
    "hidden_size": ("embedding_length", None),
    "num_hidden_layers": ("block_count", None),
    "intermediate_size": ("feed_forward_length", None),
    "num_attention_heads": ("attention.head_count", None),
    "num_key_value_heads": ("attention.head_count_kv", None),
    "head_dim": ("attention.key_length", None),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", None),
    "sliding_window": ("attention.sliding_window", 4096),
    "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
    "final_logit_softcapping": ("final_logit_softcapping", 30.0),
    "rope_theta": ("rope.freq_base", 10000.0),
}
_REALS = ("rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping", "rope_theta")
_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 2**24  # bytes of float32 that are in hand at once


def _library() -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("GGUF files need the library gguf: pip install 'gemma2[gguf]'")
    import gguf

    return gguf


def file_name(name: str) -> str:
    """Give GGUF's name of the hub's tensor `name`."""
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def query_scalar(config: Gemma2Config) -> int:
    """Give the query_pre_attn_scalar that llama.cpp takes for a model of this shape.

    It knows the 27B model by its 46 layers.
    """
    if config.num_hidden_layers == 46:
        return config.hidden_size // config.num_attention_heads
    return config.head_dim


# ---- reading -------------------------------------------------------------------------------------


def _config(file: File, given: Gemma2Config | None) -> Gemma2Config:
    """Give the configuration that the file's keys describe, or `given` if they agree with it."""
    architecture = file.text("general.architecture")
    if architecture != ARCHITECTURE:
        held = shown(architecture) if architecture else "none"
        raise CheckpointError(
            f'{file.path}: general.architecture is {held}: it must be "{ARCHITECTURE}"'
        )
    parts = file.integer("split.count") or 1
    if parts > 1:
        raise CheckpointError(
            f"{file.path}: it is one of {parts} parts: join them with llama-gguf-split --merge"
        )
    _check_rotation(file)
    fields: dict[str, Any] = {}
    absent = []
    for field, (key, default) in _KEYS.items():
        key = f"{ARCHITECTURE}.{key}"
        value = file.number(key) if field in _REALS else file.integer(key)
        if value is None and default is None:
            absent.append(key)
        elif value is not None or given is None:
            fields[field] = default if value is None else value
    if given is not None:
        differing = [
            f"{field} is {value} in the file and {getattr(given, field)} in the configuration"
            for field, value in fields.items()
            if value != getattr(given, field)
        ]
        if differing:
            raise CheckpointError(f"{file.path}: {'; '.join(differing)}")
        return given
    embedding = file.tensors.get(_TOP[_EMBEDDING])
    if embedding is None:
        absent.append(_TOP[_EMBEDDING])
    if absent:
        raise CheckpointError(f"{file.path}: it has no {', '.join(absent)}")
    assert embedding is not None
    value_length = file.integer(f"{ARCHITECTURE}.attention.value_length")
    if value_length not in (None, fields["head_dim"]):
        raise CheckpointError(
            f"{file.path}: {ARCHITECTURE}.attention.value_length is {value_length}: it must be "
            f"that of a key, {fields['head_dim']}"
        )
    fields["vocab_size"] = embedding.shape[0]
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        key = "padding_token_id" if field == "pad_token_id" else field
        number = file.integer(f"tokenizer.ggml.{key}")
        if number is not None:
            fields[field] = number
    try:
        config = Gemma2Config(**fields)
        config.query_pre_attn_scalar = query_scalar(config)
        config.validate()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    return config


def _check_rotation(file: File) -> None:
    """Check that the file asks for no scaled or partial RoPE, which a reader of it would honour."""
    rope = f"{ARCHITECTURE}.rope"
    kind = file.text(f"{rope}.scaling.type") or "none"
    if kind not in ("none", "linear"):
        raise CheckpointError(f"{file.path}: {rope}.scaling.type is {shown(kind)}: it must be none")
    for key in (f"{rope}.scaling.factor", f"{rope}.scale_linear"):
        factor = file.number(key)
        if factor not in (None, 0, 1):
            raise CheckpointError(f"{file.path}: {key} is {factor}: positions are not scaled here")
    size, rotated = (
        file.integer(f"{ARCHITECTURE}.{key}")
        for key in ("attention.key_length", "rope.dimension_count")
    )
    if rotated not in (None, size):
        raise CheckpointError(
            f"{file.path}: {rope}.dimension_count is {rotated}: it must be that of a key, {size}"
        )


def _expands(kind: int, block_bytes: int) -> bool:
    """Tell whether the library knows how to expand the type."""
    gguf = _library()
    try:
        gguf.quants.dequantize(
            np.zeros((1, block_bytes), np.uint8), gguf.GGMLQuantizationType(kind)
        )
    except NotImplementedError:
        return False
    return True


class GGUFSource:
    """An opened GGUF file; see `Source`."""

    def __init__(self, path: Path, config: Gemma2Config | None) -> None:
        gguf = _library()
        self._file = file = File(path)
        self.config = _config(file, config)
        expanded: dict[int, torch.dtype | None] = {}
        for stored in file.tensors.values():
            if stored.kind not in expanded:
                block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(stored.kind)][1]
                known = stored.kind_name in _DENSE or _expands(stored.kind, block_bytes)
                dense = _DENSE.get(stored.kind_name, torch.float32)
                expanded[stored.kind] = dense if known else None

        def info(stored: Stored) -> TensorInfo:
            return TensorInfo(path, stored.shape, expanded[stored.kind], stored.kind_name)

        shapes = hub_shapes(self.config)
        shapes.pop(LM_HEAD, None)
        found = {name: info(stored) for name, stored in file.tensors.items() if name != _OUTPUT}
        problems = []
        if _OUTPUT in file.tensors and not self._same(_OUTPUT, _TOP[_EMBEDDING]):
            problems.append(
                f"{_OUTPUT} differs from {_TOP[_EMBEDDING]}: Gemma 2's head is its embedding"
            )
        check_tensors(
            path, found, {file_name(name): shape for name, shape in shapes.items()}, problems
        )
        self.tensors = {
            name: TensorInfo(path, shape, torch.float32, found[file_name(name)].dtype_name)
            if len(shape) == 1
            else found[file_name(name)]
            for name, shape in shapes.items()
        }
        kinds = {stored.kind_name for stored in file.tensors.values()}
        embedding = _DENSE.get(file.tensors[_TOP[_EMBEDDING]].kind_name)
        self.dtype = embedding if embedding and kinds <= _DENSE.keys() else torch.bfloat16
        self.generation = self._generation()

    def _same(self, first: str, second: str) -> bool:
        """Tell whether two tensors are stored alike, bit by bit."""
        one, two = self._file.tensors[first], self._file.tensors.get(second)
        if two is None or (one.kind, one.shape) != (two.kind, two.shape):
            return False
        left, right = bytearray(min(_CHUNK, one.size)), bytearray(min(_CHUNK, one.size))
        for start in range(0, one.size, _CHUNK):
            count = min(_CHUNK, one.size - start)
            self._file.read(first, memoryview(left)[:count], start)
            self._file.read(second, memoryview(right)[:count], start)
            if left[:count] != right[:count]:
                return False
        return True

    def _generation(self) -> GenerationConfig:
        config, ends = self.config, []
        for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"):
            number = self._file.integer(key)
            if number is not None and not 0 <= number < config.vocab_size:
                raise CheckpointError(
                    f"{self._file.path}: {key} is {number}: a number of one of the vocabulary's "
                    f"{config.vocab_size} tokens is wanted"
                )
            if number is not None and number not in ends:
                ends.append(number)
        return GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=ends if len(ends) > 1 else config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )

    @functools.cached_property
    def tokenizer(self) -> list[Path]:
        """The files of the tokenizer, made from the file's vocabulary; they live as long as this.

        A vocabulary that cannot be expressed faithfully is left out with a warning.
        """
        try:
            tokenizer, config = read_tokenizer(self._file, self.config.vocab_size)
        except (UnfaithfulError, CheckpointError) as error:
            warnings.warn(
                f"{self._file.path}: no tokenizer is written, copy that of the model into the "
                f"folder: {error}",
                stacklevel=2,
            )
            return []
        folder = Path(tempfile.mkdtemp(prefix="gemma2-"))
        weakref.finalize(self, shutil.rmtree, folder, True)
        files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
        tokenizer.save(str(files[0]))
        files[1].write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return files

    def read(self, name: str) -> Tensor:
        """Give one tensor as the hub means it: norms without the +1, quantised ones as float32."""
        stored = self._file.tensors[file_name(name)]
        dense = _DENSE.get(stored.kind_name)
        if dense is not None:
            out = torch.empty(stored.shape, dtype=dense)
            self._file.read(file_name(name), out.view(torch.uint8).numpy().reshape(-1).data)
        else:
            out = torch.empty(stored.shape, dtype=torch.float32)
            self._expand(name, stored, out)
        if len(stored.shape) == 1:
            return out.float() - 1.0
        return out

    def _expand(self, name: str, stored: Stored, out: Tensor) -> None:
        """Fill `out` with the values of a quantised tensor, a few rows at a time."""
        gguf = _library()
        kind = gguf.GGMLQuantizationType(stored.kind)
        flat = out.view(-1, stored.shape[-1])
        row_bytes = stored.size // len(flat)
        step = max(1, _CHUNK // (4 * stored.shape[-1]))
        for first in range(0, len(flat), step):
            rows = flat[first : first + step]
            packed = np.empty((len(rows), row_bytes), np.uint8)
            self._file.read(file_name(name), packed.reshape(-1).data, first * row_bytes)
            # A scale may be any bit pattern, infinity included: what is in the file is given.
            with np.errstate(all="ignore"):
                rows.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))


def open_source(path: PathLike, config: Gemma2Config | None = None) -> GGUFSource:
    """Open the GGUF file `path` and check it: nothing in it is trusted, no tensor is read.

    `config` stands in for the file's keys, with which it must agree.

    Raises:
        ImportError: the library gguf is not installed.
        FileNotFoundError: there is no such file.
        CheckpointError: no GGUF file, a damaged one, one of another model; all missing, unknown,
            mis-shaped tensors and those of a type that cannot be expanded.
    """
    return GGUFSource(Path(path), config)


# ---- writing -------------------------------------------------------------------------------------


def _check_expressible(config: Gemma2Config) -> None:
    """Check that a reader of the file will compute what this configuration says."""
    wanted: dict[str, Any] = {
        "query_pre_attn_scalar": query_scalar(config),
        "layer_types": default_layer_types(config.num_hidden_layers),
    }
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"convert: {field} is {getattr(config, field)}: GGUF has no place for it, and a "
                f"reader takes {value} for a model of this shape"
            )
    for field in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"):
        if getattr(config, field) is None:
            raise ValueError(
                f"convert: {field} is None: GGUF cannot say that, a reader takes {_KEYS[field][1]}"
            )
    for field in _REALS:
        value = getattr(config, field)
        with np.errstate(over="ignore"):
            held = shortest(np.float32(value))
        if held != value:
            raise ValueError(
                f"convert: {field} is {value}: GGUF has it in float32, a reader takes {held}"
            )


def _add_keys(writer: Any, source: Source, kind: str) -> None:
    config = source.config
    types = _library().LlamaFileType
    file_types = {
        "float32": types.ALL_F32,
        "float16": types.MOSTLY_F16,
        "bfloat16": types.MOSTLY_BF16,
        "q8_0": types.MOSTLY_Q8_0,
    }
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(_library().GGML_QUANT_VERSION)
    for field, (key, _) in _KEYS.items():
        add = writer.add_float32 if field in _REALS else writer.add_uint32
        add(f"{ARCHITECTURE}.{key}", getattr(config, field))
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, source)
    special = generation_of(source)
    ends = special.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    for number, add in (
        (special.bos_token_id, writer.add_bos_token_id),
        (special.pad_token_id, writer.add_pad_token_id),
        (ends[0] if ends else None, writer.add_eos_token_id),
        (ends[1] if len(ends) > 1 else None, writer.add_eot_token_id),
    ):
        if number is not None and 0 <= number < config.vocab_size:
            add(number)


def _kind(shape: tuple[int, ...], kind: str) -> str:
    """Give the type that a tensor is written in, where the weights are to be of type `kind`."""
    if len(shape) == 1:
        return "float32"  # of norms, as llama.cpp wants it
    if kind == "q8_0" and shape[-1] % 32:
        return "float16"  # as llama.cpp does with rows that are not of whole blocks
    return kind


def _packed(rows: Tensor, kind: str, name: str) -> memoryview:
    """Give the bytes of `rows` (a norm with its +1) in a type of GGUF."""
    if kind != "q8_0":
        return bytes_of(cast(rows, getattr(torch, kind), name))
    gguf = _library()
    values = rows.float().numpy()
    # The scale of a block is float16, the largest value divided by 127.
    if not np.isfinite(values).all() or np.abs(values).max() > 127 * 65504:
        raise CheckpointError(f"{name} has values that q8_0 cannot hold: write bfloat16")
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    return memoryview(packed.reshape(-1))


def _rows(tensor: Tensor, name: str) -> Iterator[Tensor]:
    """Give a tensor of the hub's layout as GGUF means it, some rows at a time."""
    if tensor.dim() == 1:
        yield cast(tensor, torch.float32, name) + 1.0
        return
    step = max(1, _CHUNK // (4 * tensor.shape[-1]))
    for first in range(0, tensor.shape[0], step):
        yield tensor[first : first + step]


def _check_head(source: Source) -> None:
    if LM_HEAD in source.tensors and not torch.equal(source.read(LM_HEAD), source.read(_EMBEDDING)):
        raise CheckpointError(
            f"convert: {LM_HEAD} differs from the embedding: GGUF's Gemma 2 has no head of its own"
        )


def write(
    source: Source,
    target: PathLike,
    *,
    dtype: str | None = None,
    progress: bool | None = None,
) -> list[Path]:
    """Write `source` as the GGUF file `target`, new or in place of an old one; give the file.

    `dtype`: "float32", "float16", "bfloat16" or "q8_0"; None: the source's. Norms are float32. In
    "q8_0", tensors whose rows are not a multiple of 32 are float16, as llama.cpp does it. At most
    one tensor is in memory. The file is written beside the target, read back and compared, and
    only then gets its name. `progress`: a bar on stderr; None: for more than 1 GB.

    Raises:
        ImportError: the library gguf is not installed.
        ValueError: another dtype; a setting that the format cannot say.
        OSError: the disk is full; the target is as it was.
        CheckpointError: a head that is not tied, values beyond the type, or the disk gives back
            something else than was written.
    """
    gguf = _library()
    kind = str(source.dtype).removeprefix("torch.") if dtype is None else dtype
    if kind not in TYPES:
        raise ValueError(f"convert: dtype is {kind!r}: GGUF is written in {', '.join(TYPES)}")
    _check_expressible(source.config)
    _check_head(source)
    path = Path(target)
    numbers = {
        "float32": gguf.GGMLQuantizationType.F32,
        "float16": gguf.GGMLQuantizationType.F16,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }
    infos = {name: info for name, info in source.tensors.items() if name != LM_HEAD}
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    _add_keys(writer, source, kind)
    sizes = {}
    for name, info in infos.items():
        number = numbers[_kind(info.shape, kind)]
        block, block_bytes = gguf.GGML_QUANT_SIZES[number]
        sizes[name] = info.numel // block * block_bytes
        # of any dtype but uint8 the library takes the shape as it is
        writer.add_tensor_info(
            file_name(name), info.shape, np.dtype(np.float32), sizes[name], number
        )
    total = sum(sizes.values())
    check_space(path, total)
    with (
        staged_file(path) as temporary,
        progress_bar(2 * total, f"Writing {path.name}", progress) as advance,
    ):
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with open(temporary, "ab") as file:
            for name, info in infos.items():
                file.write(bytes(-file.tell() % ALIGNMENT))
                for rows in _rows(source.read(name), name):
                    file.write(_packed(rows, _kind(info.shape, kind), name))
                advance(sizes[name])
            file.write(bytes(-file.tell() % ALIGNMENT))
        written = GGUFSource(temporary, source.config)
        for name, info in infos.items():
            if not _equal(written.read(name), source.read(name), _kind(info.shape, kind)):
                raise CheckpointError(f"{path}: {name} does not read back as it was written")
            advance(sizes[name])
    return [path]


def _equal(found: Tensor, wanted: Tensor, kind: str) -> bool:
    """Tell whether a reader gets from the file what was to be written, bit by bit or in q8_0
    within a step."""
    step = max(1, _CHUNK // (4 * wanted.shape[-1]))
    for first in range(0, wanted.shape[0], step):
        want, got = wanted[first : first + step], found[first : first + step]
        if kind == "q8_0":
            # Half a step, and what rounding the scale of a block to float16 adds.
            blocks = want.float().reshape(-1, 32)
            error = (got.reshape(-1, 32) - blocks).abs().amax(1)
            if not bool((error <= blocks.abs().amax(1) / 127 + 127 * 2.0**-25).all()):
                return False
            continue
        if want.dim() == 1:
            want = (want.float() + 1.0) - 1.0
        if not np.array_equal(bytes_of(got), bytes_of(want.to(getattr(torch, kind)))):
            return False
    return True

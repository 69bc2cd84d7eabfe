"""What a checkpoint of any layout looks like to whoever converts it.

A reader (original.py, gguf.py, orbax.py, `HubSource` here) turns its files into a `Source`: the
hub's names, shapes and values, one tensor at a time. Names and shapes are checked when it is
opened, before a tensor is read, so that all that is wrong comes in one `CheckpointError`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gemma2.config import Gemma2Config
from gemma2.generation import GenerationConfig
from gemma2.weights import (
    CONFIG,
    GENERATION_CONFIG,
    CheckpointError,
    TensorInfo,
    cast,
    misfit,
    shown,
)

SIZES = {
    "2b": Gemma2Config.gemma2_2b,
    "9b": Gemma2Config.gemma2_9b,
    "27b": Gemma2Config.gemma2_27b,
}
# What a tokenizer consists of; the first two are the tokenizer itself.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_PART = 2**24  # elements that are converted or compared at once


class Source(Protocol):
    """A checkpoint that has been opened and checked: every tensor of the model is there.

    config: the model's.
    tensors: the hub's names, in the model's order, with final shapes; `dtype` is what `read` gives.
    dtype: what the weights are written in unless another dtype is asked for: that of the file,
        bfloat16 for quantised weights.
    generation: the settings beside the weights, None where there are none.
    tokenizer: files of a tokenizer that go with the weights, perhaps none.
    """

    @property
    def config(self) -> Gemma2Config: ...
    @property
    def tensors(self) -> dict[str, TensorInfo]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def generation(self) -> GenerationConfig | None: ...
    @property
    def tokenizer(self) -> list[Path]: ...

    def read(self, name: str) -> Tensor:
        """Give one tensor on the CPU as the hub's layout means it, perhaps mapped from its file.

        Norm weights are without the +1, q, k and v are apart, quantised weights are float32.
        """
        ...


def hub_shapes(config: Gemma2Config) -> dict[str, tuple[int, ...]]:
    """Give the hub's names and shapes of the language model, in the model's order.

    A tied `lm_head.weight` is not among them.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for n in range(config.num_hidden_layers):
        for name, shape in (
            ("self_attn.q_proj", (q_size, hidden)),
            ("self_attn.k_proj", (kv_size, hidden)),
            ("self_attn.v_proj", (kv_size, hidden)),
            ("self_attn.o_proj", (hidden, q_size)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
            ("input_layernorm", (hidden,)),
            ("post_attention_layernorm", (hidden,)),
            ("pre_feedforward_layernorm", (hidden,)),
            ("post_feedforward_layernorm", (hidden,)),
        ):
            shapes[f"model.layers.{n}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_tensors(
    entry: Path,
    found: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    problems: Iterable[str] = (),
) -> None:
    """Compare what a file holds with what the model needs, both by the file's own names.

    `problems` are sentences of the reader's own about further faults.

    Raises:
        CheckpointError: lists every missing, unknown, mis-shaped and wrongly typed tensor.
    """
    missing = [name for name in expected if name not in found]
    unexpected = sorted(name for name in found if name not in expected)
    both = [name for name in expected if name in found]
    mismatched = [name for name in both if found[name].shape != expected[name]]
    wrong_dtype = [name for name in both if found[name].dtype is None]
    groups = {
        "missing in the file": missing,
        "not part of the model": [shown(name) for name in unexpected],
        "of the wrong shape": [
            f"{name}: {list(found[name].shape)} in the file, {list(expected[name])} in the model"
            for name in mismatched
        ],
        "of the wrong dtype": [f"{name}: {found[name].dtype_name}" for name in wrong_dtype],
        "wrong otherwise": list(problems),
    }
    if any(groups.values()):
        raise misfit(
            f"{entry} does not fit the model",
            groups,
            missing=missing,
            unexpected=unexpected,
            mismatched=mismatched,
            wrong_dtype=wrong_dtype,
        )


def given_config(
    path: Path, config: Gemma2Config | str | os.PathLike[str] | None, size: str | None
) -> Gemma2Config | None:
    """Give the configuration that was passed or lies beside the file, None if there is none.

    `config` is one, a ``config.json``, or a folder with one; `size` is "2b", "9b" or "27b".

    Raises:
        ValueError: both were given, or `size` is no published size.
        FileNotFoundError: `config` does not exist.
    """
    if config is not None and size is not None:
        raise ValueError(f"convert: config and size={size!r} were given: give one of them")
    if size is not None:
        if size not in SIZES:
            raise ValueError(f'convert: size is {size!r}: it must be "2b", "9b" or "27b"')
        return SIZES[size]()
    file = folder_of(path) / CONFIG
    if config is None and not file.is_file():
        return None
    if not isinstance(config, Gemma2Config):
        if config is not None:
            file = Path(config) / CONFIG if Path(config).is_dir() else Path(config)
            if not file.is_file():
                raise FileNotFoundError(f"convert: config is {file}: there is no such file")
        with warnings.catch_warnings():  # about the 224, which is an error here
            warnings.simplefilter("ignore", UserWarning)
            config = Gemma2Config.from_json_file(file)
    nine = SIZES["9b"](query_pre_attn_scalar=224)
    if config.query_pre_attn_scalar == 224 and hub_shapes(config) == hub_shapes(nine):
        raise ValueError(
            "convert: query_pre_attn_scalar is 224 in the configuration of a 9B: the model was "
            'trained with 256, and 224 is a known error of old conversions. Pass size="9b"'
        )
    return config


def folder_of(path: Path) -> Path:
    """Give the folder in which a checkpoint's small files lie."""
    return path if path.is_dir() else path.parent


def generation_beside(path: Path) -> GenerationConfig | None:
    """Give the generation settings that lie beside a checkpoint."""
    file = folder_of(path) / GENERATION_CONFIG
    return GenerationConfig.from_json_file(file) if file.is_file() else None


def tokenizer_beside(path: Path) -> list[Path]:
    """Give the tokenizer's files that lie beside a checkpoint."""
    files = [folder_of(path) / name for name in TOKENIZER_FILES]
    return [file for file in files if file.is_file()]


def stale_files(shards: re.Pattern[str], source: Source) -> re.Pattern[str]:
    """Give the pattern of an older checkpoint's files that must not stay beside those of `source`.

    These are its `shards`, and what its tokenizer consisted of if `source` has one.
    """
    if not source.tokenizer:
        return shards
    return re.compile("|".join([shards.pattern, *map(re.escape, TOKENIZER_FILES)]))


def generation_of(source: Source) -> GenerationConfig:
    """Give the source's generation settings, or those that follow from its configuration."""
    if source.generation is not None:
        return source.generation
    config = source.config
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def layout_of(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> tuple[dict[str, Tensor], int]:
    """Give tensors of these shapes without memory, and how many bytes they would have."""
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()
    }
    return tensors, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def parts_of(source: Source, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Give the elements of a tensor in order and in `dtype`, a part at a time."""
    for part in source.read(name).reshape(-1).split(_PART):
        yield cast(part, dtype, name)


def verify(
    source: Source, written: Source, dtype: torch.dtype, advance: Callable[[int], object]
) -> None:
    """Compare what was written, bit by bit, with what was to be written.

    Raises:
        CheckpointError: the text names the first tensor that differs.
    """
    for name in source.tensors:
        found = written.read(name).reshape(-1).split(_PART)
        for wanted, part in zip(parts_of(source, name, dtype), found, strict=True):
            # as bytes: NaN equals itself, and -0 is not 0
            if part.dtype != dtype or not torch.equal(
                part.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)
            ):
                raise CheckpointError(
                    f"{written.tensors[name].file}: {name} reads back other than it was written: "
                    "the disk or the memory is faulty, or another process writes there"
                )
            advance(part.numel() * part.element_size())

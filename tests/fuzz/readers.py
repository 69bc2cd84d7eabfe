"""Who reads untrusted files: for each a healthy folder, what is damaged, and what must come of it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from gemma2 import Gemma2Config, Gemma2ForCausalLM
from gemma2.convert import original
from gemma2.convert.gguf import open_source as open_gguf
from gemma2.generation.config import GenerationConfig
from gemma2.tokenizer import Tokenizer
from tests.fuzz import damage, expected, gguf, samples
from tests.fuzz.samples import Folder


class WrongError(Exception):
    """A reader has accepted a folder and made something else of it than the folder says."""


@dataclass(frozen=True)
class Reader:
    """`healthy`: folders to damage; `focus`: files that are damaged most; `read`: reads a folder.

    `read` raises an error that names the file, or `WrongError`, or the folder was read as it is.
    """

    healthy: Callable[[], list[Folder]]
    focus: list[str]
    read: Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    reader: str
    folder: Folder
    said: list[str]


def _model(folder: Path) -> Gemma2ForCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Gemma2ForCausalLM.from_pretrained(folder)
    wanted = expected.hub(folder)
    if not any(name.startswith("model.") for name in wanted):  # a body that was saved alone
        wanted = {f"model.{name}": value for name, value in wanted.items()}
    wanted.setdefault("model.embed_tokens.weight", wanted.get("lm_head.weight", torch.empty(0)))
    found: dict[str, Tensor] = dict(model.named_parameters())
    if wrong := expected.difference(found, wanted):
        raise WrongError(wrong)
    return model


def _config(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = Gemma2Config.from_pretrained(folder)
    said = json.loads((folder / "config.json").read_bytes())
    for item in dataclasses.fields(config):
        value, told = getattr(config, item.name), said.get(item.name)
        if item.name in ("extra", "dtype", "id2label", "num_labels") or told is None:
            continue
        if value != told:
            raise WrongError(f"{item.name} is {value!r}, the file says {told!r}")
    again = Gemma2Config.from_dict(json.loads(config.to_json().encode()))
    if again != config:
        raise WrongError("written and read again it is another configuration")
    if config.num_hidden_layers <= 50:
        _model(folder)


def _generation_config(folder: Path) -> None:
    config = GenerationConfig.from_pretrained(folder)
    path = folder / "generation_config.json"
    said = json.loads(path.read_bytes()) if path.exists() else {}
    for name, told in said.items():
        value = config.extra[name] if name in config.extra else getattr(config, name)
        if isinstance(value, float):
            told = float(told)
        if told is not None and value != told:
            raise WrongError(f"{name} is {value!r}, the file says {told!r}")
    written = json.dumps(config.to_dict(), allow_nan=False)
    if GenerationConfig.from_dict(json.loads(written)) != config:
        raise WrongError("written and read again it is another configuration")
    _model(folder)


def _tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    text = "an <eos> inner star \N{GRINNING FACE}"
    ids = tokenizer.encode(text)
    # in the beginning: a damaged file may name a letter, which occurs elsewhere, too
    if ids[:2].count(tokenizer.bos_id) != (tokenizer.bos_id is not None):  # type: ignore[arg-type]
        raise WrongError(f"{ids} begins with more or less than one {tokenizer.bos_id}")
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise WrongError(f"{ids} are no token ids")
    if not isinstance(tokenizer.decode(ids), str):
        raise WrongError("decoding gives no text")
    stream = tokenizer.decode_stream()
    "".join([*map(stream.put, ids), stream.end()])


def _original(folder: Path) -> None:
    config = Gemma2Config(**samples.SIZES)
    ckpt = folder / "model.ckpt"
    source = original.open_source(ckpt if ckpt.is_file() else folder, config)
    said: dict[str, Tensor] = {}
    for file in [ckpt] if ckpt.is_file() else sorted(folder.glob("*.bin")):
        state = expected.pickled(file)
        said |= state.get("model_state_dict", state)
    wanted = {}
    for key, value in said.items():
        scaler = said.get(key.replace("weight", "weight_scaler"))
        if value.dtype == torch.int8 and scaler is not None:
            value = value.float() * scaler.float()[:, None]
        if ".qkv_proj." in key:
            sizes = [config.num_attention_heads, *[config.num_key_value_heads] * 2]
            rows = value.split([heads * config.head_dim for heads in sizes])
            for kind, part in zip("qkv", rows, strict=True):
                wanted[key.replace("qkv_proj", f"{kind}_proj")] = part
        wanted["model.embed_tokens.weight" if key == "embedder.weight" else key] = value
    found = {name: source.read(name) for name in source.tensors}
    if wrong := expected.difference(found, wanted):
        raise WrongError(wrong)


def _gguf(folder: Path) -> None:
    path = folder / "model.gguf"
    source = open_gguf(path)
    found = {name: source.read(name) for name in source.tensors}
    if wrong := expected.difference(found, gguf.read(path)):
        raise WrongError(wrong)
    with warnings.catch_warnings():  # a vocabulary that cannot be expressed
        warnings.simplefilter("ignore")
        _ = source.tokenizer


READERS: dict[str, Reader] = {
    "safetensors": Reader(lambda: [samples.one_file()], ["model.safetensors"], _model),
    "index": Reader(lambda: [samples.shards()], ["model.safetensors.index.json"], _model),
    "bin": Reader(lambda: [samples.pickle_file()], ["pytorch_model.bin"], _model),
    "bin index": Reader(
        lambda: [samples.pickle_shards()],
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
        _model,
    ),
    "config": Reader(lambda: [samples.one_file()], ["config.json"], _config),
    "generation_config": Reader(
        lambda: [samples.one_file()], ["generation_config.json"], _generation_config
    ),
    "original": Reader(lambda: [samples.original_file()], ["model.ckpt"], _original),
    "original shards": Reader(
        lambda: [samples.original_shards()],
        ["pytorch_model-0.bin", "pytorch_model-1.bin"],
        _original,
    ),
    "gguf": Reader(lambda: [{"model.gguf": gguf.healthy().packed()}], ["model.gguf"], _gguf),
    "tokenizer": Reader(
        lambda: [samples.tokenizer()], ["tokenizer.json", "tokenizer_config.json"], _tokenizer
    ),
}


@st.composite
def cases(draw: st.DrawFn, reader: str) -> Case:
    """A damaged folder for `reader`; some are left whole, since those must be read."""
    who = {**READERS, **PLANTED}[reader]
    folder = dict(draw(st.sampled_from(who.healthy())))
    said: list[str] = []
    for _ in range(draw(st.sampled_from([0, *[1] * 12, 2, 2, 3]))):
        damage.one(draw, folder, who.focus, said)
    return Case(reader, folder, said)


# ---- broken readers, with which the campaign is tested ------------------------------------------

_hoard: list[Any] = []


def _raises(folder: Path) -> None:
    raise KeyError("weight_map")


def _hangs(folder: Path) -> None:
    while True:
        pass


def _waits(folder: Path) -> None:
    import time

    time.sleep(1000)


def _allocates(folder: Path) -> None:
    _hoard.append(torch.ones(50_000_000))
    _hoard.clear()


def _takes_address_space(folder: Path) -> None:
    torch.empty(2**36, dtype=torch.uint8)


def _crashes(folder: Path) -> None:
    import ctypes

    ctypes.string_at(0)


def _leaves_a_name_out(folder: Path) -> None:
    raise ValueError("a file is damaged")


def _gives_wrong_weights(folder: Path) -> None:
    model = samples.model()
    found = {name: value + 1 for name, value in model.named_parameters()}
    if wrong := expected.difference(found, expected.hub(folder)):
        raise WrongError(wrong)


PLANTED: dict[str, Reader] = {
    f"planted {name}": Reader(lambda: [samples.one_file()], ["config.json"], read)
    for name, read in {
        "KeyError": _raises,
        "hang": _hangs,
        "wait": _waits,
        "memory": _allocates,
        "space": _takes_address_space,
        "crash": _crashes,
        "nameless": _leaves_a_name_out,
        "wrong": _gives_wrong_weights,
    }.items()
}
PLANTED["planted memory of a tokenizer"] = Reader(
    lambda: [samples.tokenizer()], ["tokenizer_config.json"], _allocates
)

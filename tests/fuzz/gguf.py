"""GGUF: a small healthy file, the same with one entry that lies, and what a file says."""

from __future__ import annotations

import dataclasses
import functools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz import expected, samples

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_FORMS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_DENSE: dict[int, tuple[Any, torch.dtype]] = {
    0: (np.float32, torch.float32),
    1: (np.float16, torch.float16),
    30: (np.int16, torch.bfloat16),
}
Q8_0 = 8
_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def hub_name(name: str) -> str:
    if not name.startswith("blk."):
        top = {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
        }
        return top.get(name, name)
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{_NAMES[kind]}.weight"


@dataclass(frozen=True)
class Key:
    name: str
    kind: int
    value: Any
    inner: int = STRING  # of an array
    claimed: int | None = None  # the length that is written, where it is not the true one

    def packed(self) -> bytes:
        head = _text(self.name) + struct.pack("<I", self.kind)
        if self.kind == ARRAY:
            count = len(self.value) if self.claimed is None else self.claimed
            body = b"".join(_scalar(self.inner, item) for item in self.value)
            return head + struct.pack("<IQ", self.inner, count) + body
        return head + _scalar(self.kind, self.value)


@dataclass(frozen=True)
class Entry:
    name: str
    dims: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None  # where it is not that of the data

    def packed(self, offset: int) -> bytes:
        said = offset if self.offset is None else self.offset
        dims = struct.pack(f"<I{len(self.dims)}Q", len(self.dims), *self.dims)
        return _text(self.name) + dims + struct.pack("<IQ", self.kind, said)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _scalar(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(str(value))
    form = _FORMS.get(kind, "<I")
    if form in ("<f", "<d"):
        return struct.pack(form, value)
    size = struct.calcsize(form)
    return struct.pack("<" + form[1].upper(), int(value) % 256**size)


@dataclass(frozen=True)
class File:
    keys: list[Key]
    tensors: list[Entry]
    counts: tuple[int | None, int | None] = (None, None)
    version: int = 3

    def packed(self) -> bytes:
        counts = [
            said if said is not None else len(held)
            for said, held in zip(self.counts, (self.tensors, self.keys), strict=True)
        ]
        head = b"GGUF" + struct.pack("<IQQ", self.version, *counts)
        head += b"".join(key.packed() for key in self.keys)
        body, infos = b"", b""
        for tensor in self.tensors:
            infos += tensor.packed(len(body))
            body += tensor.data + b"\0" * (-len(tensor.data) % 32)
        head += infos
        return head + b"\0" * (-len(head) % 32) + body


@functools.cache
def healthy() -> File:
    sizes = samples.SIZES
    said = {
        "context_length": sizes["max_position_embeddings"],
        "embedding_length": sizes["hidden_size"],
        "block_count": sizes["num_hidden_layers"],
        "feed_forward_length": sizes["intermediate_size"],
        "attention.head_count": sizes["num_attention_heads"],
        "attention.head_count_kv": sizes["num_key_value_heads"],
        "attention.key_length": sizes["head_dim"],
        "attention.sliding_window": sizes["sliding_window"],
    }
    words = [f"<{i}>" for i in range(sizes["vocab_size"])]
    keys = [
        Key("general.architecture", STRING, "gemma2"),
        Key("general.alignment", U32, 32),
        *(Key(f"gemma2.{name}", U32, value) for name, value in said.items()),
        Key("gemma2.attention.layer_norm_rms_epsilon", F32, 1e-6),
        Key("gemma2.attn_logit_softcapping", F32, 50.0),
        Key("gemma2.rope.freq_base", F32, 10000.0),
        Key("tokenizer.ggml.model", STRING, "llama"),
        Key("tokenizer.ggml.tokens", ARRAY, words),
        Key("tokenizer.ggml.scores", ARRAY, [0.0] * len(words), F32),
        Key("tokenizer.ggml.token_type", ARRAY, [1] * len(words), I32),
        Key("tokenizer.ggml.eos_token_id", U32, 1),
        Key("tokenizer.ggml.add_bos_token", BOOL, 1),
    ]
    back = {hub: file for file, hub in _NAMES.items()}
    tensors = []
    for name, value in samples.tensors().items():
        if value.dim() == 1:
            value = value + 1
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            name = f"blk.{layer}.{back[rest.removesuffix('.weight')]}.weight"
        else:
            name = "token_embd.weight" if "embed" in name else "output_norm.weight"
        kind = 1 if "ffn_up" in name else 30 if "attn_q" in name else 0
        kept = value.to(_DENSE[kind][1]).contiguous().view(torch.uint8).numpy().tobytes()
        tensors.append(Entry(name, tuple(reversed(value.shape)), kind, kept))
    return File(keys, tensors)


_LIES = st.sampled_from(
    [0, 1, 2, 3, 7, 31, 32, 64, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]
)


def lying(draw: st.DrawFn, said: list[str]) -> bytes:
    """The healthy file with an entry that lies, is there twice, or is missing."""
    file = healthy()
    what = draw(
        st.sampled_from(["key", "key", "key", "tensor", "tensor", "tensor", "counts", "version"])
    )
    if what == "counts":
        which = draw(st.sampled_from([(0,), (1,), (0, 1)]))
        counts = tuple(draw(_LIES) if i in which else None for i in range(2))
        said.append(f"counts {counts}")
        return dataclasses.replace(file, counts=counts).packed()
    if what == "version":
        said.append("version")
        return dataclasses.replace(file, version=draw(_LIES) % 2**32).packed()
    items: list[Any] = list(file.keys if what == "key" else file.tensors)
    i = draw(st.integers(0, len(items) - 1))
    old = items[i]
    action = draw(st.sampled_from(["change", "change", "change", "remove", "repeat", "rename"]))
    if action == "remove":
        del items[i]
    elif action == "repeat":
        items.insert(draw(st.integers(0, len(items))), old)
    elif action == "rename":
        names = st.sampled_from([item.name for item in items]) | st.text(max_size=9)
        name = draw(
            names | st.sampled_from(["n" * 70_000, "a\0b", "blk.7.attn_q.weight", "output.weight"])
        )
        items[i] = dataclasses.replace(old, name=name.encode("utf-8", "replace").decode())
    elif what == "key":
        items[i] = _lying_key(draw, old)
    else:
        items[i] = _lying_tensor(draw, old)
    said.append(f"{action} {old.name}: {str(items[min(i, len(items) - 1)])[:200]}")
    if what == "key":
        return dataclasses.replace(file, keys=items).packed()
    return dataclasses.replace(file, tensors=items).packed()


def _lying_key(draw: st.DrawFn, key: Key) -> Key:
    if key.kind == ARRAY:
        inner = draw(st.sampled_from([key.inner, key.inner, U32, STRING, ARRAY, 99]))
        value = draw(
            st.sampled_from(
                [key.value, key.value[:-1], [], [str(0)] * 3, key.value * 5000, ["x" * 3_000_000]]
            )
        )
        if inner != STRING:
            value = [item if isinstance(item, (int, float)) else 0 for item in value]
        return Key(key.name, ARRAY, value, inner, draw(st.none() | _LIES))
    kind = draw(st.sampled_from([key.kind, key.kind, *_FORMS, STRING, 13, 2**31]))
    if kind == STRING:
        texts = ["", "gemma2", "gemma3", "llama", "x" * 2_000_000, "\0", "\n  all is well"]
        return Key(key.name, kind, draw(st.sampled_from(texts)))
    if kind in (6, 12):
        return Key(key.name, kind, draw(st.floats(width=32)))
    return Key(key.name, kind, draw(_LIES | st.integers(0, 70)))


def _lying_tensor(draw: st.DrawFn, entry: Entry) -> Entry:
    field = draw(st.sampled_from(["dims", "dims", "kind", "offset", "data", "quantised"]))
    if field == "dims":
        near = st.sampled_from([*entry.dims, 1, 8]) | _LIES
        dims = draw(
            st.lists(near, max_size=5) | st.just(entry.dims[::-1]) | st.just((*entry.dims, 1))
        )
        return dataclasses.replace(entry, dims=tuple(dims))
    if field == "kind":
        return dataclasses.replace(entry, kind=draw(st.integers(0, 45) | _LIES) % 2**32)
    if field == "offset":
        return dataclasses.replace(entry, offset=draw(_LIES))
    if field == "data":
        data = draw(st.sampled_from([b"", entry.data[:-1], entry.data[::-1], entry.data * 3]))
        return dataclasses.replace(entry, data=data)
    # rows of blocks of 32: no row of this model has so many, so this is refused, or a lie more
    data = draw(st.sampled_from([b"\0" * 34, b"\xff" * 34 * 8]))
    return dataclasses.replace(entry, kind=draw(st.sampled_from([2, 8, 12, 14])), data=data)


def read(path: Path) -> dict[str, Tensor]:
    """Give the tensors of a file by the hub's names, as the hub means them."""
    content, at = path.read_bytes(), 8

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(form, content, at)
        at += struct.calcsize(form)
        return int(value) if form not in ("<f", "<d") else 0

    def text() -> str:
        nonlocal at
        count = number("<Q")
        at += count
        return content[at - count : at].decode()

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind == ARRAY:
            inner, count = number("<I"), number("<Q")
            return [value(inner) for _ in range(count)]
        return number(_FORMS[kind])

    tensors, keys = number("<Q"), number("<Q")
    said = {text(): value(number("<I")) for _ in range(keys)}
    listed = []
    for _ in range(tensors):
        name, count = text(), number("<I")
        listed.append((name, [number("<Q") for _ in range(count)], number("<I"), number("<Q")))
    alignment = said.get("general.alignment", 32)
    start = -(-at // alignment) * alignment
    found = {}
    for name, dims, kind, offset in listed:
        array, dtype = _DENSE[kind]
        count = int(np.prod(dims))
        numbers = np.frombuffer(content, array, count, start + offset).reshape(dims[::-1])
        tensor = expected.as_tensor(numbers.copy(), dtype)
        found[hub_name(name)] = tensor.float() - 1 if len(dims) == 1 else tensor
    return found

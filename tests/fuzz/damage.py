"""What is done to a healthy folder: changes of its files, bytes, JSON, headers and archives."""

from __future__ import annotations

import functools
import io
import os
import pickle
import random
import struct
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from tests.fuzz import gguf, samples
from tests.fuzz.samples import ODD, Folder
from tests.fuzz.values import Raw, bytes_of, edit, hostile, names, parse, show

Said = list[str]
INTEGERS = [
    0,
    1,
    2,
    7,
    8,
    63,
    64,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
]


# ---- bytes --------------------------------------------------------------------------------------


def flip(draw: st.DrawFn, content: bytes, said: Said) -> bytes:
    out = bytearray(content)
    for _ in range(draw(st.sampled_from([1, 1, 2, 8]))):
        if out:
            # the beginning of a file decides more than its data
            top = draw(st.sampled_from([len(out), min(len(out), 64), min(len(out), 512)]))
            at, bits = draw(st.integers(0, top - 1)), draw(st.integers(1, 255))
            out[at] ^= bits
            said.append(f"byte {at} ^= {bits}")
    return bytes(out)


def cut(draw: st.DrawFn, content: bytes, said: Said) -> bytes:
    kept = draw(st.integers(0, len(content)))
    said.append(f"keep {kept} of {len(content)} bytes")
    return content[:kept] if draw(st.booleans()) else content[len(content) - kept :]


def extend(draw: st.DrawFn, content: bytes, said: Said) -> bytes:
    count = draw(st.sampled_from([1, 7, 8, 64, 4096, 1_000_000]))
    fill = draw(st.sampled_from([b"\0", b" ", b"\xff", b"{"]))
    said.append(f"append {count} times {fill!r}")
    return content + fill * count


def splice(draw: st.DrawFn, content: bytes, said: Said) -> bytes:
    """Remove a stretch, or repeat it, or overwrite it."""
    start = draw(st.integers(0, len(content)))
    count = draw(st.integers(0, min(4096, len(content) - start)))
    part = content[start : start + count]
    new = draw(st.sampled_from([b"", part * 2, b"\0" * count, b"\xff" * count]))
    said.append(f"bytes {start} to {start + count} become {show(new)}")
    return content[:start] + new + content[start + count :]


def overwrite(draw: st.DrawFn, content: bytes, said: Said) -> bytes:
    """Put an integer of a size that files use somewhere, most often at a multiple of it."""
    width = draw(st.sampled_from("BHIQ"))
    size = struct.calcsize("<" + width)
    if len(content) < size:
        return content
    at = draw(st.integers(0, (len(content) - size) // size)) * size
    value = draw(st.sampled_from(INTEGERS)) % 256**size
    said.append(f"{size} bytes at {at} become {value}")
    return content[:at] + struct.pack("<" + width, value) + content[at + size :]


def noise(draw: st.DrawFn, content: bytes, said: Said) -> bytes:
    """Random bytes, behind the first bytes of the file or none of them."""
    kept = draw(st.sampled_from([0, 0, 2, 4, 8, 16, 64]))
    count = draw(st.sampled_from([0, 1, 8, 100, 5000, 300_000]))
    seed = draw(st.integers(0, 2**32))
    said.append(f"{kept} bytes and {count} random ones")
    return content[:kept] + random.Random(seed).randbytes(count)


BYTES: list[Callable[[st.DrawFn, bytes, Said], bytes]] = [
    flip, flip, cut, extend, splice, overwrite, overwrite, noise,
]  # fmt: skip


# ---- JSON and safetensors -----------------------------------------------------------------------


def json_text(draw: st.DrawFn, content: bytes, said: Said) -> bytes:
    document = parse(content)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        document = edit(draw, document, said)
    return bytes_of(document)


def safetensors(draw: st.DrawFn, content: bytes, said: Said) -> bytes:
    """Change the header, and sometimes what is said about its length."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = parse(content[8 : 8 + length]), content[8 + length :]
    what = draw(st.sampled_from(["entry", "entry", "any", "swap", "data", "length", "more"]))
    entries = [i for i, (name, _) in enumerate(header) if name != "__metadata__"]
    if what == "entry":
        at = draw(st.sampled_from(entries))
        name, fields = header[at]
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        old = dict(fields)[key]
        if key == "dtype":
            kinds = ["F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "I64", "F8_E4M3", "C64", "F4"]
            new: Any = draw(st.sampled_from(kinds) | hostile())
        else:
            new = list(old)
            if new and draw(st.booleans()):
                near = st.sampled_from([*INTEGERS, -1, -8, 2**70, *old]) | st.integers(-64, 64)
                new[draw(st.integers(0, len(new) - 1))] = draw(near)
            else:
                new = draw(
                    st.sampled_from([[], old[::-1], [*old, 1], [0, *old], old * 2]) | hostile()
                )
        said.append(f"{name}: {key} becomes {show(new)}")
        for i, (field, _) in enumerate(fields):
            if field == key:
                fields[i] = (field, new)
    elif what == "any":
        header = edit(draw, header, said)
    elif what == "swap":
        # the file stays in order: two tensors trade names
        one, two = draw(st.sampled_from(entries)), draw(st.sampled_from(entries))
        said.append(f"{header[one][0]} and {header[two][0]} trade names")
        first, second = (header[two][0], header[one][1]), (header[one][0], header[two][1])
        header[one], header[two] = (first, second) if one != two else (header[one], header[two])
    elif what == "data":
        data = draw(st.sampled_from(BYTES))(draw, data, said)
    elif what == "more":
        name = draw(names())
        count = draw(st.sampled_from([1, 1000, 20_000]))
        for i in range(count):
            end = len(data)
            entry = Raw(f'{{"dtype":"F32","shape":[0],"data_offsets":[{end},{end}]}}')
            header.append((f"{name}{i or ''}", entry))
        said.append(f"{count} more tensors without values, {show(name)}")
    text = bytes_of(header)
    length = len(text)
    if what == "length":
        length = draw(st.sampled_from([*INTEGERS, length - 1, length + 1, 8 + length + len(data)]))
        said.append(f"the header's length is {length}")
    return struct.pack("<Q", length % 2**64) + text + data


# ---- archives of torch.save ---------------------------------------------------------------------


class Call:
    """What a pickle holds in its place: call `function` with `arguments`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def _strange() -> dict[str, Any]:
    """Values for a tensor of shape [8] in a pickle. The first ones are weights."""
    base = torch.arange(64, dtype=torch.float32)
    utils: Any = torch._utils
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(base[:8], 0.1, 0, torch.qint8)
        rows = base.reshape(8, 8).to_sparse_csr()
    return {
        "a view": base[8:16],
        "a view with steps": base[::8],
        "a parameter": torch.nn.Parameter(base[:8].clone()),
        "an expanded number": torch.zeros(1).expand(8),
        "an endless expanded number": torch.zeros(1).expand(2**40),
        "float16": base[:8].half(),
        "float64": base[:8].double(),
        "integers": base[:8].long(),
        "complex": base[:8].to(torch.complex64),
        "float8": base[:8].to(torch.float8_e4m3fn),
        "sparse": base[:8].to_sparse(),
        "rows": rows,
        "quantised": quantised,
        "a conjugate": base[:8].to(torch.complex64).conj(),
        "a negative view": torch.complex(base[:8], base[:8]).conj().imag,
        "meta": torch.empty(8, device="meta"),
        "meta without a storage": Call(
            utils._rebuild_meta_tensor_no_storage, torch.float32, (8,), (1,), False
        ),
        "huge meta": Call(
            utils._rebuild_meta_tensor_no_storage, torch.float32, (2**50,), (1,), False
        ),
        "a new tensor": Call(torch.Tensor, 8),
        "a huge new tensor": Call(torch.Tensor, 2**36),
        "a huge array": Call(bytearray, 2**36),
        "a large array": Call(bytearray, 2**29),
        "a counter": Counter({"a": 2**70}),
        "ordered": OrderedDict(a=base[:8]),
        "a nested one": {"a": {"b": base[:8]}},
        "none": None,
        "a number": 1,
        "a huge number": 1 << 2000,
        "a name": "model.norm.weight",
        "bytes": b"\0" * 8,
        "a tuple": (base[:8],),
        "a set": {1, 2},
        "a shape": torch.Size([8]),
        "a dtype": torch.float32,
        "a device": torch.device("cuda", 0),
        "a shell": Call(os.system, "touch /tmp/gemma2-fuzz-owned"),
        "a program": Call(eval, "__import__('os').system('touch /tmp/gemma2-fuzz-owned')"),
        "an opened file": Call(open, "/etc/passwd"),
        "an import": Call(__import__, "antigravity"),
        "an attribute": Call(getattr, base, "numpy"),
        "a storage": base[:8].untyped_storage(),
    }


@functools.cache
def _archives(nested: str | None) -> dict[str, bytes]:
    """Archives with one tensor (or all) replaced by something else; made once, as all are small."""

    def of(tensors: Any) -> bytes:
        return samples.pickled(tensors if nested is None else {nested: tensors})

    healthy: dict[Any, Any] = samples.originals() if nested else samples.tensors()
    last = "model.norm.weight"
    made = {what: of({**healthy, last: value}) for what, value in _strange().items()}
    made["a key that is a number"] = of({**healthy, 7: torch.zeros(1)})
    made["a key that is a tuple"] = of({**healthy, ("a", 1): torch.zeros(1)})
    made["a hostile key"] = of({**healthy, "\n  all is well\x1b[2J" + "n" * 9999: torch.zeros(1)})
    made["a shared storage"] = of({**healthy, "lm_head.weight": healthy[next(iter(healthy))]})
    made["a list"] = of([healthy])
    made["one tensor"] = of(healthy[last])
    made["nothing"] = of({})
    made["only a key"] = of({"model_state_dict": None})
    made["once more nested"] = of({"model_state_dict": healthy})
    made["bfloat16"] = of(
        {name: value.bfloat16() for name, value in healthy.items() if not value.is_complex()}
    )
    made["the old form"] = samples.pickled(healthy, _use_new_zipfile_serialization=False)
    return made


def _repacked(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # a name may stand there twice
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def _entries(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(item.filename, archive.read(item)) for item in archive.infolist()]


@functools.cache
def _bomb() -> bytes:
    """An archive of 1 MB whose pickle is 256 MB of a repeated instruction."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = b"N0" * 2**19  # push None, pop it
    data = b"".join(pack.compress(block) for _ in range(256)) + pack.flush()
    size, name = 256 * len(block), b"archive/data.pkl"
    common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, 0, len(data), size, len(name), 0)
    local = b"PK\3\4" + common + name + data
    central = (
        b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    )
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + end


@functools.cache
def _wild_pickles() -> dict[str, bytes]:
    return {
        "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "nested tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
        "nested tuples as a key": b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\1s.",
        "marks": b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b".",
        "many numbers, one by one": b"\x80\x02]" + b"K\1a" * 600_000 + b".",
        "an endless string": b"\x80\x02X\xff\xff\xff\xff" + b"a" * 100 + b".",
        "a string of 2 GB": b"\x80\x02X\xff\xff\xff\x7f" + b"a" * 100 + b".",
        "a long of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "a memo far away": b"\x80\x02}r\xff\xff\xff\x7f.",
        "a memo that is not there": b"\x80\x02h\x07.",
        "no memo at all": b"\x80\x02.",
        "a list in itself": b"\x80\x02]q\0h\0a.",
        "a dict in itself": b"\x80\x02}q\0X\1\0\0\0ah\0s.",
        "a stack that is empty": b"\x80\x02e.",
        "a mark too few": b"\x80\x02]K\1u.",
        "an odd dict": b"\x80\x02}(K\1u.",
        "a list as a key": b"\x80\x02}]K\1s.",
        "protocol 5": pickle.dumps({"a": 1}, protocol=5),
        "protocol 0": pickle.dumps({"a": 1}, protocol=0),
        "a global by its stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "an instance": b"(S'touch /tmp/gemma2-fuzz-owned'\nios\nsystem\n.",
        "a storage called 7": b"\x80\x02K\x07Q.",
        "a storage of nothing": b"\x80\x02(tQ.",
        "a storage of too much": b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu"
        b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7ftQ.",
        "a million numbers": b"\x80\x02](" + b"K\1" * 1_000_000 + b"e.",
        "empty": b"",
    }  # fmt: skip


def _fields(draw: st.DrawFn, content: bytes, said: Said) -> bytes:
    """Let one of the archive's own records lie: an offset, a size, a method, a name's length."""
    kinds = {b"PK\3\4": 30, b"PK\1\2": 46, b"PK\5\6": 22}
    mark = draw(st.sampled_from(sorted(kinds)))
    found = [i for i in range(len(content) - 4) if content.startswith(mark, i)]
    if not found:
        return content
    start = draw(st.sampled_from(found))
    at = start + draw(st.integers(4, kinds[mark] - 1))
    width = draw(st.sampled_from("BHI"))
    size = struct.calcsize("<" + width)
    value = draw(st.sampled_from(INTEGERS) | st.integers(0, 20_000)) % 256**size
    said.append(f"record {mark!r} at {start}: {size} bytes at {at} become {value}")
    return content[:at] + struct.pack("<" + width, value) + content[at + size :]


def _entry(
    draw: st.DrawFn, entries: list[tuple[str, bytes]], said: Said
) -> list[tuple[str, bytes]]:
    """Remove one of the archive's entries, repeat, damage or rename it, or lie of the byte order."""
    i = draw(st.integers(0, len(entries) - 1))
    name, old = entries[i]
    action = draw(st.sampled_from(["remove", "repeat", "damage", "rename", "big endian"]))
    said.append(f"{action} {name}")
    if action == "remove":
        del entries[i]
    elif action == "repeat":
        entries.insert(draw(st.integers(0, len(entries))), (name, old[::-1]))
    elif action == "damage":
        entries[i] = (name, draw(st.sampled_from(BYTES))(draw, old, said))
    elif action == "rename":
        other = draw(st.sampled_from(["x", "../x", "archive/data/0", "/data.pkl", "a" * 60_000]))
        entries[i] = (other, old)
    else:
        root = entries[0][0].partition("/")[0]
        entries = [(name, text) for name, text in entries if not name.endswith("/byteorder")]
        entries.append((f"{root}/byteorder", draw(st.sampled_from([b"big", b"", b"middle"]))))
    return entries


def archive(draw: st.DrawFn, content: bytes, said: Said, nested: str | None = None) -> bytes:
    what = draw(
        st.sampled_from(
            [
                "value",
                "value",
                "pickle",
                "pickle",
                "wild",
                "entry",
                "pack",
                "fields",
                "fields",
                "bomb",
            ]
        )
    )
    said.append(f"archive: {what}")
    if what == "bomb":
        return _bomb() if draw(st.integers(0, 9)) == 0 else b"PK\3\4"
    if what == "fields":
        return _fields(draw, content, said)
    if what == "value":
        which = draw(st.sampled_from(sorted(_archives(nested))))
        said.append(which)
        return _archives(nested)[which]
    entries = _entries(content)
    if what == "pack":
        said.append("deflated")
        return _repacked(entries, zipfile.ZIP_DEFLATED)
    pickles = [i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl")]
    if not pickles:
        raise ValueError("a damage before this one took the pickle away")
    of_pickle = pickles[0]
    name, old = entries[of_pickle]
    if what == "pickle":
        entries[of_pickle] = (name, draw(st.sampled_from(BYTES))(draw, old, said))
    elif what == "wild":
        which = draw(st.sampled_from(sorted(_wild_pickles())))
        said.append(which)
        entries[of_pickle] = (name, _wild_pickles()[which])
    else:
        entries = _entry(draw, entries, said)
    return _repacked(entries)


# ---- files --------------------------------------------------------------------------------------


def files(draw: st.DrawFn, folder: Folder, said: Said) -> None:
    """Remove a file, put something else in its place, or let two files trade places."""
    name = draw(st.sampled_from(sorted(folder)))
    action = draw(st.sampled_from(["remove", "empty", "odd", "odd", "trade", "rename", "stray"]))
    if action == "remove":
        del folder[name]
    elif action == "empty":
        folder[name] = b""
    elif action == "odd":
        folder[name] = draw(st.sampled_from(sorted(ODD)))
        action = f"{folder[name]!r} in place of"
    elif action == "trade":
        other = draw(st.sampled_from(sorted(folder)))
        folder[name], folder[other] = folder[other], folder[name]
        action = f"trade with {other}"
    elif action == "rename":
        new = draw(
            st.sampled_from(
                ["model.safetensors", "pytorch_model.bin", "tokenizer.model", "x", ".x"]
            )
        )
        folder[new] = folder.pop(name)
        action = f"rename to {new}"
    else:
        stray = draw(
            st.sampled_from([".replacing-0", ".saving-0", "model.safetensors.index.json", "x"])
        )
        folder[stray] = draw(st.sampled_from(["a folder", "a pipe", b"", b"{}"]))
        action = f"{stray} beside"
    said.append(f"{action} {name}")


def one(draw: st.DrawFn, folder: Folder, focus: list[str], said: Said) -> None:
    """Damage one file of the folder, most often one of `focus`, in the way of its format."""
    if not folder or draw(st.integers(0, 7)) == 0:
        if folder:
            files(draw, folder, said)
        return
    present = [name for name in focus if name in folder]
    name = draw(st.sampled_from(present if present and draw(st.integers(0, 9)) else sorted(folder)))
    content = folder[name]
    if not isinstance(content, bytes):
        return
    healthy = not said
    said.append(name)
    try:
        folder[name] = _by_format(draw, name, content, said)
    except Exception:
        if healthy:
            raise
        # a damage before this one has left nothing of the format
        folder[name] = draw(st.sampled_from(BYTES))(draw, content, said)


def _by_format(draw: st.DrawFn, name: str, content: bytes, said: Said) -> bytes:
    if draw(st.integers(0, 3)):
        if name.endswith(".json"):
            return json_text(draw, content, said)
        if name.endswith(".safetensors"):
            return safetensors(draw, content, said)
        if name.endswith(".gguf"):
            return gguf.lying(draw, said)
        if name.endswith((".bin", ".ckpt")):
            return archive(
                draw, content, said, "model_state_dict" if name == "model.ckpt" else None
            )
    return draw(st.sampled_from(BYTES))(draw, content, said)

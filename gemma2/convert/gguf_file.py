"""The container format of GGUF: a header of keys, a list of tensors, and their bytes.

Files come from anywhere, so the header is read here and not by the library `gguf`, whose reader
maps what the counts in a file claim: an array that claims 2**60 entries keeps it busy for ever, and
tensors that lie on top of each other or beyond the end pass. Every count, length and offset is
compared with the file's size before it is used, values stay on the disk until somebody asks for
them, and no two tensors share a byte, so what is read can never exceed the file. Format: docs/gguf.md
of ggml-org/ggml, versions 2 and 3.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gemma2.weights import CheckpointError, shown

ALIGNMENT = 32  # of tensors, where general.alignment does not say otherwise

_MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",  # bool
    10: "<Q",
    11: "<q",
    12: "<d",
}
# Far beyond any model of this kind, and small enough that a file of nothing but entries is read in
# seconds and takes megabytes.
_MAX_KEYS = 4096
_MAX_TENSORS = 2**14
_MAX_STRINGS = 2**21
_MAX_TEXT = 2**20  # bytes in one string


@dataclass(frozen=True)
class Value:
    """Where the value of a key lies: `count` entries of the type `kind` from `offset` on."""

    kind: int
    is_array: bool
    count: int
    offset: int


@dataclass(frozen=True)
class Stored:
    """One tensor: `shape` as torch has it (the file has it reversed), GGML's number for the type,
    the file's first byte of it, and how many bytes there are."""

    shape: tuple[int, ...]
    kind: int
    kind_name: str
    offset: int
    size: int


class _Header:
    """Reads forward through a file, and never past its end."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0
        self.strings = 0

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a readable GGUF file: {what}")

    def check(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.wrong(
                f"{what} has {count} bytes, and the file ends {self.size - self.at} bytes later"
            )

    def take(self, count: int, what: str) -> bytes:
        self.check(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise self.wrong(f"it ends within {what}")
        self.at += count
        return data

    def skip(self, count: int, what: str) -> None:
        self.check(count, what)
        self.at += count
        self.file.seek(self.at)

    def number(self, form: str, what: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form), what))
        return int(value)

    def name(self, longest: int, what: str) -> str:
        length = self.number("<Q", what)
        if length > longest:
            raise self.wrong(f"{what} has {length} bytes: at most {longest} are allowed")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8") from error

    def value(self, key: str) -> Value:
        kind = self.number("<I", f"the type of {key}")
        is_array = kind == _ARRAY
        count = 1
        if is_array:
            kind = self.number("<I", f"the type of {key}")
            count = self.number("<Q", f"the length of {key}")
        start = self.at
        if kind in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[kind]), key)
        elif kind == _STRING:
            self.strings += count
            if self.strings > _MAX_STRINGS:
                raise self.wrong(f"{key} claims {count} strings: at most {_MAX_STRINGS} are read")
            for _ in range(count):
                self.skip(self.number("<Q", key), key)
        else:
            raise self.wrong(f"{key} has the type {kind}, which no version of the format has")
        return Value(kind, is_array, count, start)


class File:
    """A GGUF file: its keys, and where its tensors are. Only `read` and `texts` read more.

    Raises:
        CheckpointError: the file is no GGUF file, is damaged or lies; the text begins with the path.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():  # opening a pipe may never end
            raise CheckpointError(f"{path}: not a readable GGUF file: it is no file")
        with open(path, "rb") as file:
            header = _Header(path, file)
            counts = self._start(header)
            self.values = self._keys(header, counts[1])
            self.tensors = self._tensors(header, counts[0])

    def _start(self, header: _Header) -> tuple[int, int]:
        if header.size < 24 or header.take(4, "the magic") != _MAGIC:
            raise header.wrong("it does not begin with the bytes GGUF")
        version = header.number("<I", "the version")
        if version and not version & 0xFFFF:
            raise header.wrong("it is big-endian: only little-endian files are read")
        if version not in (2, 3):
            raise header.wrong(f"its version is {version}: versions 2 and 3 are read")
        tensors = header.number("<Q", "the number of tensors")
        keys = header.number("<Q", "the number of keys")
        for count, most, what in ((tensors, _MAX_TENSORS, "tensors"), (keys, _MAX_KEYS, "keys")):
            if count > most:
                raise header.wrong(f"it claims {count} {what}: at most {most} are read")
        return tensors, keys

    def _keys(self, header: _Header, count: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for _ in range(count):
            key = header.name(2**16 - 1, "a key")
            if key in found:
                raise header.wrong(f"the key {shown(key)} is there twice")
            found[key] = header.value(shown(key))
        return found

    def _tensors(self, header: _Header, count: int) -> dict[str, Stored]:
        sizes = _block_sizes()
        listed: list[tuple[str, list[int], int, int]] = []
        for _ in range(count):
            name = header.name(64, "the name of a tensor")
            dims = header.number("<I", shown(name))
            if not 1 <= dims <= 4:
                raise header.wrong(f"{shown(name)} has {dims} dimensions: 1 to 4 are allowed")
            shape = [header.number("<Q", shown(name)) for _ in range(dims)]
            kind = header.number("<I", shown(name))
            listed.append((name, shape, kind, header.number("<Q", shown(name))))
        alignment = self._alignment(header)
        start = -(-header.at // alignment) * alignment
        found: dict[str, Stored] = {}
        for name, shape, kind, offset in listed:
            label = shown(name)
            if name in found:
                raise header.wrong(f"the tensor {label} is there twice")
            if kind not in sizes:
                raise header.wrong(f"{label} has the type {kind}, which this version does not know")
            kind_name, block, block_bytes = sizes[kind]
            if 0 in shape or shape[0] % block:
                raise header.wrong(
                    f"{label} has rows of {shape[0]} values, {kind_name} has blocks of {block}: "
                    "rows must be of whole blocks, and none may be empty"
                )
            size = math.prod(shape) // block * block_bytes
            if offset % alignment or start + offset + size > header.size:
                raise header.wrong(
                    f"{label} lies at {start + offset} and has {size} bytes, the file has "
                    f"{header.size}: it must lie inside and begin at a multiple of {alignment}"
                )
            found[name] = Stored(tuple(reversed(shape)), kind, kind_name, start + offset, size)
        _check_apart(header, found)
        return found

    def _alignment(self, header: _Header) -> int:
        value = self.values.get("general.alignment")
        if value is None:
            return ALIGNMENT
        number = self._integer("general.alignment", value)
        if number < 8 or number > 2**16 or number & (number - 1):
            raise header.wrong(
                f"general.alignment is {number}: it must be a power of two from 8 to 65536"
            )
        return number

    # ---- values -------------------------------------------------------------------------------

    def _wrong(self, key: str, value: Value, wanted: str) -> CheckpointError:
        kind = {_STRING: "a string", _BOOL: "true or false"}.get(value.kind, "a number")
        held = f"an array of {value.count} entries" if value.is_array else kind
        return CheckpointError(f"{self.path}: {key} is {held}: it must be {wanted}")

    def _at(self, value: Value, count: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(value.offset)
            return file.read(count)

    def _number(self, value: Value) -> int | float:
        form = _SCALARS[value.kind]
        (number,) = struct.unpack(form, self._at(value, struct.calcsize(form)))
        if value.kind == 6 and math.isfinite(number):
            return shortest(np.float32(number))
        return float(number) if isinstance(number, float) else int(number)

    def _integer(self, key: str, value: Value) -> int:
        if value.is_array or value.kind in (6, _BOOL, _STRING, 12):
            raise self._wrong(key, value, "an integer")
        return int(self._number(value))

    def integer(self, key: str) -> int | None:
        """Give the integer under `key`, None where there is none."""
        value = self.values.get(key)
        return None if value is None else self._integer(key, value)

    def number(self, key: str) -> float | None:
        """Give the number under `key`, None where there is none."""
        value = self.values.get(key)
        if value is None:
            return None
        if value.is_array or value.kind in (_BOOL, _STRING):
            raise self._wrong(key, value, "a number")
        return float(self._number(value))

    def flag(self, key: str) -> bool | None:
        """Give the truth under `key`, None where there is none."""
        value = self.values.get(key)
        if value is None:
            return None
        if value.is_array or value.kind != _BOOL:
            raise self._wrong(key, value, "true or false")
        return bool(self._number(value))

    def text(self, key: str) -> str | None:
        """Give the string under `key`, None where there is none."""
        value = self.values.get(key)
        if value is None:
            return None
        if value.is_array or value.kind != _STRING:
            raise self._wrong(key, value, "a string")
        return next(self._texts(key, value))

    def texts(self, key: str) -> list[str] | None:
        """Give the strings under `key`, None where there are none."""
        value = self.values.get(key)
        if value is None:
            return None
        if not value.is_array or value.kind != _STRING:
            raise self._wrong(key, value, "an array of strings")
        return list(self._texts(key, value))

    def _texts(self, key: str, value: Value) -> Iterator[str]:
        with open(self.path, "rb") as file:
            file.seek(value.offset)
            for number in range(value.count):
                (length,) = struct.unpack("<Q", file.read(8))
                if length > _MAX_TEXT:
                    raise CheckpointError(
                        f"{self.path}: {key} has a string of {length} bytes: at most {_MAX_TEXT} "
                        "are read"
                    )
                try:
                    yield file.read(length).decode("utf-8")
                except UnicodeDecodeError as error:
                    raise CheckpointError(
                        f"{self.path}: entry {number} of {key} is not UTF-8"
                    ) from error

    def numbers(self, key: str) -> np.ndarray | None:
        """Give the numbers under `key` as an array of the file's type, None where there are none."""
        value = self.values.get(key)
        if value is None:
            return None
        if not value.is_array or value.kind in (_STRING, _BOOL):
            raise self._wrong(key, value, "an array of numbers")
        dtype = np.dtype(_SCALARS[value.kind])
        return np.frombuffer(self._at(value, value.count * dtype.itemsize), dtype)

    # ---- tensors ------------------------------------------------------------------------------

    def read(self, name: str, into: memoryview, start: int = 0) -> None:
        """Fill `into` (bytes) with those of the tensor `name` from byte `start` of it on."""
        stored = self.tensors[name]
        assert start + len(into) <= stored.size
        with open(self.path, "rb", buffering=0) as file:
            file.seek(stored.offset + start)
            done = 0
            while done < len(into):
                count = file.readinto(into[done:])
                if not count:
                    raise CheckpointError(
                        f"{self.path}: it has become shorter: {shown(name)} is not there any more"
                    )
                done += count


def shortest(number: np.float32) -> float:
    """Give the shortest decimal that is this float32, so that 1e-6 comes back as 1e-6."""
    return float(str(number))


def _block_sizes() -> dict[int, tuple[str, int, int]]:
    """Give GGML's types: number -> name, values in a block, bytes of a block."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def _check_apart(header: _Header, tensors: dict[str, Stored]) -> None:
    """Check that no two tensors share a byte: a small file could stand for any amount of them."""
    end, before = 0, ""
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].offset):
        if stored.offset < end:
            raise header.wrong(f"the tensors {shown(before)} and {shown(name)} overlap")
        end, before = stored.offset + stored.size, name

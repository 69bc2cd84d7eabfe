"""What is in an archive of torch.save, checked before torch reads it.

``torch.load(weights_only=True)`` runs no code of a file, but it trusts more than that: it maps a
compressed record as if it were plain, calls what takes memory at will (``bytearray``), and dies of
deep nesting. Files of weights have none of that, so whatever is not needed for tensors in
dictionaries is refused here.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["check_archive"]

# Room for thousands of names, while reading takes two seconds at worst.
_MAX_PICKLE = 2**20
_MAX_DIRECTORY = 8 * 2**20
_MAX_STACK = 10_000  # values that wait; a writer hands over a thousand pairs at a time
_MAX_NESTING = 20

# The bytes of a number in each kind of storage.
_STORAGES = {
    f"torch {kind}Storage": size
    for size, kinds in {
        16: ("ComplexDouble",),
        8: ("Double", "Long", "ComplexFloat"),
        4: ("Float", "Int"),
        2: ("Half", "BFloat16", "Short"),
        1: ("Char", "Byte", "Bool"),
    }.items()
    for kind in kinds
}
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *_STORAGES,
}
_OPCODES = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINSTRING", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
}
# These put further values into the one that they begin with.
_FILLING = {"BUILD", "SETITEM", "SETITEMS", "APPEND", "APPENDS"}


def check_archive(path: Path) -> None:
    """Check that the file of torch.save `path` holds tensors in dictionaries and nothing else.

    Only the directory and the pickle are read.

    Raises:
        ValueError: it does not; the text says what it holds, not in which file.
        OSError: it cannot be opened.
    """
    if not path.is_file():  # opening a pipe may never end
        raise ValueError("no regular file")
    with open(path, "rb") as file:
        records = _records(file)
        found = [name for name in records if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if not found:
            raise ValueError("no data.pkl")
        start, info = records[found[0]]
        if info.file_size > _MAX_PICKLE:
            raise ValueError(f"a pickle of {info.file_size} bytes: at most {_MAX_PICKLE} are read")
        file.seek(start)
        content = file.read(info.file_size)
    if info.CRC not in (0, zlib.crc32(content)):  # torch can be told to write none
        raise ValueError("a pickle that is damaged")
    folder = found[0].removesuffix("data.pkl") + "data/"
    sizes = {name: info.file_size for name, (_, info) in records.items()}
    for kind, key, count in _storages(content):
        if sizes.get(f"{folder}{key}") != count * _STORAGES[kind]:
            raise ValueError(f"{count} numbers of {kind}, which are not there")


def _records(file: BinaryIO) -> dict[str, tuple[int, zipfile.ZipInfo]]:
    """Give for each record where its content begins and what the archive's directory says of it."""
    size = file.seek(0, 2)
    if _directory_size(file, size) > _MAX_DIRECTORY:
        raise ValueError(f"a directory of more than {_MAX_DIRECTORY} bytes")
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
    found: dict[str, tuple[int, zipfile.ZipInfo]] = {}
    free = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError("compressed or encrypted records")
        start = _start(file, info)
        if info.compress_size != info.file_size:
            raise ValueError("a record of two sizes")
        if info.header_offset < free or start + info.file_size > size:
            raise ValueError("records that overlap or end behind the file")
        free = start + info.file_size
        if info.filename in found:
            raise ValueError("an archive that names a record twice")
        found[info.filename] = start, info
    return found


def _directory_size(file: BinaryIO, size: int) -> int:
    """Give what the end of an archive says of its directory, before it is read."""
    file.seek(max(0, size - 2**16 - 200))
    tail = file.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) < end + 22:
        raise ValueError("no archive")
    (short,) = struct.unpack_from("<I", tail, end + 12)
    if end >= 76 and tail[end - 76 :].startswith(b"PK\6\6"):
        (long,) = struct.unpack_from("<Q", tail, end - 36)
        return max(int(long), short if short != 0xFFFFFFFF else 0)
    return int(short)


def _start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Give where a record's content begins: behind a header of its own, of the same name."""
    file.seek(info.header_offset)
    local = file.read(30)
    if len(local) < 30 or not local.startswith(b"PK\3\4"):
        raise ValueError("a record without a header")
    name, extra = struct.unpack_from("<HH", local, 26)
    if file.read(name) != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
        raise ValueError("a record of two names")
    return info.header_offset + 30 + int(name) + int(extra)


# A value of a pickle while it waits: how deep others nest in it, and what it is, None if unknown.
_Value = tuple[int, Any]


def _storages(content: bytes) -> list[tuple[str, str, int]]:
    """Give the storages that a pickle names: type, key and count of numbers.

    The pickle's instructions are followed only as far as to know what is called and how deep values
    nest.
    """
    values: list[_Value] = []
    marks: list[int] = []  # how many values waited at each mark
    memo: dict[Any, _Value] = {}
    found = []
    try:
        for code, argument, _ in pickletools.genops(content):
            if code.name not in _OPCODES:
                raise ValueError(f"the instruction {code.name}")
            if code.name == "PROTO" and int(argument or 0) > pickle.HIGHEST_PROTOCOL:
                raise ValueError(f"a pickle of protocol {argument}")
            if code.name == "GLOBAL" and argument not in _GLOBALS:
                raise ValueError(f"the global {str(argument)[:100]!r}")
            if code.name == "BINPERSID":
                found.append(_storage(values[-1][1]))
            if code.name == "MARK":
                marks.append(len(values))
            elif code.name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = values[-1]
            elif code.name in ("BINGET", "LONG_BINGET"):
                values.append(memo[argument])
            else:
                _apply(code, argument, values, marks)
            if len(values) + len(marks) > _MAX_STACK:
                raise ValueError("too many values at once")
    except (IndexError, KeyError) as error:
        raise ValueError("a pickle that takes what is not there") from error
    return found


def _storage(said: Any) -> tuple[str, str, int]:
    match said:
        case ("storage", str(kind), str(key), str(), int(count)) if kind in _STORAGES:
            return kind, key, count
    raise ValueError("a reference to something else than a storage")


def _apply(
    code: pickletools.OpcodeInfo, argument: Any, values: list[_Value], marks: list[int]
) -> None:
    """Take from `values` what an instruction takes, and put what it gives."""
    wanted, above = code.stack_before, len(values)
    if pickletools.markobject in wanted:
        above = marks.pop()
        wanted = wanted[: wanted.index(pickletools.markobject)]
    low = above - len(wanted)
    if low < (marks[-1] if marks else 0):
        raise IndexError(low)
    taken = values[low:]
    del values[low:]
    if not code.stack_after:
        return
    inner = [depth for depth, _ in taken]
    if code.name in _FILLING:
        depth = max(inner[0], 1 + max(inner[1:], default=0))
    else:
        depth = 1 + max(inner, default=0)
    if depth > _MAX_NESTING:
        raise ValueError(f"values nested more than {_MAX_NESTING} deep")
    if code.name.startswith("TUPLE"):
        argument = tuple(value for _, value in taken)
    values.append((depth, argument))

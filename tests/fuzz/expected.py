"""What files of weights say, read by other code than the package's: Python, numpy, no mapping.

A reader here is lenient: it need not refuse anything. It is asked only for files that the package
has accepted; where it fails, the package has accepted what says nothing.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SAFE: dict[str, tuple[Any, torch.dtype]] = {
    "F64": (np.float64, torch.float64),
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
}
_STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "CharStorage": torch.int8,
    "ComplexFloatStorage": torch.complex64,
}
_NUMPY: dict[torch.dtype, Any] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: np.int16,
    torch.int8: np.int8,
    torch.complex64: np.complex64,
}


def as_tensor(array: Any, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(array)).view(dtype)


def safetensors(path: Path) -> dict[str, Tensor]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    found = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _SAFE:
            continue
        kind, dtype = _SAFE[entry["dtype"]]
        start, end = entry["data_offsets"]
        array = np.frombuffer(data[start:end], dtype=kind).reshape(entry["shape"])
        found[name] = as_tensor(array, dtype)
    return found


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    """Give a record's bytes, whatever their checksum."""
    with archive.open(name) as record:
        record._expected_crc = None  # type: ignore[attr-defined]
        return record.read()


class _Reader(pickle.Unpickler):
    """Knows only what a dictionary of tensors is made of, and calls nothing of torch."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(_content(archive, f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        known: dict[str, Callable[..., Any]] = {
            "_rebuild_tensor_v2": self._tensor,
            "_rebuild_parameter": lambda data, *_: data,
            "OrderedDict": dict,
        }
        return name if name in _STORAGES else known[name]

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count = pid
        content = _content(self.archive, f"{self.root}/data/{key}")
        dtype = _STORAGES[kind]
        order = f"{self.root}/byteorder"
        known = order in self.archive.namelist()
        order = _content(self.archive, order).decode() if known else "little"
        numbers = np.frombuffer(content, dtype=_NUMPY[dtype])[:count]
        return (numbers.byteswap() if order == "big" else numbers), dtype

    def _tensor(self, storage: Any, start: int, size: Any, steps: Any, *_: Any) -> Tensor:
        numbers, dtype = storage
        index = np.full(size, start, dtype=np.int64)
        for axis, (count, step) in enumerate(zip(size, steps, strict=True)):
            line = np.arange(count, dtype=np.int64) * step
            index += line.reshape([-1 if i == axis else 1 for i in range(len(size))])
        return as_tensor(numbers[index], dtype)


def pickled(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return _Reader(archive, name.removesuffix("/data.pkl")).load()


def hub(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder in the hub's layout, by the names in its files."""
    for name, read in (("model.safetensors", safetensors), ("pytorch_model.bin", pickled)):
        if (folder / name).is_file():
            return dict(read(folder / name))
        index = folder / f"{name}.index.json"
        if index.is_file():
            places = json.loads(index.read_bytes())["weight_map"]
            held = {
                file: (safetensors if file.endswith(".safetensors") else pickled)(folder / file)
                for file in set(places.values())
            }
            return {name: held[file][name] for name, file in places.items() if name in held[file]}
    raise AssertionError("no weights, and yet they were read")


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """Give the first tensor of `found` that is not, bit by bit, what the file says; None if all are.

    A file's tensor is converted to the dtype in which it was read.
    """
    for name, value in found.items():
        if name not in wanted:
            return f"{name}: the file does not hold it"
        said = wanted[name].to(value.dtype)
        if said.shape != value.shape:
            return f"{name}: {list(value.shape)} was read, the file says {list(said.shape)}"
        if not torch.equal(_bits(value), _bits(said)):
            return f"{name}: other values than in the file"
    return None


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

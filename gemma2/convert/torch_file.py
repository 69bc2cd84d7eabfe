"""A file like torch.save's, written tensor by tensor.

`torch.save` needs all tensors at once. The format: a zip archive without compression with the
pickled containers in ``data.pkl``, where a tensor is its shape and the key of its storage, and the
storages' bytes in ``data/KEY``.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.saving import bytes_of

_ALIGNMENT = 64
_STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.complex64: torch.ComplexFloatStorage,
}


class _Storage:
    """Stands for a storage in the pickle."""

    def __init__(self, key: str, tensor: Tensor) -> None:
        # what torch's reader expects: kind, type, key, device, number of elements
        self.id = ("storage", _STORAGES[tensor.dtype], key, "cpu", tensor.numel())


class _Stored:
    """Stands for a tensor in the pickle: it is pickled as tensors are, without its storage."""

    def __init__(self, key: str, tensor: Tensor) -> None:
        self.storage = _Storage(key, tensor)
        self.shape = tuple(tensor.shape)
        self.stride = tensor.stride()

    def __reduce__(self) -> tuple[Any, ...]:
        hooks: dict[Any, Any] = collections.OrderedDict()
        rebuilt = (self.storage, 0, self.shape, self.stride, False, hooks)
        return torch._utils._rebuild_tensor_v2, rebuilt


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> Any:
        return obj.id if isinstance(obj, _Storage) else None


def write_torch_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    parts: Callable[[str], Iterable[Tensor]],
    advance: Callable[[int], object],
    key: str | None = None,
) -> None:
    """Write the dict `tensors`, or `{key: tensors}`, into the new file `path`.

    tensors: dense; only shapes and dtypes count, so that they may be on meta.
    parts: gives a tensor's elements in order, in one part or several.
    advance: is told of bytes written.
    """
    state: Any = {name: _Stored(str(i), tensor) for i, (name, tensor) in enumerate(tensors.items())}
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(state if key is None else {key: state})
    with open(path, "wb") as raw, zipfile.ZipFile(raw, "w") as archive:
        for name, content in (
            ("data.pkl", pickled.getvalue()),
            ("byteorder", sys.byteorder.encode()),
            ("version", b"3\n"),
        ):
            archive.writestr(f"archive/{name}", content)
        for i, name in enumerate(tensors):
            entry = _aligned(f"archive/data/{i}", raw.tell())
            with archive.open(entry, "w", force_zip64=True) as file:
                for part in parts(name):
                    advance(file.write(bytes_of(part)))


def _aligned(name: str, start: int) -> zipfile.ZipInfo:
    """Give an entry whose bytes begin at a multiple of 64, so that they can be used where mapped.

    start: where in the file its header begins.
    """
    entry = zipfile.ZipInfo(name)
    # 30 bytes and the name, 20 for sizes of 64 bits, and 4 for what is added here
    begin = start + 30 + len(name) + 20 + 4
    padding = -begin % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return entry

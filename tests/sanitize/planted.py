"""Two faults on purpose: `python -m tests.sanitize.planted overflow|misaligned`.

They are tensors that lie about their memory, which no caller can make by accident and no operator can
see; the sanitizers must.
"""

from __future__ import annotations

import ctypes
import sys

import tests.sanitize.plugin  # noqa: F401  (before gemma2)

import torch  # isort: skip
from gemma2 import ops  # isort: skip


def overflow() -> None:
    """One float more than the heap block has."""
    allocate = ctypes.CDLL(None).malloc
    allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    block = allocate(4 * 100)
    lie = (ctypes.c_float * 101).from_address(block)
    ops.softcap(torch.frombuffer(lie, dtype=torch.float32), 30.0)


def misaligned() -> None:
    """An int64 that begins at an odd address."""
    step = torch.frombuffer(bytearray(16), dtype=torch.int64, count=1, offset=1)
    ops.sample(torch.zeros(1, 8), None, 0, step)


if __name__ == "__main__":
    {"overflow": overflow, "misaligned": misaligned}[sys.argv[1]]()
    print("ended as if nothing were wrong")

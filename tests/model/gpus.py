"""GPUs that are not there: the model on tensors of "cuda:0" and "cuda:1" that have no values.

torch's FakeTensorMode knows shapes, dtypes and devices only. So it refuses what a GPU refuses
(tensors of different devices), and whatever would have to wait for one: a value that is read.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemma2 import cache, ring


@contextlib.contextmanager
def device_guard() -> Iterator[None]:
    """Lend "cuda" the guard of "meta", which does nothing, where this torch has none for it."""
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    kinds = torch._C._autograd.DeviceType
    guards = (ctypes.c_void_p * (int(kinds.PrivateUse1) + 1)).in_dll(
        c10, "_ZN3c104impl26device_guard_impl_registryE"
    )
    own = guards[int(kinds.CUDA)]
    if own is None:
        guards[int(kinds.CUDA)] = guards[int(kinds.Meta)]
    try:
        yield
    finally:
        guards[int(kinds.CUDA)] = own


class Watch(TorchDispatchMode):
    """Sees every operator: refuses mixed devices to ours, notes what goes from device to device."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.calls: list[str] = []
        self.transfers: list[tuple[str, str]] = []
        self.dtypes_changed_on: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "prim::device":  # how such a tensor is asked where it is
            return out
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = [str(x.device) for x in given]
        self.calls.append(name)
        if name.startswith("gemma2::"):
            assert len(set(devices)) <= 1, f"{name}: tensors on {devices}"
        if name == "aten::copy_" and given[0].dtype != given[1].dtype:
            self.dtypes_changed_on.append(devices[1])
        if name == "aten::copy_" and devices[0] != devices[1]:
            self.transfers.append((devices[1], devices[0]))
        elif name == "aten::_to_copy" and devices[0] != str(out.device):
            self.transfers.append((devices[0], str(out.device)))
        elif name.startswith("aten::index") and len(set(devices)) > 1:
            # what torch allows, and FakeTensorMode does not look at
            assert set(devices) <= {devices[0], "cpu"}, f"{name}: tensors on {devices}"
            self.transfers.append((devices[-1], devices[0]))
        return out


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Inside, all tensors that are made have no values, and "cuda:0", "cuda:1" can be had."""
    # The model shall take them for what they stand for, tensors on a device that can be waited for.
    for module in (ring, cache):
        monkeypatch.setattr(module, "has_values", lambda tensor: not tensor.is_meta)
    with device_guard(), FakeTensorMode() as mode, Watch(mode) as watch:
        yield watch


def move(module: nn.Module, device: str) -> None:
    """Do what `module.to(device)` does, which cannot be done to these tensors."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(old, device=device))

"""A CUDA graph's meaning without a GPU: recorded operators, run again on the same memory.

`as_on_a_device()` makes the CPU's generation take the way of a GPU: nothing may be looked at by the
host, and the step is captured by `RecordedGraph` in the place of CUDA. What a GPU would refuse in a
capture, or wait for, raises `HostWaitsError` with the line of Python. What a replay would not do, because
Python does it, is not done here either.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemma2 import ring
from gemma2.generation import graph, loop

TREES = [Path(__file__).resolve().parents[2] / tree for tree in ("gemma2", "tests")]

# Methods and functions that bring values to Python or tensors from there. The first ones copy
# without an operator that could be seen.
_TO_OR_FROM_PYTHON = {
    *("tolist", "cpu", "numpy", "item", "__array__", "__contains__", "__format__", "__repr__"),
    *("__bool__", "__int__", "__float__", "__index__"),
    *("tensor", "as_tensor", "from_numpy", "pin_memory", "cuda"),
}
_BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_REFUSED = {
    torch.Tag.data_dependent_output: "gives the host a value",
    torch.Tag.dynamic_output_shape: "has a result whose size depends on values",
    torch.Tag.nondeterministic_seeded: "draws from torch's generator",
}


class HostWaitsError(AssertionError):
    """The host would wait for the device, or a capture would fail."""


def _refuse(what: str, why: str) -> None:
    own = [f for f in traceback.extract_stack() if f.filename != __file__]
    root = TREES[0].parent
    *_, place = (f for f in own if any(Path(f.filename).is_relative_to(t) for t in TREES))
    line = f"{Path(place.filename).relative_to(root)}:{place.lineno}: {place.line}"
    raise HostWaitsError(f"{what} {why}: {line}")


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (name := getattr(func, "__name__", "")) in _TO_OR_FROM_PYTHON:
            _refuse(name, "goes between Python and the device")
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Refuses operators that make the host wait, those inside of others too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        name = func.overloadpacket.__name__
        if name in _BY_INDEX:
            if any(t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1])):
                _refuse(name, "by a mask has a size that depends on values")
        elif name == "isin":
            _refuse(name, "counts unique values on the device if there are many")
        else:
            for tag, why in _REFUSED.items():
                if tag in func.tags:
                    _refuse(name, why)
        devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = self.run(func, args, kwargs)
        devices |= {t.device for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        if len(devices) > 1:
            _refuse(name, f"goes between {' and '.join(map(str, devices))}")
        return out

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


class _Record(Watch):
    """Keeps every operator with its tensors, and what it overwrites that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, list[Any]]] = []
        self.made: dict[int, torch.Tensor] = {}  # by memory
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        for given, wanted in zip(args, func._schema.arguments, strict=False):
            written = wanted.alias_info is not None and wanted.alias_info.is_write
            if written and not {_memory(given)} & (self.made.keys() | self.before.keys()):
                self.before[_memory(given)] = given, _bytes(given).clone()
        known = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs)
        outputs = tree_leaves(out)
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor) and _memory(tensor) not in known:
                self.made[_memory(tensor)] = tensor
        self.operators.append((func, args, kwargs, outputs))
        return out


class RecordedGraph:
    """What `CudaCapture` does, by recording operators."""

    device_type = "cpu"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = self.replays = 0
        self._operators: list[tuple[Any, Any, Any, list[Any]]] = []

    def warm_up(self, function: Callable[[], None]) -> None:
        with _Calls(), Watch():
            function()

    def capture(self, function: Callable[[], None]) -> None:
        record = _Record()
        with _Calls(), record:
            function()
        # a capture runs nothing: old memory is as it was, and new memory holds anything
        for tensor, content in record.before.values():
            _bytes(tensor).copy_(content)
        for tensor in record.made.values():
            _bytes(tensor).fill_(0x7F)
        self._operators = record.operators
        self.captures += 1

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, outputs in self._operators:
            for old, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                # views and what is written in place are there already
                if isinstance(old, torch.Tensor) and _memory(old) != _memory(new):
                    old.copy_(new)

    def reset(self) -> None:
        self._operators = []


@contextlib.contextmanager
def as_on_a_device(ahead: int = 4) -> Iterator[list[RecordedGraph]]:
    """Generate on the CPU as on a GPU, inside; gives the graphs that are made."""
    graphs: list[RecordedGraph] = []

    def make(device: torch.device) -> RecordedGraph:
        graphs.append(RecordedGraph(device))
        return graphs[-1]

    make.device_type = RecordedGraph.device_type
    with contextlib.ExitStack() as patches:
        # the module itself last, whose function the others are compared with
        modules = [m for name, m in sys.modules.items() if name.startswith("gemma2.")]
        for module in sorted(modules, key=lambda m: m is ring):
            if getattr(module, "readable", None) is ring.readable:
                patches.enter_context(mock.patch.object(module, "readable", return_value=False))
        patches.enter_context(mock.patch.object(graph, "capture_type", make))
        patches.enter_context(mock.patch.dict(loop.AHEAD, {"cpu": ahead}))
        yield graphs

"""The step of generation, captured once in a CUDA graph and replayed.

A step of a 26-layer model launches some 250 kernels, each for more of the host's time than a small
one takes on the device. A graph launches them all at once.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from gemma2.generation.step import Step

__all__ = ["GraphedStep", "wanted"]

# With fewer steps after the first token, capturing takes longer than what replays save.
LEAST_STEPS = 8


# One at a time, since all captures on a device share a stream.
_capturing = threading.Lock()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Give the stream for captures: the default one cannot be, and cuBLAS keeps memory for each."""
    return torch.cuda.Stream(device)


class CudaCapture:
    """A function on fixed tensors, captured by CUDA and replayed without Python."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._launched = torch.cuda.Event()

    def warm_up(self, function: Callable[[], None]) -> None:
        """Call the function where it will be captured: libraries set themselves up on a stream."""
        with _capturing:
            current, stream = torch.cuda.current_stream(self._device), _capture_stream(self._device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                function()
            current.wait_stream(stream)

    def capture(self, function: Callable[[], None]) -> None:
        """Record what the function does; on the device it does nothing yet."""
        self.reset()
        # Not torch.cuda.graph, which empties the allocator's caches and waits for the device. The
        # memory of a capture comes from a pool of its own either way.
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.stream(_capture_stream(self._device)):
            # other threads, which may load data meanwhile, are not looked at
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        self._graph = graph

    def replay(self) -> None:
        """Launch what has been captured on the current stream."""
        assert self._graph is not None
        self._graph.replay()
        self._launched.record(torch.cuda.current_stream(self._device))

    def reset(self) -> None:
        """Give the graph's memory back, after the launches under way have ended."""
        if self._graph is not None:
            self._launched.synchronize()
            self._graph.reset()
            self._graph = None


class Capture(Protocol):
    """What `CudaCapture` does; tests put a recorder in its place."""

    device_type: str

    def __init__(self, device: torch.device) -> None: ...

    def warm_up(self, function: Callable[[], None]) -> None: ...

    def capture(self, function: Callable[[], None]) -> None: ...

    def replay(self) -> None: ...

    def reset(self) -> None: ...


capture_type: type[Capture] = CudaCapture


class GraphedStep:
    """Calls a step as it is once, captures the second call, and replays all others.

    Every call has the effect of one call of the step: capturing has none on the device.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._capture = capture_type(step.tokens.device)
        self._warm = False
        # kept, too, because a graph writes to its tensors even where nobody else has them any more
        self._bound: list[Tensor] = []

    def __call__(self) -> None:
        if not self._warm:
            self._capture.warm_up(self._step)
            self._warm = True
            return
        bound = self._step.bound()
        if len(bound) == len(self._bound) and all(map(_is, bound, self._bound)):
            self._step.replayed()
        else:
            try:
                self._capture.capture(self._step)
            except RuntimeError as error:
                raise RuntimeError(
                    "generate: the step could not be captured in a CUDA graph; cuda_graph=False "
                    "runs it without"
                ) from error
            self._bound = bound
        self._capture.replay()

    def close(self) -> None:
        """Free the graph."""
        self._capture.reset()
        self._bound = []


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b


def wanted(
    given: bool | None, models: Sequence[nn.Module], device: torch.device, steps: int, room: bool
) -> bool:
    """Tell whether a step of `models` is to be captured.

    Args:
        given: what the user says; None: where it can be and pays.
        device: of the input.
        steps: how many there will be at most, after the first token.
        room: whether the cache has it for its longest row, in the batch or not, to take part.

    Raises:
        TypeError, ValueError: True, and it cannot be captured; or no bool.
    """
    if given is not None and not isinstance(given, bool):
        raise TypeError(f"generate: cuda_graph is {given!r}: it must be a bool, or None")
    if given is False or (given is None and steps < LEAST_STEPS):
        return False
    obstacle = next(filter(None, (_obstacle(model, device) for model in models)), "")
    if not obstacle and not room:
        obstacle = (
            "a row of past_key_values that is not in the batch is so long that the host, which "
            "counts the longest row only, would see the cache as full"
        )
    if given and obstacle:
        raise ValueError(f"generate: cuda_graph is True, but {obstacle}; leave it out")
    return not obstacle


def _obstacle(model: nn.Module, device: torch.device) -> str:
    """Tell why a step of `model` cannot be captured; "" if it can."""
    from gemma2.model import is_hooked  # which imports what this is part of

    if device.type != capture_type.device_type:
        return f"the model is on {device}"
    for tensors in (model.parameters(), model.buffers()):
        other = next((t.device for t in tensors if t.device != device), None)
        if other is not None:
            return f"the model is on {device} and {other}"
    if nn.modules.module._has_any_global_hook():
        return "hooks are registered for all modules, which a replayed graph would not call"
    for name, module in model.named_modules():
        if is_hooked(module):
            return f"{name or 'the model'} has hooks, which a replayed graph would not call"
    return ""

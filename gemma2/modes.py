"""Eval mode for a while, which no interrupt can leave half of a model in."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat

from torch import nn

__all__ = ["evaluating"]


@contextlib.contextmanager
def evaluating(training: Sequence[nn.Module]) -> Iterator[None]:
    """Put the modules `training`, which are in training mode, into eval mode, and back."""
    begin, end = _switch(training, False), _switch(training, True)
    try:
        begin()
        yield
    finally:
        end()


def _switch(modules: Sequence[nn.Module], training: bool) -> Callable[[], object]:
    """Give what sets `training` of all modules, to be called once.

    The call is one of C, and nothing is prepared in it: a signal's handler that raises, as that of
    Ctrl-C does, runs before it or after it. In a loop of Python it would come in between sooner or
    later, and training would go on with some modules in eval mode.
    """
    # nn.Module.__setattr__ is Python
    settings = map(object.__setattr__, modules, repeat("training"), repeat(training))
    return functools.partial(deque, settings, 0)

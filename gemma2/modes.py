"""Eval mode for a while, which no interrupt can leave half of a model in."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from itertools import repeat

from torch import nn

__all__ = ["switch"]


def switch(modules: Sequence[nn.Module], training: bool) -> Callable[[], object]:
    """Give what sets `training` of all modules, to be called once.

    The call is one of C, and nothing is prepared in it: a signal's handler that raises, as that of
    Ctrl-C does, runs before it or after it. In a loop of Python it would come in between sooner or
    later, and training would go on with some modules in eval mode.
    """
    # nn.Module.__setattr__ is Python
    settings = map(object.__setattr__, modules, repeat("training"), repeat(training))
    return functools.partial(deque, settings, 0)

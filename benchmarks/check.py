"""Results are compared with exact ones before anything is timed: a wrong kernel has no speed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Check", "relative"]

# Of the norms of error and exact result. Rounding a result to bfloat16 costs 0.2%, and so do the
# rounded terms of its sum; float32 stays far below its bound.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
ROWS = 5  # what a single row may err by, in bounds
FAR = 10  # what results of a mistake differ by at least, in bounds
_PIECE = 1 << 16  # rows compared at a time


def relative(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Give ``|actual - exact| / |exact|`` over all, and over the worst row (of the last dimension).

    A row counts as no shorter than a tenth of the average. NaN and infinity give infinity.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {list(actual.shape)}, not {list(exact.shape)}")
    rows = [x.reshape(-1, x.shape[-1]) for x in (actual, exact)]
    errors, sizes = [], []
    for first in range(0, rows[0].shape[0], _PIECE):
        a, e = (x[first : first + _PIECE].to(exact.dtype) for x in rows)
        errors.append((a - e).square().sum(-1, dtype=torch.float64))
        sizes.append(e.square().sum(-1, dtype=torch.float64))
    error, size = torch.cat(errors), torch.cat(sizes)
    if not bool(error.isfinite().all()):
        return math.inf, math.inf
    worst = (error / size.clamp(min=1e-2 * float(size.mean()))).max()
    return math.sqrt(float(error.sum() / size.sum())), math.sqrt(float(worst))


class Check:
    """Runs a call and compares what it gives; the runner does so before it times the call.

    Args:
        exact: gives the result in float32 or wider. It is asked once.
        dtype: of the calls' results, which decides the bound.
        mistake: gives what a kernel with the likeliest mistake would: the inputs must be such that it
            is far from exact, or the check would show nothing.
    """

    def __init__(
        self,
        exact: Callable[[], Tensor],
        dtype: torch.dtype,
        mistake: Callable[[], Tensor] | None = None,
    ) -> None:
        self._make, self._mistake = exact, mistake
        self.dtype, self.bound = dtype, BOUNDS[dtype]

    @functools.cached_property
    def exact(self) -> Tensor:
        exact = self._make()
        if self._mistake is not None:
            apart, _ = relative(self._mistake(), exact)
            if not apart >= FAR * self.bound:
                raise AssertionError(
                    f"the check shows nothing: with the mistake the result is only {apart:.1e} away"
                )
        return exact

    def __call__(self, call: Callable[[], object]) -> float:
        """Run `call`; give its error.

        Raises:
            AssertionError: the error is beyond the bound, over all or in one row.
        """
        # What the allocator hands out next must not be the last call's result, right by chance.
        poison = torch.full_like(self.exact, math.nan, dtype=self.dtype)
        del poison
        out = call()
        out = out[0] if isinstance(out, tuple) else out
        assert isinstance(out, Tensor)
        error, worst = relative(out, self.exact)
        if not (error <= self.bound and worst <= ROWS * self.bound):
            raise AssertionError(
                f"wrong result: error {error:.1e} (at most {self.bound:.0e}), in the worst row "
                f"{worst:.1e} (at most {ROWS * self.bound:.0e})"
            )
        return error

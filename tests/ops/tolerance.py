"""The one tolerance policy: a kernel must be as exact as eager torch in the same dtype.

Against a float64 reference, the mean error may be that of eager torch, the largest error twice
that, plus one rounding of the output. A failure prints the worst element, its index and its float64
value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_to_float64(
    actual: Tensor, eager: Tensor, exact: Tensor, what: str = "result", floor: float = 0.0
) -> None:
    """Asserts the rule.

    Args:
        actual: the kernel's result.
        eager: the same in eager torch, computed in the same dtype.
        exact: the same from the reference in float64.
        what: named in the failure.
        floor: an absolute error always allowed (for results that are exactly 0 in eager torch).
    """
    assert exact.dtype == torch.float64, "the reference must be float64"
    assert actual.shape == exact.shape == eager.shape, (
        f"{what}: shapes {list(actual.shape)}, {list(eager.shape)} (eager), {list(exact.shape)} (float64)"
    )
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, eager {eager.dtype}"
    if actual.numel() == 0:
        return
    same = (actual.double() == exact) | (actual.isnan() & exact.isnan())  # infinities, too
    error = (actual.double() - exact).abs().masked_fill(same, 0.0)
    eager_error = (eager.double() - exact).abs()
    eager_error = eager_error.masked_fill(~eager_error.isfinite(), 0.0)
    ulp = torch.finfo(actual.dtype).eps * exact.abs().masked_fill(~exact.isfinite(), 0.0)
    rounding = ulp / 2 + floor + torch.finfo(actual.dtype).tiny

    worst = int((error - rounding).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape)]
    where = (
        f"{what}: worst element {index}: {actual.flatten()[worst].item()!r}, "
        f"float64 {exact.flatten()[worst].item()!r}, eager {eager.flatten()[worst].item()!r}"
    )
    assert not error.isnan().any(), f"NaN in {where}"
    mean, mean_allowed = error.mean(), eager_error.mean() + rounding.mean()
    assert mean <= mean_allowed, f"mean error {mean:.3e} > {mean_allowed:.3e}; {where}"
    largest = (error - rounding).max()
    assert largest <= 2 * eager_error.max(), (
        f"largest error {error.flatten()[worst]:.3e} > 2 x {eager_error.max():.3e} "
        f"(+ {rounding.flatten()[worst]:.3e}); {where}"
    )

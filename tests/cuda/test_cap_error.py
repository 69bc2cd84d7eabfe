"""Which form of the cap attention's error budget allows: why it is not tanh.approx."""

from __future__ import annotations

import pytest
import torch

from gemma2.ops import attention
from tests.cuda import cap_error
from tests.cuda.cap_error import CAP, DIM, DTYPES, KEYS

CASES = {
    (name, scores): make(dtype)
    for name, dtype in DTYPES.items()
    for scores, make in cap_error.inputs()
}


def error(x, result):
    error = (result.double() - cap_error.exact(x)).abs()
    return error.mean(), error.max()


def shares(x, **form):
    """Of the budget: mean error and largest one."""
    mean, largest = error(x, cap_error.kernel(x, **form))
    eager_mean, eager_largest = error(x, cap_error.eager(x))
    return mean / eager_mean, largest / (2 * eager_largest)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("worst", [False, True])
def test_two_exp2_and_a_reciprocal_err_less_than_eager(case, worst):
    mean, largest = shares(CASES[case], tanh_approx=False, worst=worst)
    assert mean < 0.6
    assert largest < 0.35


def test_tanh_approx_would_do_for_bfloat16_while_scores_differ():
    for scores in ("to 4", "to 20", "to 160", "all near 20"):
        assert max(shares(CASES["bfloat16", scores], tanh_approx=True)) < 1 / 3


@pytest.mark.parametrize("case", [("float16", "to 160"), ("bfloat16", "all near 150")])
def test_tanh_approx_breaks_the_budget_at_the_cap(case):
    assert shares(CASES[case], tanh_approx=True)[0] > 1


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_errs_as_little_as_its_form(case):
    x = CASES[case]
    q, k, v = (t[None, None] for t in x)
    at = torch.tensor([KEYS - 1]), torch.tensor([KEYS])  # the columns behind see all keys, too
    out, _ = attention(q, k, v, *at, scale=DIM**-0.5, softcap=CAP)
    mean, largest = error(x, out[0, 0])
    form_mean, form_largest = error(x, cap_error.kernel(x, tanh_approx=False))
    assert mean < 1.05 * form_mean + 1e-7
    assert largest < 1.5 * form_largest

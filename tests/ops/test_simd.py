"""The vector layer (csrc/cpu/simd.h) through operators that add nothing to what they show of it."""

from __future__ import annotations

import pytest
import torch

from gemma2 import ops

ALL_16_BIT = torch.arange(-(2**15), 2**15, dtype=torch.int16)


def convert(x, dtype):
    """x in another dtype, by the kernel that writes a cache of another dtype."""
    rows = x.reshape(1, 1, -1, 64)
    k_cache = torch.zeros(rows.shape, dtype=dtype)
    start, end = torch.tensor([0]), torch.tensor([rows.shape[2]])
    ops.cache_write(k_cache, torch.zeros_like(k_cache), rows, rows, start, end)
    return k_cache.flatten()


def assert_same(actual, expected):
    """Bit for bit; a NaN need only stay one."""
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    bits = torch.int32 if expected.dtype == torch.float32 else torch.int16
    different = (actual.view(bits) != expected.view(bits)) & number
    at = different.nonzero()[:3, 0]
    assert not different.any(), f"{actual[at].tolist()} instead of {expected[at].tolist()}"


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_converts_as_in_torch(dtype, to):
    x = ALL_16_BIT.view(dtype)
    assert_same(convert(x, to), x.to(to))


@pytest.mark.parametrize("tail", [1, 3, 5, 17, 63])
def test_every_16_bit_pattern_converts_in_a_partial_vector(tail):
    """Rows of a length that is no multiple of a vector."""
    for dtype in (torch.bfloat16, torch.float16):
        x = ALL_16_BIT[: 65536 // tail * tail].view(dtype)
        rows = x.reshape(1, 1, -1, tail)
        cache = torch.zeros(rows.shape)
        where = torch.tensor([0]), torch.tensor([rows.shape[2]])
        ops.cache_write(cache, torch.zeros_like(cache), rows, rows, *where)
        assert_same(cache.flatten(), x.float())


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_float32_rounds_to_nearest_even_around_every_16_bit_pattern(to):
    """Each pattern, the midpoint to the next one, and the floats on either side of both."""
    bits = ALL_16_BIT.view(to).float().view(torch.int32)
    half = 1 << (15 if to == torch.bfloat16 else 12)
    near = torch.cat([bits + d for d in (0, 1, -1, half, half - 1, half + 1)])
    x = near.view(torch.float32)
    assert_same(convert(x, to), x.to(to))


def test_float32_subnormals_and_extremes_round_as_in_torch():
    values = [
        2.0**-149,
        2.0**-126,
        65504.0,
        65519.99,
        65520.0,
        3.4e38,
        2.0**-24,
        2.0**-25,
        2.0**-14,
    ]
    x = torch.tensor([*values, torch.inf] * 64)
    x = torch.cat([x, -x, x * 1.5, x * 0.75])
    for to in (torch.float32, torch.bfloat16, torch.float16):
        assert_same(convert(x, to), x.to(to))


def spread(low, high, n=200_000):
    """Floats from low to high, dense, with neighbours of round numbers among them."""
    x = torch.linspace(low, high, n)
    return torch.cat([x, torch.nextafter(x[::7], torch.tensor(torch.inf))])


def ulps(actual, exact):
    """Error in units in the last place of the exact value in float32."""
    _, exponent = torch.frexp(exact)
    unit = torch.ldexp(torch.ones_like(exact), (exponent - 24).clamp(min=-149))
    return ((actual.double() - exact).abs() / unit).max().item()


@pytest.mark.parametrize(("low", "high"), [(-0.7, 0.7), (-9.5, 9.5), (-40.0, 40.0), (1e-30, 1e-3)])
def test_tanh_is_exact_to_2_ulp(low, high):
    x = spread(low, high)
    assert ulps(ops.softcap(x, 1.0), torch.tanh(x.double())) <= 2.0


def test_exp_is_exact_to_a_few_ulp():
    """gelu_tanh(x) = x / (1 + e^t); t is rounded by up to 2 ulp, which e^t shows |t| times."""
    for low, high in ((-5.6, -1.0), (-1.0, 1.0), (1.0, 6.0)):
        x = spread(low, high)
        wide = x.double()
        t = -2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
        exact = wide / (1 + torch.exp(t))
        error = (ops.geglu(x, torch.ones_like(x)).double() - exact).abs() / exact.abs()
        assert (error <= (6 + 3 * t.abs()) * 2.0**-24)[exact != 0].all()


def test_exponentials_of_attention_are_exact():
    """Two keys, one of which has score 0: out = e^s / (e^s + 1) and lse = ln(e^s + 1)."""
    scores = spread(-80.0, 80.0, 4000)
    n = len(scores)
    q = torch.zeros(n, 1, 1, 64)
    q[:, 0, 0, 0] = scores
    k = torch.zeros(n, 1, 2, 64)
    k[:, 0, 1, 0] = 1.0
    v = torch.zeros(n, 1, 2, 64)
    v[:, 0, 1] = 1.0
    ones = torch.ones(n, dtype=torch.int64)
    out, lse = ops.attention(q, k, v, ones, 2 * ones, scale=1.0)
    exact = torch.sigmoid(scores.double())
    # A score in base 2 is rounded once: |s| ulp of relative error.
    allowed = (6 + 2 * scores.double().abs()) * 2.0**-24
    assert ((out[:, 0, 0, 0].double() - exact).abs() / exact <= allowed).all()
    exact_lse = torch.nn.functional.softplus(scores.double(), threshold=100)
    assert ((lse[:, 0, 0].double() - exact_lse).abs() <= 2e-6 + exact_lse * 2.0**-22).all()

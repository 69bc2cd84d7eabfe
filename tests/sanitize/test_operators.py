"""The operators with random good and bad arguments: a clear error, or what the reference gives.

Shapes, strides, dtypes, devices and numbers are drawn, among them empty and expanded tensors, NaN and
infinities, int64 extremes and outputs that share memory with inputs. `python -m tests.sanitize` runs
this under AddressSanitizer and UBSan.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma2 import reference
from gemma2.ops import add_rms_norm_, cache_write, rope_cache
from gemma2.ops._library import library
from tests.sanitize.drawing import FLOATS, Draw

EXAMPLES = int(os.environ.get("GEMMA2_FUZZ_EXAMPLES", "25"))
LOG = os.environ.get("GEMMA2_FUZZ_LOG")  # where each case is written before it runs
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def plain(value: Any) -> Any:
    """A dense float32 copy for the reference; other arguments as they are."""
    if not isinstance(value, Tensor):
        return value
    return value.float().clone() if value.is_floating_point() else value.clone()


def bits(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype).copy_(x).flatten().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def assert_equal(got: Tensor, exact: Tensor, what: str, slack: float) -> None:
    """Equal up to rounding and `slack`; NaN and infinities are where the reference has them."""
    tolerance = ROUNDING[got.dtype]
    exact = exact.to(got.dtype)
    finite = exact[exact.isfinite()].float()
    size = float(finite.abs().max()) if finite.numel() else 0.0
    torch.testing.assert_close(
        got.float(), exact.float(), rtol=tolerance, atol=tolerance * size + 1e-8 + slack, equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )  # fmt: skip


def judge(
    draw: Draw,
    name: str,
    call: Callable[[], Any],
    exact: Callable[[], Any] | None,
    changed: tuple[str, ...] = (),
    slack: float = 0.0,
) -> None:
    """Calls; what comes is a clear error that has changed nothing, or equals exact().

    Args:
        exact: gives the result, then what `changed` should hold; None: not compared.
        changed: arguments that the operator writes to.
        slack: error that the formula itself has in float32.
    """
    text = f"{name}, {torch.get_num_threads()} threads\n{draw.described()}"
    if LOG:
        with open(LOG, "w") as log:
            log.write(text)
    tensors = {n: t for n, t in draw.names.items() if isinstance(t, Tensor)}
    on_meta = {n: t.is_meta for n, t in tensors.items()}
    small = {n: t for n, t in tensors.items() if t.numel() < 10**7}  # others are expanded
    before = {n: t.clone() for n, t in small.items() if not t.is_meta}
    # before the operator, which changes its arguments
    expected = exact() if exact is not None and not any(on_meta.values()) else None
    try:
        out = call()
    except (ValueError, RuntimeError, TypeError) as error:
        said = str(error)
        assert draw.wrong, f"{text}\nrefused: {said}"
        assert said.startswith(f"{name}: "), f"{text}\nsaid: {said}"
        assert len(said) < 500, f"{text}\nsaid: {said}"
        for n, then in before.items():
            assert same_bits(tensors[n], then), (
                f"{text}\n{n} was changed by a call that was refused"
            )
        return
    outs = [out] if isinstance(out, Tensor) else list(out or ())
    if any(on_meta.values()):
        assert all(on_meta.values()), f"{text}\ngave a result with a tensor on another device"
        return
    if expected is None and exact is not None:
        expected = exact()
    for n, then in before.items():
        assert n in changed or same_bits(tensors[n], then), f"{text}\n{n} was changed"
    if expected is None:
        assert draw.wrong or exact is None, f"{text}\nthe reference refuses good arguments"
        return
    wanted = list(expected) if isinstance(expected, tuple) else [expected]
    for i, (got, right) in enumerate(
        zip([*outs, *(tensors[n] for n in changed)], wanted, strict=True)
    ):
        assert_equal(got, right, f"{text}\nresult {i}", slack)


def fuzz(test: Callable[[Draw], None]) -> Callable[..., None]:
    """`test(draw)` with good arguments, and with all kinds."""

    def run(arguments: str, data: st.DataObject) -> None:
        draw = Draw(data, arguments == "any")
        torch.set_num_threads(draw.one(1, 2, 3))
        test(draw)

    run.__name__ = test.__name__
    drawn = settings(max_examples=EXAMPLES)(given(data=st.data())(run))
    return pytest.mark.parametrize("arguments", ["good", "any"])(drawn)


def tried(reference: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], Any]:
    """exact() of `judge`: the reference on plain copies, None if it refuses them, too."""

    def exact() -> Any:
        try:
            return reference(*map(plain, arguments), **options)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return None

    return exact


def is_ordinary(x: Tensor) -> bool:
    return x.is_cpu and bool((x.abs() < 1e6).all())


def leading(draw: Draw) -> tuple[int, ...]:
    return draw.one((), (1,), (3,), (2, 3), (2, 1, 2), (0,), (3, 0), (40,))


WIDTHS = (1, 3, 8, 15, 16, 17, 31, 64, 65, 100, 0)


@fuzz
def test_softcap_fuzz(draw: Draw) -> None:
    dtype = draw.one(*FLOATS)
    x = draw.tensor("x", (*leading(draw), draw.one(*WIDTHS)), dtype)
    cap = draw.scalar("cap", 30.0, 0.5, 1e4)
    judge(draw, "softcap", lambda: library.softcap(x, cap), tried(reference.softcap, x, cap))


@fuzz
def test_geglu_fuzz(draw: Draw) -> None:
    dtype, shape = draw.one(*FLOATS), (*leading(draw), draw.one(*WIDTHS))
    gate, up = draw.tensor("gate", shape, dtype), draw.tensor("up", shape, dtype)
    # The reference's 1 + tanh(x) is a multiple of 2^-24: far below 0 it is 0, and 0 times infinity
    # is NaN, where our form gives what it must.
    finite = not up.is_cpu or bool(up.isfinite().all())
    exact = tried(reference.geglu, gate, up) if finite else None
    sizes = [
        float(x.float().nan_to_num(0, 0, 0).abs().flatten().amax())
        for x in (gate, up)
        if x.numel() and x.is_cpu
    ]
    judge(draw, "geglu", lambda: library.geglu(gate, up), exact, slack=2.0**-22 * math.prod(sizes))


@fuzz
def test_rms_norm_fuzz(draw: Draw) -> None:
    width = draw.one(*WIDTHS)
    x = draw.tensor("x", (*leading(draw), width), draw.one(*FLOATS))
    weight = draw.tensor("weight", (width,), draw.one(*FLOATS))
    eps = draw.scalar("eps", 1e-6, 1e-3)
    judge(
        draw, "rms_norm", lambda: library.rms_norm(x, weight, eps),
        tried(reference.rms_norm, x, weight, eps),
    )  # fmt: skip


@fuzz
def test_add_rms_norm_fuzz(draw: Draw) -> None:
    width, dtype = draw.one(*WIDTHS), draw.one(*FLOATS)
    shape = (*leading(draw), width)
    in_place = draw.chance(2)
    residual = draw.tensor("residual", shape, draw.one(*FLOATS), own_memory=in_place)
    if in_place and not draw.wrong:
        draw.names["residual"] = residual = residual.contiguous()
    x = draw.tensor("x", shape, draw.one(*FLOATS))
    if draw.mistake(6):
        draw.names["x"] = x = residual if draw.chance(2) else residual[..., :1].expand(shape)
    post, pre = (draw.tensor(name, (width,), dtype) for name in ("post_weight", "pre_weight"))
    eps = draw.scalar("eps", 1e-6, 1e-3)

    def exact() -> Any:
        h, y = reference.add_rms_norm(residual, plain(x), plain(post), plain(pre), eps)
        return (y, h) if in_place else (h, y)

    arguments = (residual, x, post, pre, eps)
    if in_place:
        judge(draw, "add_rms_norm_", lambda: add_rms_norm_(*arguments), tried(exact), ("residual",))
    else:
        judge(draw, "add_rms_norm", lambda: library.add_rms_norm(*arguments), tried(exact))


@fuzz
def test_linear_fuzz(draw: Draw) -> None:
    inner, dtype = draw.one(*WIDTHS, 300), draw.one(*FLOATS)
    x = draw.tensor("x", (*leading(draw), inner), dtype)
    weight = draw.tensor("weight", (draw.one(0, 1, 2, 7, 9, 40, 130), inner), dtype)
    judge(draw, "linear", lambda: library.linear(x, weight), tried(reference.linear, x, weight))


@fuzz
def test_embed_fuzz(draw: Draw) -> None:
    rows, width = draw.one(1, 2, 97), draw.one(*WIDTHS)
    ids = draw.integers("ids", leading(draw), 0, rows - 1)
    weight = draw.tensor("weight", (rows, width), draw.one(*FLOATS))
    scale = draw.scalar("scale", 1.0, 59.86652)

    def exact(ids: Tensor, weight: Tensor) -> Tensor:
        # in the weight's dtype: it decides how the scale is rounded
        return reference.embed(ids, weight.to(draw.names["weight"].dtype), scale)

    judge(draw, "embed", lambda: library.embed(ids, weight, scale), tried(exact, ids, weight))


# ---- Rotation and the cache ----------------------------------------------------------------------


def heads(draw: Draw) -> tuple[int, int, int, int]:
    """B, Hq, Hkv, S."""
    kv_heads = draw.one(1, 2, 3)
    group = draw.one(1, 2, 3)
    return draw.one(1, 2, 3, 0), kv_heads * group, kv_heads, draw.one(1, 2, 5, 8, 0)


def tables(draw: Draw, batch: int, length: int, half: int) -> tuple[Tensor, Tensor]:
    rows = draw.one(1, batch)
    shape = (rows, length, half)
    return (
        draw.tensor("cos", shape, torch.float32),
        draw.tensor("sin", shape, torch.float32),
    )


@fuzz
def test_rope_fuzz(draw: Draw) -> None:
    batch, q_heads, kv_heads, length = heads(draw)
    width, dtype = draw.one(2, 6, 16, 64, 66, 256, 0), draw.one(*FLOATS)
    q = draw.tensor("q", (batch, q_heads, length, width), dtype)
    k = draw.tensor("k", (batch, kv_heads, length, width), dtype)
    cos, sin = tables(draw, batch, length, width // 2)
    judge(draw, "rope", lambda: library.rope(q, k, cos, sin), tried(reference.rope, q, k, cos, sin))


def positions(draw: Draw, batch: int, length: int, capacity: int) -> dict[str, Tensor | None]:
    q_start = draw.integers("q_start", (batch,), -length - 1, 2 * capacity)
    kv_len = draw.integers("kv_len", (batch,), 0, 3 * capacity)
    k_base = draw.integers("k_base", (batch,), 0, capacity) if draw.chance(3) else None
    return {"q_start": q_start, "kv_len": kv_len, "k_base": k_base}


def overlapping(draw: Draw, cache: Tensor, like: Tensor) -> Tensor:
    """k or v in the cache's own memory, as far as it goes."""
    if cache.is_meta or like.is_meta or cache.dim() != 4 or like.dim() != 4:
        return like
    if cache.dtype != like.dtype or cache.shape[2] < like.shape[2] or not like.numel():
        return like
    if cache.shape[:2] != like.shape[:2] or cache.shape[3] != like.shape[3]:
        return like
    at = draw.number(0, cache.shape[2] - like.shape[2])
    return cache[:, :, at : at + like.shape[2]]


def cache_case(draw: Draw, operator: str) -> None:
    batch, q_heads, kv_heads, length = heads(draw)
    width, dtype = draw.one(2, 16, 64, 66), draw.one(*FLOATS)
    capacity = draw.one(1, 2, 7, 20, 0)
    q = draw.tensor("q", (batch, q_heads, length, width), dtype)
    k = draw.tensor("k", (batch, kv_heads, length, width), dtype)
    v = draw.tensor("v", (batch, kv_heads, length, width), dtype)
    cache_dtype = draw.one(dtype, *FLOATS)
    shape = (batch, kv_heads, capacity, width)
    k_cache = draw.tensor("k_cache", shape, cache_dtype, own_memory=True)
    v_cache = draw.tensor("v_cache", shape, cache_dtype, own_memory=True)
    shared = draw.mistake(5)
    if shared:
        draw.names["k"] = k = overlapping(draw, k_cache, k)
        draw.names["v"] = v = overlapping(draw, draw.one(k_cache, v_cache), v)
        if draw.chance(4):
            draw.names["v_cache"] = v_cache = k_cache
    cos, sin = tables(draw, batch, length, width // 2)
    if operator == "cache_write":
        for name in ("q", "cos", "sin"):
            del draw.names[name]
    where = positions(draw, batch, length, capacity)
    rotation = (cos, sin) if operator == "rope_cache" else ()

    def exact() -> Any:
        caches = plain(k_cache), plain(v_cache)
        if operator == "rope_cache":
            right = (
                reference.rope_cache(plain(q), plain(k), plain(v), *rotation, *caches, **where),
            )
        else:
            reference.cache_write(*caches, plain(k), plain(v), **where)
            right = ()
        return (*right, *caches)

    if operator == "cache_write":
        call = lambda: cache_write(k_cache, v_cache, k, v, **where)  # noqa: E731
    else:
        call = lambda: rope_cache(q, k, v, *rotation, k_cache, v_cache, **where)  # noqa: E731
    judge(draw, operator, call, tried(exact), ("k_cache", "v_cache"))


@fuzz
def test_cache_write_fuzz(draw: Draw) -> None:
    cache_case(draw, "cache_write")


@fuzz
def test_rope_cache_fuzz(draw: Draw) -> None:
    cache_case(draw, "rope_cache")


# ---- Attention and sampling ----------------------------------------------------------------------


@fuzz
def test_attention_fuzz(draw: Draw) -> None:
    batch, q_heads, kv_heads, length = heads(draw)
    length = draw.one(length, 70) if length else 0
    q_heads = draw.one(q_heads, 5) if draw.wrong else q_heads
    width, capacity = draw.one(64, 64, 128, 256), draw.one(1, 2, 7, 64, 130, 700, 0)
    q = draw.tensor("q", (batch, q_heads, length, width), draw.one(*FLOATS))
    dtype = draw.one(q.dtype if q.dtype in FLOATS else torch.float32, *FLOATS)
    shape = (batch, kv_heads, capacity, width)
    k = draw.tensor("k", shape, dtype)
    v = draw.tensor("v", shape, dtype, special=False)  # what no query sees is told by other tests
    huge = draw.wrong and capacity == 1 and draw.chance(2)
    if huge and k.dim() == v.dim() == 4:  # a trillion slots in a row's memory
        draw.names["k"] = k = k.expand(-1, -1, 2**40, -1)
        draw.names["v"] = v = v.expand(-1, -1, 2**40, -1)
    where = positions(draw, batch, length, capacity)
    kv_start = None
    if draw.chance(3):
        kv_start = draw.integers("kv_start", (batch, length), 0, capacity)
    options = {
        "scale": draw.scalar("scale", 0.1, 1.0),
        "softcap": draw.scalar("softcap", 50.0, 2.0, 0.0, 100.0),
        "window": draw.scalar("window", 0, 1, 5, 100, odd=(-1, 2**63 - 1, 2**62)),
        "deterministic": draw.one(False, True),
    }
    q_start, kv_len, k_base = (where[n] for n in ("q_start", "kv_len", "k_base"))
    arguments = (q, k, v, q_start, kv_len, kv_start, k_base)
    # without a cap, what infinite scores give depends on the order of the sums
    compared = not huge and (options["softcap"] > 0 or all(map(is_ordinary, (q, k))))
    exact = tried(reference.attention, *arguments, **options) if compared else None
    judge(draw, "attention", lambda: library.attention(*arguments, **options), exact)


@fuzz
def test_sample_fuzz(draw: Draw) -> None:
    batch, vocab = draw.one(1, 2, 3, 0), draw.one(1, 2, 5, 64, 97, 1000, 17000)
    logits = draw.tensor("logits", (batch, vocab), draw.one(*FLOATS))
    if not draw.wrong:  # what may not be drawn from is an error
        logits = logits.nan_to_num(0.0, 1.0, -1.0).clamp(-1e4, 1e4)
        draw.names["logits"] = logits
    history = draw.integers("history", (batch, draw.one(0, 1, 6)), -1, vocab - 1)
    history = draw.one(None, history)
    draw.names["history"] = history
    step = draw.integers("step", draw.one((), (batch,)), 0, 9)
    seed = draw.scalar("seed", 0, 5, 2**63 - 1, -(2**63))
    options = {
        "temperature": draw.scalar("temperature", 1.0, 0.0, 0.3, 5.0),
        "top_k": draw.scalar("top_k", 0, 1, 3, 100, odd=(-1, 2**63 - 1)),
        "top_p": draw.scalar("top_p", 1.0, 0.9, 0.1),
        "min_p": draw.scalar("min_p", 0.0, 0.1, 1.0),
        "repetition_penalty": draw.scalar("repetition_penalty", 1.0, 1.3, 0.7),
    }

    def call() -> None:
        seeds = int(seed) if seed == seed and abs(seed) <= 2**63 else 0
        tokens = library.sample(logits, history, seeds, step, **options)
        if logits.is_meta or (history is not None and history.is_meta) or step.is_meta:
            assert logits.is_meta, "gave a result with a tensor on another device"
            return
        # a little looser than asked for: rounding decides at the edges of top_p and min_p
        loose = {**options, "top_p": min(1.0, options["top_p"] + 1e-3)}
        loose["min_p"] = options["min_p"] * (1 - 1e-3)
        wide = plain(logits)
        scores = reference.kept_scores(wide, history, **loose)
        noise = 0.0
        if options["temperature"] > 0:
            noise = reference.gumbel(batch, vocab, seeds, step.clone())
        drawn = (scores + noise).double()
        strict = reference.kept_scores(wide, history, **options)
        best = (strict.double() + noise).amax(-1)
        at = drawn.gather(1, tokens[:, None])[:, 0]
        error = 1e-4 * (1 + best.abs())
        assert (at >= best - error).all(), (tokens, at, best)

    judge(draw, "sample", call, None)

"""HybridCache: what it holds, how it goes back, and what it refuses.

Truth is one uncached forward of each row alone.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.config import Gemma2Config
from gemma2.ring import LayerCache
from tests.model import factories as F

WINDOW, MARGIN = 100, 28  # a ring of 128 slots
LONG = 150  # past the ring
ROWS = 2


def model_of(**overrides: Any) -> Any:
    return F.tiny("three", sliding_window=WINDOW, **overrides)


def new_cache(rows: int = ROWS, length: int | None = 400, **options: Any) -> HybridCache:
    return HybridCache(model_of().config, rows, length, margin=MARGIN, **options)


def ids() -> Tensor:
    return F.tokens(ROWS, LONG + 60)


@torch.no_grad()
def truth(tokens: Tensor) -> Tensor:
    return model_of()(tokens, use_cache=False).logits


@torch.no_grad()
def run(tokens: Tensor, cache: HybridCache, **inputs: Any) -> Tensor:
    return model_of()(tokens, past_key_values=cache, **inputs).logits


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=2e-4, rtol=0)


def filled(tokens: Tensor, length: int = LONG, **options: Any) -> HybridCache:
    cache = new_cache(tokens.shape[0], **options)
    run(tokens[:, :length], cache)
    return cache


# ---- what it holds ------------------------------------------------------------------------------


def test_the_ring_of_the_published_models_has_4224_slots_and_a_margin_of_128() -> None:
    cache = HybridCache(Gemma2Config.gemma2_2b(), 1, 8192)
    sliding, full = cache.layers[0], cache.layers[1]
    assert (sliding.window, sliding.capacity, sliding.margin) == (4096, 4224, 128)
    assert (full.window, full.capacity) == (0, 8192)
    assert cache.margin == 128
    assert cache.nbytes == 0


@pytest.mark.parametrize(("length", "slots"), [(1, 128), (128, 128), (129, 256), (5000, 4224)])
def test_a_ring_never_needs_more_than_a_plain_buffer(length: int, slots: int) -> None:
    layer = HybridCache(Gemma2Config.gemma2_2b(), 1, length).layers[0]
    assert layer.capacity == slots
    assert layer.wraps == (length > 4224)


def test_without_a_dtype_memory_is_taken_at_the_first_write() -> None:
    cache = new_cache()
    assert cache.nbytes == 0
    with pytest.raises(RuntimeError, match="nothing has been written"):
        cache[0]
    run(ids()[:, :3], cache)
    k, v = cache[1]
    assert k.shape == v.shape == (ROWS, 1, 512, 64)
    assert k.dtype == torch.float32
    assert cache.nbytes == sum(2 * t.numel() * 4 for t, _ in cache)


def test_with_dtype_and_device_memory_is_taken_at_once() -> None:
    cache = new_cache(dtype=torch.bfloat16, device="cpu")
    assert [k.dtype for k, _ in cache] == [torch.bfloat16] * len(cache)


def test_another_dtype_than_the_models_is_kept_and_named() -> None:
    tokens = ids()[:, :20]
    cache = new_cache(dtype=torch.bfloat16)
    once = run(tokens, cache)
    assert cache[0][0].dtype == torch.bfloat16
    assert "bfloat16" in repr(cache)
    assert 1e-4 < float((once - truth(tokens)).abs().max()) < 1.0
    # ... and how a prompt is cut into chunks makes no difference
    parts = new_cache(dtype=torch.bfloat16)
    cut = [run(tokens[:, a:b], parts) for a, b in ((0, 7), (7, 8), (8, 20))]
    assert_close(torch.cat(cut, 1), once)


def test_slot_p_mod_c_holds_position_p() -> None:
    tokens = ids()
    linear = HybridCache(model_of().config, ROWS, 200, margin=200)  # long enough for every position
    run(tokens[:, :LONG], linear)
    ring = filled(tokens)
    held = torch.arange(LONG - 128, LONG)
    for (k_ring, v_ring), (k, v) in zip(ring, linear, strict=True):
        slots = k_ring.shape[2]
        assert_close(k_ring[:, :, held % slots], k[:, :, held])
        assert_close(v_ring[:, :, held % slots], v[:, :, held])


def test_lengths_count_real_tokens_and_stay_exact_past_the_window() -> None:
    tokens, mask = F.padded([ids()[0, :LONG], ids()[1, :9]], "left")
    cache = new_cache()
    run(tokens, cache, attention_mask=mask)
    assert cache.lengths.tolist() == [LONG, 9]
    assert cache.get_seq_length() == LONG
    run(ids()[:, :1], cache)
    assert cache.lengths.tolist() == [LONG + 1, 10]
    assert cache.get_seq_length() == LONG + 1


@pytest.mark.parametrize("chunks", [[LONG], [1] * 5 + [LONG - 5], [60, 60, 30], [129, 21]])
@pytest.mark.parametrize("length", [None, LONG, 400])
def test_chunks_equal_one_uncached_forward(chunks: list[int], length: int | None) -> None:
    tokens = ids()[:, :LONG]
    cache = new_cache(length=length)
    parts = torch.split(tokens, chunks, dim=1)
    assert_close(torch.cat([run(part, cache) for part in parts], 1), truth(tokens))


def test_a_smaller_batch_uses_the_first_rows() -> None:
    tokens = ids()[:1, :40]
    cache = new_cache(rows=3)
    out = torch.cat([run(tokens[:, :30], cache), run(tokens[:, 30:], cache)], 1)
    assert_close(out, truth(tokens))
    assert cache.lengths.tolist() == [40, 0, 0]


def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it() -> None:
    tokens = ids()[:, :20]
    cache = new_cache(length=None)
    with torch.inference_mode():
        run(tokens[:, :10], cache)
        cache.snapshot()
    out = run(tokens[:, 10:], cache)
    assert_close(out, truth(tokens)[:, 10:])
    assert not cache.lengths.is_inference()


# ---- going back ---------------------------------------------------------------------------------


def test_crop_keeps_the_first_n_and_drops_the_last_of_negative_n() -> None:
    tokens = ids()[:, :40]
    cache = filled(tokens, 40)
    cache.crop(35)
    assert cache.lengths.tolist() == [35, 35]
    cache.crop(-5)
    assert cache.lengths.tolist() == [30, 30]
    cache.crop(50)  # more than there is: nothing to drop
    assert cache.lengths.tolist() == [30, 30]
    cache.crop(torch.tensor([28, -4]))
    assert cache.lengths.tolist() == [28, 26]
    assert_close(run(tokens[:, 28:29], cache)[:1], truth(tokens)[:1, 28:29])


def test_crop_within_the_margin_twice_is_counted_from_the_highest_position() -> None:
    tokens = ids()
    wrong = (tokens + 5) % 90 + 3
    cache = filled(tokens)  # positions up to 149 written
    run(wrong[:, LONG : LONG + 10], cache)  # up to 159
    cache.crop(-10)
    run(tokens[:, LONG : LONG + 2], cache)
    least = LONG + 10 - MARGIN
    with pytest.raises(ValueError, match=rf"smallest possible n is {least} \(or {least - 152}\)"):
        cache.crop(least - 1)
    assert cache.lengths.tolist() == [LONG + 2] * ROWS
    cache.crop(least)
    assert_close(run(tokens[:, least : least + 20], cache), truth(tokens)[:, least : least + 20])


def test_crop_is_free_until_the_ring_has_wrapped() -> None:
    tokens = ids()
    cache = filled(tokens, 128)
    cache.crop(1)
    assert_close(run(tokens[:, 1:60], cache), truth(tokens)[:, 1:60])


def test_crop_to_nothing_starts_the_row_again() -> None:
    tokens = ids()
    cache = filled(tokens)
    cache.crop(torch.tensor([0, LONG]))
    assert_close(run(tokens[:1, :70], cache), truth(tokens)[:1, :70])
    cache.crop(torch.tensor([1]))  # the ring of the first row has not wrapped since
    assert cache.lengths.tolist() == [1, LONG]


@pytest.mark.parametrize(
    ("n", "error"),
    [
        (1.5, "n is a float"),
        (True, "n is a bool"),
        (torch.zeros(3, dtype=torch.int64), r"int64 \[3\]: it must be an int or an int64 tensor"),
        (torch.zeros(2), "float32"),
        (-LONG - 1, "smallest possible n is 122"),
    ],
)
def test_crop_refuses_other_arguments(n: Any, error: str) -> None:
    cache = filled(ids())
    with pytest.raises((TypeError, ValueError), match=error):
        cache.crop(n)
    assert cache.lengths.tolist() == [LONG] * ROWS


def test_reorder_permutes_rows_and_their_lengths() -> None:
    tokens, mask = F.padded([ids()[0, :LONG], ids()[1, :30]], "left")
    cache = new_cache()
    run(tokens, cache, attention_mask=mask)
    cache.reorder(torch.tensor([1, 0]))
    assert cache.lengths.tolist() == [30, LONG]
    following = torch.stack([ids()[1, 30:32], ids()[0, LONG : LONG + 2]])
    out = run(following, cache)
    assert_close(out[:1], truth(ids())[1:, 30:32])
    assert_close(out[1:], truth(ids())[:1, LONG : LONG + 2])


def test_reorder_can_spread_one_row_over_all() -> None:
    tokens = ids()[:1]
    cache = new_cache(rows=3)
    run(tokens[:, :LONG], cache)
    cache.reorder_cache(torch.tensor([0, 0, 0]))
    out = run(tokens[:, LONG : LONG + 1].repeat(3, 1), cache)
    assert_close(out, truth(tokens)[:, LONG : LONG + 1].expand(3, -1, -1))


@pytest.mark.parametrize(
    ("beams", "error"),
    [
        (torch.tensor([0, 2]), "rows are numbered 0 to 1"),
        (torch.tensor([-1, 0]), "rows are numbered 0 to 1"),
        (torch.tensor([0, 0, 0]), "has 3 rows, the cache has 2"),
        (torch.tensor([0.0, 1.0]), "float32"),
    ],
)
def test_reorder_refuses_rows_that_are_not_there(beams: Tensor, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        filled(ids(), 5).reorder(beams)


def test_reset_forgets_tokens_and_keeps_the_memory() -> None:
    tokens = ids()
    cache = filled(tokens)
    memory = cache[0][0].data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(run(tokens[:, :20], cache), truth(tokens)[:, :20])
    assert cache[0][0].data_ptr() == memory


def test_a_snapshot_goes_back_beyond_the_margin_as_often_as_wanted() -> None:
    tokens = ids()
    other = (tokens + 11) % 90 + 3
    cache = filled(tokens, 110)
    snapshot = cache.snapshot()
    for _ in range(2):
        run(other[:, :60], cache)
        with pytest.raises(ValueError, match="smallest possible n"):
            cache.crop(110)
        cache.restore(snapshot)
        assert cache.get_seq_length() == 110
        run(tokens[:, 110:130], cache)
        cache.restore(snapshot)
    out = run(tokens[:, 110:130], cache)
    assert_close(out, truth(tokens)[:, 110:130])


def test_a_snapshot_survives_growth() -> None:
    tokens = ids()
    cache = HybridCache(model_of().config, ROWS, 60, margin=MARGIN)
    run(tokens[:, :50], cache)
    snapshot = cache.snapshot()
    cache.grow(300)
    run(tokens[:, 50:200], cache)
    cache.restore(snapshot)
    assert_close(run(tokens[:, 50:70], cache), truth(tokens)[:, 50:70])


def test_a_snapshot_refuses_what_it_cannot_bring_back() -> None:
    tokens = ids()
    cache = filled(tokens, 60)
    snapshot = cache.snapshot()
    cache.crop(50)
    run(tokens[:, :3], cache)
    with pytest.raises(ValueError, match="had 60 tokens, and position 50 has been written again"):
        cache.restore(snapshot)
    assert cache.lengths.tolist() == [53, 53]
    snapshot = cache.snapshot()
    with pytest.raises(ValueError, match="of another cache"):
        filled(tokens, 60).restore(snapshot)
    cache.reorder(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="reordered"):
        cache.restore(snapshot)
    with pytest.raises(TypeError, match="restore: got a int"):
        cache.restore(3)  # type: ignore[arg-type]


def test_a_deep_copy_goes_its_own_way() -> None:
    tokens = ids()
    cache = filled(tokens)
    snapshot = cache.snapshot()
    twin = copy.deepcopy(cache)
    run((tokens[:, :5] + 9) % 90 + 3, twin)
    assert_close(run(tokens[:, LONG : LONG + 5], cache), truth(tokens)[:, LONG : LONG + 5])
    assert twin.get_seq_length() == cache.get_seq_length() == LONG + 5
    with pytest.raises(ValueError, match="of another cache"):
        twin.restore(snapshot)


# ---- room ---------------------------------------------------------------------------------------


def test_growth_keeps_what_is_stored() -> None:
    tokens = ids()
    cache = HybridCache(model_of().config, ROWS, 40, margin=MARGIN)
    first = run(tokens[:, :40], cache)
    with pytest.raises(ValueError, match=r"room for 41 tokens in a row, max_cache_len is 40"):
        run(tokens[:, 40:41], cache)
    assert cache.lengths.tolist() == [40, 40]
    cache.grow(400)
    rest = [run(part, cache) for part in torch.split(tokens[:, 40:], 35, dim=1)]
    assert_close(torch.cat([first, *rest], 1), truth(tokens))
    with pytest.raises(ValueError, match="a cache does not shrink"):
        cache.grow(300)


def test_overflow_counts_real_tokens_not_padding() -> None:
    tokens, mask = F.padded([ids()[0, :30], ids()[1, :28]], "right")
    tokens, mask = (torch.nn.functional.pad(t, (20, 0)) for t in (tokens, mask))
    cache = new_cache(length=30)
    run(tokens, cache, attention_mask=mask)
    assert cache.lengths.tolist() == [30, 28]


@pytest.mark.parametrize("length", [2, 60])  # a short call, and one that does not fit the margin
def test_a_failing_forward_leaves_the_cache_usable(length: int) -> None:
    tokens = ids()
    cache = filled(tokens)
    model = F.build(model_of().config)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model((tokens[:, :length] + 9) % 90 + 3, past_key_values=cache)
    handle.remove()
    assert cache.lengths.tolist() == [LONG] * ROWS
    out = run(tokens[:, LONG : LONG + length], cache)
    assert_close(out, truth(tokens)[:, LONG : LONG + length])


def test_advance_counts_on_the_host_and_not_past_the_end() -> None:
    cache = HybridCache(model_of().config, 1, 10, device="meta")
    cache.advance(7)
    assert cache.get_seq_length() == 7
    with pytest.raises(ValueError, match="advance: 4 tokens after 7 exceed max_cache_len, 10"):
        cache.advance(4)
    assert cache.get_seq_length() == 7


def test_gradients_flow_through_the_call_but_not_into_the_past() -> None:
    tokens = ids()[:, :LONG]
    model = F.build(model_of().config)
    cache = new_cache()
    with torch.no_grad():
        model(tokens[:, :-3], past_key_values=cache)
    logits = model(tokens[:, -3:], past_key_values=cache).logits
    assert_close(logits.detach(), truth(tokens)[:, -3:])
    logits.sum().backward()
    assert float(model.model.layers[0].self_attn.k_proj.weight.grad.abs().max()) > 0
    assert cache.lengths.tolist() == [LONG] * ROWS
    assert not cache[0][0].requires_grad


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"num_hidden_layers": 3}, "has 3 layers, the model 2"),
        ({"num_key_value_heads": 3}, "has 3 key/value heads, the model 1"),
        ({"head_dim": 128}, "has 128 as head_dim, the model 64"),
        ({"sliding_window": 99}, r"has \[99, 0\] as sliding windows by layer"),
        ({"layer_types": ["full_attention"] * 2}, r"has \[0, 0\] as sliding windows by layer"),
    ],
)
def test_the_cache_of_another_model_is_refused(changes: dict[str, Any], error: str) -> None:
    config = F.config("three", **{"sliding_window": WINDOW, **changes})
    cache = HybridCache(config, ROWS, 50)
    with pytest.raises(ValueError, match=f"past_key_values: the cache {error}"):
        run(ids()[:, :5], cache)
    assert cache.nbytes == 0


def test_a_batch_larger_than_the_cache_and_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="has 2 rows, the cache max_batch_size 1"):
        run(ids()[:, :5], new_cache(rows=1))
    with pytest.raises(ValueError, match="the cache is on meta, the model's input on cpu"):
        run(ids()[:, :5], new_cache(device="meta"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((None, 1, 5), "config is a NoneType"),
        (("config", 0, 5), "max_batch_size is 0: it must be at least 1"),
        (("config", 1, 0), "max_cache_len is 0: it must be at least 1"),
        (("config", 1.0, 5), "max_batch_size is 1.0: it must be an integer"),
        (("config", 1, 5, "cpu", torch.int8), "dtype is torch.int8"),
    ],
)
def test_nonsense_is_refused_at_construction(arguments: tuple[Any, ...], error: str) -> None:
    config, *others = arguments
    with pytest.raises((TypeError, ValueError), match=error):
        HybridCache(model_of().config if config == "config" else config, *others)
    with pytest.raises(ValueError, match="margin is -1"):
        HybridCache(model_of().config, 1, 5, margin=-1)


def test_cache_position_may_be_left_out_or_be_right() -> None:
    tokens = ids()[:, :12]
    cache = new_cache()
    run(tokens[:, :8], cache, cache_position=torch.arange(8))
    out = run(tokens[:, 8:], cache, cache_position=torch.arange(8, 12))
    assert_close(out, truth(tokens)[:, 8:])
    for wrong in (torch.arange(1), torch.tensor([3]), torch.arange(12, 14), torch.ones(1)):
        with pytest.raises(ValueError, match="cache_position"):
            run(tokens[:, :1], cache, cache_position=wrong)
    assert cache.get_seq_length() == 12


def test_layers_that_do_not_wrap_take_calls_of_any_length() -> None:
    layer = LayerCache(window=100, margin=28)
    layer.resize(128)
    assert layer.holds(10_000)
    layer.resize(129)
    assert layer.capacity == 128
    assert layer.holds(29)
    assert not layer.holds(30)

"""What users of Gemma 2 have suffered elsewhere: one test for each failure, named after it.

The numbers in the docstrings are issues of the projects named. What concerns files, the tokenizer
and the chat template is in tests/model/test_checkpoint.py and test_tokenizer.py.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2 import HybridCache, ops
from tests.model import factories as F
from tests.model import plain

TOLERANCE = 1e-5


def exact(shape: str, ids: Tensor, **overrides: Any) -> Tensor:
    """Float64 logits of one uncached forward."""
    config = F.config(shape, **overrides)
    with torch.no_grad():
        return plain.forward(F.state_dict(config), config, ids).logits


# ---- soft-capping -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["2b", "9b", "27b"])
@torch.no_grad()
def test_attention_scores_are_capped(shape: str) -> None:
    """llama.cpp#8156, #8197, vllm#5908: 27B is incoherent without the cap."""
    config, ids = F.config(shape), F.tokens(1, 20)
    without = F.config(shape, attn_logit_softcapping=None)
    want = exact(shape, ids)
    uncapped = plain.forward(F.state_dict(config), without, ids).logits
    got = F.tiny(shape)(ids).logits
    assert F.relative_error(got, want) < TOLERANCE
    assert F.relative_error(got, uncapped) > 0.3
    # the cap may be switched off, and then it is off
    off = F.build(without)
    assert F.relative_error(off(ids).logits, exact(shape, ids, attn_logit_softcapping=None)) < 1e-4


@pytest.mark.parametrize("path", ["prefill", "decode", "long_chunk", "attentions", "4d_mask"])
@torch.no_grad()
def test_no_path_drops_the_cap(path: str) -> None:
    """vllm#25502, #8660: the cap is silently dropped by one backend among several."""
    model, ids = F.tiny("27b"), F.tokens(1, 20)
    cache = HybridCache(model.config, 1, 512, margin=0)
    if path == "prefill":
        got = model(ids).logits
    elif path == "decode":
        got = torch.cat(
            [model(ids[:, i, None], past_key_values=cache).logits for i in range(20)], 1
        )
    elif path == "long_chunk":
        got = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(10, 1)], 1)
    elif path == "attentions":
        got = model(ids, output_attentions=True).logits
    else:
        mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
        with pytest.warns(UserWarning, match="4-D"):
            got = model(ids, attention_mask=mask).logits
    assert F.relative_error(got, exact("27b", ids)) < TOLERANCE


def test_the_cap_is_part_of_the_backward() -> None:
    """trl, Liger-Kernel#127: trained with a cap in the forward that the backward did not know."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, 9, 64, requires_grad=True)
    k, v = (torch.randn(1, 2, 9, 64, requires_grad=True) for _ in range(2))
    where = torch.zeros(1, dtype=torch.long), torch.full((1,), 9)
    out, _ = ops.attention(q, k, v, *where, scale=1.0, softcap=2.0, window=4)
    weight = torch.randn_like(out)
    out.mul(weight).sum().backward()
    q64, k64, v64 = (t.detach().double().requires_grad_() for t in (q, k, v))
    i = torch.arange(9)
    seen = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 4)
    scores = q64 @ k64.repeat_interleave(2, 1).transpose(2, 3)
    assert float(scores.detach().std()) > 6, "the scores do not reach the cap"
    probabilities = (2 * torch.tanh(scores / 2)).masked_fill(~seen, -1e30).softmax(-1)
    (probabilities @ v64.repeat_interleave(2, 1)).mul(weight.double()).sum().backward()
    for name, ours, want in (("q", q, q64), ("k", k, k64), ("v", v, v64)):
        assert F.relative_error(ours.grad, want.grad) < TOLERANCE, name


def test_the_loss_sees_capped_logits() -> None:
    """ml-cross-entropy#48, Liger-Kernel#127: the cap is missing in a fused loss."""
    config, ids = F.config("2b"), F.tokens(2, 12)
    model = F.build(config).train()
    loss = model(ids, labels=ids).loss.detach()
    logits = exact("2b", ids)[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(loss) / float(want) - 1) < TOLERANCE
    assert float(logits.abs().max()) > 0.95 * config.final_logit_softcapping


@torch.no_grad()
def test_logits_are_capped_once() -> None:
    """vllm, llama.cpp: the head caps and the sampler caps again, or neither does."""
    ids = F.tokens(1, 20)
    for shape in ("2b", "27b"):
        got = F.tiny(shape)(ids).logits
        cap = F.config(shape).final_logit_softcapping
        assert 0.95 * cap < float(got.abs().max()) <= cap
        assert F.relative_error(got, exact(shape, ids)) < TOLERANCE


# ---- numerics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_fully_masked_rows_give_no_nan(side: str, dtype: torch.dtype) -> None:
    """transformers#32390, #45491: NaN from padded rows."""
    model = F.tiny("2b", dtype=dtype)
    ids, mask = F.padded([F.tokens(1, 12)[0], F.tokens(1, 2)[0]], side)
    mask[1] = 0
    for extra in ({}, {"output_attentions": True}):
        out = model(ids, attention_mask=mask, **extra)
        assert torch.isfinite(out.logits).all()
        alone = model(ids[:1]).logits
        assert F.relative_error(out.logits[:1], alone.double()) < (
            TOLERANCE if dtype == torch.float32 else 0.1
        )


def test_a_fully_masked_row_has_no_gradient_and_no_nan() -> None:
    """transformers#32390: NaN gradients from rows of padding."""
    model = F.build(F.config("2b")).train()
    ids, mask = F.tokens(2, 6), torch.tensor([[1] * 6, [0] * 6])
    labels = ids.masked_fill(mask == 0, -100)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    both = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(ids[:1], labels=labels[:1]).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(both[name]).all(), name
        assert F.relative_error(both[name], parameter.grad.double()) < 1e-4, name


@torch.no_grad()
def test_fp16_does_not_overflow_in_the_residual_stream() -> None:
    """llama.cpp#8240, AutoAWQ#627: the stream exceeds 65504 in float16."""
    config = F.config("2b", num_hidden_layers=4)
    state = F.state_dict(config)
    for n in range(config.num_hidden_layers):
        # each layer adds rows of norm weight ~ 30000: float16 numbers, but their sum is none
        state[f"model.layers.{n}.post_feedforward_layernorm.weight"].fill_(30000.0)
    model = gemma2.Gemma2ForCausalLM(config)
    F.load(model, state)
    ids = F.tokens(1, 12)
    half = copy.deepcopy(model).half().eval()(ids).logits
    truth = plain.forward(state, config, ids, dtype=torch.float16)
    assert float(truth.hidden_states[-2].abs().max()) > 65504
    assert torch.isfinite(half).all()
    assert F.relative_error(half, truth.logits) < 0.1


@torch.no_grad()
def test_the_query_scale_is_the_configs_and_not_the_head_dims() -> None:
    """transformers#31891: 224 on 9B; 27B has 144 with head_dim 128."""
    ids = F.tokens(1, 20)
    assert gemma2.Gemma2Config.gemma2_9b().query_scale == 256**-0.5
    assert gemma2.Gemma2Config.gemma2_27b().query_scale == 144**-0.5
    right, wrong = exact("27b", ids), exact("27b", ids, query_pre_attn_scalar=128)
    # the weights depend on the scalar as well: draw them for 144
    config = F.config("27b")
    wrong = plain.forward(
        F.state_dict(config), F.config("27b", query_pre_attn_scalar=128), ids
    ).logits
    got = F.tiny("27b")(ids).logits
    assert F.relative_error(got, right) < TOLERANCE
    assert F.relative_error(got, wrong) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_embeddings_scale_is_rounded_to_the_weights_dtype(dtype: torch.dtype) -> None:
    """vllm#3653, litgpt#1031: 55.4256 becomes 55.5 in bfloat16, and that is part of the model."""
    model = F.tiny("2b", dtype=dtype)  # hidden_size 72: sqrt is 8.4853, in bfloat16 8.5
    ids = F.tokens(1, 5)
    with torch.no_grad():
        rows = model.model.embed_tokens.weight[ids].double()
        got = model.get_input_embeddings()(ids)
    want = rows * torch.tensor(72**0.5, dtype=dtype).double()
    assert got.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert torch.equal(got, want.to(got.dtype))
    if dtype == torch.bfloat16:
        assert not torch.equal(got, (rows * 72**0.5).to(got.dtype))


@torch.no_grad()
def test_the_norm_multiplies_by_one_plus_weight() -> None:
    """vllm#31464: the +1 of the norms missed or doubled."""
    model = F.tiny("2b")
    x = torch.randn(3, 72)
    got = model.model.norm(x)
    w = model.model.norm.weight.double()
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + w)
    assert F.relative_error(got, want) < 1e-6
    new = gemma2.Gemma2Model(F.config("three"))
    assert all(bool((p == 0).all()) for n, p in new.named_parameters() if "norm" in n)


@torch.no_grad()
def test_rope_is_computed_in_float32_whatever_the_dtype() -> None:
    """litgpt#1031: a RoPE table in bfloat16 is off by whole positions at 4000 tokens."""
    positions = torch.tensor([[4093, 8191]])
    cos, sin = ops.rope_table(positions, 64, 10000.0)
    angle = positions[..., None].double() * 10000.0 ** (-torch.arange(32).double() / 32)
    assert cos.dtype == sin.dtype == torch.float32
    assert float((cos.double() - angle.cos()).abs().max()) < 1e-3
    assert float((sin.double() - angle.sin()).abs().max()) < 1e-3


# ---- sliding window -----------------------------------------------------------------------------


@torch.no_grad()
def test_even_layers_slide_and_odd_layers_see_everything() -> None:
    """transformers#31775, NeMo#9672: the parity of the layers inverted."""
    model, ids = F.tiny("9b"), F.tokens(1, 20)
    attentions = model(ids, output_attentions=True).attentions
    for n, weights in enumerate(attentions):
        seen_at_first = float(weights[0, :, -1, 0].abs().max())
        assert (seen_at_first > 0) == (n % 2 == 1), f"layer {n}"
    assert F.relative_error(model(ids).logits, exact("9b", ids)) < TOLERANCE


@pytest.mark.parametrize("length", [7, 8, 9, 19])
@torch.no_grad()
def test_the_window_counts_the_token_itself(length: int) -> None:
    """keras-hub#2186 and others: the window off by one, or ignored by a fast path."""
    ids, want = F.tokens(1, length), exact("2b", F.tokens(1, length))
    got = F.tiny("2b")(ids).logits
    assert F.relative_error(got, want) < TOLERANCE
    for window in (7, 9):
        config = F.config("2b", sliding_window=window)
        other = plain.forward(F.state_dict(config), config, ids).logits
        if length > min(window, 8):
            assert F.relative_error(got, other) > 0.01, f"it could as well be {window}"


@torch.no_grad()
def test_beyond_the_window_with_padding() -> None:
    """transformers#31785, #35681: garbage beyond the window, with padding."""
    rows = [F.tokens(1, n, n)[0] for n in (40, 20, 9)]
    for side in ("left", "right"):
        ids, mask = F.padded(rows, side)
        got = F.tiny("2b")(ids, attention_mask=mask).logits
        for b, row in enumerate(rows):
            error = F.relative_error(got[b, mask[b].bool()], exact("2b", row[None])[0])
            assert error < TOLERANCE, f"{side}, row {b}"


@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_the_future_is_not_visible(cached: bool) -> None:
    """torchtune#1835: a mask that shows the future."""
    model, ids = F.tiny("2b"), F.tokens(1, 20)
    changed = ids.clone()
    changed[:, 15:] = (changed[:, 15:] + 7) % 90 + 3

    def run(ids: Tensor) -> Tensor:
        cache = HybridCache(model.config, 1, 512) if cached else None
        return model(ids, past_key_values=cache).logits

    assert torch.equal(run(ids)[:, :15], run(changed)[:, :15])


@torch.no_grad()
def test_the_full_context_is_used_on_full_layers() -> None:
    """vllm#6220: context cut to the window on all layers."""
    model, ids = F.tiny("2b"), F.tokens(1, 100)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 7) % 90 + 3
    assert not torch.equal(model(ids).logits[:, -1], model(changed).logits[:, -1])


@torch.no_grad()
def test_8k_of_context_through_the_ring_of_the_published_models() -> None:
    """vllm#6220, transformers#31785: nobody tried beyond 4096 tokens. Window 4096, ring of 4224."""
    config = F.config("single", sliding_window=4096, max_position_embeddings=8192)
    model, ids = F.build(config), F.tokens(1, 8192)
    cache = HybridCache(config, 1, 8192)
    assert cache.layers[0].capacity == 4224
    whole = model(ids).logits
    parts = ids[:, :8100].split(2048, dim=1)
    prefill = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
    steps = [model(ids[:, n, None], past_key_values=cache).logits for n in range(8100, 8192)]
    got = torch.cat([prefill, *steps], dim=1)
    # as close as float32 is to float64 over 8192 keys and angles of 8192 radians
    assert F.relative_error(got, whole.double()) < 1e-4
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 7) % 90 + 3
    assert not torch.equal(model(changed).logits[:, -1], whole[:, -1])


# ---- cache --------------------------------------------------------------------------------------


def test_the_cache_is_importable_and_subscriptable() -> None:
    """transformers#44351 (ImportError in 5.0), #37269 (not subscriptable)."""
    from gemma2 import HybridCache as Imported

    config = F.config("9b")
    cache = Imported(
        config=config, max_batch_size=2, max_cache_len=300, device="cpu", dtype=torch.bfloat16
    )
    assert len(cache) == len(list(cache)) == 4
    for n, (k, v) in enumerate(cache):
        assert k.shape == v.shape == (2, 8, 128 if n % 2 == 0 else 384, 256)
        assert k.dtype == torch.bfloat16
        assert cache[n][0] is k


@torch.no_grad()
def test_max_cache_len_is_the_number_of_tokens_that_fit() -> None:
    """transformers#37269: max_cache_len means something else than the user thinks."""
    model = F.tiny("three")
    cache = HybridCache(model.config, 1, 13)
    model(F.tokens(1, 13), past_key_values=cache)
    with pytest.raises(ValueError, match="max_cache_len is 13"):
        model(F.tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_the_length_is_right_past_the_window() -> None:
    """transformers#38156: get_seq_length stops at the window."""
    model = F.tiny("three")
    cache = HybridCache(model.config, 1, 400)
    for n, count in enumerate((100, 100, 1, 90)):
        model(F.tokens(1, count, n), past_key_values=cache)
    assert cache.get_seq_length() == 291
    assert all(cache.get_seq_length(n) == 291 for n in range(2))


def test_several_sequences_from_one_prompt() -> None:
    """transformers#31965: num_return_sequences crashes with the hybrid cache."""
    model = F.tiny("three")
    out = model.generate(
        F.tokens(2, 5), do_sample=True, num_return_sequences=3, max_new_tokens=20, seed=1
    )
    assert out.shape[0] == 6
    assert torch.equal(out[:, :5], F.tokens(2, 5).repeat_interleave(3, 0))
    assert not torch.equal(out[0], out[1])


@torch.no_grad()
def test_the_cache_follows_beams() -> None:
    """unsloth#923: no reordering of the cache for beams."""
    model = F.tiny("three")
    rows, new = F.tokens(3, 140), F.tokens(3, 2, 9)
    cache = HybridCache(model.config, 3, 512)
    model(rows, past_key_values=cache)
    beams = torch.tensor([2, 0, 0])
    cache.reorder_cache(beams)
    got = model(new, past_key_values=cache).logits
    want = exact("three", torch.cat([rows[beams], new], 1))[:, -2:]
    assert F.relative_error(got, want) < TOLERANCE


@torch.no_grad()
def test_a_conversation_continues_from_the_past() -> None:
    """transformers#32896: cannot continue from past_key_values, with and without cache_position."""
    model, ids = F.tiny("three"), F.tokens(1, 150)
    want = exact("three", ids)
    for positions in (False, True):
        cache, start = HybridCache(model.config, 1, 200), 0
        for count in (100, 1, 45, 4):
            chunk = slice(start, start + count)
            extra = {"cache_position": torch.arange(150)[chunk]} if positions else {}
            got = model(ids[:, chunk], past_key_values=cache, **extra).logits
            assert F.relative_error(got, want[:, chunk]) < TOLERANCE
            start += count


@torch.no_grad()
def test_rolling_back_needs_no_reprocessing() -> None:
    """llama.cpp#13194, #14157: the prompt is processed again after an eviction.

    What transformers' own tests skip for Gemma 2, assisted decoding and prompt lookup, is this.
    """
    model, ids = F.tiny("three"), F.tokens(1, 300)
    want = exact("three", ids)
    cache = HybridCache(model.config, 1, 400)
    model(ids[:, :200], past_key_values=cache)
    for start in range(200, 290, 6):
        guess = ids[:, start : start + 10].clone()
        guess[:, 6:] = 5  # four of ten guesses are wrong
        got = model(guess, past_key_values=cache).logits
        assert F.relative_error(got[:, :6], want[:, start : start + 6]) < TOLERANCE
        cache.crop(start + 6)
        assert cache.get_seq_length() == start + 6
    assert cache.reprocessed == 0


@torch.no_grad()
def test_a_reset_cache_is_as_good_as_new() -> None:
    """transformers#32313: slow or wrong after reset."""
    model = F.tiny("three")
    cache = HybridCache(model.config, 2, 300)
    model(F.tokens(2, 200), past_key_values=cache)
    memory = [k.data_ptr() for k, _ in cache]
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = F.tokens(2, 30, 4)
    got = model(ids, past_key_values=cache).logits
    assert F.relative_error(got, exact("three", ids)) < TOLERANCE
    assert [k.data_ptr() for k, _ in cache] == memory


def test_decoding_allocates_no_new_cache_each_step() -> None:
    """transformers#44609: work that grows with every step."""
    model = F.tiny("three")
    cache = HybridCache(model.config, 1, 64)
    memory: list[list[int]] = []
    for _ in model.stream(F.tokens(1, 4), past_key_values=cache, max_new_tokens=8, eos_token_id=[]):
        memory.append([t.data_ptr() for pair in cache for t in pair])
    assert len(memory) == 8
    assert all(m == memory[0] for m in memory)


@torch.no_grad()
def test_the_cache_lives_where_its_layers_live() -> None:
    """transformers#34706: the cache on the wrong device."""
    model = F.tiny("three", dtype=torch.bfloat16)
    cache = HybridCache(model.config, 1, 64)
    model(F.tokens(1, 3), past_key_values=cache)
    for k, v in cache:
        assert k.device == v.device == cache.lengths.device == model.device
        assert k.dtype == v.dtype == torch.bfloat16


# ---- training, heads, install -------------------------------------------------------------------


def test_packing_isolates_documents_in_training() -> None:
    """axolotl#2449, transformers 5: packing leaks between documents in train()."""
    model = F.build(F.config("2b")).train()
    ids, bounds = F.tokens(1, 20), torch.tensor([0, 9, 20])
    changed = ids.clone()
    changed[:, :9] = (changed[:, :9] + 7) % 90 + 3
    before = model(ids, cu_seqlens=bounds).logits
    after = model(changed, cu_seqlens=bounds).logits
    assert torch.equal(before[:, 9:], after[:, 9:])
    assert not torch.equal(before[:, :9], after[:, :9])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_head_dim_has_a_backward(head_dim: int) -> None:
    """flash-attention: no backward for head_dim 256 on consumer hardware."""
    model = F.build(F.config("three", head_dim=head_dim)).train()
    ids = F.tokens(1, 12)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_no_advice_about_eager_attention() -> None:
    """peft#2111: "use eager attention" outlived its cause. Training says nothing."""
    import warnings

    ids = F.tokens(1, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = F.build(F.config("2b")).train()
        model(ids, labels=ids).loss.backward()


@torch.no_grad()
def test_the_sequence_head_reads_the_last_token_that_is_no_padding() -> None:
    """vllm#11802 and others: a classifier that reads a padded column."""
    config = F.config("2b", num_labels=3)
    model, state = F.build(config, "sequence"), F.state_dict(config, "sequence")
    rows = [F.tokens(1, n, n)[0] for n in (11, 4)]
    for side in ("left", "right"):
        ids, mask = F.padded(rows, side)
        for extra in ({"attention_mask": mask}, {}):
            if side == "left" and not extra:
                continue  # without a mask left pads are tokens, which the last one sees
            got = model(ids, **extra).logits
            for b, row in enumerate(rows):
                want = plain.forward(state, config, row[None], head="score").logits[0, -1]
                assert F.relative_error(got[b], want) < TOLERANCE, (side, b)


def test_importing_the_package_imports_no_transformers() -> None:
    """flash-attention's wheels: an import that drags in what may be broken."""
    code = (
        "import sys, gemma2; gemma2.Gemma2ForCausalLM; "
        "sys.exit(any(m.split('.')[0] in ('transformers', 'sentencepiece') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

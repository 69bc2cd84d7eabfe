"""Log-probabilities of tokens and perplexity, against transformers and the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch

import gemma2
from gemma2 import evaluation
from gemma2.evaluation import perplexity, token_log_probs
from tests.model import plain
from tests.model.factories import build, config, padded, state_dict, tiny, tokens, twin

BOS = 2


def exact(ids: torch.Tensor, **overrides) -> torch.Tensor:
    """Log-probabilities of ids[1:] by the float64 oracle, [B, S - 1]."""
    cfg = config("three", **overrides)
    logits = plain.forward(state_dict(cfg), cfg, ids).logits
    return logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


def begun(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full((len(ids), 1), BOS), ids], dim=1)


# ---- tokens -------------------------------------------------------------------------------------


def test_log_probs_are_those_of_the_exact_model_and_zero_at_the_first_token():
    ids = begun(tokens(2, 40))
    found = token_log_probs(tiny(), ids)
    assert (found.dtype, found.shape) == (torch.float32, ids.shape)
    assert not found.requires_grad
    assert found[:, 0].tolist() == [0, 0]
    torch.testing.assert_close(found[:, 1:].double(), exact(ids), rtol=0, atol=2e-5)


@pytest.mark.parametrize("cap", [8.0, None])
def test_log_probs_are_those_of_transformers(cap):
    cfg = config("three", final_logit_softcapping=cap)
    ids = begun(tokens(2, 30, seed=1))
    with torch.no_grad():
        logits = twin(cfg)(ids).logits
    wanted = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    found = token_log_probs(build(cfg), ids)[:, 1:]
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_zero_and_changes_nothing_else(side):
    rows = [begun(tokens(1, n, seed=n))[0] for n in (20, 3, 11)]
    ids, mask = padded(rows, side)
    found = token_log_probs(tiny(), ids, mask)
    assert found[mask == 0].abs().sum() == 0
    for row, line, seen in zip(rows, found, mask, strict=True):
        alone = token_log_probs(tiny(), row[None])[0]
        torch.testing.assert_close(line[seen == 1], alone, rtol=0, atol=1e-5)


def test_the_logits_exist_for_a_part_of_the_tokens_at_a_time(monkeypatch):
    ids = begun(tokens(2, 30))
    model, seen = tiny(), []
    whole = token_log_probs(model, ids)
    monkeypatch.setattr(evaluation, "_LOGITS_AT_A_TIME", 7 * 97)
    hook = model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    try:
        parts = token_log_probs(model, ids)
    finally:
        hook.remove()
    assert seen == [(7, 97)] * 8 + [(4, 97)]
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_a_model_in_training_is_evaluated_and_trains_on():
    model = build(config("three"))
    model.train()
    model.lm_head.eval()
    modes = []
    for module in (model.model, model.lm_head):
        module.register_forward_hook(lambda m, args, out: modes.append(m.training))
    token_log_probs(model, begun(tokens(1, 20)))
    perplexity(model, tokens(1, 20)[0])
    assert modes == [False] * 4
    assert [m.training for m in (model, model.model, model.lm_head)] == [True, True, False]


@pytest.mark.parametrize(
    ("ids", "mask", "text"),
    [
        ([1, 2], None, "input_ids is list"),
        (torch.zeros(1, 2), None, "input_ids is torch.float32"),
        (torch.zeros(2, dtype=torch.int64), None, r"input_ids has the shape \[2\]"),
        (torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 3), r"attention_mask has .* \[1, 3\]"),
    ],
)
def test_bad_input_is_told(ids, mask, text):
    with pytest.raises((TypeError, ValueError), match=f"token_log_probs: {text}"):
        token_log_probs(tiny(), ids, mask)


# ---- perplexity ---------------------------------------------------------------------------------


def by_windows(ids: torch.Tensor, context: int, stride: int) -> tuple[float, list[int], int]:
    """The oracle in the words of the definition; also how much each token had before it."""
    total, before, done, read = 0.0, [], 0, 0
    begin = 0
    while done < len(ids):
        window = ids[begin : begin + context - 1]
        scores = exact(begun(window[None]))[0]
        new = begin + len(window) - done
        total += float(scores[-new:].sum())
        before += range(len(window) - new + 1, len(window) + 1)
        done, read = begin + len(window), read + len(window) + 1
        begin += stride
    return total, before, read


@pytest.mark.parametrize(
    ("length", "context", "stride"),
    [(50, 16, 8), (50, 16, 15), (50, 16, 1), (31, 16, 5), (15, 16, 8), (16, 16, 8), (1, 16, 8),
     (5, 2, 1), (60, 200, 100)],
)  # fmt: skip
def test_every_token_is_scored_once_with_as_much_before_it_as_promised(length, context, stride):
    ids = tokens(1, length, seed=length)[0]
    total, before, read = by_windows(ids, context, stride)
    assert len(before) == length
    assert all(n >= context - stride for n in before[context - 1 :])
    found = perplexity(tiny(), ids, stride=stride, context=context)
    assert (found.tokens, found.read) == (length, read)
    assert found.log_prob == pytest.approx(total, abs=2e-5 * length)
    assert found.perplexity == pytest.approx(math.exp(-total / length), rel=1e-4)


def test_in_one_window_it_is_the_loss_of_transformers():
    cfg = config("three")
    ids = begun(tokens(1, 60))
    with torch.no_grad():
        loss = twin(cfg)(ids, labels=ids).loss
    found = perplexity(tiny(), ids)  # the bos in front is not scored
    assert found.tokens == 60
    assert found.windows == 1
    assert math.log(found.perplexity) == pytest.approx(float(loss), abs=1e-5)


def test_windows_of_transformers_recipe_are_these():
    """Their text begins every window where ours does; without bos in theirs, it is put there."""
    cfg, context, stride = config("three"), 21, 10
    ids = tokens(1, 75, seed=4)
    model, losses, done = twin(cfg), 0.0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + context - 1, ids.shape[1])
        window = begun(ids[:, begin:end])
        target = window.clone()
        target[:, : -(end - done)] = -100
        with torch.no_grad():
            losses += float(model(window, labels=target).loss) * (end - done)
        done = end
        if end == ids.shape[1]:
            break
    found = perplexity(tiny(), ids[0].tolist(), stride=stride, context=context)
    assert -found.log_prob == pytest.approx(losses, rel=1e-5)


def test_the_head_sees_scored_tokens_only():
    model, seen = tiny(), []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[0]))
    progress = []
    try:
        perplexity(model, tokens(1, 50)[0], stride=8, context=16, progress=progress.append)
    finally:
        hook.remove()
    assert seen == [15, 8, 8, 8, 8, 3]
    assert progress == [15, 23, 31, 39, 47, 50]


def test_bits_per_byte_count_bytes_not_tokens():
    windows = {"windows": 1, "context": 8, "stride": 4}
    found = evaluation.Perplexity(log_prob=-8 * math.log(2), tokens=4, read=5, **windows)
    assert found.perplexity == pytest.approx(4)
    assert found.bits_per_byte(16) == pytest.approx(0.5)
    assert evaluation.Perplexity(-1e6, 1, 2, **windows).perplexity == math.inf


def test_the_embedded_model_has_read_its_definitions():
    model, tokenizer = gemma2.tiny.load_causal_lm(), gemma2.tiny.load_tokenizer()
    known = tokenizer.encode("dog: a member of the genus canis that has been domesticated by man")
    shuffled = [known[0], *reversed(known[1:])]
    assert perplexity(model, known).perplexity < perplexity(model, shuffled).perplexity / 3


@pytest.mark.parametrize(
    ("ids", "options", "text"),
    [
        ([], {}, "ids holds no token"),
        ([BOS], {}, "ids holds no token"),
        ([[1, 2], [3, 4]], {}, "ids is"),
        ([0.5], {}, "ids is"),
        ([5], {"context": 1}, "context is 1: it must be at least 2"),
        ([5], {"context": 8, "stride": 8}, "stride is 8, context 8: stride must be less"),
        ([5], {"stride": 0}, "stride is 0"),
        ([5], {"stride": 2.0}, "stride is 2.0: it must be an integer"),
    ],
)
def test_a_bad_call_is_told(ids, options, text):
    with pytest.raises((TypeError, ValueError), match=f"perplexity: {text}"):
        perplexity(tiny(), ids, **options)

"""The whole model against float64 and against transformers' eager model of the same weights.

The rule: float32 within 1e-5 of float64, or no worse than twice what eager transformers does;
bf16 and fp16 no worse than eager on average.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model import factories as F
from tests.model import plain

ALL_SHAPES = sorted(F.SHAPES)
PUBLISHED = ["2b", "9b", "27b"]
LENGTH = 21  # more than twice the window of 8


@functools.lru_cache(maxsize=64)
def exact(shape: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> plain.PlainOutput:
    config = F.config(shape)
    with torch.no_grad():
        ids = F.tokens(2, LENGTH, seed)
        return plain.forward(F.state_dict(config, seed=seed), config, ids, dtype=dtype)


@functools.lru_cache(maxsize=16)
def eager(shape: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    with torch.no_grad():
        return F.twin(F.config(shape), dtype=dtype, seed=seed)(
            F.tokens(2, LENGTH, seed), output_hidden_states=True, output_attentions=True
        )


def assert_within(ours: Tensor, theirs: Tensor, truth: Tensor, what: str) -> None:
    """1e-5 of float64 or, where the problem itself is worse conditioned, twice eager's error."""
    assert ours.shape == truth.shape, f"{what}: shape {list(ours.shape)}, not {list(truth.shape)}"
    error, allowed = F.relative_error(ours, truth), 2 * F.relative_error(theirs, truth)
    # beyond 1e-4 eager would not be computing the same thing
    assert error <= max(1e-5, min(allowed, 1e-4)), (
        f"{what}: {error:.2e}, twice eager's {allowed:.2e}"
    )


def assert_gradient(ours: Tensor, theirs: Tensor, truth: Tensor, what: str) -> None:
    """1e-5 by norm (or twice eager's), and 1e-4 for the worst element: gradients have long tails."""
    assert ours.shape == truth.shape, f"{what}: shape {list(ours.shape)}, not {list(truth.shape)}"
    error, allowed = (float((g.double() - truth).norm() / truth.norm()) for g in (ours, theirs))
    assert error <= max(1e-5, min(2 * allowed, 5e-5)), f"{what}: {error:.2e}, eager {allowed:.2e}"
    assert F.relative_error(ours, truth) <= 1e-4, f"{what}: {F.relative_error(ours, truth):.2e}"


def mean_error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).abs().mean())


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_the_oracle_agrees_with_transformers_in_float64(shape: str) -> None:
    theirs = eager(shape, torch.float64)
    # transformers' norms, softmax and RoPE table are float32 even here
    assert F.relative_error(theirs.logits, exact(shape).logits) < 2e-6


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_scores_and_logits_reach_their_caps(shape: str) -> None:
    # or none of the comparisons below could see that a cap is missing
    config, truth = F.config(shape), exact(shape)
    state, ids = F.state_dict(config), F.tokens(2, LENGTH)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        without = plain.forward(state, F.config(shape, **{name: None}), ids)
        assert F.relative_error(without.logits, truth.logits) > 0.3, name


@pytest.mark.parametrize("shape", ALL_SHAPES)
@torch.no_grad()
def test_float32_logits_equal_float64(shape: str) -> None:
    ours = F.tiny(shape)(F.tokens(2, LENGTH))
    assert_within(ours.logits, eager(shape).logits, exact(shape).logits, "logits")
    assert ours.logits.dtype == torch.float32
    uncapped = plain.forward(
        F.state_dict(F.config(shape)),
        F.config(shape, attn_logit_softcapping=None),
        F.tokens(2, LENGTH),
    )
    assert F.relative_error(ours.logits, uncapped.logits) > 0.3


@pytest.mark.parametrize("shape", ALL_SHAPES)
@torch.no_grad()
def test_float32_hidden_states_equal_float64_layer_by_layer(shape: str) -> None:
    ours = F.tiny(shape)(F.tokens(2, LENGTH), output_hidden_states=True)
    truth = exact(shape).hidden_states
    assert len(ours.hidden_states) == F.config(shape).num_hidden_layers + 1
    for i, (a, b, c) in enumerate(
        zip(ours.hidden_states, eager(shape).hidden_states, truth, strict=True)
    ):
        assert_within(a, b, c, f"hidden_states[{i}]")
    body = F.tiny(shape).model(F.tokens(2, LENGTH))
    assert_within(
        body.last_hidden_state, eager(shape).hidden_states[-1], truth[-1], "last_hidden_state"
    )


@pytest.mark.parametrize("shape", ALL_SHAPES)
@torch.no_grad()
def test_float32_attentions_equal_float64_layer_by_layer(shape: str) -> None:
    ours = F.tiny(shape)(F.tokens(2, LENGTH), output_attentions=True)
    truth = exact(shape).attentions
    assert len(ours.attentions) == F.config(shape).num_hidden_layers
    for i, (a, b, c) in enumerate(
        zip(ours.attentions, eager(shape).attentions, truth, strict=True)
    ):
        assert_within(a, b, c, f"attentions[{i}]")
        assert torch.equal(a == 0, c == 0), f"attentions[{i}]: another pattern of visibility"
    # asking for attentions takes another path: it must give the same logits
    assert_within(ours.logits, eager(shape).logits, exact(shape).logits, "logits")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", ALL_SHAPES)
@torch.no_grad()
def test_16_bit_error_is_no_worse_than_eager(shape: str, dtype: torch.dtype) -> None:
    seeds = range(4)
    errors: dict[str, list[float]] = {"ours": [0.0, 0.0], "eager": [0.0, 0.0]}
    for seed in seeds:
        truth = exact(shape, dtype, seed)
        ours = F.tiny(shape, dtype=dtype, seed=seed)(
            F.tokens(2, LENGTH, seed), output_hidden_states=True
        )
        assert ours.logits.dtype == ours.hidden_states[-1].dtype == dtype
        for name, out in (("ours", ours), ("eager", eager(shape, dtype, seed))):
            errors[name][0] += mean_error(out.logits, truth.logits)
            errors[name][1] += mean_error(out.hidden_states[-1], truth.hidden_states[-1])
    # 2%: the noise of a mean over so few roundings, half of which both have in common
    assert errors["ours"][0] <= 1.02 * errors["eager"][0], f"logits: {errors}"
    assert errors["ours"][1] <= 1.02 * errors["eager"][1], f"last hidden state: {errors}"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", PUBLISHED)
@torch.no_grad()
def test_padded_rows_equal_float64(shape: str, side: str) -> None:
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (LENGTH, 3, 12)], side)
    config = F.config(shape)
    truth = plain.forward(F.state_dict(config), config, ids, mask).logits
    theirs = F.twin(config)(ids, attention_mask=mask).logits
    ours = F.tiny(shape)(ids, attention_mask=mask).logits
    assert torch.isfinite(ours).all()
    real = mask.bool()
    assert_within(ours[real], theirs[real], truth[real], "logits of real tokens")


def tree(length: int) -> Tensor:
    """bool [1, S, S] of a tree of guesses: a token sees its ancestors and itself."""
    parents = [-1, 0, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 0, 12, 13, 14, 14, 15, 16, 17, 18][:length]
    seen = torch.eye(length, dtype=torch.bool)
    for child, parent in enumerate(parents):
        if parent >= 0:
            seen[child] |= seen[parent]
    return seen[None]


@pytest.mark.parametrize("form", ["bool", "additive", "dict"])
@torch.no_grad()
def test_a_4d_mask_of_a_tree_equals_float64(form: str) -> None:
    config, ids, seen = F.config("27b"), F.tokens(2, LENGTH), tree(LENGTH)
    column = torch.arange(LENGTH)
    near = column[None, :] > column[:, None] - config.sliding_window
    mask: Any = seen[:, None]
    sliding = seen & near  # a single mask gets the window on sliding layers
    if form == "additive":
        mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~mask, torch.finfo(torch.float32).min)
    if form == "dict":
        sliding = seen  # a dict is used verbatim
        mask = {"full_attention": mask, "sliding_attention": mask}
    truth = plain.forward(
        F.state_dict(config),
        config,
        ids,
        positions=column[None].expand(2, -1),
        visible={"full_attention": seen, "sliding_attention": sliding},
    )
    assert F.relative_error(exact("27b").logits, truth.logits) > 0.1, "the mask does nothing"
    with pytest.warns(UserWarning, match="4-D"):
        ours = F.tiny("27b")(ids, attention_mask=mask).logits
    assert F.relative_error(ours, truth.logits) < 1e-5


# ---- losses -------------------------------------------------------------------------------------


def causal_labels(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, -3:] = -100
    labels[:, 9] = -100
    return labels


def cross_entropy(logits: Tensor, labels: Tensor, items: int | None = None) -> Tensor:
    """Float64, written out: the mean (or the sum over `items`) of -log p(label) where not -100."""
    kept = labels != -100
    log_p = logits - torch.logsumexp(logits, -1, keepdim=True)
    picked = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][kept]
    return -picked.sum() / (len(picked) if items is None else items)


@pytest.mark.parametrize("items", [None, 7], ids=["mean", "num_items_in_batch"])
@pytest.mark.parametrize("shape", ALL_SHAPES)
@torch.no_grad()
def test_causal_loss_shifts_inside_and_ignores_minus_100(shape: str, items: int | None) -> None:
    ids = F.tokens(2, LENGTH)
    labels = causal_labels(ids)
    extra = {} if items is None else {"num_items_in_batch": items}
    truth = cross_entropy(exact(shape).logits[:, :-1], labels[:, 1:], items)
    theirs = F.twin(F.config(shape))(ids, labels=labels, **extra).loss
    ours = F.tiny(shape)(ids, labels=labels, **extra)
    assert ours.loss.dtype == torch.float32
    assert ours.loss.dim() == 0
    assert abs(float(theirs) / float(truth) - 1) < 1e-5
    assert abs(float(ours.loss) / float(truth) - 1) < 1e-5
    assert_within(ours.logits, eager(shape).logits, exact(shape).logits, "logits beside a loss")


@torch.no_grad()
def test_bf16_loss_is_computed_in_float32() -> None:
    ids = F.tokens(2, LENGTH)
    model = F.tiny("2b", dtype=torch.bfloat16)
    out = model(ids, labels=ids)
    assert out.loss.dtype == torch.float32
    want = cross_entropy(out.logits.double()[:, :-1], ids[:, 1:])
    # the fused loss may cap in float32 before the rounding of the logits to bf16
    assert abs(float(out.loss) / float(want) - 1) < 3e-3


SEQUENCE_CASES: dict[str, tuple[int, str | None, Any]] = {
    "regression_one_label": (1, "regression", lambda b: torch.linspace(-1, 2, b)),
    "regression_three": (3, "regression", lambda b: torch.linspace(-1, 2, 3 * b).view(b, 3)),
    "single_label": (
        4,
        "single_label_classification",
        lambda b: torch.arange(b) % 4,
    ),
    "multi_label": (
        3,
        "multi_label_classification",
        lambda b: (torch.arange(3 * b).view(b, 3) % 2).float(),
    ),
    "guessed_regression": (1, None, lambda b: torch.linspace(-1, 2, b)),
    "guessed_single": (4, None, lambda b: torch.arange(b) % 4),
    "guessed_multi": (3, None, lambda b: (torch.arange(3 * b).view(b, 3) % 2).float()),
}


def sequence_loss(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """logits [B, labels], float64."""
    if "regression" in kind:
        return (logits.squeeze(-1) - labels.double()).square().mean()
    if "single" in kind:
        return cross_entropy(logits, labels)
    y = labels.double()
    softplus = torch.nn.functional.softplus
    return (y * softplus(-logits) + (1 - y) * softplus(logits)).mean()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", sorted(SEQUENCE_CASES))
@torch.no_grad()
def test_sequence_head_pools_the_last_real_token_and_its_loss(case: str, side: str) -> None:
    labels_count, problem, make = SEQUENCE_CASES[case]
    config = F.config("27b", num_labels=labels_count, problem_type=problem)
    rows = [F.tokens(1, n, n)[0] for n in (13, 4, 1)]
    ids, mask = F.padded(rows, side)
    labels = make(3)
    state = F.state_dict(config, "sequence")
    truth = torch.cat(
        [plain.forward(state, config, row[None], head="score").logits[:, -1] for row in rows]
    )
    model = F.build(config, "sequence")
    ours = model(ids, attention_mask=mask, labels=labels)
    theirs = F.twin(config, "sequence")(ids, attention_mask=mask, labels=labels)
    assert_within(ours.logits, theirs.logits, truth, "logits")
    want = float(sequence_loss(truth, labels, case))
    assert abs(float(theirs.loss) / want - 1) < 1e-5
    assert abs(float(ours.loss) / want - 1) < 1e-5


@torch.no_grad()
def test_token_head_gives_a_bias_and_a_float32_loss() -> None:
    config = F.config("2b", num_labels=5)
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (13, 4)], "right")
    labels = (ids % 5).masked_fill(mask == 0, -100)
    truth = plain.forward(F.state_dict(config, "token"), config, ids, mask, head="score").logits
    ours = F.build(config, "token")(ids, attention_mask=mask, labels=labels)
    theirs = F.twin(config, "token")(ids, attention_mask=mask, labels=labels)
    real = mask.bool()
    assert_within(ours.logits[real], theirs.logits[real], truth[real], "logits")
    want = float(cross_entropy(truth, labels))
    assert abs(float(theirs.loss) / want - 1) < 1e-5
    assert abs(float(ours.loss) / want - 1) < 1e-5


# ---- gradients ----------------------------------------------------------------------------------


def gradients_in_float64(
    shape: str, ids: Tensor, mask: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    config = F.config(shape)
    state = {k: v.double().requires_grad_() for k, v in F.state_dict(config).items()}
    logits = plain.forward(state, config, ids, mask).logits
    cross_entropy(logits[:, :-1], labels[:, 1:]).backward()
    return {k: v.grad for k, v in state.items() if v.grad is not None}


def gradients(model: Any, **inputs: Any) -> dict[str, Tensor]:
    model.train()
    model(**inputs).loss.backward()
    return {k: v.grad for k, v in model.named_parameters() if v.grad is not None}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_gradients_of_every_parameter_equal_float64(shape: str, side: str) -> None:
    lengths = (LENGTH, 5) if side != "none" else (LENGTH, LENGTH)
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in lengths], side)
    labels = causal_labels(ids).masked_fill(mask == 0, -100)
    if side == "left":  # nor what a pad would predict
        labels = labels.masked_fill(mask.cumsum(1) == 1, -100)
    truth = gradients_in_float64(shape, ids, mask, labels)
    inputs = {"input_ids": ids, "labels": labels}
    if side != "none":
        inputs["attention_mask"] = mask
    ours = gradients(F.build(F.config(shape)), **inputs)
    theirs = gradients(F.twin(F.config(shape)), **inputs)
    assert set(ours) == set(truth), set(ours) ^ set(truth)
    for name, want in truth.items():
        assert_gradient(ours[name], theirs[name], want, f"gradient of {name}")


@pytest.mark.parametrize("shape", PUBLISHED)
def test_bf16_gradients_are_no_worse_than_eager(shape: str) -> None:
    ids = F.tokens(2, LENGTH)
    labels = causal_labels(ids)
    config = F.config(shape)
    state = {k: v.double().requires_grad_() for k, v in F.state_dict(config).items()}
    logits = plain.forward(state, config, ids, dtype=torch.bfloat16).logits
    cross_entropy(logits[:, :-1], labels[:, 1:]).backward()
    ours = gradients(F.build(config, dtype=torch.bfloat16), input_ids=ids, labels=labels)
    theirs = gradients(F.twin(config, dtype=torch.bfloat16), input_ids=ids, labels=labels)
    errors = {"ours": 0.0, "eager": 0.0}
    for name, weight in state.items():
        scale = float(weight.grad.square().mean().sqrt())
        assert ours[name].dtype == torch.bfloat16
        errors["ours"] += mean_error(ours[name], weight.grad) / scale
        errors["eager"] += mean_error(theirs[name], weight.grad) / scale
    assert errors["ours"] <= errors["eager"], errors


def test_gradient_checkpointing_changes_no_gradient() -> None:
    ids = F.tokens(2, LENGTH)
    usual = gradients(F.build(F.config("2b")), input_ids=ids, labels=ids)
    model = F.build(F.config("2b"))
    model.gradient_checkpointing_enable()
    again = gradients(model, input_ids=ids, labels=ids)
    assert set(usual) == set(again)
    for name in usual:
        assert torch.equal(usual[name], again[name]), name


def test_sequence_head_gradients_equal_float64() -> None:
    config = F.config("27b", num_labels=4)
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (13, 4)], "left")
    labels = torch.tensor([3, 1])
    state = {k: v.double().requires_grad_() for k, v in F.state_dict(config, "sequence").items()}
    pooled = plain.forward(state, config, ids, mask, head="score").logits[:, -1]
    cross_entropy(pooled, labels).backward()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    ours = gradients(F.build(config, "sequence"), **inputs)
    theirs = gradients(F.twin(config, "sequence"), **inputs)
    for name, weight in state.items():
        assert_gradient(ours[name], theirs[name], weight.grad, f"gradient of {name}")


# ---- greedy tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ALL_SHAPES)
@torch.no_grad()
def test_greedy_tokens_equal_transformers_and_float64(shape: str) -> None:
    config, new = F.config(shape), 16
    ids = F.tokens(2, 5)
    state = F.state_dict(config)
    want = ids
    for _ in range(new):
        logits = plain.forward(state, config, want).logits[:, -1]
        best = logits.topk(2).values
        assert float((best[:, 0] - best[:, 1]).min()) > 1e-4, "a tie: choose another seed"
        want = torch.cat([want, logits.argmax(-1, keepdim=True)], dim=1)
    settings = {"max_new_tokens": new, "do_sample": False}
    theirs = F.twin(config).generate(
        ids, attention_mask=torch.ones_like(ids), eos_token_id=-1, **settings
    )
    ours = F.tiny(shape).generate(ids, eos_token_id=[], **settings)
    assert torch.equal(theirs, want)
    assert torch.equal(ours, want)


@torch.no_grad()
def test_greedy_tokens_of_left_padded_prompts_equal_those_of_each_alone() -> None:
    rows = [F.tokens(1, n, n)[0] for n in (11, 2, 7)]
    ids, mask = F.padded(rows, "left")
    model = F.tiny("27b")
    settings = {"max_new_tokens": 12, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, eos_token_id=[], **settings)
    theirs = F.twin(F.config("27b")).generate(
        ids, attention_mask=mask, eos_token_id=-1, pad_token_id=0, **settings
    )
    assert torch.equal(together, theirs)
    for b, row in enumerate(rows):
        alone = model.generate(row[None], eos_token_id=[], **settings)
        assert torch.equal(together[b, -12:], alone[0, -12:]), f"row {b}"

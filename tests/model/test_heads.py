"""The heads: which logits, which loss, which token, and how outputs are read."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F_
from torch import Tensor

from gemma2.heads import Gemma2ForCausalLM, Gemma2ForTokenClassification
from gemma2.outputs import CausalLMOutputWithPast
from tests.model import factories as F


def causal(**overrides: Any) -> Any:
    return F.tiny("three", **overrides)


def sequence(**overrides: Any) -> Any:
    return F.tiny("three", "sequence", **overrides)


# ---- logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "columns"),
    [
        (0, [0, 1, 2, 3, 4, 5]),
        (1, [5]),
        (2, [4, 5]),
        (9, [0, 1, 2, 3, 4, 5]),
        (torch.tensor([3, 0]), [3, 0]),
    ],
)
@torch.no_grad()
def test_logits_to_keep(keep: Any, columns: list[int]) -> None:
    tokens = F.tokens(2, 6)
    whole = causal()(tokens, labels=tokens)
    part = causal()(tokens, logits_to_keep=keep, labels=tokens)
    torch.testing.assert_close(part.logits, whole.logits[:, columns])
    # the loss is over what is kept
    following = F_.pad(tokens, (0, 1), value=-100)[:, 1:][:, columns]
    wanted = F_.cross_entropy(whole.logits[:, columns].transpose(1, 2), following)
    torch.testing.assert_close(part.loss, wanted, equal_nan=True)


@torch.no_grad()
def test_logits_are_capped_unless_the_config_says_no_cap() -> None:
    tokens = F.tokens(2, 6)
    capped = causal(final_logit_softcapping=0.5)(tokens).logits
    free = causal(final_logit_softcapping=None)(tokens).logits
    assert float(capped.abs().max()) <= 0.5
    assert float(free.abs().max()) > 1


def test_a_tied_head_is_the_embeddings_parameter() -> None:
    tied = Gemma2ForCausalLM(F.config("three"))
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert tied.to(torch.bfloat16).lm_head.weight is tied.model.embed_tokens.weight
    untied = Gemma2ForCausalLM(F.config("three", tie_word_embeddings=False))
    assert untied.get_output_embeddings().weight is not untied.model.embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == untied.lm_head.weight.numel()
    assert float(untied.lm_head.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


# ---- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_the_loss_is_the_same_in_one_piece_and_in_several(grad: bool) -> None:
    tokens = F.tokens(4, 150)  # 600 tokens: several pieces where no gradient is wanted
    labels = tokens.masked_fill(tokens % 5 == 0, -100)
    with torch.set_grad_enabled(grad):
        out = causal()(tokens, labels=labels, use_cache=False)
    logits, following = out.logits[:, :-1], labels[:, 1:]
    wanted = F_.cross_entropy(logits.flatten(0, 1), following.flatten())
    torch.testing.assert_close(out.loss, wanted, rtol=1e-5, atol=0)
    assert out.loss.requires_grad == grad


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
@torch.no_grad()
def test_num_items_in_batch_divides_the_sum(items: Any) -> None:
    tokens = F.tokens(2, 6)
    mean = causal()(tokens, labels=tokens).loss
    out = causal()(tokens, labels=tokens, num_items_in_batch=items)
    torch.testing.assert_close(out.loss, mean * 10 / 7)


def test_unknown_arguments_are_not_swallowed() -> None:
    with pytest.raises(TypeError, match=r"no arguments \['atention_mask'\]"):
        causal()(F.tokens(1, 3), atention_mask=torch.ones(1, 3))


@torch.no_grad()
def test_token_labels_of_minus_100_are_ignored() -> None:
    model = F.tiny("three", "token", num_labels=5)
    tokens = F.tokens(2, 6)
    labels = tokens % 5
    labels[1] = -100
    assert torch.equal(model(tokens, labels=labels).loss, model(tokens[:1], labels=labels[:1]).loss)


def test_the_token_head_drops_out_in_training_only() -> None:
    config = F.config("three", classifier_dropout=0.5)
    model = Gemma2ForTokenClassification(config)
    tokens = F.tokens(1, 6)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


# ---- the sequence head's token ------------------------------------------------------------------


@torch.no_grad()
def at(tokens: Tensor, column: int) -> Tensor:
    """What the head reads at a column of one row."""
    return sequence()(tokens[None, : column + 1]).logits[0]


PADDED = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 0, 8, 9]])


@torch.no_grad()
def test_the_rightmost_token_that_is_not_the_pad_id_is_read() -> None:
    out = sequence()(PADDED, attention_mask=(PADDED != 0).long()).logits
    torch.testing.assert_close(out[0], at(PADDED[0], 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[1], at(PADDED[1, 2:], 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[2], at(PADDED[2], 4), atol=1e-4, rtol=0)
    # without a mask pads are tokens, but none of them is read
    out = sequence()(PADDED).logits
    torch.testing.assert_close(out[0], at(PADDED[0], 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[3], at(PADDED[3], 4), atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_the_mask_hides_is_padding_whatever_its_id() -> None:
    tokens = F.tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    out = sequence()(tokens, attention_mask=mask).logits
    torch.testing.assert_close(out[0], at(tokens[0], 2), atol=1e-4, rtol=0)
    embedded = sequence().get_input_embeddings()(tokens)
    again = sequence()(inputs_embeds=embedded, attention_mask=mask).logits
    torch.testing.assert_close(again, out)


@torch.no_grad()
def test_embeddings_without_a_mask_are_read_at_the_end_and_that_is_said() -> None:
    tokens = F.tokens(2, 5)
    embedded = sequence().get_input_embeddings()(tokens)
    with pytest.warns(UserWarning, match="the last column is read"):
        out = sequence()(inputs_embeds=embedded).logits
    torch.testing.assert_close(out, sequence()(tokens).logits)


@torch.no_grad()
def test_several_rows_need_a_pad_id() -> None:
    model = F.tiny("three", "sequence", pad_token_id=None)
    assert model(F.tokens(1, 5)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match=r"a batch of 2 rows needs config\.pad_token_id"):
        model(F.tokens(2, 5))


@torch.no_grad()
def test_the_sequence_head_goes_on_from_a_cache() -> None:
    tokens = F.tokens(2, 9)
    first = sequence()(tokens[:, :6])
    mask = torch.ones(2, 9, dtype=torch.int64)
    out = sequence()(tokens[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(out.logits, sequence()(tokens).logits, atol=1e-4, rtol=0)


# ---- refusals -----------------------------------------------------------------------------------

BAD_LABELS = {
    "causal, wrong shape": ("causal", {}, torch.zeros(2, 4, dtype=torch.int64), r"int64 \[2, 5\]"),
    "causal, float": ("causal", {}, torch.zeros(2, 5), "labels: is torch.float32"),
    "causal, too large": ("causal", {}, torch.full((2, 5), 97), "labels: holds 97"),
    "causal, negative": ("causal", {}, torch.full((2, 5), -1), "labels: holds -1"),
    "token, too large": ("token", {}, torch.full((2, 5), 2), "labels: holds 2"),
    "token, one a row": ("token", {}, torch.zeros(2, dtype=torch.int64), "labels: is torch.int64"),
    "single, too large": (
        "sequence",
        {},
        torch.tensor([0, 2]),
        "for single_label_classification: it must be",
    ),
    "multi, integers": (
        "sequence",
        {"problem_type": "multi_label_classification"},
        torch.zeros(2, 2, dtype=torch.int64),
        "for multi_label_classification: it must be floating",
    ),
    "regression, wrong shape": (
        "sequence",
        {"num_labels": 3, "problem_type": "regression"},
        torch.zeros(2),
        r"for regression: it must be floating \[2, 3\]",
    ),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_that_make_no_sense_are_refused(case: str) -> None:
    kind, overrides, labels, error = BAD_LABELS[case]
    with pytest.raises(ValueError, match=error):
        F.tiny("three", kind, **overrides)(F.tokens(2, 5), labels=labels)


@pytest.mark.parametrize("keep", [-1, 1.0, True, torch.tensor(1), torch.tensor([1.0])])
def test_logits_to_keep_is_a_count_or_column_numbers(keep: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="logits_to_keep"):
        causal()(F.tokens(1, 3), logits_to_keep=keep)


@pytest.mark.parametrize("kind", ["causal", "sequence", "token"])
def test_heads_refuse_a_call_without_input(kind: str) -> None:
    with pytest.raises(ValueError, match="neither given"):
        F.tiny("three", kind)()


# ---- outputs ------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_read_as_attributes_keys_indices_and_tuples() -> None:
    tokens = F.tokens(1, 4)
    out = causal()(tokens, labels=tokens)
    assert list(out) == list(out.keys()) == ["loss", "logits", "past_key_values"]
    assert out[0] is out["loss"] is out.loss
    assert out[-1] is out.past_key_values
    assert out[:2] == (out.loss, out.logits) == out.to_tuple()[:2]
    assert out.hidden_states is None
    assert "hidden_states" not in out
    assert dict(out)["logits"] is out.logits
    assert isinstance(out, dict)
    plain = causal()(tokens, labels=tokens, return_dict=False)
    assert type(plain) is tuple
    assert torch.equal(plain[1], out.logits)


def test_outputs_can_be_changed_copied_pickled_and_mapped() -> None:
    out = CausalLMOutputWithPast(logits=torch.ones(2))
    out["loss"] = torch.tensor(3.0)
    assert out.to_tuple()[0] is out.loss
    for twin in (copy.deepcopy(out), pickle.loads(pickle.dumps(out)), type(out)(dict(out))):
        assert type(twin) is type(out)
        assert torch.equal(twin.logits, out.logits)
        assert torch.equal(twin["loss"], out.loss)
    doubled = torch.utils._pytree.tree_map(lambda t: t * 2, out)
    assert isinstance(doubled, CausalLMOutputWithPast)
    assert float(doubled.loss) == 6
    out.loss = None
    assert list(out) == ["logits"]
    with pytest.raises(TypeError, match="cannot be deleted"):
        del out["logits"]
    with pytest.raises(TypeError, match="there is no"):
        CausalLMOutputWithPast({"logit": torch.ones(1)})  # type: ignore[arg-type]

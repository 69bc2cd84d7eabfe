"""generate() and pipelines give the same text as with eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import gemma2
from gemma2.integrations.transformers import HybridCache
from tests.integrations.transformers.twins import lively, model
from tests.model import factories as F

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def generate(attention: str, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    gemma = lively(attention)
    mask = torch.ones_like(ids) if mask is None else mask
    if options.pop("ours", False):
        options["past_key_values"] = HybridCache(gemma.config)
    return gemma.generate(ids, attention_mask=mask, **{**GREEDY, **options})


@pytest.mark.parametrize("ours", [False, True], ids=["their cache", "our cache"])
@pytest.mark.parametrize("how", ["greedy", "beams", "sampled", "chunked prefill"])
def test_generated_tokens_equal_eagers(how: str, ours: bool) -> None:
    options: dict[str, Any] = {
        "greedy": {"max_new_tokens": 40},
        "beams": {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2},
        "sampled": {"max_new_tokens": 12, "do_sample": True, "top_k": 5},
        "chunked prefill": {"max_new_tokens": 12, "prefill_chunk_size": 5},
    }[how]
    rows = [F.tokens(1, n, n)[0] for n in (130, 115, 128)]  # a ring of 128 wraps
    ids, mask = F.padded(rows[:1] if how == "chunked prefill" else rows, "left")
    made = []
    for attention, cache in (("eager", False), ("gemma2", ours)):
        torch.manual_seed(0)
        made.append(generate(attention, ids, mask, ours=cache, **options))
    assert torch.equal(*made)
    assert len(set(made[0][0, ids.shape[1] :].tolist())) > 5, "a text that says nothing"


def test_static_cache_generates_what_eager_does() -> None:
    ids, mask = F.padded([F.tokens(1, n, n)[0] for n in (21, 3)], "left")
    options: dict[str, Any] = {"max_new_tokens": 12, "cache_implementation": "static"}
    want = generate("eager", ids, mask, max_new_tokens=12)
    assert torch.equal(generate("gemma2", ids, mask, **options), want)


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_drafted_tokens_leave_the_text_as_it_is_past_the_window(how: str) -> None:
    ids = F.tokens(1, 120).repeat(1, 2)  # of which lookup finds something
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if how == "assistant":
        options = {"assistant_model": model("gemma2", "27b")}
    want = generate("eager", ids, max_new_tokens=16)
    assert torch.equal(generate("gemma2", ids, max_new_tokens=16, ours=True, **options), want)


def test_a_conversation_goes_on_in_our_cache() -> None:
    cache = HybridCache(lively("gemma2").config)
    first = generate("gemma2", F.tokens(1, 15), max_new_tokens=10, past_key_values=cache)
    assert cache.get_seq_length() == 24
    more = torch.cat([first, F.tokens(1, 6, 7)], dim=1)
    second = generate("gemma2", more, max_new_tokens=10, past_key_values=cache)
    assert torch.equal(second, generate("eager", more, max_new_tokens=10))


def tokenizer() -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(gemma2.tiny.path() / "tokenizer.json"), pad_token="<pad>"
    )


def test_pipelines_run_through_our_attention(tmp_path: Path) -> None:
    texts = ["dog:", "a domestic animal that barks at whoever comes to the door of the house:"]
    gemma2.tiny.load_sequence_classifier(torch.float32).save_pretrained(tmp_path)
    written, sorted_ = {}, {}
    for attention in ("eager", "gemma2"):
        options = {"attn_implementation": attention, "dtype": torch.float32}
        writer = transformers.AutoModelForCausalLM.from_pretrained(gemma2.tiny.path(), **options)
        assert writer.config._attn_implementation == attention
        tell = transformers.pipeline(
            "text-generation", model=writer, tokenizer=tokenizer(), device="cpu", batch_size=2
        )
        tell.tokenizer.padding_side = "left"
        said = tell(texts, max_new_tokens=8, do_sample=False)
        written[attention] = [one[0]["generated_text"] for one in said]
        sorter = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, **options
        )
        sorter.config.pad_token_id = 0
        sort = transformers.pipeline(
            "text-classification", model=sorter, tokenizer=tokenizer(), device="cpu", batch_size=2
        )
        sorted_[attention] = sort(texts)
    assert written["gemma2"] == written["eager"]
    assert all(said.startswith(text) for said, text in zip(written["eager"], texts, strict=True))
    for ours, theirs in zip(sorted_["gemma2"], sorted_["eager"], strict=True):
        assert ours["label"] == theirs["label"]
        assert abs(ours["score"] - theirs["score"]) < 1e-5

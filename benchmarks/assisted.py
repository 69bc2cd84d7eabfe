"""Assisted decoding with the embedded model: drafts looked up in the text, or by its first layers.

It is timed against the model alone, in turns. What is gained depends on the text: "loop" falls into
repeating a word, "long" repeats phrases in its later part, "short" is its beginning, where there is
little to look up. "same tokens" may be fewer than all in bfloat16, where a call of several tokens
rounds otherwise than one of a single token, and two tokens may be equally probable.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from gemma2 import Gemma2Config, Gemma2ForCausalLM, tiny

# the word that is defined, and how many tokens are written
TEXTS = {"loop": ("number 1", 512), "long": ("dog", 512), "short": ("dog", 128)}


def cases() -> list[dict[str, Any]]:
    drafts = [(text, {"lookup": count}) for text in TEXTS for count in (3, 10)]
    drafts.append(("short", {"layers": 3}))
    return [
        {"dtype": dtype, "text": text, **draft}
        for dtype in ("float32", "bfloat16")
        for text, draft in drafts
    ]


@functools.cache
def model(dtype: str) -> Gemma2ForCausalLM:
    return tiny.load_causal_lm().to(getattr(torch, dtype)).eval()


@functools.cache
def first_layers(dtype: str, count: int) -> Gemma2ForCausalLM:
    """Give the embedded model without its later layers: a small model of almost the same opinion."""
    whole = model(dtype)
    kept = whole.config.layer_types[:count]
    config = Gemma2Config.from_dict(
        whole.config.to_dict(), num_hidden_layers=count, layer_types=kept
    )
    short = Gemma2ForCausalLM(config).to(whole.dtype).eval()
    names = short.state_dict().keys()
    short.load_state_dict({name: whole.state_dict()[name] for name in names})
    return short


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    word, new = TEXTS[case["text"]]
    begin = tiny.load_tokenizer().encode(tiny.prompt(word))
    whole, ids = model(case["dtype"]).to(device), torch.tensor([begin], device=device)
    if "lookup" in case:
        help: dict[str, Any] = {"prompt_lookup_num_tokens": case["lookup"]}
    else:
        help = {"assistant_model": first_layers(case["dtype"], case["layers"]).to(device)}
        help["num_assistant_tokens"] = 5
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": []}
    calls: list[int] = []

    def note(_: nn.Module, inputs: Any, output: Tensor) -> None:
        calls.append(output.shape[1])

    hook = whole.model.embed_tokens.register_forward_hook(note)
    text = whole.generate(ids, **options, **help)
    hook.remove()
    steps = len(calls) - 1  # the first one reads the prompt
    drafted = sum(calls[1:]) - steps
    differ = (text != whole.generate(ids, **options))[0, ids.shape[1] :]
    return {
        "ours": lambda: whole.generate(ids, **options, **help),
        "alone": lambda: whole.generate(ids, **options),
        "tokens": new,
        "same tokens": int((differ.cumsum(0) == 0).sum()),
        "accepted": round((new - 1 - steps) / drafted, 2),
        "tokens a call": round((new - 1) / steps, 2),
    }

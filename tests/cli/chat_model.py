"""A tiny random model that can be talked to: its vocabulary has the tokens of turns."""

from __future__ import annotations

from pathlib import Path

import torch

import gemma2
from tests.model.factories import config, load, state_dict
from tests.model.libraries import BOS, END, EOS, PAD, make_library

LETTERS = range(262, 262 + 27)  # "▁" and a to z


def chat_model(**overrides) -> gemma2.Gemma2ForCausalLM:
    """A model whose most probable text is of letters, depends on all before, and never ends."""
    vocab = make_library().get_vocab_size()
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    shape = {"vocab_size": vocab, "tie_word_embeddings": False, "max_position_embeddings": 8192}
    cfg = config("three", **{**shape, **special, **overrides})
    state = state_dict(cfg)
    head = state["model.embed_tokens.weight"].roll(31, dims=0)
    silent = torch.ones(vocab, dtype=torch.bool)
    silent[list(LETTERS)] = False
    head[silent] = 0.0
    state["lm_head.weight"] = head
    for name, weight in state.items():
        if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
            weight += 6.0
    model = gemma2.Gemma2ForCausalLM(cfg)
    load(model, state)
    model.generation_config = gemma2.GenerationConfig(eos_token_id=[EOS, END])
    return model.eval()


def chat_folder(path: Path, **overrides) -> str:
    """That model in the layout of the hub."""
    chat_model(**overrides).save_pretrained(path)
    make_library().save(str(path / "tokenizer.json"))
    return str(path)

"""The cache of a call of `generate`: one that is made for it, or what is kept of the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma2.cache import HybridCache

if TYPE_CHECKING:
    from gemma2.generation.mixin import GenerationMixin

__all__ = ["common_prefix", "kept_tokens", "make_room", "new_cache"]

# Of a cache that is made here, the default of `HybridCache`.
MARGIN = 64


def kept_tokens(
    model: GenerationMixin,
    cache: HybridCache | None,
    rows: int,
    lengths: Tensor,
    device: torch.device,
    prompts: list[list[int]] | None,
) -> tuple[Tensor, int]:
    """Give how many tokens of each prompt can stay in the cache, int64 [B], and what that loses.

    Where the cache knows its text, these are the tokens that it and the prompt begin with. A row whose
    rings have lost what is seen from there keeps none; what is lost is the sum of such rows' tokens.

    Args:
        rows: of the cache, as many as the output has.
        lengths: int64 [B], tokens of the prompts.
        prompts: the prompts' tokens; None: they are embeddings.
    """
    if cache is None:
        return torch.zeros_like(lengths), 0
    if not isinstance(cache, HybridCache):
        raise TypeError(
            f"generate: past_key_values is a {type(cache).__name__}: it must be a HybridCache"
        )
    cache.check_model(model.config, rows, device)
    if cache.text is not None and prompts is not None:
        texts = [*cache.text, *([] for _ in prompts)]  # of rows that it does not know: nothing
        same = [common_prefix(*both) for both in zip(texts, prompts, strict=False)]
        kept = cache.reachable(torch.tensor(same, device=cache.lengths.device))
        return kept.to(device), sum(same) - int(kept.sum())
    cached = cache.lengths[: lengths.shape[0]].to(device)
    left = lengths - cached
    if bool((left <= 0).any()):
        row = int((left <= 0).nonzero()[0])
        raise ValueError(
            f"generate: past_key_values holds {int(cached[row])} tokens of row {row}, the "
            f"prompt has {int(lengths[row])}: pass the whole text so far and at least one "
            "token more, crop() the cache, or reset() it"
        )
    return cached, 0


def common_prefix(text: list[int], prompt: list[int]) -> int:
    """Give how many tokens both begin with, without the prompt's last, which must be read."""
    pairs = zip(text, prompt[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(prompt) - 1))


def new_cache(
    model: GenerationMixin, rows: int, columns: int, device: torch.device, ahead: int
) -> HybridCache:
    """Give an empty cache from which `ahead` tokens can be taken back."""
    cache = HybridCache(model.config, rows, columns, margin=max(MARGIN, ahead))
    cache.place(device)  # keys live where their layers do
    return cache


def make_room(cache: HybridCache, longest: int, new_tokens: int, ahead: int) -> None:
    """Grow the cache for a text and `ahead` tokens that may be taken back, if it is too small.

    Raises:
        ValueError: it cannot grow, or its margin is too small.
    """
    need = longest + new_tokens - 1 + ahead
    if need > cache.max_cache_len:
        drafts = f" (of which {ahead} for drafted tokens)" if ahead else ""
        if not cache.growable:
            raise ValueError(
                f"generate: past_key_values has max_cache_len {cache.max_cache_len}, but "
                f"{longest} tokens and {new_tokens} new ones need {need}{drafts}: make it larger, "
                f"call grow({need}), or lower max_new_tokens"
            )
        cache.grow(need)
    if any(layer.wraps and layer.margin < ahead for layer in cache.layers):
        raise ValueError(
            f"generate: past_key_values has a margin of {cache.margin} tokens that can be taken "
            f"back, drafts need {ahead}: make it with margin={ahead}, or draft fewer tokens"
        )

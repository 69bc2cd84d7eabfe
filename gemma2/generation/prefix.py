"""The cache of a call of `generate`: one that is made for it, or what is kept of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma2.cache import CacheSnapshot, HybridCache
from gemma2.snapshot import common_prefix

if TYPE_CHECKING:
    from gemma2.generation.mixin import GenerationMixin

__all__ = ["Kept", "kept_tokens", "make_room", "new_cache", "will_forget"]

# Of a cache that is made here, the default of `HybridCache`.
MARGIN = 64


@dataclass
class Kept:
    """What can stay in a cache of the prompts of a call, a list entry for each of them.

    counts: tokens that are kept.
    rows: the row of the cache that they are kept from.
    snapshots: what brings them back; None: they are there.
    lost: tokens that the cache knows but has to read again, of all prompts.
    ends: whether a row's whole text is kept, so that its end is the end of a turn.
    """

    counts: list[int]
    rows: list[int]
    snapshots: list[CacheSnapshot | None]
    lost: int
    ends: list[bool]

    def apply(self, cache: HybridCache, longest: list[int]) -> None:
        """Leave in the cache's first rows what is kept.

        Args:
            longest: tokens that each row can come to have in this call.
        """
        if will_forget(cache, longest, self.counts, self.ends):
            cache.keep_snapshot()
        own = list(range(len(self.rows)))
        if self.rows != own:
            cache.reorder(torch.tensor(self.rows))
        for snapshot in dict.fromkeys(filter(None, self.snapshots)):
            back = [row for row in own if self.snapshots[row] is snapshot]
            cache.restore_rows(snapshot, back, [self.counts[row] for row in back])
        cache.crop(torch.tensor(self.counts))
        cache.reprocessed += self.lost


def will_forget(
    cache: HybridCache, longest: list[int], lengths: list[int], which: list[bool] | None = None
) -> bool:
    """Tell whether the rings may lose the last token but one of a text while it is gone on with.

    Args:
        longest: tokens that each row can come to have.
        lengths: of the texts.
        which: rows that matter; None: all do.
    """
    if not cache.keep_snapshots:
        return False
    least = cache.least_crop(torch.tensor(longest)).tolist()
    which = which or [True] * len(lengths)
    return any(use and n - 1 < low for use, n, low in zip(which, lengths, least, strict=True))


def kept_tokens(
    model: GenerationMixin,
    cache: HybridCache | None,
    rows: int,
    lengths: Tensor,
    device: torch.device,
    prompts: list[list[int]] | None,
) -> tuple[Tensor, Kept | None]:
    """Give how many tokens of each prompt can stay in the cache, int64 [B], and how.

    Where the cache knows its text, these are the tokens that it and the prompt begin with, as far as
    the rings or a snapshot of them reach back. None: all that the cache holds stays.

    Args:
        rows: of the cache, as many as the output has.
        lengths: int64 [B], tokens of the prompts.
        prompts: the prompts' tokens; None: they are embeddings.
    """
    if cache is None:
        return torch.zeros_like(lengths), None
    if not isinstance(cache, HybridCache):
        raise TypeError(
            f"generate: past_key_values is a {type(cache).__name__}: it must be a HybridCache"
        )
    cache.check_model(model.config, rows, device)
    cache.end_stream()
    if cache.text is not None and prompts is not None:
        kept = _keep(cache, prompts)
        return torch.tensor(kept.counts, device=device), kept
    cached = cache.lengths[: lengths.shape[0]].to(device)
    left = lengths - cached
    if bool((left <= 0).any()):
        row = int((left <= 0).nonzero()[0])
        raise ValueError(
            f"generate: past_key_values holds {int(cached[row])} tokens of row {row}, the "
            f"prompt has {int(lengths[row])}: pass the whole text so far and at least one "
            "token more, crop() the cache, or reset() it"
        )
    return cached, None


# Tokens that another row must keep more of a prompt to be copied: a copy takes time, too.
WORTH_A_COPY = 32


def _keep(cache: HybridCache, prompts: list[list[int]]) -> Kept:
    """Choose for each prompt the row and the snapshot that keep most of it."""
    known = cache.text or []
    texts = [*known, *([] for _ in prompts[len(known) :])]
    # what can be gone back to: the texts of the rows, lengths at which they end, how far they crop
    written, lengths = cache._written, cache.lengths
    states: list[tuple[CacheSnapshot | None, list[list[int]], list[int], list[int]]] = [
        (None, texts, lengths.tolist(), cache.least_crop(written).tolist())
    ]
    for taken in cache.snapshots():
        ends = taken.lengths[taken.source].tolist()
        least = cache.least_crop(taken.written)[taken.source].tolist()
        states.append((taken, taken.texts(), ends, least))
    kept = Kept([], [], [], 0, [])
    for number, prompt in enumerate(prompts):
        wanted = prompt[:-1]  # the last one must be read
        best, most = -1, 0
        choice: tuple[int, CacheSnapshot | None] = (number, None)
        others = [row for row in range(len(texts)) if row != number]
        for row in (number, *others):
            same = common_prefix(texts[row], wanted)
            most = max(most, same)
            for snapshot, past, ends, least in states:
                n = min(same, common_prefix(past[row], wanted))
                reached = n if n >= least[row] or n == ends[row] else 0
                if reached > best + (WORTH_A_COPY if row != number else 0):
                    best, choice = reached, (row, snapshot)
        kept.counts.append(best)
        kept.rows.append(choice[0])
        kept.snapshots.append(choice[1] if best else None)
        kept.ends.append(choice[1] is None and 0 < best == len(texts[choice[0]]))
        kept.lost += most - best
    return kept


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

"""Beam search: for each prompt, the K texts with the largest probability so far go on together.

Each step looks at the best continuations of a prompt's texts, at least two for each text, so that K
of them go on even if every text's best one ends. Those among the best K that end are kept apart,
with their log-probability / length ** length_penalty, as long as they are among the K best that have
ended. Meaning and order of everything are those of transformers (`_beam_search` of 4.57 and 5), whose
tokens and scores these are. The prompt is read once; then its rows of the cache are copied K times,
and with each step follow the texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma2.generation.loop import FAULTS, inference, or_empty, read_prompt
from gemma2.generation.run import Beams, Run

if TYPE_CHECKING:
    from gemma2.generation.mixin import GenerationMixin

__all__ = ["Found", "beam_search"]

# Less than any log-probability: for what must not be chosen, and stays in its place.
NEVER = -1.0e9


@dataclass
class Found:
    """What a search gives, B prompts with R texts each, the best one first.

    tokens: int64 [B * R, T], new tokens, then pads.
    sources: int64 [B * R, T], the row (of B * K) that each token was chosen in, then -1.
    scores: float32 [B * R], log-probability / length ** length_penalty.
    """

    tokens: Tensor
    sources: Tensor
    scores: Tensor


def beam_search(model: GenerationMixin, run: Run) -> Found:
    """Search for the best texts. The cache is left with the beginning of each, as far as it has it.

    Raises:
        ValueError: the logits of a prompt's texts are at fault.
    """
    assert run.beams is not None
    search = _Search(run, run.beams)
    with inference(run):
        logits = read_prompt(run)
    run.cache.settle(max(run.others, *run.lengths))
    beyond = (run.cache.text or [])[len(run.lengths) :]
    try:
        while True:
            with inference(run):
                done, is_moved = search.step(logits)
                if done:
                    break
                if is_moved:
                    run.cache.reorder(search.source)
                logits = model(
                    input_ids=search.last()[:, None],
                    past_key_values=run.cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
        found = search.found()
    except BaseException:
        search.leave(None, beyond)  # the prompts are still there
        raise
    search.leave(found, beyond)
    return found


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Give values[b, index[b, i]] for values [B, n, ...] and index [B, m]."""
    rows = torch.arange(index.shape[0], device=index.device)[:, None]
    return values[rows, index]


class _Search:
    """The texts of B prompts: K that go on, and the K best that have ended.

    Attributes:
        source: int64 [B * K], the row of the step before that each text goes on from.
    """

    def __init__(self, run: Run, beams: Beams) -> None:
        self._run, self._beams = run, beams
        rows, device = run.prompt.shape[0], run.prompt.device
        self._batch, self._columns = rows // beams.count, run.new_tokens
        shape = self._batch, beams.count
        self._count = 0  # new tokens of a text that goes on
        self.source = torch.arange(rows, device=device)
        # of each text: tokens and the rows they were chosen in, [B, K, T], and score [B, K]
        self._tokens = torch.full((*shape, self._columns), run.pad, device=device)
        self._sources = torch.full_like(self._tokens, -1)
        # all are the prompt at first: continuations of one of them only, or they would all be alike
        self._scores = torch.full(shape, NEVER, device=device)
        self._scores[:, 0] = 0.0
        self._held = self._tokens  # what the rows of the cache have been given
        self._ended_tokens, self._ended_sources = self._tokens.clone(), self._sources.clone()
        self._ended_scores = torch.full(shape, NEVER, device=device)
        self._has_ended = torch.zeros(shape, dtype=torch.bool, device=device)
        self._can_improve = torch.ones((self._batch, 1), dtype=torch.bool, device=device)
        self._noise = torch.Generator(device).manual_seed(run.sampler.seed)
        # length ** length_penalty of every length, computed in float64 like Python's numbers
        lengths = range(1, self._columns + 1)
        self._worth = [float(n) ** beams.length_penalty for n in lengths]

    def last(self) -> Tensor:
        """Give the last token of each row, int64 [B * K]."""
        return self._tokens[:, :, self._count - 1].flatten()

    def step(self, logits: Tensor) -> tuple[bool, bool]:
        """Add a token to all texts, from the logits [B * K, V] after each.

        Returns:
            Whether the search is over, and whether rows of the cache have to follow `source`.
        """
        sampler, n = self._run.sampler, self._count
        step = torch.full_like(self.source, n)
        scores = sampler.processed(torch.log_softmax(logits.float(), dim=-1), step)
        scores = sampler.warped(scores, self._beams.least)
        if self._run.record is not None:
            self._run.record.put(0, logits=logits, scores=scores)
            self._run.record.post()
            self._run.record.take([[0, 0] for _ in self.source])
        total = scores.unflatten(0, self._tokens.shape[:2]) + self._scores[:, :, None]
        best, text, token = self._candidates(total)
        tokens, sources = _take(self._tokens, text), _take(self._sources, text)
        first = torch.arange(self._batch, device=text.device)[:, None] * self._beams.count
        tokens[:, :, n], sources[:, :, n] = token, text + first
        ends = self._ends(token, tokens)

        self._held = self._tokens
        self._scores, chosen = (best + ends * NEVER).topk(self._beams.count)
        self._tokens, self._sources = _take(tokens, chosen), _take(sources, chosen)
        self.source = self._sources[:, :, n].flatten()
        self._keep_ended(best, tokens, sources, ends)
        self._count += 1
        self._compare()

        is_over = ~self._can_improve.any() | ends.all()
        if self._beams.early_stopping is True:
            is_over |= self._has_ended.all()
        # all copies of a prompt are alike before their first token
        is_moved = (self.source != torch.arange(len(step), device=step.device)).any() & (n > 0)
        is_nan, is_nothing = best[:, 0].isnan() | (best[:, 0] == torch.inf), best[:, 0].isneginf()
        told = torch.stack(
            [is_over.expand_as(is_nan), is_moved.expand_as(is_nan), is_nan, is_nothing]
        )
        over, moved, nan, nothing = told.tolist()  # the one time that the host waits
        for fault, rows in ((-1, nan), (-2, nothing)):
            if True in rows:
                raise ValueError(
                    f"generate: prompt {rows.index(True)}: the logits of the next token "
                    f"{FAULTS[fault]}"
                )
        self._run.sampler.reorder(self.source)
        self._run.sampler.note(self._tokens[:, :, n].reshape(-1, 1), step)
        return over[0], moved[0]

    def _candidates(self, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the best continuations of log-probabilities [B, K, V], best first, or draw them.

        Returns:
            Log-probability, text (0 to K - 1) and token of each, [B, C].
        """
        vocab = total.shape[2]
        flat = total.flatten(1)
        count = min(self._beams.candidates, flat.shape[1])
        if self._run.sampler.temperature > 0:
            # the largest sums with Gumbel numbers are a draw without replacement
            drawn = torch.empty_like(flat).exponential_(generator=self._noise).log_().neg_()
            index = (flat + drawn).topk(count).indices
            best, order = flat.gather(1, index).sort(dim=1, descending=True)
            index = index.gather(1, order)
        else:
            best, index = flat.topk(count)
        return best, index // vocab, index % vocab

    def _ends(self, token: Tensor, tokens: Tensor) -> Tensor:
        """Tell which candidates end with their last token, bool [B, C]."""
        run, n = self._run, self._count
        if n + 1 == self._columns:
            return torch.ones_like(token, dtype=torch.bool)
        ends = torch.zeros_like(token, dtype=torch.bool)
        if run.eos is not None:
            ends |= (token[..., None] == run.eos).any(dim=-1)
        if run.stops is not None:
            new = tokens[:, :, : n + 1]
            ends |= torch.tensor(run.stops.ends(new), device=ends.device)
        return ends

    def _keep_ended(self, best: Tensor, tokens: Tensor, sources: Tensor, ends: Tensor) -> None:
        """Keep the best texts that have ended, with those candidates that end now.

        Only the best K candidates count; the others are there to go on with.
        """
        ends = ends & (torch.arange(ends.shape[1], device=ends.device) < self._beams.count)
        closed = ~self._can_improve
        if self._beams.early_stopping is True:
            closed = closed | self._has_ended.all(dim=1, keepdim=True)
        worth = best / self._worth[self._count] + closed * NEVER + ~ends * NEVER
        self._ended_scores, chosen = torch.cat([self._ended_scores, worth], 1).topk(
            self._beams.count
        )
        self._ended_tokens = _take(torch.cat([self._ended_tokens, tokens], 1), chosen)
        self._ended_sources = _take(torch.cat([self._ended_sources, sources], 1), chosen)
        self._has_ended = _take(torch.cat([self._has_ended, ends], 1), chosen)

    def _compare(self) -> None:
        """Note the prompts whose best running text can no longer become better than the ended ones."""
        longest = self._beams.early_stopping == "never" and self._beams.length_penalty > 0
        length = self._columns if longest else self._count
        hoped = self._scores[:, :1] / self._worth[length - 1]
        worst = self._ended_scores.amin(dim=1, keepdim=True)
        worst = torch.where(self._has_ended, worst, NEVER)
        self._can_improve = self._can_improve & (hoped > worst).any(dim=1, keepdim=True)

    def found(self) -> Found:
        """Give the best texts that have ended."""
        returned = slice(0, self._beams.returned)
        sources = self._ended_sources[:, returned].flatten(0, 1)
        width = int((sources >= 0).sum(dim=1).max())
        return Found(
            self._ended_tokens[:, returned].flatten(0, 1)[:, :width].clone(),
            sources[:, :width].clone(),
            self._ended_scores[:, returned].flatten().clone(),
        )

    def leave(self, found: Found | None, beyond: list[list[int]]) -> None:
        """Leave row i of the cache with the beginning of text i, as far as a row still has it.

        Where the rings do not reach back so far, the row is emptied; so are all others of the batch.

        Args:
            found: the texts; None: only the prompts, one row each.
            beyond: texts of the cache's rows that are not in the batch.
        """
        run, cache = self._run, self._run.cache
        if not run.is_kept:
            return
        with or_empty(cache), inference(run):
            source, common = self._rows_of(found)
            cache.reorder(source)
            wanted = torch.zeros(len(self.source), dtype=torch.int64, device=source.device)
            prompts = torch.tensor(run.lengths, device=source.device)
            wanted[: len(source)] = prompts[source] + common
            wanted = cache.reachable(wanted)
            cache.crop(wanted)
            if run.prompts is None or cache.has_history:
                return
            new = [[] for _ in source] if found is None else found.tokens.tolist()
            texts = [[*run.prompts[row], *new[i]] for i, row in enumerate(source.tolist())]
            texts += [[] for _ in range(len(self.source) - len(texts))]
            # not what was wanted: an error in reorder() has emptied the rows
            lengths = cache.lengths[: len(texts)].tolist()
            cache.text = [text[:n] for text, n in zip(texts, lengths, strict=True)] + beyond

    def _rows_of(self, found: Found | None) -> tuple[Tensor, Tensor]:
        """Give for each text the row of the cache that begins like it, and new tokens in common."""
        first = torch.arange(self._batch, device=self.source.device) * self._beams.count
        if found is None:
            return first, torch.zeros_like(first)
        held = min(self._count - 1, found.tokens.shape[1])
        own = found.tokens[:, None, :held].unflatten(0, (self._batch, -1))  # [B, R, 1, held]
        same = own == self._held[:, None, :, :held]  # [B, R, K, held]
        common, best = same.to(torch.int64).cumprod(dim=-1).sum(dim=-1).max(dim=-1)
        lengths = (found.sources >= 0).sum(dim=1)
        # a text's last token is never in the cache
        common = torch.minimum(common.flatten(), (lengths - 1).clamp(min=0))
        return (best + first[:, None]).flatten(), common

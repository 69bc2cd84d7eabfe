"""How well a model predicts a text: log-probabilities of tokens, and perplexity over a long text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma2.heads import Gemma2ForCausalLM
from gemma2.model import beside
from gemma2.modes import evaluating

__all__ = ["Perplexity", "perplexity", "token_log_probs"]

# Logits that exist at a time, in float32: 128 MB. Of a vocabulary of 256,000 these are 131 tokens.
_LOGITS_AT_A_TIME = 2**25


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` found.

    log_prob: natural logarithm of the probability of all scored tokens, summed in float64.
    tokens: that were scored.
    read: that the model has read for it, begin-of-sequence tokens included.
    windows: it has read them in.
    context, stride: of the windows.
    """

    log_prob: float
    tokens: int
    read: int
    windows: int
    context: int
    stride: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token; infinite if that is too large."""
        try:
            return math.exp(-self.log_prob / self.tokens)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, count: int) -> float:
        """Give the bits that one of the text's `count` bytes takes: comparable between tokenizers."""
        return -self.log_prob / math.log(2) / count


def token_log_probs(
    model: Gemma2ForCausalLM, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Give the logarithm of each token's probability after those before it, float32 [B, S].

    Natural logarithm over capped logits. 0 at a row's first token, before which there is none, and on
    padding, so that a sum over a row is the logarithm of the probability of the row given its first
    token. No gradients, no dropout; the logits of the vocabulary exist for a part of the tokens at a
    time.

    Args:
        input_ids: int64 [B, S], with the begin-of-sequence token.
        attention_mask: [B, S], 1 = token, 0 = padding at either side. None: all are tokens.

    Raises:
        TypeError, ValueError: input_ids or attention_mask have another dtype or shape.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.int64:
        found = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"token_log_probs: input_ids is {found}: it must be an int64 tensor [B, S]")
    if input_ids.dim() != 2:
        raise ValueError(
            f"token_log_probs: input_ids has the shape {list(input_ids.shape)}: it must be [B, S]"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"token_log_probs: attention_mask has the shape {list(attention_mask.shape)}: it must "
            f"be that of input_ids, {list(input_ids.shape)}"
        )
    out = torch.zeros(input_ids.shape, dtype=torch.float32, device=input_ids.device)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    real = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    # tokens that have one before them in their row
    scored = (real != 0) & (real.cumsum(1) > 1)
    with _evaluating(model):
        states = model.model(input_ids, attention_mask, use_cache=False).last_hidden_state
        # the column of the token before: the last real one
        last = (columns * real).cummax(dim=1).values
        before = torch.nn.functional.pad(last, (1, 0))[:, :-1]
        rows, places = scored.nonzero(as_tuple=True)
        states = states[rows, before[rows, places]]
        out[rows, places] = _log_probs(model, states, input_ids[rows, places])
    return out


@contextlib.contextmanager
def _evaluating(model: Gemma2ForCausalLM) -> Iterator[None]:
    """Compute without gradients and in eval mode, and put every module's mode back."""
    training = [module for module in model.modules() if module.training]
    with evaluating(training), torch.no_grad():
        yield


def _log_probs(model: Gemma2ForCausalLM, states: Tensor, targets: Tensor) -> Tensor:
    """Give float32 [N]: the log-probability of token targets[n] after hidden state states[n]."""
    head, cap = model.lm_head, model.config.final_logit_softcapping
    found = torch.zeros(len(targets), dtype=torch.float32, device=targets.device)
    step = max(1, _LOGITS_AT_A_TIME // model.config.vocab_size)
    for first in range(0, len(targets), step):
        part = slice(first, first + step)
        logits = head(beside(states[part], head)).float()
        if cap is not None:  # in float32: in the model's dtype it would be rounded twice
            logits.div_(cap).tanh_().mul_(cap)
        chosen = targets[part].to(logits.device)[:, None]
        score = logits.gather(1, chosen)[:, 0] - logits.logsumexp(dim=1)
        found[part] = score.to(found.device)
    return found


def perplexity(
    model: Gemma2ForCausalLM,
    ids: Sequence[int] | Tensor,
    *,
    stride: int | None = None,
    context: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Measure how well a model predicts a text of any length, in windows that overlap.

    A window is the begin-of-sequence token and up to `context` - 1 tokens of the text; each begins
    `stride` tokens after the one before. Each token of the text is scored once, in the first window
    that reaches it: in the first window all are, in a later one those that are new, with at least
    `context` - `stride` tokens before them.

    Args:
        ids: tokens of the text, one row; a begin-of-sequence token in front is not part of it.
        stride: less than context; a smaller one costs more and gives each token more to look at.
            None: half of the context.
        context: tokens in a window. None: what the model was made for.
        progress: called after each window with the number of tokens scored so far.

    Raises:
        TypeError, ValueError: an argument makes no sense, or the config names no
            begin-of-sequence token; the text names it.
    """
    bos = model.config.bos_token_id
    if bos is None:
        raise ValueError(
            "perplexity: the model's config has no bos_token_id, which each window begins with"
        )
    row = torch.as_tensor(ids)
    if row.dim() == 2 and row.shape[0] == 1:
        row = row[0]
    if row.dim() != 1 or (row.numel() and row.dtype != torch.int64):
        raise ValueError(
            f"perplexity: ids is {row.dtype} {list(row.shape)}: it must be one row of integers"
        )
    if row.numel() and int(row[0]) == bos:
        row = row[1:]
    if not row.numel():
        raise ValueError("perplexity: ids holds no token to score: give at least one besides bos")
    if context is None:
        context = model.config.max_position_embeddings
    _check_count("context", context, 2)
    stride = context // 2 if stride is None else stride
    _check_count("stride", stride, 1)
    if stride >= context:
        raise ValueError(
            f"perplexity: stride is {stride}, context {context}: stride must be less, or tokens "
            "between two windows would not be scored"
        )
    row = row.to(model.device)
    total, done, read, windows = 0.0, 0, 0, 0
    for begin in range(0, len(row), stride):
        end = min(begin + context - 1, len(row))
        window = torch.cat([row.new_tensor([bos]), row[begin:end]])
        new = end - done
        with _evaluating(model):
            states = model.model(window[None], use_cache=False).last_hidden_state[0]
            scores = _log_probs(model, states[-new - 1 : -1], window[-new:])
        total += float(scores.double().sum())
        done, read, windows = end, read + len(window), windows + 1
        if progress is not None:
            progress(done)
        if done == len(row):
            break
    return Perplexity(total, done, read, windows, context, stride)


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"perplexity: {name} is {value!r}: it must be an integer")
    if value < least:
        raise ValueError(f"perplexity: {name} is {value}: it must be at least {least}")

"""The next token of every row, from capped logits."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.ops._library import library, register_fake


def sample(
    logits: Tensor,
    history: Tensor | None,
    seed: int,
    step: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """Draws one token a row: penalty, temperature, top-k, top-p, min-p, then Gumbel-max.

    In this order, each step as its namesake in transformers does it:

    * penalty: the score x of every token of the row's history becomes ``x / penalty`` if positive,
      else ``x * penalty``, once however often the token occurs (Keskar et al. 2019, arXiv
      1909.05858);
    * temperature: scores are divided by it; 0 is greedy, and gives the first of the largest scores;
    * top-k: scores below the k-th largest are dropped; those equal to it stay, all of them;
    * top-p: the smallest set of largest scores whose probabilities sum to at least ``top_p`` stays;
      of equal scores those with larger indices come first (Holtzman et al. 2019, arXiv 1904.09751);
    * min-p: scores whose probability is below ``min_p`` times the largest are dropped (Nguyen et
      al. 2024, arXiv 2407.01082).

    The token is ``argmax(score + g)`` with independent Gumbel numbers ``g = -log(-log(u))``, which
    is a draw from the softmax of the scores. u comes from Philox4x32-10 with the seed as key and
    (vocabulary index, row, step) as counter (csrc/common/philox.h), so that a token depends on
    nothing else: neither on threads, nor on the other rows.

    Args:
        logits: ``[B, V]``, float32, bfloat16 or float16; -inf is never drawn.
        history: int64 ``[B, L]`` for the penalty; negative entries are ignored. May be None.
        seed: any int64.
        step: int64 scalar tensor, or ``[B]`` with a step for each row; count it up between calls.
        temperature: not negative; 0 is greedy.
        top_k: not negative; 0 keeps all.
        top_p: in ``(0, 1]``; 1 keeps all.
        min_p: in ``[0, 1]``; 0 keeps all.
        repetition_penalty: positive; 1 is none.

    Returns:
        int64 ``[B]``. On a CUDA device, where an error would have to wait for the device, a row of
        logits that is at fault gives -1 (it has NaN or +inf) or -2 (it has nothing above -inf).

    Raises:
        ValueError: an argument is outside its range, a shape or dtype does not fit, a history entry
            is not below V, or a row of logits has NaN, +inf, or nothing above -inf.
            (On a CUDA device the last is in the result, and a history entry out of range stops the
            kernel.)
    """
    return library.sample(
        logits, history, seed, step, temperature, top_k, top_p, min_p, repetition_penalty
    )


@register_fake("sample")
def _(
    logits: Tensor,
    history: Tensor | None,
    seed: int,
    step: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)

"""From capped logits to a token."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.ops._library import library


def sample(
    logits: Tensor,
    history: Tensor | None = None,
    seed: int = 0,
    step: Tensor | int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """One token per row: repetition penalty, temperature, top-k, top-p, min-p, then a draw.

    The draw is Gumbel-max: ``argmax(logit_i - log(-log(u_i)))`` over the tokens that remain, with u_i from
    Philox4x32-10 (Salmon et al. 2011): key = seed, counter = (i / 4, row, step), word = i mod 4. So a
    token depends on its logits, the seed, the row and the step alone, on every device.

    Args:
        logits: ``[B, V]``, capped; float32, bfloat16 or float16. -inf is never drawn.
        history: int64 ``[B, L]``, the tokens that the repetition penalty applies to, each once; -1 is
            no token.
        seed: of the random numbers, a 64-bit integer.
        step: int64 scalar (a tensor, so that a captured graph may advance it), the number of the draw.
        temperature: divides the logits; 0 takes the first largest logit.
        top_k: keep the k largest, and what equals the k-th; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities sum to at least top_p.
        min_p: keep tokens at least min_p times as probable as the most probable one.
        repetition_penalty: divides positive and multiplies negative logits of the history (Keskar et
            al. 2019, arXiv 1909.05858).

    Returns:
        int64 ``[B]``.

    Raises:
        ValueError: a parameter out of range, wrong shapes or dtypes, NaN among the logits, or a row
            without a finite one.
    """
    if not isinstance(step, Tensor):
        step = torch.tensor(step, dtype=torch.int64, device=logits.device)
    return library.sample(
        logits, history, seed, step, temperature, top_k, top_p, min_p, repetition_penalty
    )


@torch.library.register_fake("gemma2::sample")
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
    return logits.new_empty(logits.shape[0], dtype=torch.int64)

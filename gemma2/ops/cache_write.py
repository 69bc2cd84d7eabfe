"""Writing keys and values into the cache's slots."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.ops._library import library, refuse_gradients


def cache_write(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    k_base: Tensor | None = None,
) -> None:
    """Writes each row's real tokens into their slots, in place.

    Column s of row b has position ``p = q_start[b] + s``. It is written iff
    ``max(0, k_base[b], kv_len[b] - C) <= p < kv_len[b]``, to slot ``(p - k_base[b]) mod C``: padding never
    is, and of a chunk longer than the buffer only the end.

    Args:
        k_cache, v_cache: ``[B, Hkv, C, D]``; their dtype may differ from k's, then k is rounded once.
        k, v: ``[B, Hkv, S, D]``.
        q_start: int64 ``[B]``, the position of column 0; negative with left padding.
        kv_len: int64 ``[B]``, the row's real tokens, these included.
        k_base: int64 ``[B]``, the position of slot 0; None: 0.

    Raises:
        ValueError: shapes, dtypes or strides do not fit; nothing has been written.
        RuntimeError: grad mode is on and an argument requires grad.
    """
    refuse_gradients("cache_write", k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    library.cache_write(k_cache, v_cache, k, v, q_start, kv_len, k_base)


@torch.library.register_fake("gemma2::cache_write")
def _(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    k_base: Tensor | None = None,
) -> None:
    return None

"""Keys and values of a call into the slots of a cache."""

from __future__ import annotations

from torch import Tensor

from gemma2.ops._library import library, refuse_gradients, register_fake


def cache_write(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    k_base: Tensor | None = None,
) -> None:
    """Writes each row's real tokens into slot ``(position - k_base) mod C``. For inference.

    Column s of row b has position ``p = q_start[b] + s``. It is written iff
    ``max(0, k_base[b], kv_len[b] - C) <= p < kv_len[b]``: pads never, and of a call longer than the
    cache the last C positions. Every other slot keeps what it holds. (docs/attention.md)

    Args:
        k_cache, v_cache: ``[B, Hkv, C, D]``, written in place; any strides with a dense last
            dimension; one float dtype, not necessarily k's: values are rounded once to it.
        k, v: ``[B, Hkv, S, D]``, float32, bfloat16 or float16, any strides with a dense last
            dimension.
        q_start: int64 ``[B]``, position of column 0; negative for left pads.
        kv_len: int64 ``[B]``, real tokens of the row, this call's included.
        k_base: int64 ``[B]``, position of slot 0 of a linear buffer; None (0) for a ring.

    Raises:
        ValueError: shapes, dtypes or strides do not fit; nothing has been written then.
        RuntimeError: grad mode is on and an argument requires grad.
    """
    refuse_gradients("cache_write", k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    library.cache_write(k_cache, v_cache, k, v, q_start, kv_len, k_base)


@register_fake("cache_write")
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

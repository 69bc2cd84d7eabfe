"""The operators of Gemma 2, compiled: one module per operator, one function per name.

Their plain forms, in a few lines of torch each, are in :mod:`gemma2.reference`.
"""

from __future__ import annotations

from gemma2.ops.attention import attention
from gemma2.ops.cache_write import cache_write
from gemma2.ops.embed import embed
from gemma2.ops.geglu import geglu
from gemma2.ops.linear import linear
from gemma2.ops.rms_norm import add_rms_norm, add_rms_norm_, rms_norm
from gemma2.ops.rope import rope, rope_cache, rope_table
from gemma2.ops.sample import sample
from gemma2.ops.softcap import softcap

__all__ = [
    "add_rms_norm",
    "add_rms_norm_",
    "attention",
    "cache_write",
    "embed",
    "geglu",
    "linear",
    "rms_norm",
    "rope",
    "rope_cache",
    "rope_table",
    "sample",
    "softcap",
]

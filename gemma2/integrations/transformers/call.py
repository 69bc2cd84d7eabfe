"""What passes between transformers' masks, its attention and our cache within one forward call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.masking import Layout
from gemma2.ring import LayerCache

NAME = "gemma2"


def check_model(kind: str | None) -> None:
    """Raise ValueError unless `kind`, a model_type, is Gemma 2's."""
    if kind != NAME:
        raise ValueError(
            f'attn_implementation: "gemma2" serves Gemma 2 models, this is "{kind}": load it with '
            'attn_implementation="sdpa" or "eager"'
        )


@dataclass(eq=False)
class Call:
    """A forward call that a HybridCache is part of."""

    layout: Layout
    columns: int
    mask: Tensor | None  # bool [B, columns so far]; None: all real
    next_layer: int = 0
    k_base: Tensor | None = None  # of what the last layer was given; None: a ring
    unwritten: list[tuple[LayerCache, Tensor, Tensor]] | None = None

    def pack(self, x: Tensor) -> Tensor:
        """Give x [B, H, S, D] with the real tokens of each row first."""
        return self.layout.pack(x.transpose(1, 2)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """Give [B, S, H, D] over what `HybridCache.update` gave for this layer."""
        at = self.layout.on(q.device)
        deterministic = torch.are_deterministic_algorithms_enabled()
        out, _ = ops.attention(
            self.pack(q), k, v, at.q_start, at.kv_len, None, self.k_base, **options,
            deterministic=deterministic,
        )  # fmt: skip
        return at.unpack(out.transpose(1, 2))


@dataclass(eq=False)
class Rows:
    """Where the columns of one call stand, for all layers of one kind; int64 tensors.

    q_start, kv_len, k_base: [B], kv_start: [B, S], as `gemma2.ops.attention` takes them.
    width: columns of the keys that this was made for.
    window: of these layers, 0 for none.
    call: of a `HybridCache`, which says where its keys lie.
    """

    q_start: Tensor
    kv_len: Tensor
    kv_start: Tensor | None
    k_base: Tensor | None
    width: int
    window: int
    call: Call | None = None

    def to(self, device: Any, *_: Any, **__: Any) -> Rows:
        """Give this on `device`: what accelerate calls where layers live on several."""
        if self.q_start.device == torch.device(device):
            return self
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device)
            for name, tensor in vars(self).items()
            if name in ("q_start", "kv_len", "kv_start", "k_base")
        }
        return replace(self, **moved)


class Offset(int):
    """0, the number of the first column, as a HybridCache gives it to transformers' masks.

    lay_out: that cache's answer to (rows, columns, mask bool [B, columns so far], window, device).
    """

    lay_out: Callable[[int, int, Tensor | None, int, torch.device], Rows]

"""What tokens were chosen from, kept step by step where it is asked for."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

__all__ = ["Record"]


class Record:
    """Keeps raw logits and processed scores, float32.

    A step puts them into tensors that stay, as a captured graph must; when it has been launched they
    are copied (`post`), and when its tokens are known it is clear whose they are (`take`).

    Args:
        rows, width, vocab: N rows, of which each can get that many tokens a step.
        names: what is kept, among "logits" and "scores".
    """

    def __init__(
        self, names: list[str], rows: int, width: int, vocab: int, device: torch.device
    ) -> None:
        self._now = {name: torch.zeros((rows, width, vocab), device=device) for name in names}
        self._posted: deque[dict[str, Tensor]] = deque()
        self._taken: list[tuple[dict[str, Tensor], list[int]]] = []

    def put(self, place: int, **values: Tensor) -> None:
        """Note what the token at `place` among a step's tokens was chosen from, [N, V] each."""
        for name, kept in self._now.items():
            kept[:, place].copy_(values[name])

    def post(self) -> None:
        """Copy what the step that has just been launched leaves."""
        self._posted.append({name: kept.clone() for name, kept in self._now.items()})

    def take(self, report: list[list[int]]) -> None:
        """Keep the oldest copy for the tokens that its step reports."""
        counts = [sum(token >= 0 for token in line[:-1]) for line in report]
        posted, most = self._posted.popleft(), max(counts)
        if most < len(report[0]) - 1:  # of drafts that were wrong nothing is kept
            posted = {name: kept[:, :most].clone() for name, kept in posted.items()}
        self._taken.append((posted, counts))

    def columns(self, name: str) -> tuple[Tensor, ...] | None:
        """Give [N, V] for each new token, 0 for rows that had ended before; None if not kept."""
        if name not in self._now:
            return None
        rows = [
            torch.cat([kept[name][row, : counts[row]] for kept, counts in self._taken])
            for row in range(self._now[name].shape[0])
        ]
        longest = max(len(row) for row in rows)
        nothing = torch.zeros_like(self._now[name][0, 0])
        return tuple(
            torch.stack([row[n] if n < len(row) else nothing for row in rows])
            for n in range(longest)
        )

"""Ends of a text that only the host can see: strings, and the user's criteria.

They are looked for when a step's tokens have come to the host, which then does not run ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma2.generation.step import NO_TOKEN

if TYPE_CHECKING:
    from gemma2.generation.step import Step

__all__ = ["StopStrings", "Stops"]

Criterion = Callable[[Tensor, Any], Any]

# An incomplete character, whose bytes are not all there yet, is decoded to this.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class StopStrings:
    """Tells whether a token completes one of several strings, wherever in its text they end.

    Args:
        tokenizer: a :class:`gemma2.Tokenizer`, or one of transformers.
        before: the last token of each row's prompt, after which new text is read, or None.
    """

    def __init__(
        self, strings: Sequence[str], tokenizer: Any, before: Sequence[int | None]
    ) -> None:
        self._strings = strings
        self._tokenizer = tokenizer
        self._before = [[] if token is None else [token] for token in before]
        # Every token has at least one byte; some more, because the first letters of a text may
        # depend on what stands before them.
        self.reach = max(len(string.encode()) for string in strings) + 8

    def complete(self, row: int, new: Sequence[int]) -> bool:
        """Tell whether the last of the `new` tokens of a row completes a string.

        Args:
            new: all new tokens, or the last `reach` of them, or more.
        """
        start = max(len(new) - self.reach, 0)
        context = self._before[row] if start == 0 else []
        window = [*context, *new[start:]]
        text = self._decode(window)
        settled = len(self._decode(window[:-1]).rstrip(_INCOMPLETE))
        first = len(self._decode(context).rstrip(_INCOMPLETE))
        return any(
            string in text[max(first, settled - len(string) + 1) :] for string in self._strings
        )

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""


class Stops:
    """Ends rows whose text has become complete.

    Args:
        columns: gives the tokens that criteria see, int64 [N, S + n], of n new tokens a row.
    """

    def __init__(
        self,
        strings: StopStrings | None,
        criteria: Sequence[Criterion],
        rows: int,
        columns: Callable[[int], Tensor],
    ) -> None:
        self.strings, self.criteria = strings, criteria
        self._rows: list[list[int]] = [[] for _ in range(rows)]
        self._columns = columns

    def apply(self, step: Step, report: list[list[int]]) -> None:
        """End rows in the report of a step, and in the step's state: call it in inference mode.

        What a row has been given after its end is dropped and taken back from the cache.
        """
        ended, dropped = [], []
        for place in range(len(report[0]) - 1):
            fresh = [row for row, line in enumerate(report) if line[place] >= 0]
            for row in fresh:
                self._rows[row].append(report[row][place])
            for row in self._complete(fresh):
                rest = range(place + 1, len(report[row]) - 1)
                ended.append(row)
                dropped.append(sum(report[row][later] >= 0 for later in rest))
                for later in rest:
                    report[row][later] = NO_TOKEN
                report[row][-1] = 1
        if ended:
            rows = torch.tensor(ended, device=step.finished.device)
            step.finished.index_fill_(0, rows, True)
        if any(dropped):
            back = torch.zeros_like(step.count).index_put((rows,), rows.new_tensor(dropped))
            cache = step.run.cache
            cache.rewind(cache.lengths[: len(self._rows)] - back, step.run.longest)

    def _complete(self, fresh: list[int]) -> list[int]:
        """Give the rows among those with a new token whose text has its end."""
        if not fresh:
            return []
        found = set()
        if self.strings is not None:
            found = {row for row in fresh if self.strings.complete(row, self._rows[row])}
        if self.criteria:
            hits = self.hits(self._columns(max(map(len, self._rows))))
            found |= {row for row in fresh if hits[row]}
        return sorted(found)

    def ends(self, new: Tensor) -> list[list[bool]]:
        """Tell for each prompt's candidates, int64 [B, C, n] new tokens, whether they end here."""
        batch, candidates, _ = new.shape
        beams = len(self._rows) // batch
        found = [[False] * candidates for _ in range(batch)]
        if self.criteria:
            prompts = self._columns(0)[::beams].repeat_interleave(candidates, dim=0)
            hits = self.hits(torch.cat([prompts, new.flatten(0, 1)], dim=1))
            found = [hits[b * candidates : (b + 1) * candidates] for b in range(batch)]
        if self.strings is not None:
            # one token more than it looks at, or these would be taken for all there are
            lines = new[:, :, -self.strings.reach - 1 :].tolist()
            for b, prompt in enumerate(lines):
                for c, line in enumerate(prompt):
                    found[b][c] = found[b][c] or self.strings.complete(b * beams, line)
        return found

    def hits(self, input_ids: Tensor) -> list[bool]:
        """Ask the criteria; give whether one of them holds, for each row of input_ids [N, L]."""
        rows = input_ids.shape[0]
        found = torch.zeros(rows, dtype=torch.bool)
        for number, criterion in enumerate(self.criteria):
            given = criterion(input_ids, None)
            name, wanted = f"generate: stopping_criteria[{number}]", f"a bool, or bool [{rows}]"
            try:
                told = torch.as_tensor(given).cpu()
            except (TypeError, ValueError, RuntimeError) as error:
                text = f"{name} gave a {type(given).__name__}: it must be {wanted}"
                raise TypeError(text) from error
            if told.numel() not in (1, rows):
                raise ValueError(f"{name} gave {list(told.shape)}: it must be {wanted}")
            found |= told.reshape(-1).to(torch.bool)
        return found.tolist()

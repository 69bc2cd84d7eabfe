"""The loop of generation: launches steps, follows them on the host, gives their tokens.

On a device the host runs ahead: it launches steps without waiting, and learns of their tokens when
they have been copied to it. A step launched after every row had ended changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma2.generation.assisted import AssistedStep
from gemma2.generation.graph import GraphedStep
from gemma2.generation.run import Reading, Run
from gemma2.generation.step import NO_TOKEN, Step

if TYPE_CHECKING:
    from gemma2.generation.mixin import GenerationMixin

__all__ = ["new_tokens", "steps_ahead"]

logger = logging.getLogger(__name__)

# Steps that the host launches before it looks at the first of them, by the device's type. Few, since
# as many are launched in vain when the text ends; two would do if the host were never interrupted.
AHEAD = {"cuda": 4}


def steps_ahead(device: torch.device, streaming: bool) -> int:
    """Give how many steps the host runs ahead: just one when somebody waits for the tokens."""
    ahead = AHEAD.get(device.type, 0)
    return min(ahead, 1) if streaming else ahead


def new_tokens(
    model: GenerationMixin, run: Run, ahead: int, device: torch.device | str
) -> Iterator[Tensor]:
    """Give the new tokens of each step, int64 [N] on `device`; no mode of torch is on between.

    Args:
        ahead: steps that are launched before the first of them is looked at.
    """
    step = Step(model, run) if run.draft is None else AssistedStep(model, run)
    advance = GraphedStep(step) if run.graph else step
    mailbox = _Mailbox(step.report, ahead)
    transcript = _Transcript(run)
    launched = 0
    try:
        while not transcript.ended:
            while launched < run.new_tokens and len(mailbox) <= ahead:
                with _inference(run):
                    if launched == 0:
                        step.begin(_read_prompt(run))
                        run.cache.settle(max(run.others, *run.lengths))
                    else:
                        advance()
                    mailbox.post()
                launched += 1
            for tokens in transcript.take(mailbox.take()):
                yield tokens.to(device)
        run.cache.settle(max(run.others, *transcript.cached()))
        run.cache.text = transcript.text()
        transcript.log()
    finally:
        if ahead == 0 and (rest := transcript.not_given()):
            with _inference(run):  # a reader has gone before the last tokens of a step
                lengths = run.cache.lengths[: len(run.lengths)]
                run.cache.rewind(lengths - rest, run.longest)
        if isinstance(advance, GraphedStep):
            advance.close()


class _Mailbox:
    """Copies of a report on their way to the host, oldest first."""

    def __init__(self, report: Tensor, ahead: int) -> None:
        self._report = report
        slots, pinned = (ahead + 1, *report.shape), report.is_cuda
        self._free = deque(torch.empty(slots, dtype=report.dtype, pin_memory=pinned))
        self._posted: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._posted)

    def post(self) -> None:
        """Send what the report holds once everything launched so far has run."""
        slot, event = self._free.popleft(), None
        slot.copy_(self._report, non_blocking=True)
        if self._report.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._report.device))
        self._posted.append((slot, event))

    def take(self) -> list[list[int]]:
        """Wait for the oldest report and give it, row by row."""
        slot, event = self._posted.popleft()
        if event is not None:
            event.synchronize()
        self._free.append(slot)
        return slot.tolist()


class _Transcript:
    """The new tokens that the host knows of, row by row."""

    def __init__(self, run: Run) -> None:
        self.ended = False
        self._run = run
        self._rows: list[list[int]] = [[] for _ in run.lengths]
        self._given = 0
        # of a row with new tokens, of which all but the last one were drafted
        self._reports = 0

    def take(self, report: list[list[int]]) -> Iterator[Tensor]:
        """Add a step's report, and give what has become whole: a token of every row, int64 [N].

        Raises:
            ValueError: a row's logits were at fault.
        """
        for row, (*new, _) in enumerate(report):
            for number, fault in _FAULTS.items():
                if number in new:
                    raise ValueError(f"generate: row {row}: the logits of the next token {fault}")
        for tokens, (first, *others, _) in zip(self._rows, report, strict=True):
            self._reports += first != NO_TOKEN
            tokens.extend(token for token in (first, *others) if token != NO_TOKEN)
        lengths = [len(tokens) for tokens in self._rows]
        going_on = [n for n, line in zip(lengths, report, strict=True) if not line[-1]]
        self.ended = not going_on
        for column in range(self._given, min(going_on, default=max(lengths))):
            self._given = column + 1
            yield torch.tensor(
                [row[column] if column < len(row) else self._run.pad for row in self._rows]
            )

    def cached(self) -> list[int]:
        """Give how many tokens of each row the cache holds: all but the last one."""
        return [n + len(row) - 1 for n, row in zip(self._run.lengths, self._rows, strict=True)]

    def text(self) -> list[list[int]] | None:
        """Give these tokens; None where they are not the whole story."""
        if self._run.prompts is None or self._run.cache.has_history:
            return None
        return [
            [*prompt, *row[:-1]] for prompt, row in zip(self._run.prompts, self._rows, strict=True)
        ]

    def not_given(self) -> int:
        """Give how many tokens of a single row have been read but not been given yet."""
        return len(self._rows[0]) - self._given if len(self._rows) == 1 else 0

    def log(self) -> None:
        """Say how well the drafts were."""
        if self._run.draft is not None:
            logger.debug(
                "assisted: %d of %d drafted tokens accepted",
                sum(map(len, self._rows)) - self._reports,
                (self._reports - len(self._rows)) * self._run.draft.count,
            )


# What `ops.sample` gives where it cannot raise.
_FAULTS = {
    -1: "have NaN or +infinity, or overflow when divided by the temperature",
    -2: "are -infinity everywhere",
}


@contextlib.contextmanager
def _inference(run: Run) -> Iterator[None]:
    """Run without gradients and in eval mode, and put every module's mode back."""
    for module in run.training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in run.training:
            module.training = True


def _read_prompt(run: Run) -> Tensor:
    """Read the prompts, the drafting model too; give the logits [N, V] after the last tokens."""
    if run.draft is not None and run.draft.reading is not None:
        _read(run.draft.reading)
    return _read(run.reading)


def _read(reading: Reading) -> Tensor:
    """Read what is pending; give the logits [N, V] after each row's last token."""
    name = "input_ids" if reading.pending.dim() == 2 else "inputs_embeds"
    columns = reading.pending.shape[1]
    for first in range(0, columns, reading.chunk):
        piece = slice(first, first + reading.chunk)
        call = {
            name: reading.pending[:, piece],
            "attention_mask": None if reading.mask is None else reading.mask[:, piece],
            "past_key_values": reading.cache,
            "use_cache": True,
        }
        if first + reading.chunk < columns:
            reading.model.model(**call)  # nobody wants these logits
    logits: Tensor = reading.model(**call, logits_to_keep=1).logits[:, -1]
    if reading.repeats > 1:
        source = torch.arange(logits.shape[0], device=logits.device)
        source = source.repeat_interleave(reading.repeats)
        reading.cache.reorder(source)
        logits = logits[source]
    return logits

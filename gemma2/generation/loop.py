"""The loop of generation: launches steps, follows them on the host, gives their tokens.

On a device the host runs ahead: it launches steps without waiting, and learns of their tokens when
they have been copied to it. A step launched after every row had ended changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.generation.assisted import AssistedStep
from gemma2.generation.graph import GraphedStep
from gemma2.generation.run import Reading, Run
from gemma2.generation.step import NO_TOKEN, Step
from gemma2.modes import evaluating

if TYPE_CHECKING:
    from gemma2.generation.mixin import GenerationMixin

__all__ = ["FAULTS", "inference", "new_tokens", "or_empty", "read_prompt", "steps_ahead"]

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
) -> Generator[Tensor, None, None]:
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
                with inference(run):
                    if launched == 0:
                        step.begin(read_prompt(run))
                        run.cache.settle(max(run.others, *run.lengths))
                        transcript.beyond = (run.cache.text or [])[len(run.lengths) :]
                    else:
                        advance()
                    mailbox.post()
                    if run.record is not None:
                        run.record.post()
                launched += 1
            report = mailbox.take()
            if run.stops is not None:
                with inference(run):
                    run.stops.apply(step, report)
            if run.record is not None:
                run.record.take(report)
            for tokens in transcript.take(report):
                yield tokens.to(device)
        transcript.log()
    finally:
        try:
            _leave(run, mailbox, transcript)
        finally:
            if isinstance(advance, GraphedStep):
                advance.close()


def _leave(run: Run, mailbox: _Mailbox, transcript: _Transcript) -> None:
    """Leave a cache that somebody has afterwards with a text that is known, wherever it ended.

    That is what has been read; of a single row without the tokens that its reader has not been given,
    if they can be taken back.
    """
    cache = run.cache
    if not run.is_kept:
        return
    with or_empty(cache):
        if transcript.is_whole:
            lengths = transcript.cached()
        else:
            while len(mailbox):
                transcript.add(mailbox.take())
            if cache.text is not None or not transcript.has_begun:
                return  # nothing has been read since the prompt
            lengths = transcript.held(cache.lengths.tolist())
            with inference(run):
                cache.crop(torch.tensor(lengths))
                given = torch.tensor([transcript.given(n) for n in lengths])
                if torch.equal(cache.reachable(given.to(cache.lengths.device)).cpu(), given):
                    lengths = given.tolist()
                    cache.crop(given)
        cache.settle(max(run.others, *lengths))
        cache.text = transcript.text(lengths)


@contextlib.contextmanager
def or_empty(cache: HybridCache) -> Iterator[None]:
    """Empty the cache if what is done inside fails: it would hold a text that is not known."""
    try:
        yield
    except BaseException:
        cache.reset()
        raise


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
        self.beyond: list[list[int]] = []  # what the cache's rows after the batch are known to hold
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
            for number, fault in FAULTS.items():
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

    def add(self, report: list[list[int]]) -> None:
        """Add a step's report whose tokens nobody will get."""
        for tokens, (*new, _) in zip(self._rows, report, strict=True):
            tokens.extend(token for token in new if token >= 0)

    @property
    def has_begun(self) -> bool:
        """Whether there is any new token."""
        return any(self._rows)

    @property
    def is_whole(self) -> bool:
        """Whether every row has ended, and all of it has been given."""
        return self.ended and self._given == max(map(len, self._rows))

    def cached(self) -> list[int]:
        """Give how many tokens of each row the cache holds: all but the last one."""
        return [n + len(row) - 1 for n, row in zip(self._run.lengths, self._rows, strict=True)]

    def held(self, lengths: list[int]) -> list[int]:
        """Give how many of the tokens that the cache holds, by row, are known."""
        pairs = zip(self._run.lengths, self._rows, lengths, strict=False)
        return [min(n + len(row), length) for n, row, length in pairs]

    def given(self, length: int) -> int:
        """Give how many of a row's tokens are to be held: of a single row no more than were given."""
        if len(self._rows) > 1:
            return length
        return min(length, self._run.lengths[0] + max(self._given - 1, 0))

    def text(self, lengths: list[int]) -> list[list[int]] | None:
        """Give these tokens, and those of the cache's other rows; None where they are not known."""
        if self._run.prompts is None or self._run.cache.has_history:
            return None
        rows = zip(self._run.prompts, self._rows, lengths, strict=True)
        return [*([*prompt, *row][:n] for prompt, row, n in rows), *self.beyond]

    def log(self) -> None:
        """Say how well the drafts were."""
        if self._run.draft is not None:
            logger.debug(
                "assisted: %d drafted tokens accepted in %d calls",
                sum(map(len, self._rows)) - self._reports,
                self._reports - len(self._rows),
            )


# What `ops.sample` gives where it cannot raise.
FAULTS = {
    -1: "have NaN or +infinity, or overflow when divided by the temperature",
    -2: "are -infinity everywhere",
}


@contextlib.contextmanager
def inference(run: Run) -> Iterator[None]:
    """Run without gradients and in eval mode, and put every module's mode back."""
    with evaluating(run.training), torch.inference_mode():
        yield


def read_prompt(run: Run) -> Tensor:
    """Read the prompts, the drafting model too; give the logits [N, V] after the last tokens."""
    if run.draft is not None and run.draft.reading is not None:
        _read(run.draft.reading)
    return _read(run.reading)


def _read(reading: Reading) -> Tensor:
    """Read what is pending; give the logits [N, V] after each row's last token.

    A cache that is to know its text knows it afterwards, also where reading was interrupted.
    """
    cache, known = reading.cache, reading.cache.text or []
    texts = None
    if reading.texts is not None and not cache.has_history:
        texts = reading.texts + known[len(reading.texts) :]
    try:
        logits = _last_logits(reading)
        cache.text = texts
        if reading.repeats > 1:
            source = torch.arange(logits.shape[0]).repeat_interleave(reading.repeats)
            cache.reorder(source)
            logits = logits[source.to(logits.device)]
    except BaseException:
        if texts is not None and cache.text is None:
            with or_empty(cache):
                lengths = cache.lengths.tolist()
                cache.text = [text[:n] for text, n in zip(texts, lengths, strict=False)]
        raise
    if texts is not None and reading.repeats > 1:
        repeated = [texts[row] for row in source.tolist()]
        cache.text = repeated + known[len(repeated) :]
    if reading.keep:
        cache.keep_snapshot()
    return logits


def _last_logits(reading: Reading) -> Tensor:
    """Read what is pending chunk by chunk; give the logits [B, V] after each row's last token."""
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
    return logits

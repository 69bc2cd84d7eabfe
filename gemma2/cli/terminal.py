"""What a terminal shows and asks: messages of one or more lines, answers as they come.

An answer is Markdown. On a terminal that can, finished paragraphs are shown as such and the one that
is coming is redrawn; elsewhere (a pipe, NO_COLOR, TERM=dumb) the text is printed as it is.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from gemma2.cli.shared import CommandError, check_utf8

__all__ = ["Answer", "answer_view", "read_message"]

QUOTES = '"""'
_REDRAWS_A_SECOND = 12
# A terminal would obey them: all control characters but tabs and newlines.
_CONTROLS = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}"
)


# ---- what is asked ------------------------------------------------------------------------------


def read_message() -> str:
    """Give the next message that is typed, or piped, in.

    A line that ends with a backslash goes on in the next one; what stands between two \"\"\" is a
    message with all its lines.

    Raises:
        EOFError: there is no more.
        KeyboardInterrupt: Ctrl-C.
        CommandError: it is not UTF-8, or ends within \"\"\".
    """
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() editing and a history
    line = _line("> ")
    if line.lstrip().startswith(QUOTES):
        lines = [line.lstrip()[len(QUOTES) :]]
        while not lines[-1].rstrip().endswith(QUOTES):
            try:
                lines.append(_line(". "))
            except EOFError:
                raise CommandError(f"the input ends within {QUOTES}") from None
        lines[-1] = lines[-1].rstrip()[: -len(QUOTES)]
    else:
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(_line(". "))
            except EOFError:  # the message is whole without a next line
                break
    text = "\n".join(lines)
    check_utf8("the message", text)
    return text


def _line(prompt: str) -> str:
    if not sys.stdin.isatty():
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise CommandError(f"stdin is not UTF-8: {error.reason}") from error
        if not line:
            raise EOFError
        return line.rstrip("\n")
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)  # stdout is for answers
    return input()


# ---- what is shown ------------------------------------------------------------------------------


class Answer(Protocol):
    """Shows an answer that comes in pieces."""

    def put(self, piece: str) -> None:
        """Show what has come."""

    def end(self) -> None:
        """End the answer, with a newline."""


class _Plain:
    def __init__(self) -> None:
        self._started = False
        self._controls = _CONTROLS if sys.stdout.isatty() else {}

    def put(self, piece: str) -> None:
        # the space between prompt and text is of no use at the beginning of a line
        piece = piece if self._started else piece.lstrip()
        self._started = self._started or bool(piece)
        print(piece.translate(self._controls), end="", flush=True)

    def end(self) -> None:
        print(flush=True)


class _Markdown:
    """Prints paragraphs for good once they are complete, and redraws the last one until then."""

    def __init__(self, console: Any) -> None:
        from rich.live import Live

        self._console = console
        self._text = ""
        self._drawn = 0.0
        # What is not yet complete is taken away again when it is printed for good.
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()

    def put(self, piece: str) -> None:
        self._text += piece.translate(_CONTROLS)
        done = complete_part(self._text)
        if done:
            self._print(self._text[:done])
            self._text = self._text[done:]
        elif time.monotonic() - self._drawn < 1 / _REDRAWS_A_SECOND:
            return
        self._draw()

    def end(self) -> None:
        self._live.stop()
        if self._text.strip():
            self._print(self._text)

    def _print(self, text: str) -> None:
        from rich.markdown import Markdown

        self._live.update("")  # before it is printed, or it would stay beside it for a moment
        self._console.print(Markdown(text.strip("\n")))
        self._console.print()

    def _draw(self) -> None:
        from rich.markdown import Markdown
        from rich.text import Text

        self._drawn = time.monotonic()
        # A live display cannot be higher than the screen: of more than that, the end is shown.
        lines = self._console.render_lines(Markdown(self._text), pad=False)
        kept = lines[-max(1, self._console.height - 2) :]
        shown = Text("\n").join(
            Text.assemble(*((part.text, part.style or "") for part in line)) for line in kept
        )
        self._live.update(shown, refresh=True)


def complete_part(text: str) -> int:
    """Give how many of the first characters of Markdown are complete whatever follows.

    It ends after an empty line that the next line does not continue: outside of code fences, and the
    next line begins without a space (a list's item may have several paragraphs).
    """
    fenced, done, offset, empty = False, 0, 0, False
    for line in text.splitlines(keepends=True):
        if not fenced and empty and line.strip() and not line[0].isspace():
            done = offset
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        empty = not line.strip() and line.endswith("\n")
        offset += len(line)
    return done


class _Silent:
    def put(self, piece: str) -> None:
        pass

    def end(self) -> None:
        pass


def answer_view(plain: bool, silent: bool) -> Callable[[], Answer]:
    """Give what makes the view of each answer: plain text if asked for or if there is no choice."""
    if silent:
        return _Silent
    dumb = os.environ.get("TERM", "") in ("dumb", "unknown", "") or os.environ.get("NO_COLOR")
    if plain or dumb or not sys.stdout.isatty():
        return _Plain
    from rich.console import Console

    console = Console()
    return lambda: _Markdown(console)

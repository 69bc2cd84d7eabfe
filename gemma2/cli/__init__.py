"""The command `gemma2`: write text, talk, classify, evaluate, convert, measure.

Exit codes: 0 all well, 1 it failed (one line on stderr says why), 2 wrong usage, 130 interrupted.
Results go to stdout, everything else to stderr. torch is imported only once there is work for it.
Each command is a module: `add` describes it to the parser, and what it needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn, TextIO

import gemma2
from gemma2.cli import bench, chat, classify, convert, generate, info, perplexity
from gemma2.cli.options import Commands
from gemma2.cli.shared import CommandError, say

__all__ = ["main"]

DESCRIPTION = """\
Gemma 2 on hand-written kernels. Without --model, the small embedded model is used,
which was trained on WordNet's definitions; with it, any Gemma 2 in the layout of the hub.
"""
EXAMPLES = """\
examples:
  gemma2 generate "a small bird"                  the embedded model writes a definition
  gemma2 generate --model gemma-2-2b-it --chat "Why is the sky blue?"
  gemma2 chat --model gemma-2-2b-it               a conversation
  gemma2 classify "a large wild cat with stripes" one of WordNet's 45 classes
  gemma2 perplexity --model gemma-2-2b book.txt   how well a text is predicted
  gemma2 convert model.ckpt gemma-2-2b            Google's checkpoint into the hub's layout
  gemma2 info --size 9b                           what a model of this size needs
  gemma2 bench                                    tokens per second on this machine

`gemma2 COMMAND --help` explains a command.
"""

_COMMANDS = (generate, chat, classify, perplexity, convert, info, bench)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gemma2",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gemma2 {gemma2.__version__}")
    commands = Commands(parser)
    for module in _COMMANDS:
        module.add(commands)
    return parser


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Say warnings of the library in one line each, without the place in its source."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        say(f"gemma2: warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _fail(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    text = str(error).strip() or type(error).__name__
    ours = (CommandError, ValueError, TypeError, OSError, ImportError, RuntimeError)
    if not isinstance(error, ours):
        text = f"{type(error).__name__}: {text}"
    say(f"gemma2: error: {text}")
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    return 1


def _drop_output() -> None:
    """Give up what could not be written: Python tries again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave_pipe() -> NoReturn:
    """End quietly after the reader of our output has gone, as in `gemma2 ... | head`."""
    _drop_output()
    raise SystemExit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code.

    Raises:
        SystemExit: wrong usage (2), --help and --version (0), a closed pipe.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # a terminal that cannot show a letter shows a question mark instead of ending us
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    args = _parser().parse_args(argv)
    try:
        with _plain_warnings():
            args.run(args)
        sys.stdout.flush()  # while an error can still be told
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _leave_pipe()
    except Exception as error:
        return _fail(error, args.debug)
    return 0

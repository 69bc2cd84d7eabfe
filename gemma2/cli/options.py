"""Options that several commands have, and how a command is added to the parser."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma2 import GenerationConfig

__all__ = [
    "DTYPES",
    "INF",
    "SETTINGS",
    "SIZES",
    "Commands",
    "check_sampling",
    "count",
    "number",
    "sampling_given",
    "sampling_of",
    "sampling_options",
    "weights_options",
]

DTYPES = ("auto", "bfloat16", "float16", "float32")
SIZES = ("2b", "9b", "27b")
INF = float("inf")


def number(kind: type, least: float, most: float, wanted: str) -> Callable[[str], Any]:
    """Give a converter for argparse that refuses what is out of range."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: it must be {wanted}")
        return value

    return convert


count = number(int, 1, INF, "a whole number of at least 1")
# libgomp crashes where the system gives it no more threads
threads = number(int, 1, 4096, "a whole number from 1 to 4096")


class Commands:
    """The commands of the parser; each module of a command adds its own."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._made = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        self._common = argparse.ArgumentParser(add_help=False)
        group = self._common.add_argument_group("general")
        group.add_argument("--json", action="store_true", help="machine-readable output")
        group.add_argument(
            "--threads", type=threads, metavar="N", help="threads to use (all cores)"
        )
        group.add_argument("--debug", action="store_true", help="show where an error comes from")

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], None],
        help: str,
        epilog: str,
        *parents: argparse.ArgumentParser,
    ) -> argparse.ArgumentParser:
        """Add a command that `run` executes; give its parser. `epilog` has the examples."""
        made: argparse.ArgumentParser = self._made.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=epilog,
            parents=[*parents, self._common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run, parser=made)
        return made


def weights_options() -> argparse.ArgumentParser:
    """Give the options of a command that computes with a model's weights."""
    weights = argparse.ArgumentParser(add_help=False)
    group = weights.add_argument_group("model")
    group.add_argument(
        "--model", metavar="FOLDER", help="folder with config.json, weights, tokenizer"
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="to compute in (auto: as stored)"
    )
    group.add_argument("--device", default="cpu", help="to compute on: cpu, cuda, cuda:1 ... (cpu)")
    return weights


def sampling_options(new_tokens: int) -> argparse.ArgumentParser:
    """Give the options of a command that writes text: how long it gets, and how tokens are chosen.

    Args:
        new_tokens: that are written at most if neither the user nor the model says how many.
    """
    writing = argparse.ArgumentParser(add_help=False)
    writing.set_defaults(default_new_tokens=new_tokens)
    writing.add_argument(
        "--max-new-tokens", type=count, metavar="N",
        help=f"at most so many (the model's own setting, or {new_tokens})",
    )  # fmt: skip
    sampling = writing.add_argument_group("sampling (any of these but --greedy turns it on)")
    sampling.add_argument("--greedy", action="store_true", help="the most probable token each time")
    sampling.add_argument(
        "--sample", action="store_true", help="sample with the model's own settings"
    )
    sampling.add_argument(
        "--temperature", type=number(float, 0, 1e9, "a number of at least 0"), metavar="T",
        help="below 1: safer, above 1: wilder; 0 is greedy",
    )  # fmt: skip
    sampling.add_argument(
        "--top-k", type=number(int, 0, INF, "a whole number of at least 0"), metavar="K",
        help="choose among the K most probable tokens (50); 0: among all",
    )  # fmt: skip
    sampling.add_argument(
        "--top-p", type=number(float, 1e-300, 1, "a number in (0, 1]"), metavar="P",
        help="choose among the most probable tokens that have P of the probability together",
    )  # fmt: skip
    sampling.add_argument(
        "--min-p", type=number(float, 0, 1, "a number in [0, 1]"), metavar="P",
        help="choose among tokens at least P times as probable as the most probable one",
    )  # fmt: skip
    sampling.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1, "a whole number in [0, 2**63)"), metavar="N",
        help="the same seed gives the same text",
    )  # fmt: skip
    writing.add_argument(
        "--repetition-penalty", type=number(float, 1e-300, 1e9, "a number above 0"), metavar="R",
        help="above 1: avoid what has occurred (also when greedy)",
    )  # fmt: skip
    writing.add_argument(
        "--no-repeat-ngram-size", type=count, metavar="N",
        help="no N tokens in a row occur twice in prompt and text",
    )  # fmt: skip
    writing.add_argument(
        "--min-new-tokens", type=count, metavar="N", help="the text does not end before N tokens"
    )
    return writing


# Options of `generate` that stand for those of the command line.
_CHOICES = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size",
    "min_new_tokens",
)  # fmt: skip
SETTINGS = (*_CHOICES, "do_sample", "max_new_tokens")


def _wants_sampling(args: argparse.Namespace) -> bool:
    turn_on = ("temperature", "top_k", "top_p", "min_p", "seed")
    return args.sample or any(getattr(args, name) is not None for name in turn_on)


def check_sampling(args: argparse.Namespace) -> None:
    """End with wrong usage where the options of `sampling_options` contradict each other."""
    if args.greedy and _wants_sampling(args):
        args.parser.error("--greedy takes no other sampling option")


def sampling_given(args: argparse.Namespace) -> bool:
    """Tell whether one of the options of `sampling_options` was given."""
    named = (*_CHOICES, "max_new_tokens")
    others = any(getattr(args, name) is not None for name in named)
    return _wants_sampling(args) or args.greedy or others


def sampling_of(
    args: argparse.Namespace, settings: GenerationConfig
) -> tuple[dict[str, Any], int | None]:
    """Give what `sampling_options` found as options of `generate`, and the seed, None if greedy.

    A seed is drawn where none is given: it can be named, so that a text that somebody likes can be
    had again.
    """
    options = {name: getattr(args, name) for name in _CHOICES}
    sampling = _wants_sampling(args)
    if args.greedy or sampling:
        options["do_sample"] = not args.greedy
    options["max_new_tokens"] = (
        args.max_new_tokens or settings.max_new_tokens or args.default_new_tokens
    )
    seed = args.seed
    if seed is None and (sampling or (settings.do_sample and not args.greedy)):
        seed = int.from_bytes(os.urandom(4), "little")
    return {name: value for name, value in options.items() if value is not None}, seed

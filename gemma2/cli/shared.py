"""What the commands share: errors, texts from the command line, models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gemma2

if TYPE_CHECKING:
    import torch

    from gemma2 import Gemma2Config, Gemma2ForCausalLM, Tokenizer

__all__ = [
    "CommandError",
    "check_utf8",
    "device_of",
    "dtype_of",
    "embedded",
    "load_causal_lm",
    "model_folder",
    "named_config",
    "per_second",
    "say",
    "set_threads",
    "texts_of",
]


class CommandError(Exception):
    """What the user can do something about; its text is the one line on stderr."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def texts_of(arguments: Sequence[str]) -> list[str]:
    """Give the texts of the command line, stdin for each `-`."""
    texts = []
    for argument in arguments:
        text = argument
        if argument == "-":
            data = sys.stdin.buffer.read()
            try:
                text = data.decode("utf-8").rstrip("\n")
            except UnicodeDecodeError as error:
                raise CommandError(
                    f"stdin is not UTF-8: byte {error.start}: {error.reason}"
                ) from error
        check_utf8("TEXT", text)
        if not text.strip():
            raise CommandError("TEXT is empty" if argument != "-" else "stdin is empty")
        texts.append(text)
    return texts


def check_utf8(name: str, text: str) -> None:
    """Raise for a text that the system gave us in another encoding."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # what is not UTF-8 comes as surrogates
        raise CommandError(f"{name} is not UTF-8, at character {error.start}") from error


def model_folder(name: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise CommandError(f"--model {name}: {what}: give a folder with config.json and weights")
    return path


def embedded() -> Path:
    """Give the folder of the embedded model."""
    from gemma2 import tiny

    folder = tiny.path()
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"this installation has no embedded model in {folder}: use --model FOLDER"
        )
    return folder


def set_threads(args: argparse.Namespace) -> None:
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)


def dtype_of(args: argparse.Namespace) -> str | None:
    return None if args.dtype == "auto" else args.dtype


def device_of(args: argparse.Namespace) -> torch.device:
    from gemma2.checkpoint import checked_device

    return checked_device(args.device)


def load_causal_lm(
    args: argparse.Namespace, device: torch.device | str = "cpu"
) -> tuple[Gemma2ForCausalLM, Tokenizer]:
    if args.model is None:
        embedded()
        from gemma2 import tiny

        return tiny.load_causal_lm(dtype_of(args)).to(device), tiny.load_tokenizer()
    folder = model_folder(args.model)
    # the tokenizer first, since weights take long to read
    tokenizer = gemma2.Tokenizer.from_pretrained(folder)
    load = gemma2.Gemma2ForCausalLM.from_pretrained
    return load(folder, dtype=dtype_of(args), device=device), tokenizer


def per_second(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def named_config(args: argparse.Namespace) -> tuple[Gemma2Config, str]:
    """Give the config that --model or --size names, else the embedded one, and its name."""
    if args.size:
        return getattr(gemma2.Gemma2Config, f"gemma2_{args.size}")(), f"Gemma 2 {args.size.upper()}"
    folder = model_folder(args.model) if args.model else embedded()
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"{folder} holds no config.json: it is no model in the layout of the hub"
        )
    name = str(folder) if args.model else "the embedded model"
    return gemma2.Gemma2Config.from_json_file(folder / "config.json"), name

"""`gemma2 perplexity`: how well a model predicts a text file."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

from gemma2.cli.options import INF, Commands, count, number, weights_options
from gemma2.cli.shared import (
    CommandError,
    device_of,
    load_causal_lm,
    per_second,
    say,
    set_threads,
)

__all__ = ["add"]

EXAMPLES = """\
The text is read in windows of --context tokens, each --stride tokens after the one before. Every token
is scored once: in the first window all are, in the others those that are new, with at least context -
stride tokens before them. Perplexities are comparable between models with the same tokenizer and the
same --context and --stride, bits per byte between all.

examples:
  gemma2 perplexity --model gemma-2-2b book.txt
  gemma2 perplexity --model gemma-2-2b --context 4096 --stride 512 --json book.txt
  cat *.md | gemma2 perplexity --model gemma-2-2b -
"""


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    perplexity = commands.add(
        "perplexity", _run, "measure how well a text is predicted", EXAMPLES, weights_options()
    )
    perplexity.add_argument("file", metavar="FILE", help="a text in UTF-8; - reads stdin")
    perplexity.add_argument(
        "--context",
        type=number(int, 2, INF, "a whole number of at least 2"),
        metavar="N",
        help="tokens in a window (as many as the model was made for)",
    )
    perplexity.add_argument(
        "--stride", type=count, metavar="N", help="tokens between two windows (half of the context)"
    )


def _run(args: argparse.Namespace) -> None:
    if args.context and args.stride and args.stride >= args.context:
        args.parser.error("--stride must be less than --context")
    text = _text(args.file)
    set_threads(args)
    model, tokenizer = load_causal_lm(args, device_of(args))
    most = model.config.max_position_embeddings
    if args.context and args.context > most:
        say(f"gemma2: warning: --context {args.context}: the model was made for {most} tokens")
    from tqdm import tqdm

    from gemma2.evaluation import perplexity

    ids = tokenizer.encode(text, add_bos=False, allow_special=False)
    start = time.perf_counter()
    # disable=None: no bar where stderr is no terminal
    with tqdm(total=len(ids), unit=" tokens", disable=True if args.json else None) as bar:
        found = perplexity(
            model,
            ids,
            stride=args.stride,
            context=args.context,
            progress=lambda done: bar.update(done - bar.n),
        )
    seconds = time.perf_counter() - start
    size = len(text.encode())
    bits = found.bits_per_byte(size)
    if args.json:
        report = {
            "file": args.file,
            "perplexity": found.perplexity,
            "bits_per_byte": bits,
            "bits_per_token": -found.log_prob / math.log(2) / found.tokens,
            "log_prob": found.log_prob,
            "tokens": found.tokens,
            "bytes": size,
            "context": found.context,
            "stride": found.stride,
            "windows": found.windows,
            "tokens_read": found.read,
            "seconds": seconds,
        }
        print(json.dumps(report), flush=True)
        return
    windows = "1 window" if found.windows == 1 else f"{found.windows} windows"
    print(
        f"perplexity {found.perplexity:.4f}, {bits:.4f} bits per byte\n"
        f"{found.tokens} tokens, {size} bytes; {windows} of up to {found.context} "
        f"tokens, stride {found.stride}; {found.read} tokens read in {seconds:.1f} s, "
        f"{per_second(found.read, seconds):.0f} tokens/s",
        flush=True,
    )


def _text(file: str) -> str:
    """Give the text with all its bytes: ends of lines count, too."""
    name = "stdin" if file == "-" else file
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{name} is not UTF-8: byte {error.start}: {error.reason}") from error
    if not text:
        raise CommandError(f"{name} is empty")
    return text

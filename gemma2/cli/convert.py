"""`gemma2 convert`: a checkpoint from one layout into another."""

from __future__ import annotations

import argparse
import json

from gemma2.cli.options import SIZES, Commands
from gemma2.cli.shared import CommandError, say, set_threads

__all__ = ["add"]

LAYOUTS = ("hub", "original", "gguf")
DTYPES = ("float32", "bfloat16", "float16", "float64", "q8_0")

EXAMPLES = """\
SOURCE is Google's original checkpoint (a .ckpt file, or a folder of shards), a folder in the layout of
the hub, a GGUF file, or an Orbax checkpoint. All names and shapes are checked before anything is
written, and what was written is read back and compared. Interrupted, TARGET is as it was; only while
--overwrite puts a folder's files in place it may be told to be half saved.

examples:
  gemma2 convert gemma-2-2b-pytorch/model.ckpt gemma-2-2b
  gemma2 convert --size 27b --dtype bfloat16 gemma-2-27b-pytorch gemma-2-27b
  gemma2 convert gemma-2-9b-it-Q8_0.gguf gemma-2-9b-it
  gemma2 convert --to gguf --dtype q8_0 gemma-2-2b gemma-2-2b.gguf
"""


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    convert = commands.add(
        "convert", _run, "convert a checkpoint from one layout into another", EXAMPLES
    )
    convert.add_argument("source", metavar="SOURCE", help="file or folder to read")
    convert.add_argument("target", metavar="TARGET", help="file or folder to write")
    convert.add_argument("--to", choices=LAYOUTS, default="hub", help="the target's layout (hub)")
    which = convert.add_mutually_exclusive_group()
    which.add_argument(
        "--config",
        metavar="FILE",
        help="config.json of the model (beside SOURCE, or by its shapes)",
    )
    which.add_argument("--size", choices=SIZES, help="a published size, in place of a config.json")
    convert.add_argument("--dtype", choices=DTYPES, help="of the weights (as in SOURCE)")
    convert.add_argument(
        "--max-shard-size", metavar="SIZE", help="largest file, like 5GB (by layout)"
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint of the same layout"
    )


def _run(args: argparse.Namespace) -> None:
    if args.dtype == "q8_0" and args.to != "gguf":
        args.parser.error("--dtype q8_0 goes with --to gguf")
    set_threads(args)
    from gemma2.convert import convert

    try:
        report = convert(
            args.source,
            args.target,
            to=args.to,
            config=args.config,
            size=args.size,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            progress=False if args.json else None,
            overwrite=args.overwrite,
        )
    except FileExistsError as error:
        raise CommandError(str(error).replace("pass overwrite=True", "pass --overwrite")) from error
    if args.json:
        found = {
            "tensors": report.tensors,
            "bytes": report.bytes,
            "seconds": report.seconds,
            "peak_memory": report.peak_memory,
            "files": list(map(str, report.files)),
        }
        print(json.dumps(found), flush=True)
        return
    for file in report.files:
        print(file, flush=True)
    peak = "" if report.peak_memory is None else f", at most {report.peak_memory / 1e9:.2f} GB used"
    say(
        f"{report.tensors} tensors, {report.bytes / 1e9:.2f} GB written and compared in "
        f"{report.seconds:.1f} s{peak}"
    )

"""`gemma2 bench`: tokens per second of a model, or single operators."""

from __future__ import annotations

import argparse
import json

import gemma2
from gemma2.cli.options import DTYPES, INF, SIZES, Commands, count, number
from gemma2.cli.shared import dtype_of, load_causal_lm, named_config, say, set_threads

__all__ = ["add"]

EXAMPLES = """\
examples:
  gemma2 bench                                    the embedded model
  gemma2 bench --size 2b --layers 4               random weights, fewer layers than published
  gemma2 bench --model gemma-2-2b --prompt-tokens 512 --new-tokens 32
  gemma2 bench attention linear                   single operators at the 2B's shapes
  gemma2 bench all --dtype float32                all of them

Comparisons with other libraries are in the source tree: python -m benchmarks.runner
"""


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    bench = commands.add("bench", _run, "measure tokens per second, or single operators", EXAMPLES)
    bench.add_argument(
        "what",
        nargs="*",
        metavar="OP",
        help="operators to measure, or all; the whole model if none",
    )
    which = bench.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="FOLDER", help="a model to measure")
    which.add_argument("--size", choices=SIZES, help="a published size, with random weights")
    bench.add_argument("--layers", type=count, metavar="N", help="with --size: only N layers")
    bench.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="(auto: as stored, bfloat16)"
    )
    bench.add_argument("--prompt-tokens", type=count, default=128, metavar="N", help="(128)")
    bench.add_argument("--new-tokens", type=count, default=32, metavar="N", help="(32)")
    bench.add_argument("--runs", type=count, default=3, metavar="N", help="(3)")
    bench.add_argument(
        "--context", type=number(int, 128, INF, "a whole number of at least 128"), default=2048,
        metavar="N", help="keys that the operator attention looks at (2048)",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    if args.layers and not args.size:
        args.parser.error("--layers goes with --size")
    set_threads(args)
    import torch

    from gemma2 import bench

    dtype = getattr(torch, dtype_of(args) or "bfloat16")
    here = bench.machine()
    if args.what:
        config = gemma2.Gemma2Config.gemma2_2b()
        if args.size or args.model:
            config, _ = named_config(args)
        names = [] if "all" in args.what else args.what
        for name in names:
            if name not in bench.OPERATORS:
                known = ", ".join(bench.OPERATORS)
                args.parser.error(f"there is no operator {name!r}: there are {known}, all")
        rows = bench.bench_operators(config, dtype, names, args.context, progress=say)
    else:
        if args.size:
            config, name = named_config(args)
            if args.layers:
                config = gemma2.Gemma2Config.from_dict(
                    config.to_dict(),
                    num_hidden_layers=args.layers,
                    layer_types=config.layer_types[: args.layers],
                )
                name += f", {args.layers} layers"
            say(f"{name}, random weights, {str(dtype).removeprefix('torch.')}")
            model = bench.random_model(config, dtype)
        else:
            name = args.model or "the embedded model"
            model, _ = load_causal_lm(args)
        rows = [
            {
                "model": name,
                "dtype": str(model.dtype).removeprefix("torch."),
                **bench.bench_model(
                    model, args.prompt_tokens, args.new_tokens, args.runs, progress=say
                ),
            }
        ]
    if args.json:
        print(json.dumps({"machine": here, "results": rows}, indent=2))
        return
    print(", ".join(f"{name}: {value}" for name, value in here.items()))
    print(bench.markdown(rows))

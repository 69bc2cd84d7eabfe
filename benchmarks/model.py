"""The whole model beside transformers with eager attention: tokens per second and peak memory.

On a GPU it is benchmarks/model_gpu.py. On the CPU

    python -m benchmarks.model --size 2b --prompt 512 --new 32 --isa avx2 --json results/model.json

saves a model with random weights, then loads it with `from_pretrained` in one process per variant:
ours on the machine's instruction set, ours on those named by --isa, and transformers'. A process of
its own makes the peak memory honest: it is the most that was ever resident, loading included. All
variants write the same number of tokens greedily after the same prompt, through the same `generate`
and streamer, whose clock gives prefill (up to the first token) and decode (the rest).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.model_gpu import Clock, cuda_cases, run_on, tiny
from gemma2 import Gemma2Config, Gemma2ForCausalLM
from gemma2.bench import machine, markdown, peak_memory, random_model

__all__ = ["cases", "compare", "cuda_cases", "main", "run", "tiny"]

SMALL = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "query_pre_attn_scalar": 128,
    "sliding_window": 256,
}
SIZES = ("small", "2b", "9b", "27b")


def sized(size: str, layers: int | None = None) -> Gemma2Config:
    """Give the config of a published size or of a small model, cut down to `layers` if given."""
    if size == "small":
        config = Gemma2Config(**SMALL)
    else:
        config = getattr(Gemma2Config, f"gemma2_{size}")()
    if layers is None:
        return config
    kept = config.layer_types[:layers]
    return Gemma2Config.from_dict(config.to_dict(), num_hidden_layers=layers, layer_types=kept)


# ---- what runs in a process of its own ----------------------------------------------------------


def load_ours(folder: str, dtype: str) -> Any:
    return Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype, progress=False)


def load_transformers(folder: str, dtype: str) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # eager, because it is the one that has the cap on every machine and release
    return transformers.Gemma2ForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


def measure_model(load: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Load and run one variant in this process; give its figures."""
    start = time.perf_counter()
    model = load(args.folder, args.dtype)
    loaded = time.perf_counter() - start
    after_loading = peak_memory()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, args.prompt), generator=generator)
    # an id that the vocabulary does not have ends nothing; ours would refuse it
    never: Any = [] if isinstance(model, Gemma2ForCausalLM) else model.config.vocab_size
    prefill, decode = [], []
    out = ids
    for _ in range(args.runs):
        clock = Clock()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.new,
            do_sample=False,
            eos_token_id=never,
            streamer=clock,
        )
        times = clock.times
        prefill.append(args.prompt / (times[1] - times[0]))
        decode.append((args.new - 1) / (times[-1] - times[1]))
    return {
        "prefill": max(prefill),
        "prefill median": statistics.median(prefill),
        "decode": max(decode),
        "decode median": statistics.median(decode),
        "load s": loaded,
        "peak GB loading": after_loading / 1e9,
        "peak GB": peak_memory() / 1e9,
        "tokens": out[0, args.prompt :].tolist(),
    }


# ---- the comparison -----------------------------------------------------------------------------


def in_a_process(task: str, args: argparse.Namespace, isa: str | None = None) -> dict[str, Any]:
    """Run `task` ("save", "ours", "transformers") in a process of its own; give what it printed."""
    environment = dict(os.environ)
    if isa is not None:
        environment["GEMMA2_CPU_ISA"] = isa
    words = [sys.executable, "-m", "benchmarks.model", "--task", task]
    for name in ("size", "layers", "dtype", "prompt", "new", "runs", "folder", "threads"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", str(value)]
    done = subprocess.run(
        words, env=environment, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    if done.returncode != 0:
        raise RuntimeError(f"benchmarks.model: {task} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1]) if task != "save" else {}


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Give a row for each variant: tokens/s, seconds to load, peak memory, agreement with ours."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="gemma2-benchmark-", dir=args.scratch) as scratch:
        if args.folder is None:
            args.folder = scratch
            print(f"saving a random {args.size} model", file=sys.stderr)
            in_a_process("save", args)
        variants: list[tuple[str, str, str | None]] = [("ours", "ours", None)]
        variants += [(f"ours, {isa}", "ours", isa) for isa in args.isa]
        if not args.alone:
            variants.append(("transformers eager", "transformers", None))
        for name, task, isa in variants:
            print(f"running {name}", file=sys.stderr)
            rows.append({"variant": name, **in_a_process(task, args, isa)})
    first = rows[0]["tokens"]
    for row in rows:
        tokens = row.pop("tokens")
        same = next((i for i, t in enumerate(tokens) if t != first[i]), len(tokens))
        row["same tokens"] = f"{same} of {len(first)}"
    return rows


# ---- for the runner -----------------------------------------------------------------------------


def cases() -> list[dict[str, Any]]:
    return [
        {"size": "small", "prompt": 128, "new": 32, "dtype": "float32"},
        {"size": "small", "prompt": 512, "new": 32, "dtype": "bfloat16"},
    ]


def run(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    if "kind" in case:  # a GPU's
        return run_on(case, device)
    args = _parser().parse_args([])
    for name, value in case.items():
        setattr(args, name, value)
    args.threads = torch.get_num_threads()
    found = {}
    for row in compare(args):
        variant = row.pop("variant")
        found.update({f"{variant} {name}": value for name, value in row.items()})
    return found


# ---- the command --------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--new", type=int, default=32, help="new tokens, at least 2 (32)")
    parser.add_argument("--runs", type=int, default=3, help="of each variant (3)")
    parser.add_argument("--isa", nargs="*", default=[], help="further values of GEMMA2_CPU_ISA")
    parser.add_argument("--folder", help="a saved model, instead of a random one")
    parser.add_argument("--scratch", help="where to save the random one (the system's temporary)")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path, help="write the results here, with the machine")
    parser.add_argument("--task", choices=("save", "ours", "transformers"), help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.new < 2 or args.prompt < 1 or args.runs < 1:
        parser.error("--new must be at least 2, --prompt and --runs at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.task == "save":
        config = sized(args.size, args.layers)
        random_model(config, getattr(torch, args.dtype)).save_pretrained(args.folder)
    elif args.task is not None:
        load = load_ours if args.task == "ours" else load_transformers
        print(json.dumps(measure_model(load, args)))
    else:
        here = machine()
        rows = compare(args)
        print(", ".join(f"{name}: {value}" for name, value in here.items()))
        print(f"\n{args.size}, {args.dtype}, {args.new} tokens after {args.prompt}; tokens/s\n")
        print(markdown(rows))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            settings = {
                name: getattr(args, name) for name in ("size", "layers", "dtype", "prompt", "new")
            }
            text = json.dumps({"machine": here, "settings": settings, "results": rows}, indent=2)
            args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

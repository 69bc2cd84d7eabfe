"""`gemma2 info`: a model's size and memory, this build and this machine."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import gemma2
from gemma2.cli.options import SIZES, Commands
from gemma2.cli.shared import named_config, set_threads

__all__ = ["add"]

EXAMPLES = """\
examples:
  gemma2 info                       the embedded model, this build, this machine
  gemma2 info --size 27b            a published size; no weights are needed
  gemma2 info --model gemma-2-2b --json
"""


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    info = commands.add(
        "info", _run, "show a model's size and memory, this build and this machine", EXAMPLES
    )
    which = info.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="FOLDER", help="folder with a config.json")
    which.add_argument("--size", choices=SIZES, help="a published size")


def _run(args: argparse.Namespace) -> None:
    set_threads(args)
    report: dict[str, Any] = {"model": None, "build": _build(), "machine": _machine()}
    if args.model or args.size or _has_embedded():
        report["model"] = _describe(args)
    if args.json:
        print(json.dumps(report, indent=2))
        return
    for title, section in report.items():
        if section is None:
            continue
        print(title)
        for name, value in section.items():
            if value is None:
                continue
            if isinstance(value, dict):
                value = ", ".join(f"{k}: {v}" for k, v in value.items())
            elif isinstance(value, list):
                value = ", ".join(map(str, value))
            print(f"  {name.replace('_', ' '):22} {value}")


def _has_embedded() -> bool:
    from gemma2 import tiny

    return (tiny.path() / "config.json").is_file()


def _describe(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from gemma2.bench import cache_bytes

    config, name = named_config(args)
    with torch.device("meta"):
        parameters = gemma2.Gemma2ForCausalLM(config).num_parameters()
    lengths = {512, 2048, 4096, 8192, 32768, config.max_position_embeddings}
    cache = {
        str(length): _bytes(args, cache_bytes(config, length, torch.bfloat16))
        for length in sorted(lengths)
        if length <= config.max_position_embeddings
    }
    window = config.sliding_window
    return {
        "name": name,
        "parameters": parameters if args.json else f"{parameters:,}",
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": f"{config.num_attention_heads} of {config.head_dim}, "
        f"{config.num_key_value_heads} for keys and values",
        "vocabulary": config.vocab_size,
        "window": f"{window} tokens on {config.layer_types.count('sliding_attention')} layers",
        "context": config.max_position_embeddings,
        "stored_as": config.dtype,
        "weights": {
            "float32": _bytes(args, parameters * 4),
            "bfloat16, float16": _bytes(args, parameters * 2),
        },
        "cache_by_tokens": cache,
        "cache_dtype": "bfloat16, one row",
    }


def _bytes(args: argparse.Namespace, count: int) -> Any:
    if args.json:
        return count
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1000:.0f} kB"


def _build() -> dict[str, Any]:
    import torch

    from gemma2 import _C
    from gemma2.ops._library import cuda_status

    built = _C.build_info()
    return {
        "gemma2": gemma2.__version__,
        "compiler": built["compiler"],
        "built_with_torch": built["built_with_torch"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instruction_sets": _C.compiled_isas(),
        "cuda": cuda_status,
    }


def _machine() -> dict[str, Any]:
    import torch

    from gemma2 import _C
    from gemma2.bench import cpu_name

    return {
        "cpu": cpu_name(),
        "runs": _C.supported_isas(),
        "in_use": _C.isa(),
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *map(torch.cuda.get_device_name, range(torch.cuda.device_count()))],
    }

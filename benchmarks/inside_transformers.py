"""One script of transformers, with its attention and with ours: outputs, time, peak memory.

    python -m benchmarks.inside_transformers --prompt 4608 --new 16 --dtype float32 --runs 3

saves a model with random weights, then runs `generate` of transformers' own Gemma2ForCausalLM on it
with attn_implementation "eager", "sdpa" (which has no cap: for information), "gemma2", and "gemma2"
with our HybridCache. Each run is a process of its own, and runs take turns, so that what else the
machine does falls on all. "memory" is the most that was resident, less what was before the prompt.
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

from gemma2 import Gemma2Config
from gemma2.bench import machine, peak_memory, random_model

__all__ = ["CONFIG", "VARIANTS", "main", "run"]

VARIANTS = ("eager", "sdpa", "gemma2", "gemma2 + HybridCache")
CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "attn_logit_softcapping": 2.0,  # random weights give small scores: the cap must be felt
    "max_position_embeddings": 16384,
}


def run(variant: str, folder: str, prompt: int, new: int, dtype: str) -> dict[str, Any]:
    """Generate `new` tokens greedily after `prompt` random ones; give times, memory, outputs."""
    import transformers

    from gemma2.integrations.transformers import HybridCache

    transformers.logging.set_verbosity_error()
    gemma = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=variant.split(" ")[0], dtype=getattr(torch, dtype)
    )
    ids = torch.randint(3, 8000, (1, prompt), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    if variant.endswith("HybridCache"):
        options["past_key_values"] = HybridCache(gemma.config)
    mask = torch.ones_like(ids)
    gemma.generate(ids[:, :8], attention_mask=mask[:, :8], max_new_tokens=2, do_sample=False)
    before = peak_memory()
    times: list[float] = []

    class Clock(transformers.generation.streamers.BaseStreamer):
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    begin = time.perf_counter()
    out = gemma.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        streamer=Clock(),
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    # the clock is put the prompt first
    return {
        "prefill": times[1] - begin,
        "step": (times[-1] - times[1]) / (new - 1),
        "memory": (peak_memory() - before) / 2**20,
        "tokens": out.sequences[0, prompt:].tolist(),
        "logits": out.logits[0][0].double().tolist(),
    }


def in_own_process(variant: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    call = ["--folder", folder, "--variant", variant, "--prompt", str(options.prompt)]
    call += ["--new", str(options.new), "--dtype", options.dtype]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.inside_transformers", *call],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{variant}: {done.stderr[-1500:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Give Markdown: a row for each variant, least and median over its runs."""
    lines = [
        "| attention | prompt, s | a token, ms | memory, MiB | logits differ | same tokens |",
        "|---|---|---|---|---|---|",
    ]
    first = results["eager"][0]
    exact = torch.tensor(first["logits"])
    for variant, runs in results.items():
        cells = []
        for name, unit in (("prefill", 1.0), ("step", 1e3), ("memory", 1.0)):
            found = [one[name] * unit for one in runs]
            cells.append(f"{min(found):.1f} / {statistics.median(found):.1f}")
        apart = (torch.tensor(runs[0]["logits"]) - exact).abs().max() / exact.square().mean().sqrt()
        same = sum(a == b for a, b in zip(runs[0]["tokens"], first["tokens"], strict=True))
        cells += [f"{float(apart):.1e}", f"{same} of {len(first['tokens'])}"]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=4608)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        found = run(options.variant, options.folder, options.prompt, options.new, options.dtype)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        random_model(Gemma2Config(**CONFIG), torch.float32).save_pretrained(Path(folder))
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
        for _ in range(options.runs):
            for name in VARIANTS:
                results[name].append(in_own_process(name, folder, options))
    print(
        f"{machine()}\n\n{options.prompt} tokens, {options.dtype}, {options.runs} runs: least / median\n"
    )
    print(table(results))


if __name__ == "__main__":
    main()

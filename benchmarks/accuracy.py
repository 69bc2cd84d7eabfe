"""Our error and eager transformers' error against float64, by shape and dtype: a Markdown table.

`python -m benchmarks.accuracy` (or `make accuracy`). Small models built like 2B, 9B and 27B
with random weights whose scores reach several caps (tests/model/factories.py); the truth is a
float64 Gemma 2 that shares no code with either (tests/model/plain.py). Errors are means over
several seeds, relative to the root mean square of the exact values.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.model import factories as F
from tests.model import plain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = ("2b", "9b", "27b")


@dataclass(frozen=True)
class Case:
    shape: str
    dtype: str
    seeds: int = 4
    rows: int = 2
    length: int = 40

    def ids(self, seed: int) -> Tensor:
        return F.tokens(self.rows, self.length, seed)


def cases(seeds: int = 4) -> Iterator[Case]:
    for shape in SHAPES:
        for dtype in DTYPES:
            yield Case(shape, dtype, seeds)


def ours(case: Case, seed: int) -> Any:
    return F.build(F.config(case.shape), dtype=DTYPES[case.dtype], seed=seed)


def eager(case: Case, seed: int) -> Any:
    return F.twin(F.config(case.shape), dtype=DTYPES[case.dtype], seed=seed)


PEERS = {"ours": ours, "eager": eager}


def gradients_of(case: Case, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    config, ids = F.config(case.shape), case.ids(seed)
    state = {k: v.double().requires_grad_() for k, v in F.state_dict(config, seed=seed).items()}
    logits = plain.forward(state, config, ids, dtype=dtype).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    return {k: v.grad for k, v in state.items() if v.grad is not None}


def relative(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Mean and largest error over the root mean square of what is exact."""
    scale = float(exact.square().mean().sqrt())
    error = (actual.double() - exact).abs() / scale
    return float(error.mean()), float(error.max())


def run(case: Case) -> dict[str, dict[str, float]]:
    """Gives by peer: mean and largest error of the logits, mean error of gradients."""
    dtype = DTYPES[case.dtype]
    sums = {peer: dict.fromkeys(("mean", "max", "gradient"), 0.0) for peer in PEERS}
    for seed in range(case.seeds):
        config, ids = F.config(case.shape), case.ids(seed)
        with torch.no_grad():
            state = F.state_dict(config, seed=seed)
            truth = plain.forward(state, config, ids, dtype=dtype).logits
        exact_gradients = gradients_of(case, seed, dtype)
        for peer, make in PEERS.items():
            model = make(case, seed)
            with torch.no_grad():
                mean, largest = relative(model(ids).logits, truth)
            model.train()
            model(ids, labels=ids).loss.backward()
            found = dict(model.named_parameters())
            errors = [relative(found[k].grad, v)[0] for k, v in exact_gradients.items()]
            sums[peer]["mean"] += mean / case.seeds
            sums[peer]["max"] = max(sums[peer]["max"], largest)
            sums[peer]["gradient"] += sum(errors) / len(errors) / case.seeds
    return sums


def table(seeds: int = 4) -> str:
    """Gives the table in Markdown: each cell is ours / eager's."""
    lines = [
        "| shape | dtype | logits, mean | logits, largest | gradients, mean |",
        "|---|---|---|---|---|",
    ]
    for case in cases(seeds):
        result = run(case)
        cells = [
            f"{result['ours'][k]:.1e} / {result['eager'][k]:.1e}"
            for k in ("mean", "max", "gradient")
        ]
        lines.append(f"| {case.shape} | {case.dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy")
    parser.add_argument("--seeds", type=int, default=4, help="models of each shape and dtype")
    args = parser.parse_args()
    import transformers

    from gemma2 import _C

    print(
        f"Error against float64, ours / eager transformers {transformers.__version__}; torch "
        f"{torch.__version__}, {_C.isa()}, {platform.machine()}\n"
    )
    print(table(args.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the cap's form costs in accuracy: `python -m tests.cuda.cap_error` prints the table.

cap tanh(x) can be had of two exp2 and a reciprocal (attention_softmax.h does) or of tanh.approx and one
exp2. Both are carried out here as the kernels do, in float32 with errors of the documented size (PTX
ISA: exp2 and the quotient within 2 ulp, tanh within 2^-11 of its value): random ones, or the worst, which
all push one column of the result to one side. Beside them eager torch in the same dtype; all against
float64. The rule is that of tests/ops/tolerance.py: the mean error at most eager's, the largest twice it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gemma2.bench import markdown

CAP, ROWS, KEYS, DIM = 50.0, 64, 1024, 128
TANH_ERROR, EXP2_ERROR = 2.0**-11, 2.0**-22
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor  # [KEYS, DIM]

    def scores(self) -> Tensor:
        """Before the cap, [ROWS, KEYS] float64; the products are exact in float32, too."""
        return self.q.double() @ self.k.double().T / DIM**0.5


def inputs() -> Iterator[tuple[str, Callable[[torch.dtype], Inputs]]]:
    def random(scale: float, dtype: torch.dtype) -> Inputs:
        g = torch.Generator().manual_seed(0)
        q = torch.randn(ROWS, DIM, generator=g) * scale
        k, v = torch.randn(2, KEYS, DIM, generator=g)
        return Inputs(q.to(dtype), k.to(dtype), v.to(dtype))

    def near(score: float, dtype: torch.dtype) -> Inputs:
        """All scores within 1 of `score`: no key outweighs the others."""
        made = random(0.3, dtype)
        q, k = made.q.float(), made.k.float()
        q[:, 0], k[:, 0] = score, DIM**0.5
        return Inputs(q.to(dtype), k.to(dtype), made.v)

    yield "to 4", lambda dtype: random(1.0, dtype)
    yield "to 20", lambda dtype: random(5.0, dtype)
    yield "to 160", lambda dtype: random(40.0, dtype)
    yield "all near 20", lambda dtype: near(20.0, dtype)
    yield "all near 150", lambda dtype: near(150.0, dtype)


class Errors:
    """Relative errors of one size: random, or by the sign of the first column of v."""

    def __init__(self, worst: bool, v: Tensor) -> None:
        self._g = torch.Generator().manual_seed(1)
        self._sign = v[:, 0].double().sign() if worst else None

    def __call__(self, x: Tensor, size: float) -> Tensor:
        if self._sign is None:
            return x * (1 + size * (2 * torch.rand(x.shape, generator=self._g) - 1))
        return x * (1 + size * self._sign.to(x.dtype) * x.sign())


def eager(x: Inputs) -> Tensor:
    """As transformers: products and cap in the dtype, softmax in float32."""
    s = x.q @ x.k.T * DIM**-0.5
    s = CAP * torch.tanh(s / CAP)
    return torch.softmax(s.float(), -1).to(x.v.dtype) @ x.v


def kernel(x: Inputs, tanh_approx: bool, worst: bool = False) -> Tensor:
    errors = Errors(worst, x.v)
    s = x.scores().float() / CAP
    if tanh_approx:
        capped = CAP * errors(torch.tanh(s), TANH_ERROR)
    else:
        e = errors(torch.exp(2 * s), EXP2_ERROR)
        capped = CAP - errors(2 * CAP / (1 + e), EXP2_ERROR)
    if x.v.dtype == torch.float16:  # which needs the maximum
        capped = capped - capped.amax(-1, keepdim=True)
    p = errors(torch.exp(capped), EXP2_ERROR).to(x.v.dtype).float()
    return (p @ x.v.float() / p.sum(-1, keepdim=True)).to(x.v.dtype)


def exact(x: Inputs) -> Tensor:
    return torch.softmax(CAP * torch.tanh(x.scores() / CAP), -1) @ x.v.double()


def rows() -> Iterator[dict[str, str]]:
    """The errors, each as mean / largest."""
    for name, dtype in DTYPES.items():
        for scores, make in inputs():
            x = make(dtype)
            line = {"dtype": name, "scores": scores}
            for form, result in (
                ("eager", eager(x)),
                ("exact", kernel(x, False)),
                ("exact, worst", kernel(x, False, worst=True)),
                ("tanh.approx", kernel(x, True)),
                ("tanh.approx, worst", kernel(x, True, worst=True)),
            ):
                error = (result.double() - exact(x)).abs()
                line[form] = f"{error.mean():.1e} / {error.max():.1e}"
            yield line


if __name__ == "__main__":
    print(markdown(list(rows())))
    sys.exit(0)

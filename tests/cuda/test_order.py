"""In whatever order blocks and threads run, the CUDA kernels give the same bits."""

from __future__ import annotations

import pytest
import torch

from tests.cuda import counters
from tests.cuda.emulation import Order

pytestmark = pytest.mark.usefixtures("emulated")

ORDERS = [(Order.FORWARD, 0), (Order.BACKWARD, 0), *((Order.RANDOM, seed) for seed in range(3))]


def case_names():
    return [f"{case.operator} {case.what}" for case in counters.cases()]


@pytest.mark.parametrize("index", range(len(case_names())), ids=case_names())
def test_the_order_of_threads_does_not_show(emulator, index):
    results = []
    for order, seed in ORDERS:
        torch.manual_seed(0)  # the case makes its tensors anew: some are written in place
        case = list(counters.cases())[index]
        emulator.configure(seed=seed, order=order)
        outputs = case.call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results.append([*(t for t in outputs if t is not None), *case.written])
    assert any(t.numel() > 0 for t in results[0])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))

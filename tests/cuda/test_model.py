"""The whole model on emulated CUDA kernels writes what it writes on the CPU's."""

from __future__ import annotations

import pytest
import torch

from gemma2 import tiny
from tests.cuda.emulation import operators_library

NEW = 8
# What a step launches, by the dtype: attention in float32 has a kernel of its own.
KERNELS = {
    torch.bfloat16: {"attention_prefill", "decode split"},
    torch.float32: {"attention_any"},
}
COMMON = {"embed", "rms_norm", "add_rms_norm", "rope_cache", "geglu", "softcap", "sample best"}


@pytest.mark.parametrize("dtype", list(KERNELS), ids=str)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_greedy_tokens_are_those_of_the_cpu(emulator, dtype, padding_side):
    model = tiny.load_causal_lm().to(dtype).eval()
    tokenizer = tiny.load_tokenizer()
    batch = tokenizer(
        ["a small bird", "to run quickly over the hill and through the long grass"],
        padding_side=padding_side,
    )
    expected = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    emulator.install(operators_library())
    try:
        with emulator.counting() as counters:
            tokens = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    finally:
        emulator.uninstall(operators_library())
    assert batch["input_ids"].shape[1] > 8  # more than decode's 16 rows
    assert tokens.tolist() == expected.tolist()
    assert set(counters) >= COMMON | KERNELS[dtype], sorted(counters)
    assert counters["embed"]["launches"] == NEW

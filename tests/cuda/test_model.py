"""The whole model on emulated CUDA kernels writes what it writes on the CPU's."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from gemma2 import HybridCache, tiny
from tests.cuda.emulation import operators_library
from tests.model import factories
from tests.model.recorded_graph import as_on_a_device

NEW = 8
# What a step launches, by the dtype: attention in float32 has a kernel of its own.
KERNELS = {
    torch.bfloat16: {"attention_prefill", "decode split"},
    torch.float32: {"attention_any"},
}
COMMON = {"embed", "rms_norm", "add_rms_norm", "rope_cache", "geglu", "softcap", "sample best"}


@contextlib.contextmanager
def installed(emulator, linear=False):
    emulator.install(operators_library())
    emulator.library.gemma2_emulate_linear(linear)
    try:
        yield
    finally:
        emulator.library.gemma2_emulate_linear(False)
        emulator.uninstall(operators_library())


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
    with installed(emulator), emulator.counting() as counters:
        tokens = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert batch["input_ids"].shape[1] > 8  # more than decode's 16 rows
    assert tokens.tolist() == expected.tolist()
    assert set(counters) >= COMMON | KERNELS[dtype], sorted(counters)
    assert counters["embed"]["launches"] == NEW


@pytest.mark.parametrize("help", ["alone", "model", "lookup"])
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 4}],
    ids=["greedy", "sampled"],
)
def test_a_captured_step_writes_the_tokens_of_the_cpu(emulator, options, help):
    model = factories.lively("three")
    drafts = {
        "alone": {},
        "model": {"assistant_model": factories.lively("single"), "num_assistant_tokens": 2},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[help]
    ids, mask = factories.padded([factories.tokens(1, 5)[0], factories.tokens(1, 20)[0]], "left")
    options = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": [], **options}
    expected = model.generate(ids, **options)
    with installed(emulator), as_on_a_device() as graphs:
        tokens = model.generate(ids, **options, **drafts)
    assert tokens.tolist() == expected.tolist()
    assert [graph.captures for graph in graphs] == [1]
    assert graphs[0].replays == 10 or drafts


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@torch.inference_mode()
def test_deterministic_bits_of_a_row_do_not_depend_on_its_batch_or_chunks(emulator, deterministic):
    model = copy.deepcopy(factories.lively("three")).to(torch.bfloat16)
    rows = [factories.tokens(1, n, seed=n)[0] for n in (37, 3)]
    ids, mask = factories.padded(rows, "left")
    cache = HybridCache(model.config, 1, 37)
    with installed(emulator, linear=True), emulator.counting() as counters:
        alone = model(rows[0][None]).logits
        together = model(ids, attention_mask=mask).logits
        pieces = rows[0][None].split([20, 1, 16], dim=1)
        read = [model(piece, past_key_values=cache).logits for piece in pieces]
    assert torch.equal(together[:1], alone)
    assert torch.equal(torch.cat(read, dim=1), alone)
    assert set(counters) >= {"linear few", "linear tile", "attention_prefill"}, sorted(counters)

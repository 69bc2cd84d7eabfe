"""torch.compile without a graph break: what is compiled again, and that nothing else changes.

Truth is the same call of the model, not compiled. What a GPU adds (captured graphs) is in
tests/cuda/test_device.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import get_static_address_type

from gemma2 import HybridCache
from tests.model import factories as F

STEPS = 200  # the window is 8, a ring has 128 slots: all layers but the full ones wrap
ROWS = 2


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs the graphs as they are, and keeps them with their example inputs."""

    def __init__(self) -> None:
        self.seen: list[fx.GraphModule] = []
        self.inputs: list[list[Any]] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.seen.append(graph)
        self.inputs.append(inputs)
        return graph.forward


def compiled(model: Any, **options: Any) -> tuple[Any, Graphs]:
    graphs = Graphs()
    return torch.compile(model, fullgraph=True, backend=graphs, **options), graphs


def new_cache(length: int | None = 300, **options: Any) -> HybridCache:
    return HybridCache(F.tiny().config, ROWS, length, **options)


def assert_same_steps(calls: list[dict[str, Any]], cache: HybridCache, known: int) -> Graphs:
    """Assert that the model, compiled, does each of the calls alike; give the graphs.

    From call number `known` on, compiling anything again is an error.
    """
    model, twin = F.tiny(), copy.deepcopy(cache)
    step, graphs = compiled(model)
    for i, call in enumerate(calls):
        with torch._dynamo.config.patch(error_on_recompile=i >= known):
            out = step(**call, past_key_values=cache)
        wanted = model(**call, past_key_values=twin)
        torch.testing.assert_close(out.logits, wanted.logits, atol=0, rtol=0)
    assert torch.equal(cache.lengths, twin.lengths)
    assert cache.get_seq_length() == twin.get_seq_length()
    for ours, theirs in zip(cache, twin, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    return graphs


# ---- decoding ------------------------------------------------------------------------------------


def one_each() -> list[dict[str, Any]]:
    tokens = F.tokens(ROWS, STEPS)
    return [{"input_ids": tokens[:, i : i + 1]} for i in range(STEPS)]


def padded_prompt() -> dict[str, Any]:
    ids, mask = F.padded([F.tokens(1, 20)[0], F.tokens(1, 6)[0]], "left")
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_steps_are_compiled_once_around_the_ring() -> None:
    cache = new_cache()
    F.tiny()(F.tokens(ROWS, 10), past_key_values=cache)
    graphs = assert_same_steps(one_each(), cache, known=2)
    assert cache.get_seq_length() == STEPS + 10 > cache.layers[0].capacity
    assert len(graphs.seen) <= 2  # with the number of cached tokens known, and with any


@torch.no_grad()
def test_a_batch_with_rows_that_have_ended_is_compiled_once() -> None:
    cache = new_cache()
    F.tiny()(**padded_prompt(), past_key_values=cache)
    calls = one_each()
    for i, call in enumerate(calls):
        call["attention_mask"] = torch.tensor([[1], [int(i < 50)]])
    assert_same_steps(calls, cache, known=2)
    assert cache.lengths.tolist() == [20 + STEPS, 6 + 50]


@torch.no_grad()
def test_a_mask_that_grows_with_every_step_is_compiled_once() -> None:
    cache, prompt = new_cache(), padded_prompt()
    F.tiny()(**prompt, past_key_values=cache)
    calls = one_each()[:30]
    for i, call in enumerate(calls):
        mask = prompt["attention_mask"]
        call["attention_mask"] = torch.nn.functional.pad(mask, (0, i + 1), value=1)
    assert_same_steps(calls, cache, known=2)


@torch.no_grad()
def test_another_cache_is_not_compiled_for_again() -> None:
    model = F.tiny()
    step, graphs = compiled(model)
    for i, prompt in enumerate((10, 20, 30, 40)):
        cache = new_cache()
        model(F.tokens(ROWS, prompt), past_key_values=cache)
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            step(F.tokens(ROWS, 1), past_key_values=cache)
            step(F.tokens(ROWS, 1), past_key_values=cache)
    assert len(graphs.seen) <= 2


@torch.no_grad()
def test_a_cache_that_grows_is_compiled_for_its_sizes_only() -> None:
    cache = new_cache(None)
    graphs = assert_same_steps(one_each(), cache, known=130)
    assert len(graphs.seen) <= 5  # empty, one size, growth, another size
    assert cache.get_seq_length() == STEPS


@torch.no_grad()
def test_no_number_of_the_host_changes_from_step_to_step() -> None:
    """A CUDA graph would be captured again for each, and for tensors that may move."""
    cache = new_cache()
    model = F.tiny()
    model(F.tokens(ROWS, 10), past_key_values=cache)
    graphs = assert_same_steps(one_each()[:3], cache, known=2)
    inputs = graphs.inputs[-1]
    assert all(isinstance(x, Tensor) for x in inputs)
    fixed = [x for x in inputs if get_static_address_type(x) is not None]
    kept = [t for pair in cache for t in pair] + [cache.lengths, cache._written]
    weights = {id(p) for p in model.parameters()}
    assert len([x for x in fixed if id(x) not in weights]) >= len(kept)


@torch.no_grad()
def test_a_full_cache_refuses_in_compiled_code_too() -> None:
    model, cache = F.tiny(), new_cache(12)
    step, _ = compiled(model)
    model(F.tokens(ROWS, 10), past_key_values=cache)
    step(F.tokens(ROWS, 1), past_key_values=cache)
    step(F.tokens(ROWS, 1), past_key_values=cache)
    with pytest.raises(RuntimeError, match="more tokens than max_cache_len, 12"):
        step(F.tokens(ROWS, 1), past_key_values=cache)
    assert cache.lengths.tolist() == [12, 12]


@torch.no_grad()
def test_what_compiled_steps_wrote_is_counted_afterwards() -> None:
    model, cache = F.tiny(), new_cache(40)
    step, _ = compiled(model)
    model(F.tokens(ROWS, 10), past_key_values=cache)
    for _ in range(3):
        step(F.tokens(ROWS, 1), past_key_values=cache)
    taken = cache.snapshot()
    assert taken.longest == 13
    cache.advance(27)
    cache.restore(taken)
    with pytest.raises(ValueError, match="advance: 28 tokens after 13 exceed"):
        cache.advance(28)
    cache.crop(5)
    model(F.tokens(ROWS, 35), past_key_values=cache)
    assert cache.get_seq_length() == 40


# ---- prefill -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["no mask", "left", "documents"])
@torch.no_grad()
def test_prompts_are_compiled_for_one_length_and_then_for_any(how: str) -> None:
    model = F.tiny()
    step, graphs = compiled(model)
    for length in (20, 33, 47):
        ids, call = F.tokens(ROWS, length), {}
        if how == "left":
            ids, mask = F.padded([ids[0], ids[1, :11]], how)
            call = {"attention_mask": mask}
        elif how == "documents":
            call = {"position_ids": torch.arange(length)[None] % 13}
        cache, twin = new_cache(), new_cache()
        out = step(ids, past_key_values=cache, **call)
        wanted = model(ids, past_key_values=twin, **call)
        torch.testing.assert_close(out.logits, wanted.logits, atol=0, rtol=0)
        assert torch.equal(cache.lengths, twin.lengths)
    assert len(graphs.seen) <= 2


@torch.no_grad()
def test_chunks_beyond_the_ring_are_compiled_like_others() -> None:
    tokens, first = F.tokens(ROWS, 600), 0
    calls = []
    for columns in (150, 140, 170):  # more than a ring can take before it is read
        calls.append({"input_ids": tokens[:, first : first + columns]})
        first += columns
    graphs = assert_same_steps(calls, new_cache(600), known=len(calls))
    assert len(graphs.seen) <= 3  # without a past, with one, of any length


@torch.no_grad()
def test_without_a_cache_a_length_is_compiled_once_too() -> None:
    step, graphs = compiled(F.tiny())
    for length in (5, 9, 30):
        tokens = F.tokens(ROWS, length)
        out = step(tokens)
        assert out.past_key_values is None
        wanted = F.tiny()(tokens, use_cache=False)
        torch.testing.assert_close(out.logits, wanted.logits, atol=0, rtol=0)
    assert len(graphs.seen) <= 2


# ---- training, inductor, export ------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_training_step_has_the_same_gradients(checkpointing: bool) -> None:
    plain = F.build(F.config("three")).train()
    twin = copy.deepcopy(plain)
    if checkpointing:
        twin.gradient_checkpointing_enable()
    step = torch.compile(twin, fullgraph=True, backend="aot_eager")
    ids, mask = F.padded([F.tokens(1, 20)[0], F.tokens(1, 6)[0]], "right")
    labels = ids.masked_fill(mask == 0, -100)
    wanted = plain(ids, attention_mask=mask, labels=labels).loss
    wanted.backward()
    loss = step(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    for (name, ours), theirs in zip(twin.named_parameters(), plain.parameters(), strict=True):
        assert F.relative_error(ours.grad, theirs.grad) < 1e-4, name


@pytest.mark.slow
@torch.no_grad()
def test_inductor_gives_the_same_logits_and_keys() -> None:
    model = F.tiny()
    step = torch.compile(model, fullgraph=True)
    cache, twin = new_cache(), new_cache()
    prompt = padded_prompt()
    for c in (cache, twin):
        model(**prompt, past_key_values=c)
    for i in range(4):
        tokens = F.tokens(ROWS, 1, seed=i)
        out = step(tokens, past_key_values=cache).logits
        torch.testing.assert_close(out, model(tokens, past_key_values=twin).logits)
    torch.testing.assert_close(cache[0], twin[0])
    assert cache.get_seq_length() == 24


@torch.no_grad()
def test_the_forward_is_exported_for_any_length() -> None:
    model, tokens = F.tiny(), F.tokens(ROWS, 12)
    columns = torch.export.Dim("columns", min=2, max=512)
    program = torch.export.export(
        model,
        (tokens,),
        {"use_cache": False, "return_dict": False},
        dynamic_shapes={"input_ids": {1: columns}, "use_cache": None, "return_dict": None},
    )
    for length in (12, 31):
        tokens = F.tokens(ROWS, length)
        logits = program.module()(tokens, use_cache=False, return_dict=False)[0]
        wanted = model(tokens, use_cache=False).logits
        torch.testing.assert_close(logits, wanted, atol=0, rtol=0)

"""What only a GPU shows: streams, captured graphs, generation, tensors beyond 2^31 elements, the kernel
that stops.

The operators' results are the contract tests' matter (tests/cuda/proxy.py).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gemma2
from gemma2 import HybridCache, ops, reference, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROOT = Path(__file__).resolve().parents[2]
GPU = "cuda"


def normal(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator(GPU).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=GPU).to(dtype)


def positions(*values):
    return torch.tensor(values, dtype=torch.int64, device=GPU)


class Step:
    """The operators of a decode step, one after the other, on buffers of its own."""

    def __init__(self):
        self.table, self.weight = normal(300, 256), normal(256, seed=1)
        self.k_cache, self.v_cache = torch.zeros(2, 2, 2, 16, 64, device=GPU, dtype=torch.bfloat16)
        self.ids = positions(3, 7)
        self.q_start, self.kv_len = positions(4, 0), positions(5, 1)
        self.step = torch.zeros((), dtype=torch.int64, device=GPU)
        self.cos, self.sin = ops.rope_table(positions(4, 0)[:, None], 64)

    def __call__(self):
        hidden = ops.embed(self.ids, self.table, 16.0)
        x = ops.rms_norm(hidden, self.weight)
        y = ops.add_rms_norm_(hidden, x, self.weight, self.weight)
        heads = y.view(2, 1, 4, 64).transpose(1, 2)
        kv = heads[:, :2]
        q = ops.rope_cache(
            heads, kv, kv, self.cos, self.sin, self.k_cache, self.v_cache, self.q_start, self.kv_len
        )
        wide = ops.geglu(q.flatten(1), y)
        capped = ops.softcap(wide, 30.0)
        return capped, ops.sample(capped, None, 5, self.step, 0.9, 0, 0.95)

    def state(self):
        return [*self(), self.k_cache.clone(), self.v_cache.clone()]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@torch.inference_mode()
def test_operators_run_on_the_current_stream():
    step, other = Step(), Step()
    other.ids.copy_(positions(8, 9))
    expected = other.state()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever is on another stream reads the old ids
        step.ids.copy_(other.ids)
        found = step.state()
    stream.synchronize()
    assert_same(found, expected)


@torch.inference_mode()
def test_a_captured_step_replays_with_new_inputs():
    step, fresh = Step(), Step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for s in (step, fresh):
        s.ids.copy_(positions(11, 250))
        s.q_start.copy_(positions(17, 3))  # around the ring
        s.kv_len.copy_(positions(18, 4))
        s.step.fill_(9)
        s.k_cache.zero_()
        s.v_cache.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same([*out, step.k_cache, step.v_cache], fresh.state())


@torch.inference_mode()
def test_compiled_without_a_break_the_bits_are_the_same():
    step, twin = Step(), Step()

    def norms(x, weight, up):
        return ops.softcap(ops.geglu(ops.rms_norm(x, weight), up), 30.0)

    x, up = normal(5, 256, seed=3), normal(5, 256, seed=4)
    compiled = torch.compile(norms, fullgraph=True)
    assert torch.equal(compiled(x, step.weight, up), norms(x, twin.weight, up))


BIG = (65_600, 32_768)  # 2.15e9 elements, more than 2^31


@pytest.fixture
def big():
    """`big()`: a bfloat16 tensor of more than 2^31 elements, 4.3 GB."""
    free, _ = torch.cuda.mem_get_info()
    if free < 20e9:
        pytest.skip(f"needs 20 GB of GPU memory, {free / 1e9:.0f} are free")
    yield lambda: torch.empty(BIG, device=GPU, dtype=torch.bfloat16).normal_()
    torch.cuda.empty_cache()


@torch.inference_mode()
def test_rows_beyond_2_to_the_31_elements_are_computed_like_the_first(big):
    x, up, weight = big(), big(), normal(BIG[1])
    last = slice(BIG[0] - 3, BIG[0])
    out = ops.geglu(x, up)
    assert torch.equal(out[last], ops.geglu(x[last].clone(), up[last].clone()))
    del out
    out = ops.softcap(x, 2.0)
    assert torch.equal(out[last], ops.softcap(x[last].clone(), 2.0))
    del out
    out = ops.rms_norm(x, weight)
    assert torch.equal(out[last], ops.rms_norm(x[last].clone(), weight))
    del out
    residual = up[last].clone()
    expected = ops.add_rms_norm_(residual, x[last].clone(), weight, weight)
    out = ops.add_rms_norm_(up, x, weight, weight)
    assert torch.equal(out[last], expected)
    assert torch.equal(up[last], residual)
    del out, up
    ids = torch.arange(BIG[0] - 3, BIG[0], device=GPU)
    assert torch.equal(ops.embed(ids, x, 1.0), x[last])


@torch.inference_mode()
def test_caches_beyond_2_to_the_31_elements_are_written_at_their_end(big):
    shape = (2, 4, 1_049_600, 256)  # [B, Hkv, C, D], as many elements
    k_cache, v_cache = big().view(shape), big().view(shape)
    q, k, v = normal(2, 8, 1, 256), normal(2, 4, 1, 256, seed=1), normal(2, 4, 1, 256, seed=2)
    at = shape[2] - 1
    where = positions(at, at), positions(at + 1, at + 1)
    cos, sin = ops.rope_table(where[0][:, None], 256)
    ops.rope_cache(q, k, v, cos, sin, k_cache, v_cache, *where)
    assert torch.equal(k_cache[:, :, at:], ops.rope(q, k, cos, sin)[1])
    assert torch.equal(v_cache[:, :, at:], v)
    ops.cache_write(k_cache, v_cache, v, k, *where)
    assert torch.equal(k_cache[:, :, at:], v)
    assert torch.equal(v_cache[:, :, at:], k)


@torch.inference_mode()
def test_a_row_without_a_token_gets_a_number_that_says_why():
    logits = normal(3, 1000, dtype=torch.float32)
    logits[0, 7] = torch.nan
    logits[2] = -torch.inf
    step = torch.zeros((), dtype=torch.int64, device=GPU)
    for options in ({}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        tokens = ops.sample(logits, None, 0, step, **options).tolist()
        assert tokens[0] == -1
        assert 0 <= tokens[1] < 1000
        assert tokens[2] == -2


@pytest.mark.parametrize("seed", range(5))
@torch.inference_mode()
def test_a_draw_from_equal_logits_is_the_same_on_every_device(seed):
    logits = torch.zeros(64, 5000)
    step = torch.tensor(seed)
    there = ops.sample(logits.to(GPU), None, seed, step.to(GPU))
    assert torch.equal(there.cpu(), ops.sample(logits, None, seed, step))
    assert torch.equal(there.cpu(), reference.gumbel(64, 5000, seed, seed).argmax(-1))


GENERATED = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 4},
}


@pytest.fixture(scope="module")
def story():
    """`story(device)`: the embedded model in float32, and options of generate with two prompts."""
    model, tokenizer = tiny.load_causal_lm().float().eval(), tiny.load_tokenizer()
    texts = ["a small bird", "to run quickly over the hill and through the long grass"]
    batch = tokenizer(texts, padding_side="left")

    def on(device):
        options = {name: torch.as_tensor(value).to(device) for name, value in batch.items()}
        return model.to(device), {**options, "max_new_tokens": 40, "eos_token_id": []}

    return on


@pytest.mark.parametrize("options", GENERATED.values(), ids=GENERATED)
def test_generation_writes_the_tokens_of_the_cpu_with_and_without_a_graph(story, options):
    model, batch = story("cpu")
    expected = model.generate(**batch, **options).tolist()
    model, batch = story(GPU)
    for cuda_graph in (False, None, True):
        assert model.generate(**batch, **options, cuda_graph=cuda_graph).tolist() == expected
    steps = list(model.stream(**batch, **options))
    prompt = batch["input_ids"].shape[1]
    assert torch.stack(steps, 1).tolist() == [row[prompt:] for row in expected]


@pytest.mark.parametrize("options", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_assisted_decoding_writes_the_tokens_of_the_cpu(story, cuda_graph, options):
    model, batch = story("cpu")
    expected = model.generate(**batch, **options).tolist()
    model, batch = story(GPU)
    for help in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        tokens = model.generate(**batch, **options, **help, cuda_graph=cuda_graph)
        assert tokens.tolist() == expected


def test_a_captured_step_keeps_no_memory_and_can_be_captured_again(story):
    model, batch = story(GPU)
    held = []
    for _ in range(4):
        model.generate(**batch, cuda_graph=True)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2] == held[3]


def test_a_growing_cache_is_captured_anew(story):
    model, batch = story(GPU)
    wanted = model.generate(**batch)
    cache = HybridCache(model.config, 2)
    steps = []
    for step in model.stream(**batch, past_key_values=cache):
        steps.append(step)
        if len(steps) == 15:
            cache.grow(cache.max_cache_len + 200)
    assert torch.equal(torch.stack(steps, 1), wanted[:, -len(steps) :])


def test_rows_at_fault_are_named_and_generation_works_afterwards(story):
    model, batch = story(GPU)
    wanted = model.generate(**batch)
    weight = model.model.norm.weight
    kept = weight.data.clone()
    weight.data.fill_(torch.nan)
    try:
        with pytest.raises(ValueError, match="generate: row 0: the logits of the next token have"):
            model.generate(**batch)
    finally:
        weight.data.copy_(kept)
    assert torch.equal(model.generate(**batch), wanted)


def test_tensors_of_two_devices_are_refused_by_name():
    x, weight = normal(3, 64), normal(64)
    with pytest.raises(ValueError, match=r"weight is on the CPU, x is on CUDA device 0"):
        ops.rms_norm(x, weight.cpu())
    with pytest.raises(ValueError, match="must be on the same device"):
        ops.geglu(x, x.cpu())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("ops.embed(one * 9, torch.ones(9, 64, device='cuda'), 1.0)", "an id is not a row"),
        ("ops.embed(-one, torch.ones(9, 64, device='cuda'), 1.0)", "an id is not a row"),
        (
            "ops.sample(torch.ones(1, 40, device='cuda'), one[None] * 40, 0, one[0], 1.0, 0, 1.0, 0.0,"
            " 1.5)",
            "gemma2: ",
        ),
    ],
)
def test_an_id_that_does_not_exist_stops_the_kernel_with_a_message(call, said):
    code = (
        "import torch; from gemma2 import ops; one = torch.ones(1, dtype=torch.int64, device='cuda');"
        f" {call}; torch.cuda.synchronize(); print('went on')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert "went on" not in done.stdout


# The model: where its weights, its keys and values and its stream live; compiled; captured.


@pytest.fixture(scope="module")
def tokens():
    return torch.arange(1200).remainder(4000).view(2, 600) + 3


def chunks(model, tokens, cache):
    """The logits of a prefill, of steps, of a chunk that no ring holds, and of a padded one."""
    device, out, first = model.device, [], 0
    for n in (20, 1, 1, 1, 300, 1, 30):
        part = tokens[:, first : first + n].to(device)
        mask = torch.ones_like(part)
        mask[1, : n // 2] = 0
        inputs = {"attention_mask": mask} if n in (20, 30) else {}
        logits = model(part, past_key_values=cache, **inputs).logits
        out.append(logits.masked_fill((mask == 0)[..., None], 0.0))
        first += n
    return torch.cat(out, 1)


@torch.inference_mode()
def test_a_model_is_loaded_straight_to_the_device_and_gives_the_cpus_logits(tokens):
    model = gemma2.Gemma2ForCausalLM.from_pretrained(tiny.path(), dtype="float32", device=GPU)
    twin = tiny.load_causal_lm("float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.device == torch.device(GPU, torch.cuda.current_device())
        assert torch.equal(ours.cpu(), theirs)
    caches = [HybridCache(model.config, 2, 600) for _ in range(2)]
    found, wanted = chunks(model, tokens, caches[0]), chunks(twin, tokens, caches[1])
    torch.testing.assert_close(found.cpu(), wanted, atol=2e-3, rtol=0)
    assert torch.equal(caches[0].lengths.cpu(), caches[1].lengths)


def test_loading_takes_the_memory_of_the_model_and_converts_on_the_device():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = gemma2.Gemma2ForCausalLM.from_pretrained(tiny.path(), dtype="float16", device=GPU)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert torch.cuda.memory_allocated() - before < size + 2**20
    twin = tiny.load_causal_lm("float16")
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@torch.inference_mode()
def test_no_call_of_the_model_waits_for_the_device(tokens):
    model = tiny.load_causal_lm().to(GPU)
    for length in (600, None):
        cache = HybridCache(model.config, 2, length)
        ids, mask = tokens.to(GPU), torch.ones(2, 600, dtype=torch.int64, device=GPU)
        mask[1, :7] = 0
        model(ids[:, :20], past_key_values=HybridCache(model.config, 2, 64))  # lazy handles
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
            model(ids[:, 20:21], past_key_values=cache)
            model(ids[:, 20:320], past_key_values=cache)
            model(ids[:, 320:321], attention_mask=mask[:, 320:321], past_key_values=cache)
            model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@torch.inference_mode()
def test_layers_on_two_devices_give_the_logits_of_one(tokens):
    model = tiny.load_causal_lm().to(GPU)
    wanted = chunks(model, tokens, HybridCache(model.config, 2))
    half = len(model.model.layers) // 2
    for part in (*model.model.layers[half:], model.model.norm):
        part.to("cuda:1")
    cache = HybridCache(model.config, 2)
    assert torch.equal(chunks(model, tokens, cache), wanted)
    assert {k.device.index for k, _ in cache} == {0, 1}


@torch.inference_mode()
def test_compiled_and_captured_steps_give_the_logits_of_the_model(tokens):
    model = tiny.load_causal_lm("float32").to(GPU)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    caches = [HybridCache(model.config, 2, 600) for _ in range(2)]
    ids = tokens.to(GPU)
    for cache in caches:
        model(ids[:, :20], past_key_values=cache)
    for i in range(20, 220):  # the rings wrap
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(error_on_recompile=i >= 22):
            found = step(ids[:, i : i + 1], past_key_values=caches[0]).logits.clone()
        wanted = model(ids[:, i : i + 1], past_key_values=caches[1]).logits
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=0)
    assert caches[0].get_seq_length() == 220
    assert torch.equal(caches[0].lengths, caches[1].lengths)


def test_the_command_writes_on_the_device():
    texts = []
    for device in ("cpu", GPU):
        words = (
            "generate",
            "--device",
            device,
            "--dtype",
            "float32",
            "--no-stream",
            "a small bird",
        )
        command = [sys.executable, "-m", "gemma2", *words]
        texts.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True))
    assert texts[0].stdout == texts[1].stdout != ""

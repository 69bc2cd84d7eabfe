"""Generation as on a GPU, with its step captured, gives the CPU's tokens (tests/model/recorded_graph.py)."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch

from gemma2 import HybridCache
from gemma2.generation import graph as graph_module
from tests.model.factories import build, config, lively, padded, tokens
from tests.model.recorded_graph import as_on_a_device

NEVER = {"eos_token_id": []}
SAMPLED = {"do_sample": True, "temperature": 1.5, "seed": 11}
SAMPLING = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.5},
    "all": {**SAMPLED, "top_k": 0},
    "top-k": {**SAMPLED, "top_k": 20},
    "top-p": {**SAMPLED, "top_k": 0, "top_p": 0.8, "repetition_penalty": 0.8},
    "min-p": {**SAMPLED, "top_k": 0, "min_p": 0.05},
}
ROWS = {"one": (9,), "several": (3, 12, 1), "long": (140, 20)}  # a ring has 128 slots


@pytest.fixture
def model():
    return lively("three")


def assert_the_same(model, *args, **options):
    """The tokens as on a device are the CPU's; gives the graphs."""
    wanted = model.generate(*args, **options)
    with as_on_a_device() as graphs:
        found = model.generate(*args, **options, cuda_graph=True)
    assert torch.equal(found, wanted)
    return graphs


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_tokens_are_those_of_the_plain_loop(model, sampling, side, rows):
    ids, mask = padded([tokens(1, n, seed=n)[0] for n in ROWS[rows]], side)
    options = {"attention_mask": mask, "max_new_tokens": 14, **NEVER, **SAMPLING[sampling]}
    (graph,) = assert_the_same(model, ids, **options)
    assert (graph.captures, graph.replays) == (1, 12), "one step is the prompt's, one warms up"


@pytest.mark.parametrize("shape", ["2b", "9b", "27b", "single"])
def test_every_size_of_model_can_be_captured(shape):
    assert_the_same(lively(shape), tokens(2, 9), max_new_tokens=12, **NEVER)


def test_rings_may_wrap_between_replays(model):
    cache = HybridCache(model.config, 2, 300)
    assert_the_same(model, tokens(2, 100), max_new_tokens=60, **NEVER)
    with as_on_a_device():
        model.generate(tokens(2, 100), max_new_tokens=60, past_key_values=cache, **NEVER)
    assert min(layer.capacity for layer in cache.layers) == 128
    assert cache.lengths.tolist() == [159, 159]


def test_rows_end_at_steps_of_their_own(model):
    ids = tokens(3, 6)
    free = model.generate(ids, max_new_tokens=30, **NEVER)[:, 6:]
    eos = [int(free[1, 4]), int(free[0, 13])]
    options = {"max_new_tokens": 30, "eos_token_id": eos, "pad_token_id": 5}
    assert_the_same(model, ids, **options)
    wanted, found = (HybridCache(model.config, 3, 64) for _ in range(2))
    out = model.generate(ids, **options, past_key_values=wanted)
    with as_on_a_device():
        model.generate(ids, **options, past_key_values=found)
    assert torch.equal(found.lengths, wanted.lengths)
    ended = (out[:, 6:] == 5).sum(1)
    assert len(set(ended.tolist())) > 1


@pytest.mark.parametrize("stop", [1, 2, 3, 7])
def test_steps_launched_after_all_rows_have_ended_change_nothing(model, stop):
    ids = tokens(2, 6)
    free = model.generate(ids[:1], max_new_tokens=stop, **NEVER)
    options = {"max_new_tokens": 30, "eos_token_id": int(free[0, -1])}
    one = ids[:1].repeat(2, 1)
    cache = HybridCache(model.config, 2, 64)
    wanted = model.generate(one, **options)
    with as_on_a_device(ahead=8):
        out = model.generate(one, **options, past_key_values=cache, cuda_graph=True)
        assert cache.get_seq_length() == out.shape[1] - 1, "steps in vain are not counted"
    assert torch.equal(out, wanted)
    assert cache.lengths.tolist() == [out.shape[1] - 1] * 2


def test_the_host_counts_replays(model):
    cache = HybridCache(model.config, 1, 64)
    with as_on_a_device() as graphs:
        for n, _ in enumerate(
            model.stream(tokens(1, 9), max_new_tokens=12, past_key_values=cache, **NEVER)
        ):
            assert cache.get_seq_length() == 9 + n
    assert graphs[0].replays == 10


def test_samples_of_one_prompt(model):
    options = {"num_return_sequences": 3, **SAMPLED, "top_k": 0, **NEVER}
    assert_the_same(model, tokens(2, 7), max_new_tokens=12, **options)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_prompts_read_in_chunks(model, chunk):
    ids, mask = padded([tokens(1, 90)[0], tokens(1, 70, seed=1)[0]], "left")
    options = {"attention_mask": mask, "prefill_chunk_size": chunk}
    assert_the_same(model, ids, max_new_tokens=12, **options, **NEVER)


def test_embeddings_in_the_place_of_ids(model):
    embeds = model.get_input_embeddings()(tokens(2, 5)).detach()
    assert_the_same(model, inputs_embeds=embeds, repetition_penalty=1.3, max_new_tokens=12, **NEVER)


def test_a_conversation_goes_on_from_the_cache(model):
    caches = [HybridCache(model.config, 2, 400) for _ in range(2)]
    texts = [tokens(2, 20)] * 2
    for turn in range(3):
        options = {"max_new_tokens": 25, **NEVER, **SAMPLED}
        texts[0] = model.generate(texts[0], past_key_values=caches[0], **options)
        with as_on_a_device():
            texts[1] = model.generate(texts[1], past_key_values=caches[1], **options)
            assert caches[1].get_seq_length() == texts[1].shape[1] - 1
        assert torch.equal(*texts)
        texts = [torch.cat([text, tokens(2, 30, seed=turn)], dim=1) for text in texts]


def test_rows_go_on_from_lengths_of_their_own_in_a_cache_with_no_room_to_spare(model):
    """The host counts columns while the prompt is read, padding included; then it knows better."""
    outs = []
    for device in (False, True):
        cache = HybridCache(model.config, 2, 30 + 12 - 1)
        ids, mask = padded([tokens(1, 20)[0], tokens(1, 5, seed=1)[0]], "right")
        options = {"past_key_values": cache, "attention_mask": mask, **NEVER}
        model.generate(ids, max_new_tokens=1, **options)
        ids, mask = padded([tokens(1, 30)[0], tokens(1, 30, seed=1)[0]], "right")
        ids[:, :20] = tokens(1, 20)
        ids[1, :5] = tokens(1, 5, seed=1)
        options = {"past_key_values": cache, "max_new_tokens": 12, **NEVER}
        if device:
            with as_on_a_device() as graphs:
                outs.append(model.generate(ids, **options))
            assert len(graphs) == 1
        else:
            outs.append(model.generate(ids, **options))
    assert torch.equal(*outs)


def test_documents_in_the_cache_stay_apart(model):
    """A cache with a history of position ids: the step keeps it on."""
    ids = tokens(1, 24)
    places = torch.cat([torch.arange(10), torch.arange(14)])[None]
    outs = []
    for device in (False, True):
        cache = HybridCache(model.config, 1, 64)
        with torch.no_grad():
            model(ids[:, :20], position_ids=places[:, :20], past_key_values=cache)
        assert cache.has_history
        if device:
            with as_on_a_device() as graphs:
                outs.append(model.generate(ids, max_new_tokens=12, past_key_values=cache, **NEVER))
            assert [graph.captures for graph in graphs] == [1]
        else:
            outs.append(model.generate(ids, max_new_tokens=12, past_key_values=cache, **NEVER))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], model.generate(ids, max_new_tokens=12, **NEVER))


# ---- the stream ---------------------------------------------------------------------------------


def test_a_cache_that_grows_or_is_watched_between_steps_is_captured_anew(model):
    ids = tokens(1, 9)
    wanted = model.generate(ids, max_new_tokens=30, **NEVER)[0, 9:].tolist()
    cache = HybridCache(model.config, 1)
    with as_on_a_device() as graphs:
        given, captures = [], []
        for step in model.stream(ids, max_new_tokens=30, past_key_values=cache, **NEVER):
            given.append(int(step))
            captures.append(graphs[0].captures if graphs else 0)
            if len(given) == 10:
                cache.grow(300)
            if len(given) == 20:
                taken = cache.snapshot()
    assert given == wanted
    assert captures[5] == captures[9] == 1
    assert captures[10] == captures[19] == 2
    assert captures[-1] == 3
    cache.restore(taken)
    assert cache.lengths.tolist() == [9 + 19]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
def test_a_stream_that_is_dropped_leaves_the_cache_at_the_last_token_given(model, steps):
    ids = tokens(1, 9)
    cache = HybridCache(model.config, 1)
    with as_on_a_device():
        stream = model.stream(ids, max_new_tokens=20, past_key_values=cache, **NEVER)
        given = [int(next(stream)) for _ in range(steps)]
        stream.close()
    text = torch.cat([ids, torch.tensor([given], dtype=torch.int64)], dim=1)
    assert cache.lengths.tolist() == [9 + steps - 1 if steps else 0]
    out = model.generate(text, max_new_tokens=20 - steps, past_key_values=cache, **NEVER)
    assert torch.equal(out, model.generate(ids, max_new_tokens=20, **NEVER))


def test_a_streamer_gets_a_step_while_just_one_more_is_under_way(model):
    ids = tokens(1, 9)
    lengths = []

    class Streamer:
        def put(self, value):
            lengths.append(int(cache.lengths[0]))

        def end(self):
            pass

    cache = HybridCache(model.config, 1, 64)
    with as_on_a_device():
        options = {"past_key_values": cache, "streamer": Streamer(), "max_new_tokens": 12}
        model.generate(ids, **options, **NEVER)
    # the prompt, then token n with n + 1 steps launched, of which the first read the prompt
    assert lengths == [0, *range(10, 21), 20]


def test_the_host_runs_ahead_without_waiting(model):
    """When the first token is looked at, the steps after it have been launched."""
    launched = []
    with as_on_a_device(ahead=4) as graphs:
        from gemma2.generation import loop

        taken = loop._Mailbox.take

        def look(self):
            launched.append(graphs[0].replays)
            return taken(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Mailbox, "take", look)
            model.generate(tokens(1, 9), max_new_tokens=12, **NEVER)
    assert launched == [3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10, 10]


# ---- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "said"), [(-1, "row 1: the logits of the next token have NaN"), (-2, "-infinity")]
)
@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_row_at_fault_is_named_and_the_cache_ends_where_it_was(
    model, monkeypatch, step, number, said
):
    """On a device the operator cannot raise: it gives a number that is no token."""
    from gemma2 import ops

    real = ops.sample

    def sample(logits, history, seed, steps, *options):
        drawn = real(logits, history, seed, steps, *options)
        at_fault = (steps == step) & (torch.arange(len(drawn)) == 1)
        return torch.where(at_fault, number, drawn)

    monkeypatch.setattr(ops, "sample", sample)
    cache = HybridCache(model.config, 2, 64)
    with as_on_a_device(), pytest.raises(ValueError, match=f"generate: .*{said}"):
        model.generate(tokens(2, 6), max_new_tokens=12, past_key_values=cache, **NEVER)
    assert cache.lengths.tolist() == [6 + step] * 2


# ---- when it is captured ------------------------------------------------------------------------


def test_a_graph_is_made_where_it_pays_or_is_asked_for(model):
    ids = tokens(1, 6)

    def graphs(new, **options):
        with as_on_a_device() as made:
            model.generate(ids, max_new_tokens=new, **options, **NEVER)
        return [(graph.captures, graph.replays) for graph in made]

    assert graphs(9) == [(1, 7)]
    assert graphs(8) == []
    assert graphs(9, cuda_graph=False) == []
    assert graphs(4, cuda_graph=True) == [(1, 2)]
    assert graphs(1, cuda_graph=True) == [(0, 0)]


def test_the_cpu_cannot_be_captured(model):
    with pytest.raises(ValueError, match="cuda_graph is True, but the model is on cpu"):
        model.generate(tokens(1, 6), cuda_graph=True)
    with pytest.raises(TypeError, match="cuda_graph is 1: it must be a bool"):
        model.stream(tokens(1, 6), cuda_graph=1)


def test_hooks_are_called_so_there_is_no_graph():
    model = build(config("three"))
    wanted = model.generate(tokens(1, 6), max_new_tokens=12, **NEVER)
    calls = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(0))
    with as_on_a_device() as graphs:
        out = model.generate(tokens(1, 6), max_new_tokens=12, **NEVER)
        with pytest.raises(ValueError, match=r"but model\.layers\.1\.mlp has hooks"):
            model.generate(tokens(1, 6), cuda_graph=True)
        hook.remove()
        everywhere = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
        try:
            with pytest.raises(ValueError, match="hooks are registered for all modules"):
                model.generate(tokens(1, 6), cuda_graph=True)
        finally:
            everywhere.remove()
    assert not graphs
    assert len(calls) == 12
    assert torch.equal(out, wanted)


def test_a_long_row_outside_of_the_batch_is_no_reason_to_fail(model):
    """The host counts the longest row only; with such a row it looks at the lengths instead."""
    cache = HybridCache(model.config, 2, 30)
    with torch.no_grad():
        model(tokens(2, 25), past_key_values=cache)
    cache.crop(torch.tensor([0]))
    wanted = model.generate(tokens(1, 6), max_new_tokens=20, **NEVER)
    with as_on_a_device() as graphs:
        with pytest.raises(ValueError, match="that is not in the batch is so long"):
            model.generate(tokens(1, 6), past_key_values=cache, cuda_graph=True)
        out = model.generate(tokens(1, 6), max_new_tokens=20, past_key_values=cache, **NEVER)
    assert not graphs
    assert torch.equal(out, wanted)
    assert cache.lengths.tolist() == [25, 25]


def test_a_capture_that_fails_says_what_to_do(model, monkeypatch):
    real = type(model).forward

    def forward(self, *args, **options):
        out = real(self, *args, **options)
        out.logits.sum().item()
        return out

    monkeypatch.setattr(type(model), "forward", forward)
    with as_on_a_device() as graphs, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.model.recorded_graph.HostWaitsError", RuntimeError)
        patch.setattr("tests.model.recorded_graph.RecordedGraph.warm_up", lambda _, f: f())
        with pytest.raises(RuntimeError, match=r"could not be captured .* cuda_graph=False runs"):
            model.generate(tokens(1, 6), max_new_tokens=12, cuda_graph=True, **NEVER)
        model.generate(tokens(1, 6), max_new_tokens=12, cuda_graph=False, **NEVER)
    assert len(graphs) == 1


# ---- CUDA's own, as far as it goes without a GPU -------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda with streams, events and graphs that only note what is done with them, in order."""
    done = mock.Mock()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: done.side)
    monkeypatch.setattr(torch.cuda, "Event", lambda: done.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: done.current)
    graph = mock.create_autospec(torch.cuda.CUDAGraph, instance=True)
    done.attach_mock(graph, "graph")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)

    @contextlib.contextmanager
    def stream(wanted):
        done.enter(wanted)
        yield
        done.leave()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    graph_module._capture_stream.cache_clear()
    yield done
    graph_module._capture_stream.cache_clear()


def test_cuda_warms_up_and_captures_on_a_stream_of_its_own(cuda):
    capture = graph_module.CudaCapture(torch.device("cuda"))
    capture.warm_up(cuda.function)
    capture.capture(cuda.function)
    capture.replay()
    capture.reset()
    capture.reset()
    side, current, call = cuda.side, cuda.current, mock.call
    assert cuda.mock_calls == [
        call.side.wait_stream(current),
        call.enter(side),
        call.function(),
        call.leave(),
        call.current.wait_stream(side),
        call.enter(side),
        call.graph.capture_begin(capture_error_mode="thread_local"),
        call.function(),
        call.graph.capture_end(),
        call.leave(),
        call.graph.replay(),
        call.event.record(current),
        call.event.synchronize(),  # a graph may not go while it runs
        call.graph.reset(),
    ]


def test_a_capture_is_ended_when_the_step_fails(cuda):
    capture = graph_module.CudaCapture(torch.device("cuda"))
    with contextlib.suppress(KeyboardInterrupt):
        capture.capture(mock.Mock(side_effect=KeyboardInterrupt))
    assert cuda.graph.capture_end.called
    capture.capture(cuda.function)

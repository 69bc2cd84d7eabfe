"""The recorder that stands for a CUDA graph: what it refuses, and what a replay does."""

from __future__ import annotations

import pytest
import torch

from tests.model.recorded_graph import HostWaitsError, RecordedGraph

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def x():
    return torch.arange(6.0)


WAITS = [
    lambda: x().sum().item(),
    lambda: bool((x() > 1).any()),
    lambda: int(x()[2]),
    lambda: list(range(x()[2].long())),
    lambda: x().tolist(),
    lambda: x().cpu(),
    lambda: x().numpy(),
    lambda: f"{x()}",
    lambda: 3.0 in x(),
    lambda: torch.tensor([1, 2]),
    lambda: torch.equal(x(), x()),
    lambda: torch.allclose(x(), x()),
    lambda: x().nonzero(),
    lambda: torch.where(x() > 1),
    lambda: x()[x() > 1],
    lambda: x().masked_select(x() > 1),
    lambda: x().index_put_((x() > 1,), torch.zeros(1)),
    lambda: x().__setitem__(x() > 1, 0.0),
    lambda: x().unique(),
    lambda: x().repeat_interleave(x().long()),
    lambda: torch.isin(x(), torch.arange(20.0)),
    lambda: x().to("meta"),
    lambda: torch.rand(3),
    lambda: x().bernoulli(),
]


@pytest.mark.parametrize("function", WAITS, ids=lambda f: str(WAITS.index(f)))
@pytest.mark.parametrize("use", ["warm_up", "capture"])
def test_what_makes_the_host_wait_is_refused_with_its_line(function, use):
    line = function.__code__.co_firstlineno
    with pytest.raises(HostWaitsError, match=rf": tests/model/test_recorded_graph\.py:{line}: "):
        getattr(RecordedGraph(CPU), use)(function)


def test_a_replay_is_the_captured_call_with_what_memory_holds_now():
    state, given = torch.zeros(3), torch.ones(3)
    out = torch.empty(3)

    def function():
        state[1:].add_(given[1:])
        doubled = torch.where(given > 1, given * 2, given).view(3, 1).expand(3, 2).sum(1)
        out.copy_(doubled[torch.arange(2, -1, -1)] + state)

    graph = RecordedGraph(CPU)
    graph.capture(function)
    assert state.tolist() == [0, 0, 0], "capturing runs nothing"
    graph.replay()
    assert state.tolist() == [0, 1, 1]
    assert out.tolist() == [2, 3, 3]
    given.copy_(torch.tensor([5.0, 1.0, 1.0]))
    graph.replay()
    assert state.tolist() == [0, 2, 2]
    assert out.tolist() == [2, 4, 22]


def test_python_does_not_run_in_a_replay():
    counter, out = [0], torch.zeros(4)

    def function():
        out[counter[0]] += 1
        counter[0] += 1

    graph = RecordedGraph(CPU)
    graph.warm_up(function)
    graph.capture(function)
    graph.replay()
    graph.replay()
    assert out.tolist() == [1, 2, 0, 0]


def test_results_of_a_capture_hold_nothing_before_the_replay():
    kept = []

    def function():
        kept.append(torch.ones(2) * 3)

    graph = RecordedGraph(CPU)
    graph.capture(function)
    assert kept[0].tolist() != [3, 3]
    graph.replay()
    assert kept[0].tolist() == [3, 3]

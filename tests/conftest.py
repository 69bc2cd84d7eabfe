"""Fixtures for everyone: a tiny random model, its twin in transformers and its float64 oracle."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Examples are the same in every run of CI; `HYPOTHESIS_PROFILE=soak` draws new and many ones.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("ci", derandomize=True, database=None, print_blob=True, **_COMMON)
settings.register_profile("soak", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# Counts that are printed after the tests, such as the cells of a grid: title -> kind -> number. With
# pytest-xdist each process has counts of its own, which are added up in the one that prints.
TALLIES: pytest.StashKey[dict[str, Counter[str]]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLIES] = defaultdict(Counter)
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_Processes(config))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        tallies = session.config.stash[TALLIES]
        output["tallies"] = {title: dict(counts) for title, counts in tallies.items()}


class _Processes:
    """Receives the counts of pytest-xdist's processes."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_testnodedown(self, node: Any) -> None:
        for title, counts in getattr(node, "workeroutput", {}).get("tallies", {}).items():
            self.config.stash[TALLIES][title].update(counts)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for title, counts in config.stash[TALLIES].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        terminalreporter.write_line(f"{counts.total()} {title} ({kinds})")


@pytest.fixture(scope="session")
def tallies(pytestconfig: pytest.Config) -> dict[str, Counter[str]]:
    """Counts that are printed after the tests: `tallies["title"]["kind"] += 1`."""
    return pytestconfig.stash[TALLIES]


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """A test's numbers depend on nothing that ran before; torch's switches are put back."""
    torch.manual_seed(0)
    deterministic = torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """`tiny("27b", "causal", torch.bfloat16)`: one of our models with random weights."""
    from tests.model import factories

    return factories.tiny


@pytest.fixture
def twin() -> Callable[..., Any]:
    """`twin(config)`: the same model in transformers, with eager attention."""
    from tests.model import factories

    return factories.twin

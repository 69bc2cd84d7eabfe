"""Fixtures for everyone: a tiny random model, its twin in transformers and its float64 oracle."""

from __future__ import annotations

import os
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


# What a module wants said at the end of the run, such as how many cells its grid had.
NOTES: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOTES] = []


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for note in config.stash[NOTES]:
        terminalreporter.write_line(note)


@pytest.fixture(scope="session")
def notes(pytestconfig: pytest.Config) -> list[str]:
    """Lines that are printed after the tests."""
    return pytestconfig.stash[NOTES]


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

"""A pytest plugin: the contract tests of the operators on emulated CUDA kernels.

`pytest -p tests.cuda.backend tests/ops/test_rms_norm.py` runs the same test file with the CUDA
kernels, executed by the emulator, in the place of the CPU's. Operators without a CUDA kernel stay on
the CPU, and so does `linear` but in its own tests: a whole model's products would take minutes. A run
in which no block of a kernel ran fails: it would have tested nothing.
GEMMA2_EMULATOR_SEED chooses another order of threads.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.cuda.emulation import Emulator, operators_library

_emulator: Emulator | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _emulator
    _emulator = Emulator()
    _emulator.configure(seed=int(os.environ.get("GEMMA2_EMULATOR_SEED", "0")))
    _emulator.install(operators_library())


def pytest_runtest_setup(item: pytest.Item) -> None:
    assert _emulator is not None
    _emulator.library.gemma2_emulate_linear(item.path.stem == "test_linear")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    assert _emulator is not None
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["emulated_blocks"] = _emulator.blocks()
        return
    remote = session.config.stash.get(_REMOTE, Counter())
    total = _emulator.blocks() + remote["blocks"]
    session.config.stash[_TOTAL] = total
    if total == 0 and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


_REMOTE: pytest.StashKey[Counter[str]] = pytest.StashKey()
_TOTAL: pytest.StashKey[int] = pytest.StashKey()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    config = node.config  # type: ignore[attr-defined]
    counts = config.stash.setdefault(_REMOTE, Counter())
    counts["blocks"] += getattr(node, "workeroutput", {}).get("emulated_blocks", 0)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    total = config.stash.get(_TOTAL, 0)
    terminalreporter.write_line(f"{total} blocks of CUDA kernels ran on the emulator")
    if total == 0:
        terminalreporter.write_line("ERROR: no CUDA kernel ran", red=True)

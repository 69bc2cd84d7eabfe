"""Fixtures of the tests that run CUDA kernels on the emulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda.emulation import LIBRARY, Emulator, operators_library


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    """The emulator, with its settings as they were at the end of the module."""
    if not LIBRARY.exists():
        pytest.skip("the emulator is not built: make emulator")
    emulator = Emulator()
    yield emulator
    emulator.configure()


@pytest.fixture(scope="module")
def emulated(emulator: Emulator) -> Iterator[Emulator]:
    """In this module operators on CPU tensors are the emulated CUDA kernels, `linear`, too."""
    emulator.install(operators_library())
    emulator.library.gemma2_emulate_linear(True)
    yield emulator
    emulator.library.gemma2_emulate_linear(False)
    emulator.uninstall(operators_library())

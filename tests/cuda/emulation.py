"""The emulator of CUDA kernels, from Python: build it, set it, read its counters.

It runs the files csrc/cuda/*.cu as host code (tests/cuda/emulator) on CPU tensors.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "cuda" / "emulator"
BUILD = ROOT / "build" / "emulator"
# GEMMA2_EMULATED: another build of it, such as one with a fault.
LIBRARY = Path(os.environ.get("GEMMA2_EMULATED") or BUILD / "_cuda_emulated.so")


class Order(enum.IntEnum):
    """In which order threads run between two waits, and blocks after each other."""

    RANDOM = 0
    FORWARD = 1
    BACKWARD = 2


class Landing(enum.IntEnum):
    """When an asynchronous copy writes: at the last or at the first moment it may."""

    LATE = 0
    EARLY = 1


def tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"the emulator is built with {name}, which is not installed")
    return found


def build() -> Path:
    """Builds the emulator with the kernels, or brings it up to date; gives the library's path."""
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    for command in (
        [
            tool("cmake"), "-S", str(SOURCE), "-B", str(BUILD),
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *generator,
        ],
        [tool("cmake"), "--build", str(BUILD), "--parallel", str(os.cpu_count() or 1)],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return LIBRARY


class Emulator:
    """One loaded emulator library."""

    def __init__(self, path: Path = LIBRARY) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run `make emulator`")
        self.library = ctypes.CDLL(str(path))
        for name in ("emulator_counters", "emulator_check_written", "planted", "interpret"):
            getattr(self.library, f"gemma2_{name}").restype = ctypes.c_char_p
        self.library.gemma2_emulated_kernels.restype = ctypes.c_void_p
        self.library.gemma2_emulator_mutate.restype = ctypes.c_bool
        self.library.gemma2_emulator_blocks.restype = ctypes.c_uint64

    def configure(
        self,
        seed: int = 0,
        order: Order = Order.RANDOM,
        landing: Landing = Landing.LATE,
        counting: bool = False,
    ) -> None:
        """Sets how the following launches run."""
        self.library.gemma2_emulator_configure(
            ctypes.c_uint64(seed), int(order), int(landing), int(counting)
        )

    def install(self, operators: Path) -> None:
        """CPU tensors go to the emulated kernels, in this process, from now on."""
        ctypes.CDLL(str(operators)).gemma2_install_kernels(
            ctypes.c_void_p(self.library.gemma2_emulated_kernels()), True
        )

    def uninstall(self, operators: Path) -> None:
        ctypes.CDLL(str(operators)).gemma2_install_kernels(ctypes.c_void_p(None), True)

    @contextmanager
    def mutated(self, name: str) -> Iterator[None]:
        """Inside, the kernels have this fault of csrc/common/mutate.h."""
        if not self.library.gemma2_emulator_mutate(name.encode()):
            raise ValueError(f"no fault is named {name}")
        try:
            yield
        finally:
            self.library.gemma2_emulator_mutate(b"")

    def blocks(self) -> int:
        """Blocks that have run in this process."""
        return int(self.library.gemma2_emulator_blocks())

    @contextmanager
    def counting(self, **settings: Any) -> Iterator[dict[str, Any]]:
        """Counts what runs inside; the dictionary is filled at the end: kernel -> counters."""
        counters: dict[str, Any] = {}
        self.library.gemma2_emulator_reset_counters()
        self.configure(counting=True, **settings)
        try:
            yield counters
        finally:
            counters.update(json.loads(self.library.gemma2_emulator_counters()))
            self.configure()


def operators_library() -> Path:
    """The compiled operators of the installed package."""
    import gemma2.ops._library as loader

    return Path(loader.__file__).parent.parent / "_ops.so"


if __name__ == "__main__":
    print(build())

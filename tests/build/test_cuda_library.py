"""The CUDA library asks for nothing: no torch, no CUDA runtime, no driver, until it is used."""

from __future__ import annotations

import ctypes.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gemma2
from gemma2 import _C

LIBRARY = Path(gemma2.__file__).parent / "_cuda.so"

pytestmark = [
    pytest.mark.skipif(
        not _C.build_info()["cuda"], reason="this build has no CUDA kernels (no nvcc)"
    ),
    pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is missing"),
]
without_driver = pytest.mark.skipif(
    ctypes.util.find_library("cuda") is not None, reason="this machine has a CUDA driver"
)

RUNTIME = {"libc", "libm", "libdl", "librt", "libpthread", "libstdc++", "libgcc_s", "ld-linux"}


def answer(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def dynamic_section() -> list[str]:
    return answer("readelf", "-dW", str(LIBRARY)).splitlines()


def test_it_needs_only_the_language_runtimes():
    needed = [line.split("[")[1].rstrip("]") for line in dynamic_section() if "NEEDED" in line]
    assert needed
    assert {name.split(".so")[0].split("-linux")[0] for name in needed} - {"ld"} <= RUNTIME, needed


def test_it_records_no_path():
    assert not [line for line in dynamic_section() if "RPATH" in line or "RUNPATH" in line]


def test_it_exports_its_table_and_its_trouble():
    lines = answer("nm", "-D", "--defined-only", str(LIBRARY)).splitlines()
    assert {line.split()[-1].split("@")[0] for line in lines} == {
        "gemma2_cuda_kernels",
        "gemma2_cuda_trouble",
    }


# In a process that never sees torch, as another program would load it.
TROUBLE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.gemma2_cuda_trouble.restype = ctypes.c_char_p
library.gemma2_cuda_kernels.restype = ctypes.c_void_p
assert library.gemma2_cuda_kernels()
print((library.gemma2_cuda_trouble() or b"").decode())
"""


@without_driver
def test_without_a_driver_it_loads_and_says_what_is_missing():
    trouble = answer(sys.executable, "-c", TROUBLE, str(LIBRARY))
    assert "driver" in trouble
    assert "\n" not in trouble


without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")


@without_cuda
def test_info_says_that_it_is_there_and_why_it_is_not_in_use():
    info = answer(sys.executable, "-c", "from gemma2.cli import main; main(['info'])")
    (line,) = (line for line in info.splitlines() if line.split()[:1] == ["cuda"])
    assert f"in this build ({_C.build_info()['cuda']}), not loaded: torch" in line
    assert "without CUDA" in line


@without_cuda
def test_a_torch_without_cuda_never_loads_it():
    maps = "print('_cuda.so' in open('/proc/self/maps').read())"
    code = f"import torch, gemma2.ops; gemma2.ops.softcap(torch.ones(3), 2.0); {maps}"
    assert answer(sys.executable, "-c", code) == "False"

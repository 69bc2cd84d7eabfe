"""No instruction set's code can be linked into another's.

The kernels are compiled once per instruction set. An inline function with external linkage would be
a weak symbol in each copy, of which the linker keeps one for all: AVX-512 on the portable path.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import gemma2

ROOT = Path(__file__).parent.parent.parent
LIBRARY = Path(gemma2.__file__).parent / "_ops.so"
ISAS = ("portable", "avx2", "avx512", "avx512bf16")

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")


def symbols(path):
    """(type, demangled name) of every symbol."""
    out = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^[0-9a-f ]{16,} ([A-Za-z]) (.*)$", out, re.M)


def kernel_objects():
    return sorted(ROOT.glob("build/**/cpu_*.dir/csrc/cpu/*.o"))


@pytest.fixture
def objects():
    found = kernel_objects()
    if not found:
        pytest.skip("the build folder with the object files is not here")
    return found


def test_kernel_objects_have_no_weak_symbols(objects):
    weak = {
        f"{path.parent.parent.parent.name}/{path.name}": names
        for path in objects
        if (names := [name for kind, name in symbols(path) if kind in "VvWwu"])
    }
    assert not weak


def test_kernel_objects_use_nothing_of_the_standard_library(objects):
    """Their undefined symbols are ours and libc's: std templates would be instantiated in each."""
    for path in objects:
        undefined = [name for kind, name in symbols(path) if kind == "U"]
        assert not [name for name in undefined if "std::" in name or "torch" in name], path


def test_kernel_objects_define_only_their_own_namespace(objects):
    for path in objects:
        isa = re.search(r"cpu_(\w+)\.dir", str(path)).group(1)
        exported = [name for kind, name in symbols(path) if kind in "TDBR"]
        assert exported, path
        assert all(name.startswith(f"gemma2::{isa}::") for name in exported), (path, exported)


def test_the_library_has_no_weak_symbol_of_an_instruction_set():
    found = symbols(LIBRARY)
    if not found:
        pytest.skip("the library has been stripped of its symbols")
    pattern = re.compile(rf"gemma2::({'|'.join(ISAS)})::")
    assert not [name for kind, name in found if kind in "VvWwu" and pattern.search(name)]


def test_the_library_exports_no_kernel():
    out = subprocess.run(
        ["nm", "-DC", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    pattern = re.compile(rf" [TDBRVWu] .*gemma2::({'|'.join(ISAS)})::")
    assert not pattern.findall(out)

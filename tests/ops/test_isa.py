"""Every instruction set of the build that this machine can run gives results within tolerance."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma2 import _C

ROOT = Path(__file__).parent.parent.parent
# Of each operator the tests against float64, the reference and all 16-bit patterns.
CLAIMS = "float64 or reference or pattern or ulp or bits_of or rounds or distribution"


def run(isa, *command):
    environment = dict(os.environ, GEMMA2_CPU_ISA=isa, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(_C.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("isa", _C.compiled_isas())
def test_operators_are_exact_on(isa):
    if isa not in _C.supported_isas():
        pytest.skip(f"{isa} is compiled, but this processor cannot run it")
    if isa == _C.isa():
        pytest.skip(f"{isa} is in use: every other test runs on it")
    files = [str(p) for p in sorted(Path(__file__).parent.glob("test_*.py")) if p != Path(__file__)]
    options = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CLAIMS]
    result = run(isa, *options, *files)
    assert result.returncode == 0, f"on {isa}:\n{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    assert " passed" in result.stdout


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_the_environment_chooses(isa):
    result = run(isa, "-c", "from gemma2 import _C; print(_C.isa())")
    assert result.stdout.strip() == isa, result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "from gemma2 import _C; _C.isa()",
        "import torch; from gemma2 import ops; ops.softcap(torch.ones(3), 1.0)",
    ],
)
def test_a_wrong_name_is_an_error_that_lists_the_right_ones(code):
    result = run("sse9", "-c", code)
    assert result.returncode != 0
    assert "GEMMA2_CPU_ISA is 'sse9'" in result.stderr
    assert ", ".join(_C.supported_isas()) in result.stderr


def test_an_instruction_set_the_processor_lacks_is_an_error():
    missing = [isa for isa in _C.compiled_isas() if isa not in _C.supported_isas()]
    if not missing:
        pytest.skip("this processor can run every instruction set of the build")
    result = run(missing[0], "-c", "from gemma2 import _C; _C.isa()")
    assert result.returncode != 0
    assert f"GEMMA2_CPU_ISA is '{missing[0]}'" in result.stderr

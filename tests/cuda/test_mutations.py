"""Faults in the CUDA kernels, switched on one at a time: the contract tests must notice each.

The switches are those of csrc/common/mutate.h, which the emulator's build of the kernels has. (Without
a fault the same tests pass: `make emulate` runs them. More of attention's are in
test_mutations_attention.py, those of the host code and of the CPU kernels in tests/mutations.)
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cuda.emulation import ROOT

pytestmark = pytest.mark.usefixtures("emulator")

CAUGHT_BY = {
    "norm_without_one": [
        "test_rms_norm.py::test_weight_zero_is_the_plain_norm_because_of_the_one",
        "test_rms_norm.py::test_add_rms_norm_matches_float64",
    ],
    "logits_cap_dropped": ["test_softcap.py::test_infinities_become_the_cap_and_nan_stays"],
    "cap_dropped": ["test_attention.py::test_the_cap_is_there"],
    "ring_slot_shifted": [
        "test_cache_write.py::test_position_p_goes_to_slot_p_modulo_the_capacity",
        "test_rope.py::test_rope_cache_rounds_the_rotated_key_once",
    ],
}


def run(mutation: str, test: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda.backend"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", f"tests/ops/{test}"]
    environment = dict(os.environ, GEMMA2_MUTATE=mutation, OMP_NUM_THREADS="1")
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("mutation", "test"), [(m, test) for m, tests in CAUGHT_BY.items() for test in tests]
)
def test_the_fault_is_noticed(mutation, test):
    broken = run(mutation, test)
    assert broken.returncode == 1, broken.stdout[-3000:] + broken.stderr[-1000:]
    assert " failed" in broken.stdout
    assert "blocks of CUDA kernels ran on the emulator" in broken.stdout

"""`python -m tests.sanitize`: the CPU operators under AddressSanitizer and UBSan.

Builds the operators with the preset `sanitize` into build/sanitize, sees both sanitizers find a
planted fault, and runs, on every instruction set of this machine, the fuzz of tests/sanitize and a
share of the operators' contract tests. Python and torch are not instrumented, but torch's
allocations are watched, so that what a kernel reads or writes beside a tensor is seen.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cuda.emulation import ROOT, tool
from tests.sanitize.plugin import LIBRARY

REPORTS = LIBRARY.parent / "reports"
FUZZ = "tests/sanitize/test_operators.py"
# Of the contract tests: what is about exactness, without the longest.
CLAIMS = "(float64 or reference or rounds or distribution or refused or rejected) and not slow"
HOW = {
    # Python's own leaks at exit are none of ours; what cannot be allocated is null, as without.
    # Stack use after return is not looked for: gcc before 12.4 places vectors of 64 bytes wrongly then
    # (GCC bug 110027), and the kernels crash of it.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


def build(isas: list[str]) -> str:
    """Builds the library, or brings it up to date; gives what must be loaded before Python."""
    for command in (
        [
            tool("cmake"), "--preset", "sanitize", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DGEMMA2_ISAS={';'.join(isas)}",
        ],
        [tool("cmake"), "--build", "--preset", "sanitize", "--parallel", str(os.cpu_count() or 1)],
    ):  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    cache = (LIBRARY.parent / "CMakeCache.txt").read_text()
    compiler = next(x for x in cache.splitlines() if x.startswith("CMAKE_CXX_COMPILER:"))
    compiler = compiler.split("=", 1)[1]
    found = []
    # AddressSanitizer looks for C++'s exceptions when it is loaded, before torch has brought them.
    for name in ("libasan.so", "libstdc++.so"):
        asked = [compiler, f"-print-file-name={name}"]
        found.append(
            subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        )
        if not Path(found[-1]).is_absolute():
            raise RuntimeError(f"{compiler} has no {name}: the sanitizers run with g++")
    return ":".join(found)


def run(runtime: str, isa: str, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **HOW, "LD_PRELOAD": runtime, "GEMMA2_CPU_ISA": isa, **more}
    for name in HOW:
        environment[name] += f":log_path={REPORTS / isa}"
    environment.setdefault("OMP_NUM_THREADS", "1")
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def clear_reports() -> None:
    REPORTS.mkdir(exist_ok=True)
    for path in REPORTS.iterdir():
        path.unlink()


def reports() -> str:
    return "\n".join(path.read_text() for path in sorted(REPORTS.iterdir()))


def see_planted(runtime: str, isa: str) -> list[str]:
    """What is wrong with the sanitizers themselves: nothing if each sees its planted fault."""
    trouble = []
    for fault, wanted in (("overflow", "heap-buffer-overflow"), ("misaligned", "misaligned")):
        clear_reports()
        done = run(runtime, isa, "-m", "tests.sanitize.planted", fault)
        said = reports() + done.stderr
        if done.returncode == 0 or wanted not in said or "csrc/" not in said:
            trouble.append(f"planted fault '{fault}' was not reported:\n{done.stdout}{said}")
    clear_reports()
    return trouble


def main() -> int:
    from gemma2 import _C

    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("--examples", type=int, default=150, help="of the fuzz, for an operator")
    parser.add_argument("--isa", action="append", help="only this instruction set")
    parser.add_argument("--fuzz-only", action="store_true", help="without the contract tests")
    options = parser.parse_args()
    start = time.monotonic()
    isas = _C.supported_isas()
    runtime = build(isas)
    print(f"built for {', '.join(isas)} in {time.monotonic() - start:.0f} s", flush=True)

    trouble = see_planted(runtime, isas[-1])
    if not trouble:
        print("both planted faults were reported", flush=True)

    def test(isa: str) -> str:
        pytest = [
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "tests.sanitize.plugin",
            "-p",
            "no:cacheprovider",
        ]
        files = [FUZZ] if options.fuzz_only else [FUZZ, "tests/ops"]
        done = run(
            runtime, isa, *pytest, *files, "-k", f"{CLAIMS} or fuzz",
            "--deselect", "tests/ops/test_isa.py", GEMMA2_FUZZ_EXAMPLES=str(options.examples),
            GEMMA2_FUZZ_LOG=str(case := LIBRARY.parent / f"case-{isa}.txt"),
        )  # fmt: skip
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        print(f"{isa}: {last} ({time.monotonic() - start:.0f} s)", flush=True)
        if done.returncode == 0:
            return ""
        ended = f"on {isa}, exit {done.returncode}:\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
        return f"{ended}\nlast case:\n{case.read_text()}" if case.exists() else ended

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        trouble += filter(None, pool.map(test, options.isa or isas))
    if said := reports():
        trouble.append(said)
    print("\n".join(trouble) or f"nothing found, {time.monotonic() - start:.0f} s in all")
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())

"""Break the model on purpose, one way at a time, and see the tests fail.

`python -m tests.mutations` builds the operators once with their faults compiled in, for one
instruction set (build/mutations), lays them beside the Python files in a temporary folder, and runs
for each fault of table.py its named tests with `GEMMA2_MUTATE=<fault>`. Then the tests that break the
CUDA kernels on the emulator. A fault that no test notices fails the run; so does a test that fails
without one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.mutations.table import ALL, CPP, CUDA

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "mutations"
LIBRARIES = BUILD / "lib"
BROKEN = re.compile(r"(AttributeError|ImportError|NameError|ModuleNotFoundError|TypeError)\b")
TIMEOUT = 240  # seconds for the tests of one fault


def cmake() -> str:
    beside = Path(sys.executable).parent / "cmake"
    found = str(beside) if beside.exists() else shutil.which("cmake")
    if found is None:
        sys.exit("mutations: cmake is not installed: pip install cmake")
    return found


def build(isa: str, jobs: int) -> None:
    """Builds the operators with faults for one instruction set."""
    ninja = shutil.which(
        "ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    for command in (
        [
            cmake(), "-S", str(ROOT), "-B", str(BUILD), *generator,
            "-DGEMMA2_TEST_MUTATIONS=ON", "-DGEMMA2_CUDA=OFF", f"-DGEMMA2_ISAS={isa}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={LIBRARIES}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ],
        [cmake(), "--build", str(BUILD), "--parallel", str(jobs)],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"mutations: {' '.join(command)}\n{done.stdout}\n{done.stderr}")


def lay_out_package(folder: Path) -> None:
    """Puts the Python files of gemma2/ and the test build's libraries into `folder`."""
    package = folder / "gemma2"
    package.mkdir()
    for path in (ROOT / "gemma2").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            # gemma2/ops finds the library beside its own folder, so folders are real ones
            if path.is_dir():
                shutil.copytree(
                    path, package / path.name, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                (package / path.name).symlink_to(path)
    for library in LIBRARIES.glob("*.so"):
        (package / library.name).symlink_to(library)


@dataclass
class Result:
    mutation: str
    passed: list[str]
    failed: dict[str, str]  # test: why
    errors: str  # why the run says nothing
    seconds: float

    @property
    def caught(self) -> bool:
        return bool(self.failed) and not self.errors


def run_tests(mutation: str, tests: list[str], folder: Path, threads: int) -> Result:
    """Runs `tests` with a fault switched on; "" is none."""
    environment = {
        **os.environ,
        "GEMMA2_MUTATE": mutation,
        "GEMMA2_MUTATION_PACKAGE": str(folder),
        "GEMMA2_CPU_ISA": "",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "300",  # or pytest cuts the reasons short
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
        sys.executable, "-m", "pytest", "-p", "tests.mutations.plugin", "-p", "no:cacheprovider",
        "-q", "--tb=line", "-rA", *tests,
    ]  # fmt: skip
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Result(mutation, [], {}, f"no end after {TIMEOUT} s", TIMEOUT)
    outcome: dict[str, dict[str, str]] = {"PASSED": {}, "FAILED": {}, "ERROR": {}}
    line = r"^(PASSED|FAILED|ERROR) (tests/\S+)(?: - (.*))?$"
    for kind, name, why in re.findall(line, done.stdout, re.MULTILINE):
        outcome[kind][name] = why
    # 0: all passed, 1: some failed; anything else ran no tests (a crash, a name that is not there)
    good = done.returncode in (0, 1) and not outcome["ERROR"]
    # a fault that does not even run is noticed by everything and proves nothing
    good = good and not any(BROKEN.match(why) for why in outcome["FAILED"].values())
    errors = "" if good else done.stdout + done.stderr
    seconds = time.monotonic() - started
    return Result(mutation, list(outcome["PASSED"]), outcome["FAILED"], errors, seconds)


def break_cuda(jobs: int) -> tuple[dict[str, list[str]], str]:
    """Breaks the CUDA kernels on the emulator; gives fault -> what noticed it, and what went wrong."""
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", str(jobs), "-q",
        "-rA", "--tb=short", *CUDA,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    noticed: dict[str, list[str]] = {}
    # test_..._is_noticed[fault-by what]
    for name, by in re.findall(r"^PASSED \S+_is_noticed\[(\w+)-(.*)\]", done.stdout, re.MULTILINE):
        noticed.setdefault(name, []).append(by)
    return noticed, "" if done.returncode == 0 and noticed else done.stdout + done.stderr


def faults_of_cpp() -> set[str]:
    """All that csrc/common/mutate.cpp can switch on."""
    text = (ROOT / "csrc" / "common" / "mutate.cpp").read_text()
    return set(re.findall(r'\{"(\w+)", Mutation::', text))


def short(name: str) -> str:
    return name.removeprefix("tests/").replace(".py::", " ")


def report(results: list[Result]) -> str:
    """Gives the table mutation -> tests that caught it, in Markdown."""
    lines = ["| mutation | in | caught by | how |", "|---|---|---|---|"]
    for result in results:
        where = "C++" if result.mutation in CPP else "Python"
        said, how = "**nothing**", ""
        if result.caught:
            first, how = next(iter(result.failed.items()))
            more = f" and {len(result.failed) - 1} more" if len(result.failed) > 1 else ""
            said = short(first) + more
            how = how.replace("|", "/")[:80]
        lines.append(f"| {result.mutation} | {where} | {said} | {how} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("mutations", nargs="*", help="names of table.py; none: all")
    parser.add_argument("--isa", help="instruction set to build; default: the processor's best")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    args = parser.parse_args()
    unknown = sorted(set(args.mutations) - set(ALL))
    if unknown:
        parser.error(f"no such mutation: {', '.join(unknown)}; there are {', '.join(ALL)}")
    chosen = args.mutations or list(ALL)
    if args.isa is None:
        from gemma2 import _C

        args.isa = _C.supported_isas()[-1]

    started = time.monotonic()
    build(args.isa, args.jobs)
    print(f"built for {args.isa} in {time.monotonic() - started:.0f} s", flush=True)
    union = list(dict.fromkeys(test for name in chosen for test in ALL[name]))
    with tempfile.TemporaryDirectory(prefix="gemma2-mutations-") as name:
        folder = Path(name)
        lay_out_package(folder)
        with ThreadPoolExecutor(args.jobs) as pool:
            unmutated = pool.submit(run_tests, "", union, folder, 1)
            results = list(pool.map(lambda m: run_tests(m, ALL[m], folder, 1), chosen))
            clean = unmutated.result()

    print(report(results))
    everything = not args.mutations
    broken, said, forgotten = {}, "", set()
    if everything:
        at = time.monotonic()
        broken, said = break_cuda(args.jobs)
        for name, by in broken.items():
            more = f" and {len(by) - 1} more" if len(by) > 1 else ""
            print(f"| {name} | CUDA | {short(by[0])}{more} | on the emulator |")
        print(f"\n{len(broken)} faults in CUDA kernels noticed in {time.monotonic() - at:.0f} s")
        forgotten = faults_of_cpp() - set(CPP) - set(broken)
    trouble = [r for r in results if not r.caught]
    for result in trouble:
        print(f"\n{result.mutation}: {result.errors[-3000:] or 'noticed by no test'}")
    good = bool(clean.passed) and not clean.failed and not clean.errors
    if not good:
        print(f"\nwithout a mutation: {list(clean.failed) or clean.errors[-3000:]}")
    if said:
        print(f"\nCUDA kernels:\n{said[-3000:]}")
    for name in sorted(forgotten):
        print(f"\n{name}: no test is meant to notice it")
    seconds = time.monotonic() - started
    print(
        f"\n{len(results) - len(trouble)} of {len(results)} mutations caught; without one "
        f"{len(clean.passed)} tests pass and {len(clean.failed)} fail; {seconds:.0f} s"
    )
    return 0 if good and not trouble and not said and not forgotten else 1


if __name__ == "__main__":
    sys.exit(main())

"""Takes each barrier out of the CUDA kernels, one at a time: the emulator must notice every one.

`python -m tests.cuda.barriers [file ...]` compiles the kernels once more for each barrier of
csrc/cuda, and runs the contract tests of the operator on the result: without it, or, of a wait for
copies, with one group more that may be under way. A barrier that is not missed is either not needed,
or the emulator does not see what it is for: both fail the run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.cuda.emulation import BUILD, LIBRARY, ROOT, build

KERNELS = ROOT / "csrc" / "cuda"
# A statement of its own, which is what a barrier is.
BARRIER = re.compile(
    r"^\s*(?:if \(.*\) )?((?:sync_block|sync_warp|copy_async_wait<[^>]+>)\([^)]*\));(?: +//.*)?$"
)
NOT_KERNELS = {"ptx.h", "launch.h"}
TIMEOUT = 600  # seconds for an operator's tests
# Which tests, where they are not all of the operator that the file is named after: linear's kernels have
# their own shapes and dtypes (0: float32, 1: bfloat16).
ATTENTION = ["tests/cuda/test_mutations_attention.py", "-k"]
TESTS = {
    "reduce": ["tests/ops/test_rms_norm.py"],
    "attention_any": [*ATTENTION, "without_a_fault and any"],
    "attention_decode": [*ATTENTION, "without_a_fault and decode"],
    "attention_prefill": [*ATTENTION, "without_a_fault and prefill"],
    "linear_few": ["tests/ops/test_linear.py", "-k", "others and dtype1"],
    "linear_tile": ["tests/ops/test_linear.py", "-k", "others and dtype1"],
    "linear_f32": ["tests/ops/test_linear.py", "-k", "around and dtype0"],
}


@dataclass(frozen=True)
class Barrier:
    file: Path
    line: int  # from 1
    text: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} {self.text}"

    @property
    def weaker(self) -> str:
        wait = re.match(r"copy_async_wait<(.+)>", self.text)
        return f"copy_async_wait<{wait[1]} + 1>()" if wait else "(void)0"

    @property
    def tests(self) -> list[str]:
        """Arguments of pytest."""
        stem = self.file.stem
        return TESTS.get(stem, [f"tests/ops/test_{stem.split('_')[0]}.py"])


def barriers(names: list[str]) -> list[Barrier]:
    found = []
    for path in sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.h")]):
        if path.name in NOT_KERNELS or (names and path.name not in names):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = BARRIER.match(line)
            if match:
                found.append(Barrier(path, number, match[1]))
    return found


def including(path: Path) -> set[Path]:
    """The .cu files that see `path`."""
    if path.suffix == ".cu":
        return {path}
    users = set()
    for other in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.h")]:
        if f'#include "cuda/{path.name}"' in other.read_text():
            users |= including(other)
    return users


def library_without(barrier: Barrier, folder: Path) -> Path:
    """The emulated library, with one barrier less."""
    sources = folder / "csrc"
    subprocess.run(["cp", "-r", str(ROOT / "csrc"), str(sources)], check=True)
    changed = sources / barrier.file.relative_to(ROOT / "csrc")
    lines = changed.read_text().splitlines(keepends=True)
    lines[barrier.line - 1] = lines[barrier.line - 1].replace(barrier.text, barrier.weaker, 1)
    changed.write_text("".join(lines))

    commands = {
        Path(c["file"]).resolve(): c
        for c in json.loads((BUILD / "compile_commands.json").read_text())
    }
    objects = {Path(c["directory"], c["output"]) for c in commands.values()}
    for source in including(barrier.file):
        command = commands[source]
        replaced = Path(command["directory"], command["output"])
        objects = (objects - {replaced}) | {folder / f"{source.stem}.o"}
        arguments = shlex.split(command["command"])
        arguments[arguments.index("-o") + 1] = str(folder / f"{source.stem}.o")
        arguments = [
            str(sources / source.relative_to(ROOT / "csrc")) if Path(a).resolve() == source else a
            for a in arguments
        ]
        # before the include folder of the unchanged sources
        subprocess.run(
            [arguments[0], f"-I{sources}", *arguments[1:]], check=True, cwd=command["directory"]
        )
    library = folder / LIBRARY.name
    link = ["c++", "-shared", "-Wl,-Bsymbolic-functions", "-o", str(library), *map(str, objects)]
    subprocess.run([*link, "-ldl"], check=True)
    return library


def fault_without(barrier: Barrier) -> str | None:
    """What the tests say; None if they do not notice."""
    with tempfile.TemporaryDirectory(prefix="gemma2-barrier-") as name:
        library = library_without(barrier, Path(name))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.cuda.backend"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line"]
        command += barrier.tests
        environment = dict(os.environ, OMP_NUM_THREADS="1", COLUMNS="300")
        environment["GEMMA2_EMULATED"] = str(library)
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    if done.returncode == 0:
        return None
    found = re.search(r"kernel [^,]+, block .*", done.stdout)
    if done.returncode != 1 or " failed" not in done.stdout:
        raise RuntimeError(f"{barrier}: the tests did not run:\n{done.stdout}\n{done.stderr}")
    return found[0] if found else "a wrong result"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.barriers", description=__doc__)
    parser.add_argument("files", nargs="*", help="of csrc/cuda, such as sample.cu; none: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    build()
    found = barriers(args.files)
    with ThreadPoolExecutor(args.jobs) as pool:
        faults = list(pool.map(fault_without, found))
    print("| without | what the emulator says |\n|---|---|")
    for barrier, fault in zip(found, faults, strict=True):
        print(f"| {barrier} | {fault or '**nothing**'} |")
    missed = faults.count(None)
    print(f"\n{len(found) - missed} of {len(found)} missing barriers are noticed")
    return 1 if missed or not found else 0


if __name__ == "__main__":
    sys.exit(main())

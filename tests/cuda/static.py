"""What the compiler made of the CUDA kernels, without a GPU: resources, occupancy, instructions.

``python -m tests.cuda.static`` prints the kernels' resources as a Markdown table. Every
csrc/cuda/*.cu is compiled with the flags of the product, for each architecture, into build/cubins.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.cuda.occupancy import MULTIPROCESSORS, resident_blocks, round_up
from tests.cuda.plans import FLOAT64, Plan, plan_of

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "cubins"
ARCHITECTURES = tuple(MULTIPROCESSORS)


class MissingToolError(Exception):
    """A tool is not on this machine; the text is a reason to skip."""


class CompileError(Exception):
    """nvcc's own words."""


# ---- Tools --------------------------------------------------------------------------------------


@functools.cache
def nvcc() -> str:
    named = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if shutil.which(named) is None:
        raise MissingToolError("nvcc (the CUDA toolkit) is not installed")
    return named


@functools.cache
def nvdisasm() -> str:
    """On PATH, beside nvcc, or from the wheel nvidia-cuda-nvdisasm."""
    candidates = [shutil.which("nvdisasm"), str(Path(nvcc()).resolve().with_name("nvdisasm"))]
    for wheel in importlib.metadata.distributions(name="nvidia-cuda-nvdisasm"):
        files = wheel.files or []
        candidates += [str(file.locate()) for file in files if file.name == "nvdisasm"]
    for candidate in candidates:
        if candidate and shutil.which(candidate):
            return candidate
    raise MissingToolError("nvdisasm is not installed (pip install nvidia-cuda-nvdisasm)")


@functools.cache
def flags() -> list[str]:
    """The product's device flags, from the only place where they are written."""
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    found = re.search(r"\bset\(GEMMA2_CUDA_FLAGS\s+([^)]*)\)", text)
    if found is None or "$" in found[1]:
        raise RuntimeError("CMakeLists.txt has no set(GEMMA2_CUDA_FLAGS ...) of plain words")
    return found[1].replace('"', "").split()


@functools.cache
def known_architectures() -> frozenset[int]:
    codes = subprocess.check_output([nvcc(), "--list-gpu-code"], text=True)
    return frozenset(int(code) for code in re.findall(r"^sm_(\d+)$", codes, re.M))


@functools.cache
def version() -> str:
    return subprocess.check_output([nvcc(), "--version"], text=True)


# ---- Compilation, cached by content -------------------------------------------------------------


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def included(source: Path, seen: set[Path] | None = None) -> set[Path]:
    """The file and our own headers that it reads."""
    seen = set() if seen is None else seen
    seen.add(source)
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', source.read_text(), re.M):
        for folder in (source.parent, ROOT / "csrc"):
            header = (folder / name).resolve()
            if header.exists() and header not in seen:
                included(header, seen)
    return seen


def key(source: Path, arguments: Iterable[str]) -> str:
    digest = hashlib.sha256(version().encode())
    digest.update("\0".join(arguments).encode())
    for path in sorted(included(source)):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(map(str, command))}\n{done.stderr or done.stdout}")
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Cubin:
    """A folder with the files that nvcc left for one source and architecture."""

    source: Path
    arch: int
    folder: Path

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()

    def sass(self) -> str:
        """The machine code in words."""
        kept = self.folder / "sass"
        if not kept.exists():
            partial = kept.with_suffix(f".{os.getpid()}")
            partial.write_text(run(nvdisasm(), "-c", self.folder / "cubin"))
            partial.replace(kept)
        return kept.read_text()


def compile_one(source: Path, arch: int, cache: Path = CACHE) -> Cubin:
    arguments = [*flags(), f"-arch=sm_{arch}", "-Xptxas", "-v,-warn-spills"]
    folder = cache / f"{source.stem}-sm_{arch}-{key(source, arguments)}"
    if not folder.exists():
        partial = folder.with_suffix(f".{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            log = run(
                nvcc(), *arguments, "-Icsrc", "-cubin", "--keep", "--keep-dir", partial,
                "-o", partial / "cubin", source,
            )  # fmt: skip
            (partial / "log").write_text(log)
            (partial / f"{source.stem}.ptx").rename(partial / "ptx")
            for other in partial.iterdir():
                if other.name not in ("cubin", "log", "ptx"):
                    other.unlink()
            for stale in cache.glob(f"{source.stem}-sm_{arch}-*"):
                if stale != partial:
                    shutil.rmtree(stale)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return Cubin(source, arch, folder)


def compile_all(
    files: Iterable[Path], architectures: Iterable[int] = ARCHITECTURES, cache: Path = CACHE
) -> dict[tuple[Path, int], Cubin | CompileError]:
    """Over all cores; what does not compile has its error in its place."""
    jobs = [(file, arch) for file in files for arch in architectures]
    cache.mkdir(parents=True, exist_ok=True)

    def attempt(job: tuple[Path, int]) -> Cubin | CompileError:
        try:
            cubin = compile_one(*job, cache)
            with contextlib.suppress(MissingToolError):
                cubin.sass()
            return cubin
        except CompileError as error:
            return error

    # Another process that wants the same cubins waits and finds them.
    with open(cache / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return dict(zip(jobs, pool.map(attempt, jobs), strict=True))


# ---- Reading what came out ----------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    name: str  # rms_norm<bf16, 2>
    arch: int
    threads: int | None  # of __launch_bounds__
    registers: int
    stack: int  # bytes a thread
    spills: int  # bytes stored and loaded
    shared: int  # bytes of static shared memory
    dynamic: bool  # whether it names dynamic shared memory
    instructions: Counter[str] | None  # how often each stands in the code; None: no disassembler

    def launched(self, plan: Plan | None) -> int:
        """Threads of a block."""
        return (plan and plan.launched) or self.threads or 1024

    def blocks(self, plan: Plan | None) -> int:
        """Resident blocks on a multiprocessor."""
        shared = self.shared + (plan.dynamic_shared if plan else 0)
        sm = MULTIPROCESSORS[self.arch]
        return resident_blocks(sm, self.launched(plan), self.registers, shared)

    def warps(self, plan: Plan | None) -> int:
        return self.blocks(plan) * (round_up(self.launched(plan), 32) // 32)


def readable(symbols: list[str]) -> list[str]:
    """`softcap<bf16>` for a mangled softcap_kernel<gemma2::bf16_t>(...)."""
    if not symbols:
        return []
    plain = subprocess.check_output(["c++filt"], input="\n".join(symbols), text=True)
    return [shortened(name) for name in plain.splitlines()]


def shortened(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "")
    name = re.sub(r"\b(?:\w+::)+", "", name)
    name = re.sub(r"\((?:unsigned )?\w+\)(?=-?\d)", "", name)  # (int)2, (bool)1
    name = name.split("(")[0]
    name = re.sub(r"\b(bf16|f16)_t\b", r"\1", name)
    name = re.sub(r"\bfloat\b", "f32", name)
    return re.sub(r"^void |_kernel(?=<|$)", "", name)


def with_operator(stem: str, name: str) -> str:
    """The kernel's name, which alone may not say whose it is: `sample top_k<bf16>`."""
    base = name.split("<")[0]
    if stem in base:
        return name
    if stem.endswith(f"_{base}"):
        return stem + name.removeprefix(base)
    return f"{stem} {name}"


def instructions_of(sass: str) -> dict[str, Counter[str]]:
    """How often each instruction stands in each function, by mangled name."""
    found: dict[str, Counter[str]] = {}
    for section in re.split(r"^//-+ ", sass, flags=re.M):
        title = re.match(r"\.text\.(\S+)", section)
        if title:
            code = re.findall(
                r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", section, re.M
            )
            found[title[1]] = Counter(code)
    return found


def kernels(cubin: Cubin) -> list[Kernel]:
    properties = re.findall(
        r"Compiling entry function '(\S+)'.*\n"
        r".*Function properties for .*\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers(.*)",
        cubin.text("log"),
    )
    entries = dict(re.findall(r"\.entry (\w+)(.*?)^}", cubin.text("ptx"), re.M | re.S))
    if set(entries) != {symbol for symbol, *_ in properties}:
        raise RuntimeError(f"{cubin.folder}/log: not what ptxas -v is known to print")
    try:
        code = instructions_of(cubin.sass())
    except MissingToolError as reason:
        print(f"instructions are not looked at: {reason}", file=sys.stderr)
        code = None
    found = []
    names = readable([symbol for symbol, *_ in properties])
    for short, (symbol, stack, stores, loads, registers, rest) in zip(
        names, properties, strict=True
    ):
        bounds = re.search(r"^\.maxntid ([\d, ]+)", entries[symbol], re.M)
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(
            Kernel(
                name=with_operator(cubin.source.stem, short),
                arch=cubin.arch,
                threads=math.prod(map(int, bounds[1].split(","))) if bounds else None,
                registers=int(registers),
                stack=int(stack),
                spills=int(stores) + int(loads),
                shared=int(shared[1]) if shared else 0,
                dynamic="gemma2_dynamic_shared" in entries[symbol],
                instructions=None if code is None else code[symbol],
            )
        )
    return sorted(found, key=lambda kernel: kernel.name)


# ---- The judgement ------------------------------------------------------------------------------

# What no kernel has unless its plan allows it.
FORBIDDEN = {
    r"LDL|STL": "local memory",
    r"(RED|REDG|ATOM|ATOMG|ATOMS)\..*\b(B?F16|F32|F64)": "a float atomic: sums depend on the order",
    r"ATOMS\.CAS": "a loop of compare and swap, as of float atomics in shared memory",
    FLOAT64: "float64, which most GPUs do at 1/32 or 1/64 of the speed",
}


def counted(kernel: Kernel, pattern: str) -> int:
    """How many instructions of the kernel begin with the pattern."""
    assert kernel.instructions is not None
    return sum(n for name, n in kernel.instructions.items() if re.match(rf"(?:{pattern})", name))


def resource_faults(kernel: Kernel, plan: Plan) -> list[str]:
    """Where the kernel's resources are not as planned, in words."""
    sm = MULTIPROCESSORS[kernel.arch]
    faults = []

    def want(right: bool, text: str) -> None:
        if not right:
            faults.append(f"{kernel.name} on sm_{kernel.arch}: {text}")

    want(kernel.threads is not None, "has no __launch_bounds__")
    want(kernel.threads in (None, plan.threads), f"{kernel.threads} threads, not {plan.threads}")
    want(kernel.registers <= plan.registers, f"{kernel.registers} registers, not {plan.registers}")
    want(kernel.spills == 0, f"{kernel.spills} bytes of spills")
    want(kernel.stack <= plan.stack, f"{kernel.stack} bytes of stack, not {plan.stack}")
    want(
        kernel.shared <= plan.static_shared,
        f"{kernel.shared} bytes of static shared memory, not {plan.static_shared}",
    )
    want(
        kernel.dynamic == (plan.dynamic_shared > 0),
        f"dynamic shared memory is {'' if kernel.dynamic else 'not '}used, "
        f"{plan.dynamic_shared} bytes are planned",
    )
    of_a_block = round_up(kernel.launched(plan), 32) // 32
    fewest = min(plan.warps, min(sm.warps // of_a_block, sm.blocks) * of_a_block)
    warps = kernel.warps(plan)
    want(warps >= fewest, f"{warps} resident warps, not {fewest}")
    return faults


def instruction_faults(kernel: Kernel, plan: Plan) -> list[str]:
    """Instructions that the kernel should not have, or should have and has not."""
    assert kernel.instructions is not None
    where = f"{kernel.name} on sm_{kernel.arch}"
    faults = []
    forbidden = {**FORBIDDEN, **dict.fromkeys(plan.forbids, "not planned")}
    for pattern, meaning in forbidden.items():
        for name, n in sorted(kernel.instructions.items()):
            if re.match(pattern, name) and not any(re.match(a, name) for a in plan.allows):
                faults.append(f"{where}: {n} {name}: {meaning}")
    faults += [f"{where}: no {p}" for p in plan.expects if counted(kernel, p) == 0]
    return faults


# ---- The command --------------------------------------------------------------------------------


HEAD = """\
| kernel | architecture | threads | registers | shared memory | spills | resident warps | share |
|---|---|---:|---:|---:|---:|---:|---:|"""


def row(name: str, alike: list[Kernel]) -> str:
    """A line of the table for kernels of one plan and architecture: the worst of them."""
    arch = alike[0].arch
    plan = plan_of(alike[0].name)
    warps = min(kernel.warps(plan) for kernel in alike)
    cells = (
        f"`{name}`",
        f"sm_{arch}",
        max(kernel.launched(plan) for kernel in alike),
        max(kernel.registers for kernel in alike),
        max(kernel.shared for kernel in alike) + (plan.dynamic_shared if plan else 0),
        max(kernel.spills for kernel in alike),
        warps,
        f"{warps / MULTIPROCESSORS[arch].warps:.0%}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def rows(found: Iterable[Kernel], each: bool) -> Iterator[str]:
    groups: dict[tuple[str, int], list[Kernel]] = {}
    for kernel in sorted(found, key=lambda kernel: (kernel.name, kernel.arch)):
        plan = None if each else plan_of(kernel.name)
        groups.setdefault((plan.kernels if plan else kernel.name, kernel.arch), []).append(kernel)
    return (row(name, alike) for (name, _), alike in groups.items())


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Resources of the CUDA kernels as a table: of each plan's kernels the worst."
    )
    parser.add_argument("operator", nargs="*", help="such as rms_norm; without: all")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="such as 80 90")
    parser.add_argument("--each", action="store_true", help="a line for each instantiation")
    parser.add_argument("--sass", action="store_true", help="each one's instructions, counted, too")
    options = parser.parse_args()
    wanted = [s for s in sources() if not options.operator or s.stem in options.operator]
    try:
        architectures = [arch for arch in options.arch if arch in known_architectures()]
        built = compile_all(wanted, architectures)
    except MissingToolError as reason:
        print(f"skipped: {reason}")
        return 0
    found: list[Kernel] = []
    faults: list[str] = []
    broken: dict[Path, str] = {}  # once, whatever the architecture
    for (source, _), result in built.items():
        if isinstance(result, CompileError):
            broken[source] = str(result)
        else:
            found += kernels(result)

    print(HEAD, *rows(found, options.each), sep="\n")
    for kernel in found:
        if options.sass:
            print(f"\n{kernel.name} on sm_{kernel.arch}")
            for name, n in sorted((kernel.instructions or {}).items()):
                print(f"{n:6} {name}")
        plan = plan_of(kernel.name)
        if plan is None:
            faults.append(f"{kernel.name} on sm_{kernel.arch}: no plan in tests/cuda/plans.py")
        else:
            faults += resource_faults(kernel, plan)
            faults += instruction_faults(kernel, plan) if kernel.instructions else []
    if faults or broken:
        print("", *broken.values(), *faults, sep="\n", file=sys.stderr)
    return 1 if faults or broken else 0


if __name__ == "__main__":
    sys.exit(main())

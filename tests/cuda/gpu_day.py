"""Everything that needs a GPU, in one command: `python -m tests.cuda.gpu_day` (or `make gpu`).

    --part tests      the operators' contract tests on the device's kernels, each call twice and equal
                      to the bit; PTX wrappers against their twins; what only a device shows
    --part sanitize   compute-sanitizer's memcheck, racecheck, synccheck and initcheck
    --part bench      the benchmarks, what counts most first (benchmarks/gpu_plan.py)

Without a part all three run, one after the other. It needs this Python with torch for CUDA, pytest,
hypothesis, pybind11 and CMake, and nvcc, and no network: the package is built in place for the
visible GPU (build/gpu, kept for the next part). A part ends within its minutes, the build included.

Results are appended line by line (results.jsonl: part, case, outcome and more), so that a killed run
leaves what it had; tables (results.md) and what the tools said (log.txt) lie beside them, in --out,
else in $OUT, else in benchmarks/results/gpu-<device>-<date> (of a dry run build/gpu-dry/results).
An outcome is one of

    passed, failed, skipped
    not run   with the reason: a tool or a device that is not there
    cut off   the part's minutes were over

`--dry-run` needs no GPU: what can run there does, with the CPU's kernels in the device's place, and
the rest is recorded as not run. The exit code is 1 if something failed, if tests or sanitizers were
cut off, or if there is no GPU and the run is no dry one.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_plan import BENCH, COMPILED, STARTING
from tests.cuda import lines

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("tests", "sanitize", "bench")
OPERATORS = (
    "embed", "rms_norm", "rope", "cache_write", "geglu", "softcap", "sample", "attention", "linear"
)  # fmt: skip
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Contract tests of all operators on small shapes, strided ones and awkward positions among them.
SMALL = (
    "(any_shape or any_positions or any_strides or strided or rounded_to or has_the_bits or extreme"
    " or longer_than or limits or infinities or penalty_counts or minus_infinity"
    " or published_sizes or first_of_the_largest"
    " or (add_rms_norm_matches and not 2304))"
    " and not opcheck and not gradient and not bad"
)
SANITIZER_ERRORS = 97  # compute-sanitizer's exit code if it found something
RESERVE = 6.0  # seconds of a part that are left for its tables


class CutOffError(Exception):
    """A step was ended because its part's time is over."""


# ---- the machine --------------------------------------------------------------------------------


@dataclass
class Machine:
    """What this machine has."""

    device: str  # "cuda", or "cpu" in a dry run
    facts: dict[str, Any]
    no_gpu: str | None  # why there is none

    @property
    def name(self) -> str:
        text = str(self.facts.get("gpu", platform.machine()))
        return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


NVIDIA_SMI = (
    "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,"
    "power.draw,power.limit,compute_mode,mig.mode.current"
)


def look_around(dry: bool) -> Machine:
    """The device, its driver, clocks and memory, and versions; nothing is changed."""
    import torch

    facts: dict[str, Any] = {}
    no_gpu = None
    if torch.cuda.is_available():
        known = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        facts = {
            "gpu": known.name,
            "compute capability": f"{known.major}.{known.minor}",
            "multiprocessors": known.multi_processor_count,
            "memory": f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        }
        query = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv"]
        for title, value in zip(*_csv(query), strict=False):
            facts[f"nvidia-smi {title}"] = value
    else:
        no_gpu = f"no GPU: torch {torch.__version__} finds no CUDA device"
    nvcc = cuda_tool("nvcc")
    version = [] if nvcc is None else _output([nvcc, "--version"])
    facts |= {
        "cuda": torch.version.cuda or "-",
        "nvcc": version[-1] if version else "-",
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
    }
    for package in ("torch", "triton", "transformers", "pytest", "hypothesis", "pybind11"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "-"
    return Machine("cpu" if dry else "cuda", facts, no_gpu)


def _output(command: Sequence[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{command[0]} says nothing: {error}", file=sys.stderr)
        return []
    return done.stdout.strip().splitlines()


def _csv(command: Sequence[str]) -> tuple[list[str], list[str]]:
    rows = [[cell.strip() for cell in row.split(",")] for row in _output(command)[:2]]
    return (rows[0], rows[1]) if len(rows) == 2 else ([], [])


def cuda_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on the PATH or where toolkits lie."""
    places = [Path(p) / "bin" for p in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if p]
    places += sorted(Path("/usr/local").glob("cuda-*/bin"), reverse=True)
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, places)))


def python_tool(name: str) -> str | None:
    """A program, that of this Python's environment first."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


# ---- processes ----------------------------------------------------------------------------------


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        found.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    return found


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and what it started: compute-sanitizer is the parent of what it watches."""
    if process.poll() is not None:
        return
    children, todo, family = _children(), [process.pid], []
    while todo:
        pid = todo.pop()
        family.append(pid)
        todo += children.get(pid, [])
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


# ---- a run --------------------------------------------------------------------------------------


class Run:
    """One part: its clock, its files, and the steps it is made of."""

    def __init__(self, part: str, machine: Machine, out: Path, args: argparse.Namespace) -> None:
        self.part, self.machine, self.out, self.args = part, machine, out, args
        self.results, self.log = out / "results.jsonl", out / "log.txt"
        self.started = time.monotonic()
        self.end = self.started + 60 * args.minutes - RESERVE
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, case: str, outcome: str, **values: Any) -> None:
        lines.append(self.results, part=self.part, case=case, outcome=outcome, **values)
        why = f": {str(values['why']).splitlines()[0][:200]}" if values.get("why") else ""
        spent = time.monotonic() - self.started
        print(f"[{self.part} {spent:5.0f} s] {case}: {outcome}{why}", flush=True)

    def command(
        self,
        command: Sequence[str],
        environment: dict[str, str] | None = None,
        seconds: float | None = None,
    ) -> tuple[int, str]:
        """Runs a program; gives its exit code and what it printed, which goes to the log, too.

        Raises:
            CutOffError: the part's time (or `seconds`) was over before it ended.
        """
        limit = self.left if seconds is None else min(seconds, self.left)
        if limit <= 0 or self._stopped:
            raise CutOffError
        cut = False
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            self._running.add(process)
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                cut = True
            finally:
                kill_tree(process)
                self._running.discard(process)
            output.seek(0)
            text = output.read().decode(errors="replace")
        with self.log.open("a") as log:
            log.write(f"\n==== {self.part}: {' '.join(command)}\n{text}")
        if cut or self._stopped:
            raise CutOffError
        return process.returncode, text

    def step(
        self,
        case: str,
        command: Sequence[str],
        environment: dict[str, str] | None = None,
        seconds: float | None = None,
    ) -> bool:
        """Runs a program that is right if it ends with 0; adds a line; gives whether it was."""
        start = time.monotonic()
        try:
            code, text = self.command(command, environment, seconds)
        except CutOffError:
            self.add(case, "cut off", why="over the time budget")
            return False
        except OSError as error:
            self.add(case, "not run", why=str(error))
            return False
        took = round(time.monotonic() - start, 1)
        if code == 0:
            self.add(case, "passed", seconds=took)
            return True
        said = [line for line in text.splitlines() if line.strip()]
        why = f"ended with {code}: {' / '.join(said[-3:])}"
        self.add(case, "failed", seconds=took, why=why[-1500:])
        return False

    def at_once(self, function: Callable[[str], None], items: Sequence[str]) -> None:
        """Calls `function` on all items, as many at a time as there are jobs."""
        pool = ThreadPoolExecutor(self.args.jobs)
        try:
            list(pool.map(function, items))
        except BaseException:
            self._stopped = True
            for process in list(self._running):
                kill_tree(process)
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    # ---- building ----

    def build(self) -> bool:
        """The package in place for this GPU; in a dry run its CUDA library, aside and for sm_80."""
        if self.args.build == "none":
            self.add("build", "not run", why="--build none")
            return True
        cmake, ninja = python_tool("cmake"), python_tool("ninja")
        if cmake is None:
            self.add("build", "failed", why="cmake is not on the PATH")
            return False
        nvcc = cuda_tool("nvcc")
        aside = self.machine.device == "cpu"
        if aside and nvcc is None:
            self.add("build", "not run", why="nvcc is not on the PATH")
            return True
        folder = ROOT / "build" / ("gpu-dry" if aside else "gpu")
        words = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        words += ["-DGEMMA2_CUDA=ON", f"-DGEMMA2_CUDA_ARCHS={'80' if aside else 'native'}"]
        if aside:
            words += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'lib'}"]
            words += ["-DGEMMA2_ISAS=portable"]
        if ninja is not None:
            words += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        environment = {} if nvcc is None else {"CUDACXX": nvcc}
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), *words]
        if not self.step("configure", configure, environment):
            return False
        make = [cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]
        if not self.step("build", [*make, *(["--target", "_cuda"] if aside else [])], environment):
            return False
        return aside or self.kernels_are_loaded()

    def kernels_are_loaded(self) -> bool:
        code = "from gemma2.ops import _library; print(_library.cuda_status)"
        try:
            _, text = self.command([sys.executable, "-c", code])
        except CutOffError:
            self.add("CUDA kernels", "cut off", why="over the time budget")
            return False
        status = text.strip().splitlines()[-1] if text.strip() else "nothing was said"
        loaded = status.startswith("in use")
        self.add("CUDA kernels", "passed" if loaded else "failed", why=status)
        return loaded

    # ---- the parts ----

    def pytest(self, *words: str, prefix: str = "") -> list[str]:
        reporting = ["-p", "tests.cuda.lines", "--lines", str(self.results)]
        reporting += ["--lines-part", self.part, "--lines-prefix", prefix]
        quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
        return [sys.executable, "-m", "pytest", *quiet, *reporting, *words]

    def on_device(self, *words: str, prefix: str = "") -> list[str]:
        """pytest with the operators on the device."""
        proxy = ["-p", "tests.cuda.proxy", "--proxy-device", self.machine.device]
        return self.pytest(*proxy, *words, prefix=prefix)

    def tests(self) -> None:
        threads = {"OMP_NUM_THREADS": str(max(1, self.machine.facts["cores"] // self.args.jobs))}

        def contract(op: str) -> None:
            file = f"tests/ops/test_{op}.py"
            self.step(f"file {file}", self.on_device(file), threads)

        # A process each: after an illegal access nothing else runs on the device in its process.
        self.at_once(contract, self.args.only or OPERATORS)
        if self.args.only:
            return
        self.twins()
        if self.machine.device == "cpu":
            self.add(
                "file tests/cuda/test_device.py", "not run", why=self.machine.no_gpu or "dry run"
            )
        else:
            file = "tests/cuda/test_device.py"
            self.step(f"file {file}", self.pytest(file))

    def twins(self) -> None:
        nvcc, source = cuda_tool("nvcc"), ROOT / "tests/cuda/emulator/twin_kernels.cu"
        case = "file tests/cuda/test_twins.py"
        if nvcc is None:
            self.add(case, "not run", why="nvcc is not on the PATH")
            return
        dry = self.machine.device == "cpu"
        library = ROOT / "build" / ("gpu-dry" if dry else "gpu") / "twins.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        words = ["-shared", "-Xcompiler", "-fPIC", "-std=c++20", "--expt-relaxed-constexpr", "-O3"]
        words += [f"-arch={'sm_80' if dry else 'native'}", f"-I{ROOT / 'csrc'}"]
        if not self.step("build of the twins", [nvcc, *words, "-o", str(library), str(source)]):
            return
        if dry:
            self.add(case, "not run", why=self.machine.no_gpu or "dry run")
            return
        environment = {"GEMMA2_CUDA_TWINS": str(library), "GEMMA2_EMULATED_TWINS": ""}
        self.step(case, self.pytest("tests/cuda/test_twins.py"), environment)

    def sanitize(self) -> None:
        files = [f"tests/ops/test_{op}.py" for op in self.args.only or OPERATORS]
        tool = cuda_tool("compute-sanitizer")
        if self.machine.device == "cpu":
            self.step("selection", self.on_device("-k", SMALL, *files))
            trouble = self.machine.no_gpu or "dry run"
        else:
            trouble = "compute-sanitizer is not on the PATH" if tool is None else None
        if trouble is not None or tool is None:
            for name in TOOLS:
                self.add(name, "not run", why=trouble)
            return
        self.at_once(lambda name: self.sanitize_with(tool, name, files), TOOLS)

    def sanitize_with(self, tool: str, name: str, files: Sequence[str]) -> None:
        watch = [tool, "--tool", name, "--error-exitcode", str(SANITIZER_ERRORS)]
        # Allocations of their own, of the size that was asked for: bounds are those of tensors.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
        start = time.monotonic()
        command = [*watch, *self.on_device("-k", SMALL, *files, prefix=f"{name}: ")]
        try:
            code, text = self.command(command, environment)
        except CutOffError:
            self.add(name, "cut off", why="over the time budget")
            return
        outcome, values = verdict(code, text)
        self.add(name, outcome, seconds=round(time.monotonic() - start, 1), **values)

    def bench(self) -> None:
        only = self.args.only
        dry = self.machine.device == "cpu"
        words = ["--device", self.machine.device, "--lines", str(self.results)]
        # Compiled peers take minutes on a CPU, of which a rehearsal learns nothing about a GPU.
        rehearsal = ["--rehearse", "--seconds", "0.01", "--limit", "4", "--without", *COMPILED]
        words += rehearsal if dry else ["--graph", "--seconds", "0.1"]
        for step in BENCH:
            if only and step.name not in only:
                continue
            choice = ["--only", step.only] if step.only else []
            seconds = 60.0 if dry else step.seconds
            budget = ["--budget", f"{max(1.0, min(seconds, self.left) - STARTING):.0f}"]
            command = [sys.executable, "-m", "benchmarks.runner", step.name]
            # Cases are cut off one by one; the process itself if one of them takes too long.
            self.step(str(step), [*command, *choice, *words, *budget], seconds=seconds)
        if dry:
            self.add("CUDA timing", "not run", why=self.machine.no_gpu or "dry run")

    def go(self) -> None:
        """Runs the part; whatever happens, its end is recorded."""
        self.out.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        facts = {**self.machine.facts, "date": date, "dry run": self.args.dry_run}
        lines.append(self.results, part=self.part, case="start", outcome="passed", machine=facts)
        try:
            if self.machine.device == "cuda" and self.machine.no_gpu:
                self.add(self.part, "not run", why=self.machine.no_gpu)
            elif self.build():
                {"tests": self.tests, "sanitize": self.sanitize, "bench": self.bench}[self.part]()
            else:
                self.add(self.part, "not run", why="nothing to run: see the build")
        except BaseException as error:
            self.add("end", "failed", why=f"{type(error).__name__}: {error}")
            raise
        self.add("end", "passed", seconds=round(time.monotonic() - self.started, 1))


def verdict(code: int, text: str) -> tuple[str, dict[str, Any]]:
    """Outcome and more of what compute-sanitizer printed and ended with."""
    tests = re.findall(r"^(?:\d+ \w+, )*\d+ (?:passed|failed).*$", text, re.M)
    values: dict[str, Any] = {"tests": tests[-1] if tests else "-"}
    # One line for each process that was watched.
    found = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    races = re.findall(
        r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warn", text
    )
    found += [int(errors) for errors, _ in races]
    if not found:
        said = [line for line in text.splitlines() if line.startswith("=========")]
        why = " / ".join(line.lstrip("= ") for line in said[:4]) or text.strip()[-500:]
        refused = re.search(r"not supported|[Uu]nable to|[Ff]ailed to (attach|inject)", text)
        return "not run" if refused and not tests else "failed", {
            **values,
            "why": f"no summary, ended with {code}: {why}",
        }
    values["errors"] = sum(found)
    values["warnings"] = sum(int(warnings) for _, warnings in races)
    if values["errors"] == 0 and code == 0:
        return "passed", values
    said = [line for line in text.splitlines() if line.startswith("=========")]
    values["why"] = f"ended with {code}: " + "\n".join(said[:30])
    return "failed", values


# ---- tables -------------------------------------------------------------------------------------


def latest(found: Iterable[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """The lines of the part's last run."""
    run: list[dict[str, Any]] = []
    for line in found:
        if line["part"] == part:
            run = [] if line["case"] == "start" else run
            run.append(line)
    return run


def table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    def cell(value: Any) -> str:
        return (str(value).replace("|", "\\|").splitlines() or [""])[0]

    out = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    out += ["| " + " | ".join(cell(row.get(name, "-")) for name in names) + " |" for row in rows]
    return "\n".join(out)


def _file_table(run: list[dict[str, Any]]) -> str:
    """Tests by file."""
    counts: dict[str, Counter[str]] = {}
    for line in run:
        if "::" in line["case"]:
            file = line["case"].partition("::")[0]
            counts.setdefault(file, Counter())[line["outcome"]] += 1
    rows = [{"tests of": file, **count} for file, count in counts.items()]
    return table(rows, ["tests of", "passed", "failed", "skipped"]) if rows else ""


def report(results: Path) -> str:
    """The tables, from the lines."""
    found = lines.read(results)
    started = [line for line in found if line["case"] == "start"]
    if not started:
        return "# GPU day\n\nNothing was run.\n"
    facts = started[-1]["machine"]
    title = facts.get("gpu", "no GPU") + (" (dry run)" if facts["dry run"] else "")
    out = [f"# GPU day: {title}", "\n".join(f"- {k}: {v}" for k, v in facts.items())]
    for part in PARTS:
        run = latest(found, part)
        if not run:
            continue
        out.append(f"## {part}")
        if run[-1]["case"] != "end":
            out.append("The run was killed: what follows is what it had.")
        out.append(_file_table(run))
        operators = [line for line in run if "calls" in line]
        if operators:
            out.append("Calls on the device, and how many of them gave other bits the second time:")
            out.append(table(operators, ["case", "calls", "differing", "outcome"]))
        tools = [line for line in run if line["case"] in TOOLS]
        if tools:
            out.append(table(tools, ["case", "outcome", "errors", "warnings", "tests", "seconds"]))
        if any("row" in line for line in run):
            out += _benchmark_tables(run)
        rest = [line for line in run if not {"row", "machine"} & line.keys()]
        steps = [line for line in rest if "::" not in line["case"] and line not in operators]
        out.append(table(steps, ["case", "outcome", "seconds", "why"]))
        bad = [
            line for line in rest if line["outcome"] in ("failed", "cut off") and line not in steps
        ]
        if bad:
            out.append("Failed or cut off:")
            out += [f"- `{line['case']}`: {str(line.get('why', '-'))[:600]}" for line in bad]
    return "\n\n".join(text for text in out if text) + "\n"


def _benchmark_tables(run: list[dict[str, Any]]) -> list[str]:
    from benchmarks.tables import compact

    out = []
    machines = [line["machine"] for line in run if line["case"] == "machine"]
    if machines:
        out.append(", ".join(f"{k}: {v}" for k, v in machines[-1].items()))
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in run:
        if "row" in line:
            rows.setdefault(line["benchmark"], []).append(line["row"])
    for name, found in rows.items():
        out.append(f"### {name}\n\n{compact(found)}")
    return out


def write(path: Path, text: str) -> None:
    """As a whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


# ---- the command --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cuda.gpu_day",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="all three by default")
    parser.add_argument("--minutes", type=float, default=9.0, help="of a part, build included (9)")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    parser.add_argument("--only", nargs="*", metavar="OP", help="of these operators")
    parser.add_argument("--build", choices=("yes", "none"), default="yes", help="none: as it is")
    parser.add_argument("--jobs", type=int, help="processes at once, benchmarks apart")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args(argv)
    known = {*OPERATORS, *(step.name for step in BENCH if args.part == ["bench"])}
    for op in args.only or []:
        if op not in known:
            parser.error(f"there is no {op!r}: there are {', '.join(sorted(known))}")

    machine = look_around(args.dry_run)
    args.jobs = args.jobs or max(1, min(4, machine.facts["cores"] // 4))
    day = datetime.date.today().isoformat()
    out = args.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    usual = ROOT / "benchmarks" / "results" / f"gpu-{machine.name}-{day}"
    out = (out or (ROOT / "build" / "gpu-dry" / "results" if args.dry_run else usual)).resolve()
    print("\n".join(f"{name}: {value}" for name, value in machine.facts.items()), flush=True)
    print(f"results in {out}", flush=True)
    for part in args.part or PARTS:
        try:
            Run(part, machine, out, args).go()
        finally:
            write(out / "results.md", report(out / "results.jsonl"))
    text = (out / "results.md").read_text()
    print(f"\n{text}")
    found = lines.read(out / "results.jsonl")
    bad = [
        line
        for part in args.part or PARTS
        for line in latest(found, part)
        if line["outcome"] == "failed" or (line["outcome"] == "cut off" and part != "bench")
    ]
    print(f"{len(bad)} failed or cut off" if bad else "nothing failed")
    return 1 if bad or (machine.no_gpu and not args.dry_run) else 0


if __name__ == "__main__":
    # As an exception, so that what was started is ended and the end recorded.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    sys.exit(main())

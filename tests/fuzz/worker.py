"""One case under guard: what came of it, in which time and memory."""

from __future__ import annotations

import random
import resource
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, given, settings

from gemma2.tokenizer import TOKENIZER_JSON
from tests.fuzz import samples
from tests.fuzz.readers import PLANTED, READERS, Case, WrongError, cases

# What a case may take beside what `allowed` gives for its folder: parsed JSON has its own cost for each
# value, and libraries keep pools.
FLOOR = 64 * 2**20
# Address space, which also counts what is taken and not touched, and stacks of threads.
SPACE = 512 * 2**20
# What the tokenizers library may take for a byte of the JSON that it parses. It holds every value in a
# tree, and what may be of several kinds (a decoder in a sequence) once more at each level: 14 bytes for
# a byte of a healthy file, up to 51 for the lists of lists that are drawn here.
TOKENIZERS = 100
# Its search for special tokens takes 2.3 seconds to prepare for the 10,000 equal letters that are drawn.
TOKENIZERS_SECONDS = 8.0
SECONDS = 2.0  # of processor time
LONGEST_ERROR = 300_000

READ, REFUSED = "read", "refused"


@dataclass(frozen=True)
class Outcome:
    """`kind` is READ, REFUSED, or what went wrong; `text` the error's."""

    kind: str
    text: str = ""
    seconds: float = 0.0
    memory: int = 0  # bytes at the peak, more than before

    @property
    def failed(self) -> bool:
        return self.kind not in (READ, REFUSED)


def make(seed: str, number: int, readers: list[str]) -> Case:
    """Give the case `number`; it depends on nothing but the arguments."""
    reader = readers[number % len(readers)]
    made: list[Case] = []

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(reader))
    def draw(case: Case) -> None:
        made.append(case)

    numbers = random.Random(f"{seed} {number}")
    while not made:  # a draw may want more bytes, or reject what it got
        draw.hypothesis.fuzz_one_input(numbers.randbytes(8192))
    return made[0]


def _status(field: str) -> int:
    """Give a line of /proc/self/status in bytes: VmRSS, VmHWM, VmSize."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def allowed(size: int, place: Path) -> tuple[int, float]:
    """Give how many bytes, and seconds, may be taken for the folder `place` of `size` bytes."""
    parsed = place / TOKENIZER_JSON
    if not parsed.is_file():
        return 2 * size, SECONDS
    return 2 * size + TOKENIZERS * parsed.stat().st_size, TOKENIZERS_SECONDS


def run(case: Case, place: Path) -> Outcome:
    """Write the case's folder to `place`, read it, remove it, and judge."""
    samples.remove(place)
    size = samples.write(case.folder, place)
    read = {**READERS, **PLANTED}[case.reader].read
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most, slowest = allowed(size, place)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before, start = _status("VmRSS"), time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + most + SPACE, hard))
    kind, text = READ, ""
    try:
        read(place)
    except WrongError as error:
        kind, text = "WRONG", str(error)
    except (ValueError, TypeError, OSError) as error:
        kind, text = REFUSED, str(error)
        if str(place) not in text:
            kind = "names no file"
            text = _told(error)
        elif len(text) > LONGEST_ERROR:
            kind, text = "endless text", f"{len(text)} characters: {text[:1000]}"
    except BaseException as error:  # a panic in Rust is no Exception
        kind, text = f"raises {type(error).__name__}", _told(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    seconds, memory = time.process_time() - start, _status("VmHWM") - before
    if kind in (READ, REFUSED) and seconds > slowest:
        kind = "too slow"
    elif kind in (READ, REFUSED) and memory > most + FLOOR:
        kind = "too much memory"
        text = f"{memory:,} bytes for a folder of {size:,} bytes ({text[:1000]})"
    samples.remove(place)
    return Outcome(kind, text[:20_000], seconds, memory)


def _told(error: BaseException) -> str:
    lines = traceback.format_exception(error)
    return "".join(line if len(line) < 2000 else line[:2000] + "...\n" for line in lines[-30:])

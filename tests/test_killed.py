"""Saving and converting, killed: afterwards there is the old, the new, or an error that says so."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma2 import Gemma2Config, Gemma2ForCausalLM
from gemma2.checkpoint import save_pretrained
from gemma2.convert import convert, gguf, original
from gemma2.weights import CheckpointError
from tests.fuzz.samples import SIZES

# A process is forked, so that it has all modules at once and dies at work, not while it starts.
_CONTEXT = multiprocessing.get_context("fork")

CONFIG = Gemma2Config(**{**SIZES, "query_pre_attn_scalar": SIZES["head_dim"]})
# What changes a disk, as Python's audit events call it; os.fsync has none and is counted apart.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}
INTERRUPTED = 3  # the exit status of a process that was interrupted and cleaned up

State = dict[str, Tensor]


@functools.cache
def model(shift: float) -> Gemma2ForCausalLM:
    torch.manual_seed(1)
    made = Gemma2ForCausalLM(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            # 1 + w and back is exact in these, as GGUF has it
            parameter.normal_().mul_(16).round_().div_(16).add_(shift)
    return made


def hub(path: Path) -> State:
    return dict(Gemma2ForCausalLM.from_pretrained(path).state_dict())


def originals(path: Path) -> State:
    source = original.open_source(path, CONFIG)
    return {name: source.read(name) for name in source.tensors}


def of_gguf(path: Path) -> State:
    source = gguf.open_source(path)
    return {name: source.read(name) for name in source.tensors}


def _save(target: Path, sources: Path, shift: float) -> None:
    save_pretrained(model(shift), target, max_shard_size="1KB")


def _convert(
    source: str, options: dict[str, Any], target: Path, sources: Path, shift: float
) -> None:
    convert(sources / f"{shift}{source}", target, config=CONFIG, overwrite=True, **options)


@dataclass(frozen=True)
class Operation:
    """`run(target, sources, shift)` writes the model `shift`; `read` gives what a target says."""

    target: str
    run: Callable[[Path, Path, float], None]
    read: Callable[[Path], State]


OPERATIONS = {
    "save": Operation("model", _save, hub),
    "convert Google's to the hub's": Operation(
        "model", functools.partial(_convert, ".ckpt", {"max_shard_size": "1KB"}), hub
    ),
    "convert GGUF to the hub's": Operation("model", functools.partial(_convert, ".gguf", {}), hub),
    "convert to Google's file": Operation(
        "model.ckpt", functools.partial(_convert, "", {"to": "original"}), originals
    ),
    "convert to Google's folder": Operation(
        "model",
        functools.partial(_convert, "", {"to": "original", "max_shard_size": "1KB"}),
        originals,
    ),
    "convert to GGUF": Operation(
        "model.gguf", functools.partial(_convert, "", {"to": "gguf"}), of_gguf
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models in every layout: 0.0 (folder), 0.0.ckpt, 0.0.gguf, 1.0, ..."""
    place = tmp_path_factory.mktemp("sources")
    for shift in (0.0, 1.0):
        save_pretrained(model(shift), place / f"{shift}")
        convert(place / f"{shift}", place / f"{shift}.ckpt", to="original")
        convert(place / f"{shift}", place / f"{shift}.gguf", to="gguf")
    return place


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def same(found: State, shift: float) -> bool:
    return all(torch.equal(found[name], value) for name, value in model(shift).named_parameters())


# ---- in the process that dies -------------------------------------------------------------------


def changes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Tell whether what an audit event announces changes a disk."""
    created = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
    return bool(created) or event in CHANGES


def _die_at(step: int, number: int, calls: Any) -> None:
    """Count the calls that change the disk, and at number `step` send this process a signal."""

    def count() -> None:
        calls.value += 1
        if calls.value == step:
            os.kill(os.getpid(), number)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if changes(event, arguments):
            count()

    # What a process has written outlives it without this; only the moment counts.
    os.fsync = lambda descriptor: count()
    sys.addaudithook(hook)


def _work(
    name: str, target: Path, sources: Path, step: int, number: int, calls: Any, times: Any = None
) -> None:
    if calls is not None:
        _die_at(step, number, calls)
    if times is not None:
        times.send(time.monotonic())
    try:
        OPERATIONS[name].run(target, sources, 1.0)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    if times is not None:
        times.send(time.monotonic())


def run(name: str, target: Path, sources: Path, step: int = 0, number: int = 0) -> int:
    """Run an operation in a process of its own.

    Give how it ended (-9: killed), and without a `step` how many calls changed the disk.
    """
    calls = _CONTEXT.Value("i", 0)
    process = _CONTEXT.Process(target=_work, args=(name, target, sources, step, number, calls))
    process.start()
    process.join()
    if not step:
        assert process.exitcode == 0
        return int(calls.value)
    assert process.exitcode in (0, INTERRUPTED, -number), process.exitcode
    return process.exitcode


# ---- what is left -------------------------------------------------------------------------------


def prepare(name: str, place: Path, sources: Path, existing: bool) -> Path:
    target = place / OPERATIONS[name].target
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if existing:
        OPERATIONS[name].run(target, sources, 0.0)
        if target.is_dir():
            (target / "notes.txt").write_text("mine")
    return target


def judge(name: str, target: Path, existing: bool) -> str:
    """Give "old", "new", "absent" or "said", the only things that may be found."""
    hidden = f".{target.name}.saving-"
    assert all(item == target or item.name.startswith(hidden) for item in target.parent.iterdir())
    if not target.exists():
        assert not existing
        return "absent"
    try:
        found = OPERATIONS[name].read(target)
    except CheckpointError as error:
        assert existing and target.is_dir()  # noqa: PT018
        assert "a save was interrupted while it replaced the files" in str(error)  # noqa: PT017
        return "said"
    for what, shift in (("old", 0.0), ("new", 1.0)):
        if same(found, shift):
            return what
    raise AssertionError(f"{target} was loaded, and is neither the old nor the new model")


def check_again(name: str, target: Path, sources: Path) -> None:
    """A second run succeeds, and removes what the dead one has left once it is old."""
    for item in (*target.parent.rglob(".*"), *target.parent.glob(".*")):
        if item.exists():
            os.utime(item, (0, 0))
    OPERATIONS[name].run(target, sources, 1.0)
    assert same(OPERATIONS[name].read(target), 1.0)
    assert not [item for item in target.parent.rglob("*") if item.name.startswith(".")]


def moments(total: int, last: int, count: int) -> list[int]:
    """Give `count` of the calls 1 to `total`: the `last` ones, where files are moved, and others."""
    early = range(1, max(1, total - last) + 1)
    chosen = random.Random(total).sample(early, min(len(early), count - last))
    return sorted({*chosen, *range(max(1, total - last + 1), total + 1)})


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_a_call_that_changes_the_disk(
    name: str, existing: bool, sources: Path, tmp_path: Path, tallies: Any
) -> None:
    target = prepare(name, tmp_path / "x", sources, existing)
    total = run(name, target, sources)
    assert judge(name, target, existing) == "new"
    seen = set()
    for step in moments(total, 6, 20 if name == "save" else 9):
        target = prepare(name, tmp_path / "x", sources, existing)
        assert run(name, target, sources, step, signal.SIGKILL) == -signal.SIGKILL
        what = judge(name, target, existing)
        tallies["kills at a call that changes the disk"][what] += 1
        if what not in seen:
            check_again(name, target, sources)
        seen.add(what)
    assert seen >= ({"old"} if existing else {"absent"})


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("name", ["save", "convert to Google's folder"])
def test_killed_at_a_random_moment(
    name: str, existing: bool, sources: Path, tmp_path: Path, tallies: Any
) -> None:
    """`kill -9` from outside, at 10 moments between the start and the usual end."""
    numbers = random.Random(name)
    target = prepare(name, tmp_path / "x", sources, existing)
    took = _timed(name, target, sources, None)
    assert took is not None
    for _ in range(10):
        target = prepare(name, tmp_path / "x", sources, existing)
        _timed(name, target, sources, numbers.uniform(0, took))
        tallies["kills at a random moment"][judge(name, target, existing)] += 1
    check_again(name, target, sources)


def _timed(name: str, target: Path, sources: Path, delay: float | None) -> float | None:
    """Run, and kill after `delay` seconds; give how long it took, None if it was killed."""
    here, there = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_work, args=(name, target, sources, 0, 0, None, there))
    process.start()
    there.close()
    start = here.recv()
    if delay is not None:
        time.sleep(delay)
        process.kill()
    process.join()
    return here.recv() - start if delay is None and here.poll() else None


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("name", ["save", "convert to GGUF"])
def test_interrupted_it_cleans_up(
    name: str, existing: bool, sources: Path, tmp_path: Path, tallies: Any
) -> None:
    """Ctrl-C: what is there is as it was, bit by bit, and nothing hidden lies beside it."""
    target = prepare(name, tmp_path / "x", sources, existing)
    total = run(name, target, sources)
    for step in moments(total, 4, 8):
        target = prepare(name, tmp_path / "x", sources, existing)
        before = state_of(tmp_path / "x")
        ended = run(name, target, sources, step, signal.SIGINT)
        what = judge(name, target, existing)
        tallies["interrupts"][what] += 1
        assert ended == INTERRUPTED
        if what in ("old", "absent"):
            assert state_of(tmp_path / "x") == before
        if what == "new" and not existing:
            assert not [item for item in tmp_path.rglob("*") if item.name.startswith(".")]


# ---- disks that refuse --------------------------------------------------------------------------


def state_of(place: Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(place.rglob("*"))
    }


def told(work: Callable[..., None], name: str, target: Path, sources: Path) -> tuple[int, str]:
    """Give the error's number and text with which `work` ends in a process of its own."""
    here, there = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=work, args=(name, target, sources, there))
    process.start()
    there.close()
    answer: tuple[int, str] = here.recv()
    process.join()
    return answer


def _limited(name: str, target: Path, sources: Path, answer: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    try:
        OPERATIONS[name].run(target, sources, 1.0)
    except OSError as error:
        answer.send((error.errno, str(error)))
    else:
        answer.send((0, ""))


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_disk_that_takes_no_more_leaves_the_old(
    name: str, existing: bool, sources: Path, tmp_path: Path
) -> None:
    """A file may not grow beyond 600 bytes here, as on a disk that is full."""
    target = prepare(name, tmp_path / "x", sources, existing)
    before = state_of(tmp_path / "x")
    number, text = told(_limited, name, target, sources)
    assert number == errno.EFBIG, text
    assert state_of(tmp_path / "x") == before
    check_again(name, target, sources)


def _read_only(name: str, target: Path, sources: Path, answer: Any) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if changes(event, arguments) and Path(str(arguments[0])).is_relative_to(target.parent):
            raise OSError(errno.EROFS, "Read-only file system", str(arguments[0]))

    sys.addaudithook(hook)
    try:
        OPERATIONS[name].run(target, sources, 1.0)
    except OSError as error:
        answer.send((error.errno, str(error)))
    else:
        answer.send((0, ""))


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_place_that_may_not_be_written_is_named(
    name: str, existing: bool, sources: Path, tmp_path: Path
) -> None:
    target = prepare(name, tmp_path / "x", sources, existing)
    before = state_of(tmp_path / "x")
    number, text = told(_read_only, name, target, sources)
    assert number == errno.EROFS, text
    assert str(target.parent) in text
    assert state_of(tmp_path / "x") == before

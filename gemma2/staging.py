"""Files and folders that appear whole or not at all, whatever interrupts their writing.

All is written under a hidden name on the same disk, synced, and only then moved into place by
renaming. What a killed process leaves is such a hidden name, which nobody reads and which the next
write to the same place removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gemma2.weights import REPLACING

_WRITING = ".saving-"


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    if path.is_dir() and os.name != "posix":  # other systems cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(target: Path, size: int) -> None:
    """Check that `size` more bytes fit on the disk of `target`.

    Raises:
        OSError: they do not (ENOSPC).
    """
    folder = target
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{target}: {size / 1e9:.2f} GB are to be written and {free / 1e9:.2f} GB are free",
        )


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Give the path at which to write a new file that is `target` afterwards, old or not.

    It is a hidden name beside `target`, of no suffix by which a reader would find it. Left by an
    exception, it is removed and `target` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_old_siblings(target)
    writing = _sibling(target)
    try:
        yield writing
        sync(writing)
        writing.replace(target)
    except BaseException:
        writing.unlink(missing_ok=True)
        raise
    sync(target.parent)


@contextlib.contextmanager
def staged_folder(target: Path, entries: Sequence[str], stale: re.Pattern[str]) -> Iterator[Path]:
    """Give an empty folder to write into; its files are those of `target` afterwards.

    A new `target` appears by renaming. In one that exists, other files stay: those of `entries`
    (what makes a checkpoint visible) are removed first and the new one is moved last; then files
    whose name matches `stale` and that were not written now are removed. A reader that looks for
    `REPLACING` finds the old files, the new ones, or that a replacement was interrupted. Left by an
    exception, `target` is as it was.
    """
    existing = target.exists()
    if existing:
        writing = target / (_WRITING + secrets.token_hex(4))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_old_siblings(target)
        writing = _sibling(target)
    replacing = target / (REPLACING + secrets.token_hex(4))
    try:
        writing.mkdir()
        yield writing
        for item in writing.iterdir():
            sync(item)
        sync(writing)
        # From here on a reader must not mix old and new files: the new name says so.
        writing.rename(replacing if existing else target)
        sync(target if existing else target.parent)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    if existing:
        _replace(target, replacing, entries, stale)


def _replace(target: Path, replacing: Path, entries: Sequence[str], stale: re.Pattern[str]) -> None:
    for old in entries:
        (target / old).unlink(missing_ok=True)
    written = {item.name for item in replacing.iterdir()}
    for name in sorted(written, key=lambda name: (name in entries, name)):
        (replacing / name).replace(target / name)
    sync(target)
    replacing.rmdir()
    for item in target.iterdir():
        if stale.fullmatch(item.name) and item.name not in written:
            item.unlink(missing_ok=True)
        elif item.name.startswith(REPLACING):
            shutil.rmtree(item, ignore_errors=True)
        elif is_leftover(item):
            _remove_if_old(item)
    sync(target)


def is_leftover(item: Path) -> bool:
    """Tell whether something in a folder is what an interrupted write has left there."""
    return item.name.startswith(_WRITING)


def _sibling(target: Path) -> Path:
    return target.parent / (_prefix(target) + secrets.token_hex(4))


def _prefix(target: Path) -> str:
    """Give how the hidden names beside `target` begin; a whole one has at most 255 bytes."""
    name = os.fsencode(target.name)[:200].decode(errors="ignore")
    return f".{name}{_WRITING}"


def _remove_old_siblings(target: Path) -> None:
    for item in target.parent.iterdir():
        if item.name.startswith(_prefix(target)):
            _remove_if_old(item)


def _remove_if_old(item: Path) -> None:
    """Remove what an interrupted write has left; another process may be at work in a young one."""
    with contextlib.suppress(FileNotFoundError):
        if time.time() - item.stat().st_mtime > 3600:
            if item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
            else:
                item.unlink()

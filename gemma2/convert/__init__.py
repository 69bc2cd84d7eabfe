"""Checkpoints from one layout into another: the hub's, Google's original one, GGUF, Orbax.

>>> from gemma2.convert import convert
>>> convert("gemma-2-2b-pytorch/model.ckpt", "gemma-2-2b")
"""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma2.config import Gemma2Config
from gemma2.convert import hub, original
from gemma2.convert.source import Source, given_config
from gemma2.saving import parse_size
from gemma2.staging import is_leftover
from gemma2.weights import DTYPES, SAFE, SAFE_INDEX, CheckpointError, check_finished

__all__ = ["Report", "convert", "detect"]

LAYOUTS = ("hub", "original", "gguf")
_FILES = {".ckpt": "original", ".gguf": "gguf"}  # what a file of that name would be
_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint")
_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    tensors: how many were converted, by the hub's names.
    bytes: size of the written files.
    seconds: wall time, verification included.
    peak_memory: most bytes that this process had in memory since its start, pages of mapped files
        included; None where the system does not tell.
    files: what was written.
    """

    tensors: int
    bytes: int
    seconds: float
    peak_memory: int | None
    files: list[Path]


def detect(path: str | os.PathLike[str]) -> str:
    """Tell the layout of the checkpoint at `path`: "hub", "original", "gguf" or "orbax".

    In a folder that holds several, safetensors count before a ``.ckpt``, before a ``.gguf``. Other
    pickles are Google's or the hub's by the names in them.

    Raises:
        FileNotFoundError: there is nothing.
        CheckpointError: it is none of them; the text says what is there.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist (nothing is downloaded)")
    if path.is_file():
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            return "gguf"
        if zipfile.is_zipfile(path):
            return "original"
        hint = ": give its folder" if path.suffix in (".safetensors", ".json") else ""
        raise CheckpointError(f"{path}: it is neither a GGUF file nor one of torch.save{hint}")
    if not path.is_dir():
        raise CheckpointError(f"{path}: it is neither a file nor a folder")
    check_finished(path)
    if any((path / name).is_file() for name in (SAFE, SAFE_INDEX)):
        return "hub"
    if any(path.glob("*.ckpt")):
        return "original"
    if any(path.glob("*.gguf")):
        return "gguf"
    if any((path / name).exists() for name in _ORBAX):
        return "orbax"
    if any(path.glob("*.bin")):
        return "original" if original.is_original(path) else "hub"
    held = ", ".join(sorted(item.name for item in path.iterdir())[:20]) or "nothing"
    raise CheckpointError(f"{path}: no checkpoint of a known layout; it holds {held}")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str = "hub",
    config: Gemma2Config | str | os.PathLike[str] | None = None,
    size: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    progress: bool | None = None,
    overwrite: bool = False,
) -> Report:
    """Convert the checkpoint `source` of any known layout (see `detect`) into `target`.

    Every name, shape and dtype is checked before a tensor is read, tensors go one by one, and what
    was written is read back and compared bit by bit (quantised: within a step) before it gets its
    name. Interrupted at any moment, `target` is as it was; a folder whose files were just being
    replaced says so when it is read. Tokenizer and generation settings are carried along.

    source: a folder in the hub's layout; Google's ``.ckpt`` or its folder; a ``.gguf`` file; the
        folder of an Orbax checkpoint.
    to: "hub" (a folder); "original": a folder as Google published it, or a single file where
        `target` ends in ``.ckpt``; "gguf" (a file).
    config, size: the configuration, a ``config.json`` or its folder; or "2b", "9b", "27b". Neither:
        the ``config.json`` beside the source, or the published size that has its shapes.
    dtype: of all weights: "float32", "bfloat16", "float16", "float64"; GGUF: "q8_0", and no
        "float64". None: that of the source's embedding, bfloat16 for quantised ones.
    max_shard_size: bytes, or like "5GB"; not for GGUF, which is one file. None: 5 GB in the hub's
        layout; in Google's one file for 2B and 9B, and 5 GB a shard for the 27B.
    progress: a bar on stderr; None: for more than 1 GB.
    overwrite: replace a checkpoint of the same layout in `target`; other files there stay.

    Raises:
        FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError: `source` or
            `target` is not what it must be.
        ValueError: an argument that makes no sense; a setting that the layout cannot say.
        CheckpointError: all that is missing, unknown or mis-shaped; a damaged file; values beyond
            `dtype`.
        ImportError: the library for GGUF or Orbax is not installed.
        OSError: the disk is full, or refused.
    """
    started = time.perf_counter()
    begin, end = Path(source), Path(target)
    if to not in LAYOUTS:
        raise ValueError(f"convert: to is {to!r}: it must be one of {', '.join(LAYOUTS)}")
    wanted = None if to == "gguf" else _checked_dtype(dtype)
    shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    if to == "gguf" and max_shard_size is not None:
        raise ValueError(f"convert: max_shard_size is {max_shard_size!r}: a GGUF is written whole")
    layout = detect(begin)
    _check_places(begin, end, to, overwrite)
    opened = _open(layout, begin, given_config(begin, config, size))
    if to == "gguf":
        from gemma2.convert import gguf

        files = gguf.write(opened, end, dtype=dtype, progress=progress)
    else:
        write: Callable[..., list[Path]] = hub.write if to == "hub" else original.write
        if to == "hub" and shard_bytes is None:
            shard_bytes = _SHARD_BYTES
        files = write(
            opened,
            end,
            dtype=wanted or opened.dtype,
            shard_bytes=shard_bytes,
            progress=progress,
        )
    return Report(
        tensors=len(opened.tensors),
        bytes=sum(file.stat().st_size for file in files),
        seconds=time.perf_counter() - started,
        peak_memory=_peak_memory(),
        files=files,
    )


def _checked_dtype(dtype: str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    known = {str(value).removeprefix("torch."): value for value in DTYPES.values()}
    if dtype not in known:
        raise ValueError(f"convert: dtype is {dtype!r}: it must be one of {', '.join(known)}")
    return known[dtype]


def _open(layout: str, path: Path, config: Gemma2Config | None) -> Source:
    if layout == "hub":
        return hub.open_source(path, config)
    if layout == "original":
        return original.open_source(path, config)
    if layout == "orbax":
        from gemma2.convert import orbax

        return orbax.open_source(path, config)
    from gemma2.convert import gguf

    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:20])
            raise CheckpointError(f"{path}: it holds {names}: give the path of one of them")
        path = files[0]
    return gguf.open_source(path, config)


def _check_places(source: Path, target: Path, to: str, overwrite: bool) -> None:
    """Check that `target` is where something may be written, before anything is."""
    begin, end = source.resolve(), target.resolve()
    if begin == end or begin in end.parents or end in begin.parents:
        how = "the source itself" if begin == end else "inside the other"
        raise ValueError(f"convert: source is {source} and target {target}: one is {how}")
    above = next(folder for folder in end.parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"convert: target is {target}: {above} is a file, and no folder")
    if not target.exists():
        if target.is_symlink():
            raise FileExistsError(f"convert: target is {target}: a link to nothing")
        meant = _FILES.get(target.suffix, to)
        if meant != to:
            raise ValueError(f"convert: target is {target} and to is {to!r}: pass to={meant!r}")
        return
    if to == "gguf" or (to == "original" and original.names_a_file(target)):
        if target.is_dir():
            raise IsADirectoryError(f"convert: target is {target}: a folder, and not a file")
        if not target.is_file():
            raise FileExistsError(f"convert: target is {target}: it exists and is no regular file")
        if not overwrite:
            raise FileExistsError(f"convert: target is {target}: it exists: pass overwrite=True")
        _check_layout(target, to)
        return
    if not target.is_dir():
        raise NotADirectoryError(f"convert: target is {target}: a file, and not a folder")
    if all(is_leftover(item) for item in target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"convert: target is {target}: it is not empty: pass overwrite=True")
    _check_layout(target, to)
    other = original.beside_ours(target) if to == "original" else []
    if other:
        raise FileExistsError(
            f"convert: target is {target}: it holds {other[0]}, which would lie beside the new "
            "checkpoint and might be read in its place: give another folder"
        )


def _check_layout(target: Path, to: str) -> None:
    """Check that `target` is no checkpoint of another layout; it may be none at all."""
    try:
        held = detect(target)
    except CheckpointError:
        return
    if held != to:
        raise FileExistsError(
            f"convert: target is {target}: it holds a checkpoint of another layout ({held}), which "
            "would be replaced or lie beside the new one: give another place"
        )


def _peak_memory() -> int | None:
    if os.name != "posix":
        return None
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

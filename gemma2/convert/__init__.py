"""Checkpoints from one layout into another: the hub's, Google's original one, GGUF, Orbax.

>>> from gemma2.convert import convert
>>> convert("gemma-2-2b-pytorch/model.ckpt", "gemma-2-2b")
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gemma2.config import Gemma2Config
from gemma2.weights import BIN, BIN_INDEX, SAFE, SAFE_INDEX, CheckpointError

__all__ = ["Report", "convert", "detect"]

LAYOUTS = ("hub", "original", "gguf")
_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint")


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    tensors: how many were written, by the hub's names.
    bytes: size of the written files.
    seconds: wall time, verification included.
    peak_memory: most bytes that this process had in memory so far, mapped files included.
    files: what was written.
    """

    tensors: int
    bytes: int
    seconds: float
    peak_memory: int
    files: list[Path]


def detect(path: str | os.PathLike[str]) -> str:
    """Tell the layout of the checkpoint at `path`: "hub", "original", "gguf" or "orbax".

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
        raise CheckpointError(f"{path}: neither a GGUF file nor one of torch.save")
    if any((path / name).is_file() for name in (SAFE, SAFE_INDEX)):
        return "hub"
    if any(path.glob("*.ckpt")):
        return "original"
    if any((path / name).exists() for name in _ORBAX):
        return "orbax"
    if any((path / name).is_file() for name in (BIN, BIN_INDEX)):
        return "hub"
    raise CheckpointError(f"{path}: no checkpoint of a known layout")


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
    """Convert the checkpoint `source` into `target`. Being written."""
    raise CheckpointError(f"{source}: {detect(source)} cannot be converted to {to} yet")

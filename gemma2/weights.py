"""Weights on disk: which files there are, and what they say about their tensors.

None of it is trusted: names in an index cannot leave the folder, pickles are read with
``weights_only``, and names, shapes and dtypes are known before a tensor is read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gemma2.archive import check_archive
from gemma2.config import MAX_JSON_BYTES, parse_json, read_json

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SAFE = "model.safetensors"
SAFE_INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
LM_HEAD = "lm_head.weight"

# A folder of this name inside the checkpoint's is there while a save replaces files (saving.py).
REPLACING = ".replacing-"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PROGRESS_BYTES = 10**9
_LISTED = 1000  # keys printed for each kind of problem; the exception holds them all

PathLike = str | os.PathLike[str]


def shown(name: str) -> str:
    """Give a file's name of a tensor as an error may print it: on one line, and not endless."""
    if name.isprintable() and len(name) <= 200:
        return name
    return repr(name[:200]) + ("..." if len(name) > 200 else "")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded into the model. The text lists all that is wrong.

    `missing`, `unexpected`, `mismatched` and `wrong_dtype` hold the names of the tensors concerned.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: list[str] | None = None,
        unexpected: list[str] | None = None,
        mismatched: list[str] | None = None,
        wrong_dtype: list[str] | None = None,
    ) -> None:
        super().__init__(message)
        self.missing = missing or []
        self.unexpected = unexpected or []
        self.mismatched = mismatched or []
        self.wrong_dtype = wrong_dtype or []


def misfit(
    title: str, groups: Mapping[str, Sequence[str]], hint: str | None = None, **names: list[str]
) -> CheckpointError:
    """Give the error that lists all that is wrong: for each group its name and its entries.

    `hint` is a last line, `names` are the tensors for the fields of `CheckpointError`.
    """
    lines = [f"{title}:"]
    for group, entries in groups.items():
        if entries:
            lines.append(f"  {group} ({len(entries)}):")
            lines += [f"    {entry}" for entry in entries[:_LISTED]]
            if len(entries) > _LISTED:
                lines.append(f"    ... and {len(entries) - _LISTED} more")
    if hint is not None:
        lines.append(f"  {hint}")
    return CheckpointError("\n".join(lines), **names)


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about one tensor. `dtype` is None if it is none that a weight can have."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    dtype_name: str

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class _File(Protocol):
    def infos(self) -> dict[str, TensorInfo]: ...
    def tensor(self, name: str) -> Tensor: ...


class _SafetensorsFile:
    """One safetensors file. The library checks the header against the file's length at opening."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt", device="cpu") as handle:
                yield handle
        except SafetensorError as error:
            raise self._damaged(error) from error

    def infos(self) -> dict[str, TensorInfo]:
        content = self._header()
        with self._open():
            pass
        try:
            header = parse_json(content)  # the library takes a name that is given twice
        except ValueError as error:
            raise self._damaged(error) from error
        header.pop("__metadata__", None)
        return {
            name: TensorInfo(
                self.path, tuple(entry["shape"]), DTYPES.get(entry["dtype"]), entry["dtype"]
            )
            for name, entry in header.items()
        }

    def _header(self) -> bytes:
        if not self.path.is_file():  # opening a pipe may never end
            raise self._damaged("no regular file")
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_JSON_BYTES:
                raise self._damaged(
                    f"a header of {length} bytes: at most {MAX_JSON_BYTES} are read"
                )
            return file.read(length)

    def _damaged(self, reason: object) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a readable safetensors file: {reason}")

    def tensor(self, name: str) -> Tensor:
        # Opened for every tensor: the mapping ends with the tensor, and with it the pages of the
        # file that count as memory of this process.
        with self._open() as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor


class PickleFile:
    """One file of torch.save. Read with weights_only: tensors and containers, no code.

    Its tensors are the values of the dict in it, or of the dict that is there under `key`.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.path = path
        self.key = key
        self.checked = False

    def _load(self) -> dict[str, Tensor]:
        # Mapping keeps a lying size from taking memory, and leaves out the format before torch 1.6.
        try:
            if not self.checked:
                check_archive(self.path)
                self.checked = True
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch has no error of its own for damaged files
            raise CheckpointError(
                f"{self.path}: refused: it is damaged, holds more than tensors, or is older than "
                f"torch 1.6 ({str(error).partition(chr(10))[0][:200]})"
            ) from error
        if self.key is not None and isinstance(state, dict):
            state = state.get(self.key, state)
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
        ):
            raise CheckpointError(f"{self.path}: it must hold a dict of names and tensors")
        for name, tensor in state.items():
            size = tensor.numel() * tensor.element_size()
            if tensor.untyped_storage().nbytes() < size or tensor.is_neg():
                raise CheckpointError(
                    f"{self.path}: {shown(name)} of shape {list(tensor.shape)} is not stored in "
                    "full"
                )
        return state

    def infos(self) -> dict[str, TensorInfo]:
        known = set(DTYPES.values())
        return {
            name: TensorInfo(
                self.path,
                tuple(tensor.shape),
                tensor.dtype if tensor.dtype in known else None,
                str(tensor.dtype).removeprefix("torch."),
            )
            for name, tensor in self._load().items()
        }

    def tensor(self, name: str) -> Tensor:
        return self._load()[name].detach()  # a parameter may lie there


@dataclass
class Weights:
    """The tensors of a checkpoint: what is where, without reading them.

    `tensors` maps a name to what its file says; `entry` is the file that was found first;
    `problems` are sentences about names on which the index and the files disagree.
    """

    folder: Path
    entry: Path
    tensors: dict[str, TensorInfo]
    problems: list[str] = field(default_factory=list)
    readers: dict[Path, _File] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> Tensor:
        """Give the tensor `name` on the CPU, in its file's dtype, mapped from the file."""
        return self.readers[self.tensors[name].file].tensor(name)

    def add(self, file: Path) -> dict[str, TensorInfo]:
        """Give what the file says of its tensors, and keep who can read them."""
        safe = file.suffix == ".safetensors"
        reader: _File = _SafetensorsFile(file) if safe else PickleFile(file)
        self.readers[file] = reader
        return reader.infos()


def checked_folder(folder: PathLike) -> Path:
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"{path}: {what}: give the folder with {CONFIG} and {SAFE} (nothing is downloaded)"
        )
    return path


def check_finished(folder: Path) -> None:
    """Check that no save was interrupted while it replaced the files in `folder`."""
    unfinished = sorted(folder.glob(REPLACING + "*"))
    if unfinished:
        raise CheckpointError(
            f"{folder}: a save was interrupted while it replaced the files. Save again, or move "
            f"the rest of the new files from {unfinished[0].name} into the folder and remove it"
        )


def find_weights(folder: PathLike) -> Weights:
    """Find the weights in `folder` and read the names, shapes and dtypes in them, not the values.

    The first of ``model.safetensors``, ``model.safetensors.index.json``, ``pytorch_model.bin`` and
    ``pytorch_model.bin.index.json`` counts.

    Raises:
        FileNotFoundError: the folder does not exist or holds no weights.
        CheckpointError: an index is malformed, names a file outside the folder or a missing one, or
            a file is damaged.
    """
    path = checked_folder(folder)
    check_finished(path)
    for name in (SAFE, SAFE_INDEX, BIN, BIN_INDEX):
        entry = path / name
        if not entry.is_file():
            continue
        if name in (SAFE, BIN):
            weights = Weights(path, entry, {})
            weights.tensors = weights.add(entry)
            return weights
        return from_index(path, entry)
    held = ", ".join(sorted(item.name for item in path.iterdir())[:20]) or "nothing"
    raise FileNotFoundError(f"{path}: no {SAFE}, {SAFE_INDEX} or {BIN} here; it holds {held}")


def from_index(folder: Path, entry: Path) -> Weights:
    """Give the weights of which the index `entry` says in which file of `folder` each lies."""
    try:
        index = read_json(entry)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{entry}: weight_map must be an object of tensor names and files")
    files: dict[str, dict[str, TensorInfo]] = {}
    weights = Weights(folder, entry, {})
    absent = []
    for file in dict.fromkeys(
        value if isinstance(value, str) else repr(value) for value in weight_map.values()
    ):
        shard = _inside(folder, file, entry)
        if not shard.is_file():
            absent.append(file)
            continue
        files[file] = weights.add(shard)
    if absent:
        more = f" and {len(absent) - 20} more" if len(absent) > 20 else ""
        raise CheckpointError(
            f"{entry}: it names files that are missing: {', '.join(absent[:20])}{more}"
        )
    for name, file in weight_map.items():
        if name in files[file]:
            weights.tensors[name] = files[file][name]
        else:
            weights.problems.append(
                f"{entry.name} puts {shown(name)} into {file}, which does not hold it"
            )
    for file, infos in files.items():
        for name in infos:
            if name not in weight_map:
                weights.problems.append(
                    f"{file} holds {shown(name)}, which {entry.name} does not name"
                )
            elif weight_map[name] != file:
                weights.problems.append(
                    f"{file} holds {shown(name)}, which {entry.name} puts into {weight_map[name]}"
                )
    return weights


def _inside(folder: Path, name: str, entry: Path) -> Path:
    """Give the path of the shard `name`, which an untrusted index names."""
    wanted = "the name of a .safetensors or .bin file in the same folder"
    if (
        name != Path(name).name
        or "\\" in name
        or not name.isprintable()
        or len(name) > 255
        or Path(name).suffix not in (".safetensors", ".bin")
    ):
        raise CheckpointError(
            f"{entry}: weight_map names the file {name[:300]!r}: it must be {wanted}"
        )
    path = folder / name
    target = Path(os.path.realpath(path))  # unlike resolve(), no error for links in a circle
    allowed = [folder.resolve()]
    # The hub's cache keeps snapshots/<revision>/<name> as links into blobs/ beside it.
    if allowed[0].parent.name == "snapshots":
        allowed.append(allowed[0].parent.parent / "blobs")
    if target.parent not in allowed:
        raise CheckpointError(
            f"{entry}: weight_map names the file {name!r}, a link to {target}: it must be {wanted}"
        )
    return path


def may_have_overflowed(tensor: Tensor, out: Tensor) -> Tensor | None:
    """Tell, in a bool [], whether `out`, which is `tensor` in another dtype, is not finite everywhere.

    None where the dtype is not narrower, and where there is nothing in it. The host waits for nothing.
    """
    if torch.finfo(out.dtype).max >= torch.finfo(tensor.dtype).max or not out.numel():
        return None
    # the extremes are many times faster, and not finite if any value is not
    return ~torch.stack(out.aminmax()).isfinite().all()


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Give `tensor` in `dtype`, rounded once.

    Raises:
        CheckpointError: a finite value is beyond `dtype`, such as float16, which ends at 65504.
    """
    out = tensor.to(dtype)
    if may_have_overflowed(tensor, out):
        lost = tensor[out.isinf() & tensor.isfinite()]
        if lost.numel():
            said, end = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
            raise CheckpointError(
                f"{name} reaches {lost.abs().max().item():.6g}, beyond {said}, which ends at "
                f"{end:.6g}: take a dtype that has such values"
            )
    return out


@dataclass
class Slot:
    """One parameter or persistent buffer of the model, with all names that it goes by."""

    tensor: Tensor
    names: list[str]
    source: str | None = None  # the name in the file
    twins: list[str] = field(default_factory=list)  # further names in the file for a tied weight


def slots_of(model: nn.Module) -> list[Slot]:
    slots: dict[int, Slot] = {}
    hidden = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        if name not in hidden:
            slots.setdefault(id(tensor), Slot(tensor, [])).names.append(name)
    return list(slots.values())


@contextlib.contextmanager
def progress_bar(
    total: int, title: str, progress: bool | None
) -> Iterator[Callable[[int], object]]:
    if progress is None:
        progress = total > _PROGRESS_BYTES
    if not progress:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit="B", unit_scale=True) as bar:
        yield bar.update

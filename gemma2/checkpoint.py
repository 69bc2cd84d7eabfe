"""Weights on disk in the hub's layout: found, checked, loaded and saved.

Reading. A folder holds ``config.json`` and ``model.safetensors``, or shards with
``model.safetensors.index.json``, or (old) ``pytorch_model.bin`` in either form. None of it is
trusted: names in an index cannot leave the folder, pickles are read with ``weights_only``, and
every name, shape and dtype is compared with the model before memory is taken or a weight is
changed. All that is wrong comes in one `CheckpointError`.

Memory. The model is built on the meta device. Each tensor is then mapped from its file, copied into
memory of its own and unmapped, so the peak is the model plus one tensor, and on the host one tensor
for a model on a GPU. Weights are copied even where the file's dtype and the CPU would allow the
model to live in the mapping: writing to that file in place (which other libraries do when they
save) would change or crash a running model, and tensors in a file sit at any 8-byte address, while
the kernels read whole cache lines.

Writing: see saving.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gemma2.config import Gemma2Config
from gemma2.saving import save_pretrained
from gemma2.weights import (
    DTYPES,
    GENERATION_CONFIG,
    LM_HEAD,
    CheckpointError,
    PathLike,
    Slot,
    Weights,
    cast,
    checked_folder,
    find_weights,
    may_have_overflowed,
    misfit,
    progress_bar,
    shown,
    slots_of,
)

__all__ = [
    "CheckpointError",
    "Weights",
    "checked_device",
    "find_weights",
    "from_pretrained",
    "load_state_dict_into",
    "read_config",
    "save_pretrained",
]

# Weights that belong to one class only; everything else is the shared body.
_SCORE = ("score.weight", "score.bias")
_HEADS = (LM_HEAD, *_SCORE)
_BODY = "model."


def read_config(folder: PathLike, **overrides: Any) -> Gemma2Config:
    """Give the configuration in the folder's ``config.json``; `overrides` replace single fields.

    Raises:
        FileNotFoundError: there is no such folder or no ``config.json`` in it.
        ValueError, TypeError: see `Gemma2Config.from_json_file`.
    """
    return Gemma2Config.from_pretrained(checked_folder(folder), **overrides)


def _rename(names: set[str], keys: list[str]) -> Callable[[str], str]:
    """Give the function from a file's key to the model's name.

    A head has its body under "model."; a body saved alone has the same keys without that prefix.
    """
    nested_model = any(name.startswith(_BODY) for name in names)
    nested_file = any(key.startswith(_BODY) for key in keys)

    def rename(key: str) -> str:
        if nested_model and not nested_file and key not in _HEADS:
            return _BODY + key
        if nested_file and not nested_model:
            return key.removeprefix(_BODY)
        return key

    return rename


def _dispensable(key: str, names: set[str]) -> bool:
    """Tell whether the model can do without the file's tensor `key`, that it has no place for."""
    if key.endswith("rotary_emb.inv_freq"):  # a constant, in files of old versions of transformers
        return True
    if key == LM_HEAD:
        return True  # of the causal model; the other classes need only the body
    # A bare body leaves any head; a causal model or another head refuses the wrong one.
    return key in _SCORE and not any(name in names for name in _HEADS)


def _resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype == "auto":
            return None
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(
            f"from_pretrained: dtype is {dtype!r}: it must be float32, bfloat16, float16, float64, "
            'or "auto" for that of the file'
        )
    assert dtype is None or isinstance(dtype, torch.dtype)
    return dtype


def checked_device(device: torch.device | str | int | None) -> torch.device:
    """Give the device that is meant ("cpu", "cuda", "cuda:1", 1; None: torch's default).

    Raises:
        TypeError, ValueError: it is no such device, or is not there; the text says which GPUs are.
    """
    wanted = 'it must be "cpu", "cuda", "cuda:1" or the number of a GPU'
    if device is None:
        device = torch.get_default_device()
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        raise TypeError(f"from_pretrained: device is a {type(device).__name__}: {wanted}")
    said = f"from_pretrained: device is {device if isinstance(device, int) else str(device)!r}"
    try:
        where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{said}: {wanted}") from error
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"{said}: {wanted}")
    if where.type == "cuda":
        if torch.version.cuda is None:
            raise ValueError(f"{said}, but torch {torch.__version__} was built without CUDA")
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError(
                f"{said}, but torch sees no GPU: the driver or CUDA_VISIBLE_DEVICES may be why"
            )
        if where.index is not None and where.index >= count:
            raise ValueError(f"{said}, but torch sees only {count} of them, numbered from 0")
    return where


def load_state_dict_into(
    model: nn.Module,
    folder: PathLike | Weights,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    progress: bool | None = None,
    *,
    new_head: bool = False,
) -> None:
    """Fill `model` with the weights in `folder`.

    Parameters on the meta device get memory on `device` (see `checked_device`) in `dtype` (None or
    "auto": that of the largest tensor in the file); others are filled in place and keep both. Every
    name, shape and dtype is checked first: when this raises `CheckpointError` for one of those, the
    model is unchanged. Keys of a bare body and of a head are understood in both directions. A tied
    `lm_head.weight` in the file must equal the embedding. `progress`: a bar on stderr; None: for
    more than 1 GB.

    `new_head`: a classification head that is missing in the file, or has another shape there, is
    initialised (normal, `config.initializer_range`; bias 0) with a warning.

    Raises:
        FileNotFoundError: there are no weights in the folder.
        ValueError, TypeError: a dtype or device that makes no sense or is not there.
        CheckpointError: all missing, unexpected, mis-shaped and wrongly typed tensors; a damaged
            file.
    """
    wanted_dtype = _resolve_dtype(dtype)
    where = checked_device(device)
    weights = folder if isinstance(folder, Weights) else find_weights(folder)
    slots = slots_of(model)
    fresh = match(model, slots, weights, new_head)
    tensors = weights.tensors
    filled = [slot for slot in slots if slot.source is not None]
    check_twins(filled, weights)
    if wanted_dtype is None:
        largest = max(
            (tensors[slot.source] for slot in filled if slot.source is not None),
            key=lambda info: info.numel,
        )
        wanted_dtype = largest.dtype
    assert wanted_dtype is not None
    narrowed: dict[str, tuple[Tensor, torch.dtype]] = {}  # an extreme is not finite; the dtype

    total = sum(slot.tensor.numel() for slot in filled) * wanted_dtype.itemsize
    with (
        torch.no_grad(),
        progress_bar(total, f"Loading {weights.folder.name}", progress) as advance,
    ):
        for slot in filled:
            assert slot.source is not None
            # Of any dtype it crosses to a device as it is: converting there is faster.
            source = weights.read(slot.source)
            source = source.to(where if slot.tensor.is_meta else slot.tensor.device)
            target = _filled(slot.tensor, source, wanted_dtype)
            if (suspect := may_have_overflowed(source, target)) is not None:
                narrowed[slot.source] = (suspect, target.dtype)
            del source
            _place(model, slot, target)
            advance(target.numel() * target.element_size())
        _check_overflow(narrowed, weights)
        if fresh:
            _initialise(model, fresh, wanted_dtype, where)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise RuntimeError(
                f"load: {name} is still on the meta device: it is not part of a checkpoint, so the "
                "model must make it itself"
            )
    config = getattr(model, "config", None)
    if isinstance(config, Gemma2Config):
        config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")


def match(model: nn.Module, slots: list[Slot], weights: Weights, new_head: bool) -> list[Slot]:
    """Find each slot's source in the file, or raise one error; give the slots to be initialised."""
    by_name = {name: slot for slot in slots for name in slot.names}
    names = set(by_name)
    hidden = {name for name, _ in model.named_buffers()} - names
    rename = _rename(names, list(weights.tensors))
    unexpected = []
    for key in weights.tensors:
        name = rename(key)
        slot = by_name.get(name)
        if slot is None:
            if name not in hidden and not _dispensable(key, names):
                unexpected.append(key)
        elif slot.source is None:
            slot.source = key
        elif name == slot.names[0]:
            slot.twins.append(slot.source)
            slot.source = key
        else:
            slot.twins.append(key)

    missing, mismatched, wrong_dtype = [], [], []
    for slot in slots:
        if slot.source is None:
            missing.append(slot.names[0])
            continue
        for key in (slot.source, *slot.twins):
            info = weights.tensors[key]
            if info.shape != tuple(slot.tensor.shape):
                mismatched.append(key)
            elif info.dtype is None:
                wrong_dtype.append(key)

    fresh: list[Slot] = []
    if new_head and any(key in _SCORE for key in (*missing, *mismatched)):
        fresh = [slot for slot in slots if slot.names[0] in _SCORE]
        for slot in fresh:
            slot.source = None
        missing, mismatched, wrong_dtype, unexpected = (
            [key for key in keys if key not in _SCORE]
            for keys in (missing, mismatched, wrong_dtype, unexpected)
        )
    if not (missing or unexpected or mismatched or wrong_dtype or weights.problems):
        return fresh

    def shapes(key: str) -> str:
        wanted = list(by_name[rename(key)].tensor.shape)
        found = list(weights.tensors[key].shape)
        return f"{shown(key)}: {found} in the file, {wanted} in the model"

    def typed(key: str) -> str:
        name = weights.tensors[key].dtype_name
        return f"{shown(key)}: {name}, but a weight is float32, bfloat16, float16 or float64"

    lost = {*missing, *mismatched}
    hint = "pass new_head=True to start with a fresh classification head"
    raise misfit(
        f"{weights.entry} does not fit {type(model).__name__}",
        {
            "missing in the file": sorted(missing),
            "not part of the model": [shown(key) for key in sorted(unexpected)],
            "of the wrong shape": [shapes(key) for key in sorted(mismatched)],
            "of the wrong dtype": [typed(key) for key in sorted(wrong_dtype)],
            "wrong in the index": weights.problems,
        },
        hint if lost and lost <= set(_SCORE) else None,
        missing=sorted(missing),
        unexpected=sorted(unexpected),
        mismatched=sorted(mismatched),
        wrong_dtype=sorted(wrong_dtype),
    )


def check_twins(slots: list[Slot], weights: Weights) -> None:
    """Check that the copies of a tied weight in the file are equal."""
    for slot in slots:
        for twin in slot.twins:
            assert slot.source is not None
            if not torch.equal(weights.read(slot.source), weights.read(twin)):
                raise CheckpointError(
                    f"{weights.entry}: {twin} differs from {slot.source}, while config.json ties "
                    "them: load with tie_word_embeddings=False to use both",
                    mismatched=[twin],
                )


def _filled(tensor: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
    """Give `tensor` with the values of `source`, or in place of one on meta a new one."""
    if not tensor.is_meta:
        return tensor.copy_(source)
    # On the CPU the source still lives in its file.
    if source.device.type != "cpu" and source.dtype == dtype and source.is_contiguous():
        return source
    return torch.empty(source.shape, dtype=dtype, device=source.device).copy_(source)


def _check_overflow(narrowed: dict[str, tuple[Tensor, torch.dtype]], weights: Weights) -> None:
    """Check that no conversion lost a finite value; waits for the device once.

    Weights that are not finite after it are read and converted again.
    """
    if not narrowed:
        return
    device = next(iter(narrowed.values()))[0].device
    suspects = torch.stack([flag.to(device) for flag, _ in narrowed.values()]).tolist()
    for (name, (_, dtype)), is_suspect in zip(narrowed.items(), suspects, strict=True):
        if is_suspect:
            cast(weights.read(name), dtype, f"{weights.entry}: {name}")


def _place(model: nn.Module, slot: Slot, tensor: Tensor) -> None:
    """Put `tensor` under all the slot's names, so that tied weights stay one parameter."""
    if tensor is slot.tensor:
        return
    value = tensor
    if isinstance(slot.tensor, nn.Parameter):
        value = nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad)
    for name in slot.names:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, value)


def _initialise(
    model: nn.Module, slots: list[Slot], dtype: torch.dtype, device: torch.device
) -> None:
    std = getattr(getattr(model, "config", None), "initializer_range", 0.02)
    for slot in slots:
        target = slot.tensor
        if target.is_meta:
            target = torch.empty(target.shape, dtype=dtype, device=device)
        if target.dim() == 1:
            target.zero_()
        else:
            target.normal_(0.0, std)
        _place(model, slot, target)
    warnings.warn(
        f"{', '.join(slot.names[0] for slot in slots)}: newly initialised, train before use",
        stacklevel=3,
    )


Model = TypeVar("Model", bound=nn.Module)


def from_pretrained(
    cls: Callable[[Gemma2Config], Model],
    folder: PathLike,
    *,
    config: Gemma2Config | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    progress: bool | None = None,
    new_head: bool = False,
    **config_overrides: Any,
) -> Model:
    """Build `cls` from the folder's ``config.json`` and weights; give it in eval mode.

    A causal model also takes its settings from ``generation_config.json``, if there is one.
    `config` stands in for ``config.json``; `config_overrides` replace single fields of either. The
    other arguments are those of `load_state_dict_into`.

    Raises:
        FileNotFoundError: the folder, its ``config.json`` or its weights do not exist.
        ValueError, TypeError: the configuration cannot be honoured, or an override is unknown.
        CheckpointError: the weights do not fit.
    """
    resolved, where = _resolve_dtype(dtype), checked_device(device)
    if config is None:
        config = read_config(folder, **config_overrides)
    else:
        config = Gemma2Config.from_dict(config.to_dict(), **config_overrides)
    weights = find_weights(folder)
    with torch.device("meta"):
        model = cls(config)
    load_state_dict_into(model, weights, resolved, where, progress, new_head=new_head)
    _read_generation_config(model, weights)
    return model.eval()


def _read_generation_config(model: nn.Module, weights: Weights) -> None:
    """Give a model that generates the folder's settings; special tokens not named there stay."""
    own = getattr(model, "generation_config", None)
    if own is None or not (weights.folder / GENERATION_CONFIG).is_file():
        return
    read = type(own).from_pretrained(weights.folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(read, name) is None:
            setattr(read, name, getattr(own, name))
    model.generation_config = read

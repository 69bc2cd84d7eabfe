"""The hub's layout as a source and a target: ``config.json`` and safetensors, or old pickles."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from torch import Tensor

from gemma2.checkpoint import check_twins, match
from gemma2.config import Gemma2Config
from gemma2.convert.source import (
    Source,
    generation_beside,
    generation_of,
    layout_of,
    parts_of,
    stale_files,
    tokenizer_beside,
    verify,
)
from gemma2.generation import GenerationConfig
from gemma2.heads import Gemma2ForCausalLM
from gemma2.saving import HUB_ENTRIES, HUB_SHARD, config_text, generation_text, write_hub
from gemma2.staging import check_space, staged_folder
from gemma2.weights import (
    CONFIG,
    GENERATION_CONFIG,
    CheckpointError,
    TensorInfo,
    Weights,
    find_weights,
    progress_bar,
    slots_of,
)


@dataclasses.dataclass
class HubSource:
    """A checkpoint in the hub's layout; see `gemma2.convert.source.Source`."""

    config: Gemma2Config
    tensors: dict[str, TensorInfo]
    dtype: torch.dtype
    generation: GenerationConfig | None
    tokenizer: list[Path]
    weights: Weights
    names: dict[str, str]  # the model's name -> the file's

    def read(self, name: str) -> Tensor:
        return self.weights.read(self.names[name])


def open_source(folder: Path, config: Gemma2Config | None) -> HubSource:
    """Open a language model in the hub's layout; `config` is that of its ``config.json``.

    Raises:
        CheckpointError: there is no configuration; all that does not fit it.
    """
    if config is None:
        raise CheckpointError(f'{folder}: no {CONFIG} here: pass config= or size="2b", "9b", "27b"')
    weights = find_weights(folder)
    with torch.device("meta"):
        model = Gemma2ForCausalLM(config)
    slots = slots_of(model)
    match(model, slots, weights, new_head=False)
    check_twins(slots, weights)
    names = {slot.names[0]: slot.source for slot in slots if slot.source is not None}
    tensors = {name: weights.tensors[source] for name, source in names.items()}
    dtype = max(tensors.values(), key=lambda info: info.numel).dtype
    assert dtype is not None  # `match` refuses a tensor without one
    return HubSource(
        config,
        tensors,
        dtype,
        generation_beside(folder),
        tokenizer_beside(folder),
        weights,
        names,
    )


def write(
    source: Source,
    target: Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int,
    progress: bool | None = None,
) -> list[Path]:
    """Write `source` into the folder `target` in the hub's layout; give the files.

    They are read back and compared before they are moved into place (see staging.py). In a folder
    that exists, an older checkpoint is replaced and other files stay.

    Raises:
        OSError: the disk is full, or refused; the folder is as it was.
        CheckpointError: values beyond `dtype`, or the disk gives back something else.
    """
    tensors, size = layout_of({name: info.shape for name, info in source.tensors.items()}, dtype)
    texts = {
        CONFIG: config_text(source.config, Gemma2ForCausalLM.__name__, dtype),
        GENERATION_CONFIG: generation_text(generation_of(source)),
    }
    check_space(target, size)
    with (
        staged_folder(target, HUB_ENTRIES, stale_files(HUB_SHARD, source)) as folder,
        progress_bar(2 * size, f"Writing {target.name}", progress) as advance,
    ):
        write_hub(
            folder,
            texts,
            tensors,
            lambda name: parts_of(source, name, dtype),
            shard_bytes,
            advance,
        )
        for file in source.tokenizer:
            shutil.copyfile(file, folder / file.name)
        verify(source, open_source(folder, source.config), dtype, advance)
        names = [item.name for item in folder.iterdir()]
    return sorted(target / name for name in names)

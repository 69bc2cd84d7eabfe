"""Flax checkpoints of Google DeepMind's library gemma, which Orbax has written. They are only read.

Names and shapes (google-deepmind/gemma: gemma/gm/nn/_modules.py; N query heads, K key/value heads,
H their size, D the stream, F the inner width): ``q_einsum`` [N, D, H], ``kv_einsum`` [2, K, D, H],
one ``qkv_einsum`` [3, N, D, H] where K = N, ``attn_vec_einsum`` [N, H, D], ``gating_einsum``
[2, D, F] for 2B and [2, F, D] for 9B and 27B, ``linear`` [F, D]. Norms are called ``scale`` and are
without the 1. The embedding has 128 rows more than the vocabulary. A tree is nested, or flat with
slashes in its keys, and may lie under ``transformer`` or ``params``.

Orbax restores what one asks for: shapes and dtypes are known before an array is read, and arrays
come one by one. It builds arrays and containers and imports nothing that a folder names.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma2.config import Gemma2Config
from gemma2.convert.source import (
    SIZES,
    check_tensors,
    generation_beside,
    hub_shapes,
    tokenizer_beside,
)
from gemma2.generation import GenerationConfig
from gemma2.weights import CONFIG, CheckpointError, PathLike, TensorInfo, shown

EMBEDDER = "embedder/input_embedding"
_SPARE_ROWS = 128  # of the embedding, beyond the vocabulary
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# What a training run keeps beside "params".
_TRAINING = ("collections", "opt_state", "step")


def _keys(config: Gemma2Config, found: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Give the names in the file and their shapes, in the form that `found` has where two exist."""
    N, K = config.num_attention_heads, config.num_key_value_heads
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    keys: dict[str, tuple[int, ...]] = {EMBEDDER: (config.vocab_size, D)}
    for n in range(config.num_hidden_layers):
        if f"layer_{n}/attn/qkv_einsum" in found:
            keys[f"layer_{n}/attn/qkv_einsum"] = (3, N, D, H)
        else:
            keys[f"layer_{n}/attn/q_einsum"] = (N, D, H)
            keys[f"layer_{n}/attn/kv_einsum"] = (2, K, D, H)
        keys[f"layer_{n}/attn/attn_vec_einsum"] = (N, H, D)
        keys[f"layer_{n}/mlp/gating_einsum"] = (2, D, F)
        keys[f"layer_{n}/mlp/linear"] = (F, D)
        for norm in ("pre_attention", "post_attention", "pre_ffw", "post_ffw"):
            keys[f"layer_{n}/{norm}_norm/scale"] = (D,)
    keys["final_norm/scale"] = (D,)
    table = found.get(EMBEDDER)
    if table is not None and len(table.shape) == 2:
        spare = table.shape[0] - config.vocab_size
        if 0 < spare <= _SPARE_ROWS:
            keys[EMBEDDER] = (table.shape[0], D)
    for key in keys:
        if key.endswith("gating_einsum") and key in found and found[key].shape == (2, F, D):
            keys[key] = (2, F, D)
    return keys


_EMBEDDING = "model.embed_tokens.weight"
_QKV = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
_GATES = {"mlp.gate_proj": 0, "mlp.up_proj": 1}
_SOURCES = {
    "input_layernorm": "pre_attention_norm/scale",
    "post_attention_layernorm": "post_attention_norm/scale",
    "pre_feedforward_layernorm": "pre_ffw_norm/scale",
    "post_feedforward_layernorm": "post_ffw_norm/scale",
    "self_attn.q_proj": "attn/q_einsum",
    "self_attn.k_proj": "attn/kv_einsum",
    "self_attn.v_proj": "attn/kv_einsum",
    "self_attn.o_proj": "attn/attn_vec_einsum",
    "mlp.gate_proj": "mlp/gating_einsum",
    "mlp.up_proj": "mlp/gating_einsum",
    "mlp.down_proj": "mlp/linear",
}


def _part(name: str) -> str:
    """Give the module within its layer of the hub's tensor `name`, "" outside the layers."""
    return name.split(".", 3)[3].removesuffix(".weight") if ".layers." in name else ""


def _key(name: str, found: Mapping[str, TensorInfo]) -> str:
    """Give the array in the file that holds the hub's tensor `name`."""
    if name == _EMBEDDING:
        return EMBEDDER
    if name == "model.norm.weight":
        return "final_norm/scale"
    layer = f"layer_{name.split('.', 3)[2]}"
    joined = f"{layer}/attn/qkv_einsum"
    if _part(name) in _QKV and joined in found:
        return joined
    return f"{layer}/{_SOURCES[_part(name)]}"


@dataclasses.dataclass
class OrbaxSource:
    """An Orbax checkpoint; see `gemma2.convert.source.Source`."""

    config: Gemma2Config
    tensors: dict[str, TensorInfo]
    dtype: torch.dtype
    generation: GenerationConfig | None
    tokenizer: list[Path]
    found: dict[str, TensorInfo]  # by the names of `_keys`
    tree: _Tree
    kept: tuple[str, Tensor] | None = None  # k and v, gate and up are halves of one array

    def read(self, name: str) -> Tensor:
        array = self._array(_key(name, self.found))
        part = _part(name)
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        if name == _EMBEDDING:
            return array[: self.config.vocab_size]
        if part in _QKV:  # [heads, D, H], one, two or three times
            which = _QKV[part] if len(array) == 3 and array.dim() == 4 else _QKV[part] - 1
            heads = array if array.dim() == 3 else array[which]
            return heads.transpose(1, 2).reshape(-1, hidden)
        if part == "self_attn.o_proj":
            return array.reshape(-1, hidden).T
        if part in _GATES:
            half = array[_GATES[part]]
            return half if tuple(half.shape) == (inner, hidden) else half.T
        return array.T if part == "mlp.down_proj" else array

    def _array(self, key: str) -> Tensor:
        if self.kept is None or self.kept[0] != key:
            self.kept = None  # before the next one takes memory
            self.kept = key, self.tree.restore(key, self.found[key])
        return self.kept[1]


class _Tree:
    """The arrays in a folder, by their names without prefix, endings and separators of a form."""

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("orbax") is None:
            raise ImportError(
                "Orbax checkpoints need the library orbax-checkpoint: pip install 'gemma2[orbax]'"
            )
        self.path = path
        leaves = self._leaves()
        if any(names[0] == "params" for names in leaves):
            leaves = {at: leaf for at, leaf in leaves.items() if at[0] not in _TRAINING}
        ends = [names for names in leaves if "/".join(names).endswith(EMBEDDER)]
        prefix = "/".join(ends[0])[: -len(EMBEDDER)] if len(ends) == 1 else ""
        self.infos: dict[str, TensorInfo] = {}
        self.places: dict[str, tuple[str, ...]] = {}
        self.problems: list[str] = []
        for names, leaf in leaves.items():
            whole = "/".join(names)
            key = whole[len(prefix) :] if whole.startswith(prefix) else whole
            key = key.removesuffix("/w")
            if key in self.infos:
                self.problems.append(f"{shown(key)} is there twice")
            self.places[key] = names
            self.infos[key] = self._info(key, leaf)

    def _checkpointer(self) -> Any:
        import orbax.checkpoint

        return orbax.checkpoint.PyTreeCheckpointer()

    def _leaves(self) -> dict[tuple[str, ...], Any]:
        try:
            metadata = self._checkpointer().metadata(self.path.resolve()).item_metadata
            tree = None if metadata is None else metadata.tree
        except Exception as error:  # the library has no class of its own for a damaged folder
            raise self._unreadable(error) from error
        leaves: dict[tuple[str, ...], Any] = {}

        def walk(node: Any, names: tuple[str, ...]) -> None:
            if isinstance(node, Mapping):
                for name, child in node.items():
                    walk(child, (*names, str(name)))
            else:
                leaves[names] = node

        walk(tree, ())
        if not any(leaves):
            raise CheckpointError(f"{self.path}: Orbax finds no tree of arrays in it")
        return leaves

    def _unreadable(self, error: Exception) -> CheckpointError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return CheckpointError(f"{self.path}: Orbax cannot read it: {lines[0][:300]}")

    def _info(self, key: str, leaf: Any) -> TensorInfo:
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None:
            self.problems.append(f"{shown(key)} is no array")
            return TensorInfo(self.path, (), None, type(leaf).__name__)
        shape = tuple(int(size) for size in shape)
        chunk = getattr(getattr(leaf, "storage", None), "chunk_shape", None)
        # Arrays are read by whole chunks: one that claims more than its array would take more.
        if chunk is not None and math.prod(chunk) > math.prod(shape):
            self.problems.append(f"{shown(key)} of shape {list(shape)} has chunks of {list(chunk)}")
        return TensorInfo(self.path, shape, _DTYPES.get(str(dtype)), str(dtype))

    def restore(self, key: str, info: TensorInfo) -> Tensor:
        """Read one array and nothing else."""
        import orbax.checkpoint

        names = self.places[key]
        restore = orbax.checkpoint.RestoreArgs(restore_type=np.ndarray)
        item: Any = 0
        args: Any = restore
        for name in reversed(names):
            item, args = {name: item}, {name: args}
        try:
            # without transformations, what is not in `item` is not read
            node: Any = self._checkpointer().restore(
                self.path.resolve(),
                args=orbax.checkpoint.args.PyTreeRestore(
                    item=item, restore_args=args, transforms={}
                ),
            )
            for name in names:
                node = node[name]
            array = np.ascontiguousarray(node)
        except Exception as error:  # as above
            raise self._unreadable(error) from error
        if array.shape != info.shape or str(array.dtype) != info.dtype_name:
            raise CheckpointError(f"{self.path}: {shown(key)} has changed while it was read")
        if info.dtype == torch.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def open_source(path: PathLike, config: Gemma2Config | None = None) -> OrbaxSource:
    """Open the folder of an Orbax checkpoint and check it; no array is read.

    Without `config`, the model must have the shapes of a published size.

    Raises:
        ImportError: the library orbax-checkpoint is not installed.
        CheckpointError: Orbax cannot read the folder; no published size has these shapes; all that
            is missing, unknown or mis-shaped.
    """
    folder = Path(path)
    # Kauldron's checkpoints keep their tree in a folder inside
    inner = folder / "default"
    tree = _Tree(inner if not (folder / "_METADATA").exists() and inner.is_dir() else folder)
    found = tree.infos
    if config is None:
        config = _published(folder, found)
    expected = _keys(config, found)
    problems = list(tree.problems)
    if not config.tie_word_embeddings:
        problems.append("tie_word_embeddings is False, and these checkpoints have no head")
    if config.hidden_size == config.intermediate_size:
        problems.append("hidden_size is intermediate_size: which side gating_einsum has is unknown")
    check_tensors(folder, found, expected, problems)
    dtype = found[EMBEDDER].dtype
    assert dtype is not None  # `check_tensors` refuses an array without one
    shapes = hub_shapes(config)
    return OrbaxSource(
        config,
        {
            name: dataclasses.replace(found[_key(name, found)], shape=shape)
            for name, shape in shapes.items()
        },
        dtype,
        generation_beside(folder),
        tokenizer_beside(folder) or tokenizer_beside(folder.absolute().parent),
        found,
        tree,
    )


def _published(folder: Path, found: Mapping[str, TensorInfo]) -> Gemma2Config:
    """Give the configuration of the published model that has these shapes."""
    for preset in SIZES.values():
        config = preset()
        expected = _keys(config, found)
        telling = (EMBEDDER, "layer_0/attn/q_einsum", "layer_0/attn/attn_vec_einsum")
        if all(key in found and found[key].shape == expected.get(key) for key in telling):
            return config
    table = found.get(EMBEDDER)
    held = "none" if table is None else str(list(table.shape))
    raise CheckpointError(
        f"{folder}: it has the shapes of no published Gemma 2 ({EMBEDDER}: {held}), and there is "
        f'no {CONFIG} beside it: pass config= with one, or size="2b", "9b" or "27b"'
    )

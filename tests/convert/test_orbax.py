"""Flax checkpoints, written by Orbax as the library gemma does, give the model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma2 import Gemma2Config
from gemma2.convert import orbax as ours
from gemma2.weights import CheckpointError
from tests.convert.sources import logits, model_of
from tests.model import factories

pytest.importorskip("orbax.checkpoint", reason="the extra orbax is not installed")

# Where the manifest is damaged, reads of the library end after its event loop, which it tells stderr.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
)

SHAPES: dict[str, dict[str, Any]] = {
    "2b": {},
    "9b": {},
    "27b": {},
    "multi-head": {**factories.SHAPES["2b"], "num_key_value_heads": 4},
}


def config(shape: str) -> Gemma2Config:
    return (
        factories.config(shape, **SHAPES[shape])
        if shape in factories.SHAPES
        else factories.config("2b", **SHAPES[shape])
    )


def flax_tree(cfg: Gemma2Config, shape: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The nested tree of gemma's parameters, made from the hub's weights one number at a time.

    Every weight is placed by its meaning in gemma's einsums: BTD,NDH->BTNH for q, BSD,CKDH->CBSKH
    for k and v, BTNH,NHD->BTD for the output, ...F,NFH->...NH (2B) or ...F,NHF->...NH for the
    gates, ...H,HF->...F for the way back.
    """
    state = factories.state_dict(cfg)
    N, K, H = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    D = cfg.hidden_size

    def array(values: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
        if dtype != torch.bfloat16:
            return tensor.numpy()
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)

    def get(name: str) -> np.ndarray:
        return state[f"model.{name}.weight"].numpy()

    spare = np.full((128, D), 1e4, np.float32)  # rows that nobody may read
    tree: dict[str, Any] = {
        "embedder": {"input_embedding": array(np.concatenate([get("embed_tokens"), spare]))},
        "final_norm": {"scale": array(get("norm"))},
    }
    for n in range(cfg.num_hidden_layers):
        at = f"layers.{n}."
        q, k, v = (
            np.einsum("nhd->ndh", get(f"{at}self_attn.{x}_proj").reshape(heads, H, D))
            for x, heads in (("q", N), ("k", K), ("v", K))
        )
        attn: dict[str, Any]
        if N == K:
            attn = {"qkv_einsum": {"w": array(np.stack([q, k, v]))}}
        else:
            attn = {"q_einsum": {"w": array(q)}, "kv_einsum": {"w": array(np.stack([k, v]))}}
        out = np.einsum("dnh->nhd", get(f"{at}self_attn.o_proj").reshape(D, N, H))
        attn["attn_vec_einsum"] = {"w": array(out)}
        gates = np.stack([get(f"{at}mlp.gate_proj"), get(f"{at}mlp.up_proj")])
        tree[f"layer_{n}"] = {
            "attn": attn,
            "mlp": {
                # transpose_gating_einsum is False for 2B alone
                "gating_einsum": array(gates if shape in ("9b", "27b") else gates.swapaxes(1, 2)),
                "linear": array(get(f"{at}mlp.down_proj").T),
            },
            "pre_attention_norm": {"scale": array(get(f"{at}input_layernorm"))},
            "post_attention_norm": {"scale": array(get(f"{at}post_attention_layernorm"))},
            "pre_ffw_norm": {"scale": array(get(f"{at}pre_feedforward_layernorm"))},
            "post_ffw_norm": {"scale": array(get(f"{at}post_feedforward_layernorm"))},
        }
    return tree


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """The form of the published checkpoints: paths with slashes, and one level of leaves."""
    out: dict[str, Any] = {}

    def walk(node: dict[str, Any], path: str) -> None:
        for name, child in node.items():
            if isinstance(child, dict):
                walk(child, f"{path}/{name}")
            elif path.endswith("/mlp"):
                out[f"{path}/{name}"] = {"w": child}
            else:
                out.setdefault(path, {})[name] = child

    walk(tree, "transformer")
    return out


def saved(path: Path, tree: dict[str, Any], **options: Any) -> Path:
    import orbax.checkpoint

    orbax.checkpoint.PyTreeCheckpointer(**options).save(path.absolute(), tree)
    return path


@pytest.mark.parametrize("shape", ["2b", "9b", "27b", "multi-head"])
def test_logits_are_those_of_transformers(tmp_path: Path, shape: str) -> None:
    cfg = config(shape)
    source = ours.open_source(saved(tmp_path / "c", flat(flax_tree(cfg, shape))), cfg)
    state = factories.state_dict(cfg)
    assert list(source.tensors) == list(state)
    for name, tensor in state.items():
        found = source.read(name)
        assert torch.equal(found, tensor), name
        assert (source.tensors[name].shape, source.tensors[name].dtype) == (
            tuple(found.shape),
            found.dtype,
        )
    assert factories.relative_error(logits(model_of(source)), logits(factories.twin(cfg))) < 2e-5


@pytest.mark.parametrize("form", ["nested", "under params", "in a training run", "without OCDBT"])
def test_every_form_of_the_tree_is_read(tmp_path: Path, form: str) -> None:
    cfg = config("2b")
    tree = flax_tree(cfg, "2b", torch.bfloat16)
    path = tmp_path / "c"
    if form == "nested":
        saved(path, tree)
    elif form == "under params":
        saved(path, {"params": tree})
    elif form == "in a training run":
        run = {"params": tree, "step": np.array(7), "opt_state": {"mu": tree}, "collections": {}}
        saved(path / "default", run)
    else:
        saved(path, flat(tree), use_ocdbt=False)
    source = ours.open_source(path, cfg)
    assert source.dtype == torch.bfloat16
    for name, tensor in factories.state_dict(cfg).items():
        assert torch.equal(source.read(name), tensor.bfloat16()), name


def test_arrays_come_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("2b")
    path = saved(tmp_path / "c", flat(flax_tree(cfg, "2b")))
    restored = []
    restore = ours._Tree.restore
    monkeypatch.setattr(
        ours._Tree,
        "restore",
        lambda self, key, info: restored.append(key) or restore(self, key, info),
    )
    source = ours.open_source(path, cfg)
    assert restored == []
    for name in source.tensors:
        source.read(name)
    assert restored[:5] == [
        "embedder/input_embedding",
        "layer_0/attn/q_einsum",
        "layer_0/attn/kv_einsum",
        "layer_0/attn/attn_vec_einsum",
        "layer_0/mlp/gating_einsum",
    ]
    assert len(restored) == len(set(restored)) == 2 + 9 * cfg.num_hidden_layers


def test_the_tokenizer_beside_the_folder_goes_along(tmp_path: Path) -> None:
    cfg = config("2b")
    path = saved(tmp_path / "c", flat(flax_tree(cfg, "2b")))
    (tmp_path / "tokenizer.model").write_bytes(b"")  # where the published archives have it
    assert ours.open_source(path, cfg).tokenizer == [tmp_path.absolute() / "tokenizer.model"]


def test_all_that_does_not_fit_comes_in_one_error(tmp_path: Path) -> None:
    cfg = config("2b")
    tree = flax_tree(cfg, "2b")
    del tree["layer_1"]["mlp"]["linear"]
    tree["layer_0"]["attn"]["_query_norm"] = {"scale": np.zeros(256, np.float32)}
    tree["layer_0"]["attn"]["q_einsum"]["w"] = np.zeros((4, 256, 72), np.float32)
    tree["final_norm"]["scale"] = np.zeros(72, np.int32)
    with pytest.raises(CheckpointError) as caught:
        ours.open_source(saved(tmp_path / "c", tree), cfg)
    assert caught.value.missing == ["layer_1/mlp/linear"]
    assert caught.value.unexpected == ["layer_0/attn/_query_norm/scale"]
    assert caught.value.mismatched == ["layer_0/attn/q_einsum"]
    assert caught.value.wrong_dtype == ["final_norm/scale"]
    assert str(caught.value).startswith(f"{tmp_path / 'c'} ")


@pytest.mark.parametrize("rows", [-1, 129])
def test_only_the_spare_rows_of_the_embedding_are_dropped(tmp_path: Path, rows: int) -> None:
    cfg = config("2b")
    tree = flax_tree(cfg, "2b")
    table = np.zeros((cfg.vocab_size + rows, cfg.hidden_size), np.float32)
    tree["embedder"]["input_embedding"] = table
    with pytest.raises(CheckpointError, match="embedder/input_embedding: "):
        ours.open_source(saved(tmp_path / "c", tree), cfg)


def test_gates_whose_side_nobody_can_tell_are_refused(tmp_path: Path) -> None:
    cfg = factories.config("2b", intermediate_size=72)
    with pytest.raises(CheckpointError, match="which side gating_einsum has is unknown"):
        ours.open_source(saved(tmp_path / "c", flax_tree(cfg, "2b")), cfg)


def test_without_a_configuration_the_shapes_must_be_published(tmp_path: Path) -> None:
    path = saved(tmp_path / "c", flax_tree(config("2b"), "2b"))
    with pytest.raises(CheckpointError, match=r"no published Gemma 2 .*\[225, 72\]"):
        ours.open_source(path)


def test_a_published_size_is_known_by_its_shapes() -> None:
    from gemma2.convert.source import SIZES

    for name, preset in SIZES.items():
        held = {
            key: ours.TensorInfo(Path("c"), shape, torch.bfloat16, "bfloat16")
            for key, shape in ours._keys(preset(), {}).items()
        }
        assert ours._published(Path("c"), held) == preset(), name


@pytest.mark.parametrize("damage", ["_METADATA", "manifest.ocdbt", "everything"])
def test_a_damaged_folder_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    cfg = config("2b")
    path = saved(tmp_path / "c", flax_tree(cfg, "2b"))
    for file in path.rglob("*"):
        if file.is_file() and damage in (file.name, "everything"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    def read_all() -> None:
        source = ours.open_source(path, cfg)
        for name in source.tensors:
            source.read(name)

    with pytest.raises(CheckpointError) as caught:
        read_all()
    assert str(caught.value).startswith(f"{path}")


def test_an_array_with_chunks_beyond_itself_is_refused(tmp_path: Path) -> None:
    cfg = config("2b")
    path = saved(tmp_path / "c", flat(flax_tree(cfg, "2b")), use_ocdbt=False)
    file = path / "transformer/final_norm.scale/.zarray"
    text = file.read_text()
    assert '"chunks":[72]' in text
    file.write_text(text.replace('"chunks":[72]', '"chunks":[7200000000]'))
    with pytest.raises(CheckpointError, match="has chunks of"):
        ours.open_source(path, cfg)


def test_without_the_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'gemma2\[orbax\]'"):
        ours.open_source(tmp_path)

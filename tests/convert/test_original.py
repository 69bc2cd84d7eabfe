"""Google's original PyTorch checkpoints, read and written.

The fixtures are written here from the conventions of google/gemma_pytorch (gemma/model.py and
gemma/config.py), starting from the state dict of a model of transformers; the package has no part
in them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma2 import CheckpointError, Gemma2Config, Gemma2ForCausalLM
from gemma2.convert import convert, original
from gemma2.weights import TensorInfo
from tests.model import factories

SHAPES = ("2b", "9b", "27b")
INDEX = "pytorch_model.bin.index.json"

# ---- an independent writer ----------------------------------------------------------------------


def google_state(state: dict[str, Tensor], config: Gemma2Config) -> dict[str, Tensor]:
    """What GemmaForCausalLM.state_dict() of gemma_pytorch holds for the weights `state`."""
    frequencies = 1.0 / (
        config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    )
    angles = torch.outer(torch.arange(config.max_position_embeddings * 2), frequencies).float()
    out = {
        "freqs_cis": torch.polar(torch.ones_like(angles), angles),
        "embedder.weight": state["model.embed_tokens.weight"],
    }
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}."
        out[layer + "self_attn.qkv_proj.weight"] = torch.cat(
            [state[f"{layer}self_attn.{kind}_proj.weight"] for kind in "qkv"]
        )
        for name in (
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ):
            out[f"{layer}{name}.weight"] = state[f"{layer}{name}.weight"]
    out["model.norm.weight"] = state["model.norm.weight"]
    return out


def quantised(state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The same with int8 matrices and a scaler for each of their rows."""
    out = {}
    for key, value in state.items():
        if value.dim() == 2 and not value.is_complex():
            scaler = (value.float().abs().amax(1) / 127).to(dtype)
            out[key] = (value.float() / scaler.float()[:, None]).round().to(torch.int8)
            out[key + "_scaler"] = scaler
        else:
            out[key] = value
    return out


def as_file(state: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    torch.save({"model_state_dict": state}, folder / "weights.ckpt")
    return folder / "weights.ckpt"


def as_folder(state: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    torch.save({"model_state_dict": state}, folder / "model.ckpt")
    return folder


def as_shards(state: dict[str, Tensor], folder: Path) -> Path:
    """Three shards dealt like cards, so that a scaler lies in another file than its weight."""
    folder.mkdir()
    weight_map = {}
    keys = [key for key in state if key != "freqs_cis"]
    for i in range(3):
        name = f"pytorch_model-{i:05d}-of-00003.bin"
        torch.save({key: state[key] for key in keys[i::3]}, folder / name)
        weight_map |= dict.fromkeys(keys[i::3], name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def as_old_shards(state: dict[str, Tensor], folder: Path) -> Path:
    """Without an index, and with the constant in every file."""
    folder.mkdir()
    keys = [key for key in state if key != "freqs_cis"]
    for i in range(2):
        part = {key: state[key] for key in (*keys[i::2], "freqs_cis")}
        torch.save(part, folder / f"part{i}.bin")
    return folder


LAYOUTS: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {
    "file": as_file,
    "folder": as_folder,
    "shards": as_shards,
    "old shards": as_old_shards,
}


def weights(shape: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    state = factories.state_dict(factories.config(shape))
    return {name: value.to(dtype) for name, value in state.items()}


def loaded_by_transformers(folder: Path) -> Any:
    import transformers

    return transformers.Gemma2ForCausalLM.from_pretrained(
        folder, attn_implementation="eager", torch_dtype=torch.float32
    ).eval()


@pytest.fixture
def google(tmp_path: Path) -> tuple[Path, dict[str, Tensor], Gemma2Config]:
    """A file of the shape "2b", what is in it, and its configuration."""
    config = factories.config("2b")
    state = google_state(weights("2b"), config)
    return as_file(state, tmp_path / "google"), state, config


# ---- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_gives_the_logits_of_transformers(
    shape: str, int8: bool, tmp_path: Path
) -> None:
    config = factories.config(shape)
    state = google_state(weights(shape), config)
    meant = weights(shape, torch.float32)
    if int8:
        state = quantised(state)
        back = {
            key: state[key] * state[f"{key}_scaler"][:, None]
            for key in state
            if f"{key}_scaler" in state
        }
        meant["model.embed_tokens.weight"] = back.pop("embedder.weight")
        sizes = [
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        ]
        for key, value in back.items():
            for kind, rows in zip("qkv", value.split(sizes), strict=True) if "qkv" in key else ():
                meant[key.replace("qkv_", f"{kind}_")] = rows
            if "qkv" not in key:
                meant[key] = value
    for layout, write in LAYOUTS.items():
        source = write(state, tmp_path / f"google {layout}")
        report = convert(source, tmp_path / layout, config=config, dtype="float32")
        assert report.tensors == len(meant)
    contents = {(tmp_path / layout / "model.safetensors").read_bytes() for layout in LAYOUTS}
    assert len(contents) == 1

    ids = factories.tokens(2, 12)
    with torch.no_grad():
        wanted = factories.twin(config, state=meant)(ids).logits
        theirs = loaded_by_transformers(tmp_path / "file")(ids).logits
        ours = Gemma2ForCausalLM.from_pretrained(tmp_path / "file")(ids).logits
    assert torch.equal(theirs, wanted)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_weights_are_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    config = factories.config("2b")
    state = quantised(google_state(weights("2b"), config), dtype)
    convert(as_file(state, tmp_path / "google"), tmp_path / "hub", config=config)
    model = Gemma2ForCausalLM.from_pretrained(tmp_path / "hub")
    assert model.dtype == torch.bfloat16
    scaler = state["embedder.weight_scaler"].double()
    exact = state["embedder.weight"].double() * scaler[:, None]
    assert torch.equal(model.model.embed_tokens.weight, exact.float().bfloat16())


@pytest.mark.parametrize(
    ("size", "layers", "hidden", "inner", "heads", "kv_heads", "head_dim", "scalar"),
    [
        ("2b", 26, 2304, 9216, 8, 4, 256, 256),
        ("9b", 42, 3584, 14336, 16, 8, 256, 256),
        ("27b", 46, 4608, 36864, 32, 16, 128, 144),
    ],
)
def test_a_published_size_is_known_by_its_shapes(
    size: str,
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scalar: int,
) -> None:
    """The numbers are those of gemma/config.py."""
    shapes = {"embedder.weight": (256000, hidden), "model.norm.weight": (hidden,)}
    for n in range(layers):
        layer = f"model.layers.{n}."
        qkv = (heads + 2 * kv_heads) * head_dim
        shapes[layer + "self_attn.qkv_proj.weight"] = (qkv, hidden)
        shapes[layer + "self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        shapes[layer + "mlp.gate_proj.weight"] = (inner, hidden)
    found = {
        key: TensorInfo(Path("x"), shape, torch.bfloat16, "bfloat16")
        for key, shape in shapes.items()
    }
    config = original._published(Path("x"), found)
    assert config == getattr(Gemma2Config, f"gemma2_{size}")()
    assert config.query_pre_attn_scalar == scalar
    found["embedder.weight"] = TensorInfo(Path("x"), (256128, hidden), torch.bfloat16, "bfloat16")
    with pytest.raises(CheckpointError, match="the shapes of no published Gemma 2"):
        original._published(Path("x"), found)


def test_another_size_must_be_told(google: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert(google[0], tmp_path / "hub")
    assert "2 layers, embedder.weight [97, 72]" in str(caught.value)
    assert "pass config=" in str(caught.value)
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("given", ["object", "file", "folder", "beside"])
def test_the_configuration_comes_from_where_it_is(given: str, google: Any, tmp_path: Path) -> None:
    source, _, config = google
    place = source.parent if given == "beside" else tmp_path / "settings"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(config.to_json())
    passed = {"object": config, "file": place / "config.json", "folder": place, "beside": None}
    convert(source, tmp_path / "hub", config=passed[given])
    written = Gemma2Config.from_pretrained(tmp_path / "hub")
    assert written.architectures == ["Gemma2ForCausalLM"]
    assert written.dtype == "bfloat16"
    written.architectures = written.dtype = None
    assert written == config


def test_tokenizer_and_generation_settings_travel(google: Any, tmp_path: Path) -> None:
    source, _, config = google
    (source.parent / "tokenizer.model").write_bytes(b"pieces")
    convert(source, tmp_path / "plain", config=config)
    assert (tmp_path / "plain" / "tokenizer.model").read_bytes() == b"pieces"
    settings = json.loads((tmp_path / "plain" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == 1
    (source.parent / "generation_config.json").write_text('{"eos_token_id": [1, 107]}')
    convert(source, tmp_path / "tuned", config=config)
    settings = json.loads((tmp_path / "tuned" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [1, 107]
    convert(tmp_path / "tuned", tmp_path / "back", to="original")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"pieces"


# ---- what is refused ----------------------------------------------------------------------------


def test_all_that_does_not_fit_comes_in_one_error(tmp_path: Path) -> None:
    config = factories.config("2b")
    state = quantised(google_state(weights("2b"), config))
    del state["model.layers.0.self_attn.o_proj.weight_scaler"]
    del state["model.norm.weight"]
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"][:5]
    state["model.layers.1.mlp.down_proj.weight"] = state[
        "model.layers.1.mlp.down_proj.weight"
    ].bfloat16()
    state["local_freqs_cis"] = state["freqs_cis"]
    state["model.layers.2.input_layernorm.weight"] = torch.zeros(72)
    state["model.layers.0.input_layernorm.weight"] = torch.zeros(72, dtype=torch.int8)
    with pytest.raises(CheckpointError) as caught:
        convert(as_file(state, tmp_path / "google"), tmp_path / "hub", config=config)
    error = caught.value
    assert error.missing == [
        "model.norm.weight",
        "model.layers.0.self_attn.o_proj.weight_scaler",
    ]
    assert error.unexpected == ["local_freqs_cis", "model.layers.2.input_layernorm.weight"]
    assert error.mismatched == ["model.layers.1.mlp.up_proj.weight"]
    assert error.wrong_dtype == ["model.layers.0.input_layernorm.weight"]
    assert "up_proj.weight: [5, 72] in the file, [96, 72] in the model" in str(error)
    assert "down_proj.weight is bfloat16 and has a weight_scaler: it must be int8" in str(error)
    assert not (tmp_path / "hub").exists()


def test_a_key_in_two_shards_is_told(tmp_path: Path) -> None:
    config = factories.config("2b")
    folder = as_old_shards(google_state(weights("2b"), config), tmp_path / "google")
    part = torch.load(folder / "part0.bin")
    torch.save({"embedder.weight": part["embedder.weight"] + 1}, folder / "part2.bin")
    with pytest.raises(CheckpointError, match=r"embedder\.weight is in part0\.bin and in part2"):
        convert(folder, tmp_path / "hub", config=config)


def test_one_of_several_files_must_be_chosen(google: Any, tmp_path: Path) -> None:
    source, state, config = google
    torch.save({"model_state_dict": state}, source.parent / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"it holds other\.ckpt, weights\.ckpt: give the pat"):
        convert(source.parent, tmp_path / "hub", config=config)
    convert(source, tmp_path / "hub", config=config)


class Touch:
    """Creates a file when it is unpickled by who does not look."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_does_not_run(google: Any, tmp_path: Path) -> None:
    source, state, config = google
    torch.save({"model_state_dict": state, "more": Touch(tmp_path / "ran")}, source)
    with pytest.raises(CheckpointError, match="refused: it is damaged, holds more than tensors"):
        convert(source, tmp_path / "hub", config=config)
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_only_claims_its_size_is_refused(google: Any, tmp_path: Path) -> None:
    source, state, config = google
    state["embedder.weight"] = torch.zeros(1, dtype=torch.bfloat16).expand(97, 72)
    torch.save({"model_state_dict": state}, source)
    with pytest.raises(CheckpointError, match=r"embedder\.weight of shape \[97, 72\] is not store"):
        convert(source, tmp_path / "hub", config=config)


# ---- writing ------------------------------------------------------------------------------------


def assert_equal_states(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_again_is_bit_equal(shape: str, tmp_path: Path) -> None:
    config = factories.config(shape)
    state = google_state(weights(shape), config)
    convert(as_folder(state, tmp_path / "google"), tmp_path / "hub", config=config)
    convert(tmp_path / "hub", tmp_path / "one", to="original")
    for mmap in (True, False):
        file = torch.load(tmp_path / "one" / "model.ckpt", weights_only=True, mmap=mmap)
        assert_equal_states(file["model_state_dict"], state)

    convert(tmp_path / "hub", tmp_path / "alone.ckpt", to="original")
    file = torch.load(tmp_path / "alone.ckpt", weights_only=True)
    assert_equal_states(file["model_state_dict"], state)

    report = convert(tmp_path / "hub", tmp_path / "shards", to="original", max_shard_size="100KB")
    weight_map = json.loads((tmp_path / "shards" / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    shards = {
        name: torch.load(tmp_path / "shards" / name, weights_only=True)
        for name in set(weight_map.values())
    }
    found = {key: shards[name][key] for key, name in weight_map.items()}
    assert sum(map(len, shards.values())) == len(found)
    del state["freqs_cis"]
    assert_equal_states({key: found[key] for key in state}, state)
    assert {file.name for file in report.files} == {
        *shards,
        INDEX,
        "config.json",
        "generation_config.json",
    }

    hub = (tmp_path / "hub" / "model.safetensors").read_bytes()
    for source in ("one", "alone.ckpt", "shards"):
        convert(tmp_path / source, tmp_path / f"{source} read", config=config)
        assert (tmp_path / f"{source} read" / "model.safetensors").read_bytes() == hub


def test_the_written_file_is_a_sound_archive_with_aligned_tensors(
    google: Any, tmp_path: Path
) -> None:
    source, _, config = google
    convert(source, tmp_path / "hub", config=config)
    convert(tmp_path / "hub", tmp_path / "x.ckpt", to="original")
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        assert archive.testzip() is None
    state = torch.load(tmp_path / "x.ckpt", weights_only=True, mmap=True)["model_state_dict"]
    assert {value.data_ptr() % 64 for value in state.values()} == {0}


@pytest.mark.parametrize(
    ("size", "dtype", "one"),
    [("2b", "bfloat16", 1), ("9b", "float32", 1), ("27b", "bfloat16", 0), ("27b", "float16", 0)],
)
def test_the_27b_is_written_in_shards(size: str, dtype: str, one: int) -> None:
    config = getattr(Gemma2Config, f"gemma2_{size}")()
    assert original.is_one_file(config, getattr(torch, dtype), None) == bool(one)


def test_a_head_of_its_own_has_no_place_in_the_original(tmp_path: Path) -> None:
    model = factories.lively()
    model.save_pretrained(tmp_path / "hub")
    with pytest.raises(ValueError, match=r"lm_head\.weight is a matrix of its own"):
        convert(tmp_path / "hub", tmp_path / "google", to="original")
    assert not (tmp_path / "google").exists()


def test_shards_do_not_go_into_one_file(google: Any, tmp_path: Path) -> None:
    source, _, config = google
    with pytest.raises(ValueError, match=r"are written in shards: give a folder"):
        convert(source, tmp_path / "x.ckpt", to="original", config=config, max_shard_size="10KB")

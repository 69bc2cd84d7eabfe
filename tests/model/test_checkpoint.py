"""Checkpoints: loaded exactly or refused in full, saved so that nobody reads a half."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gemma2 import saving
from gemma2.checkpoint import (
    CheckpointError,
    find_weights,
    from_pretrained,
    load_state_dict_into,
    read_config,
    save_pretrained,
)
from gemma2.config import Gemma2Config
from gemma2.heads import (
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
)
from gemma2.model import Gemma2Model

CLASSES: list[type[nn.Module]] = [
    Gemma2Model,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
]
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def tiny_config(**changes: Any) -> Gemma2Config:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "max_position_embeddings": 64,
    }
    return Gemma2Config(**{**sizes, **changes})


def tiny(cls: Any = Gemma2ForCausalLM, dtype: Any = torch.float32, **changes: Any) -> Any:
    """A model whose weights are all different from 0, norms too."""
    torch.manual_seed(0)
    model = cls(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
    return model.to(dtype)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = tensors_of(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny causal model in float32."""
    path = tmp_path / "model"
    save_pretrained(tiny(), path)
    return path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder's single file."""
    tensors = load_file(folder / ONE)
    change(tensors)
    save_file(tensors, folder / ONE, metadata={"format": "pt"})


# ---- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "20KB", 1])
@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_saved_is_loaded(cls: Any, shard: int | str, dtype: Any, tmp_path: Path) -> None:
    model = tiny(cls, dtype, num_labels=3)
    save_pretrained(model, tmp_path, max_shard_size=shard)
    loaded = cls.from_pretrained(tmp_path)
    assert_same(loaded, tensors_of(model))
    assert not loaded.training
    assert loaded.config.architectures == [cls.__name__]
    assert loaded.config.dtype == str(dtype).removeprefix("torch.")


def test_the_model_s_own_method_saves_too(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert_same(Gemma2ForCausalLM.from_pretrained(tmp_path), tensors_of(model))


def test_the_tied_head_is_not_written_and_stays_one_parameter(folder: Path) -> None:
    assert "lm_head.weight" not in load_file(folder / ONE)
    model = Gemma2ForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_untied_head_is_written(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=False)
    save_pretrained(model, tmp_path)
    loaded = Gemma2ForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert_same(loaded, tensors_of(model))


def test_a_written_copy_of_the_tied_head_is_accepted(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    model = Gemma2ForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_embedding_may_be_written_as_the_head_only(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop(EMBEDDING)}))
    assert_same(Gemma2ForCausalLM.from_pretrained(folder), tensors_of(tiny()))


def test_another_head_than_the_embedding_is_refused_when_tied(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}))
    text = "lm_head.weight differs from model.embed_tokens.weight, while config.json ties them"
    with pytest.raises(CheckpointError, match=text):
        Gemma2ForCausalLM.from_pretrained(folder)
    untied = Gemma2ForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    assert torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight + 1)


def test_old_files_with_rotary_constants_load(folder: Path) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda t: t.update({key: torch.ones(8)}))
    assert_same(Gemma2ForCausalLM.from_pretrained(folder), tensors_of(tiny()))


def test_generation_settings_travel_with_the_causal_model(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": [1, 7]}')
    model = Gemma2ForCausalLM.from_pretrained(folder)
    assert model.generation_config.temperature == 0.5
    assert model.generation_config.bos_token_id == 2  # named in config.json only
    save_pretrained(model, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (written["temperature"], written["eos_token_id"]) == (0.5, [1, 7])


# ---- dtype, device, override --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_the_dtype_can_be_chosen(folder: Path, dtype: Any) -> None:
    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype)
    assert_same(model, tensors_of(tiny(dtype=torch.bfloat16)))
    assert model.config.dtype == "bfloat16"


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_without_a_choice_the_file_decides_and_not_its_config(folder: Path, dtype: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config["torch_dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config))
    assert Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype).dtype == torch.float32


def test_a_mixed_file_becomes_one_dtype(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({NORM: t[NORM].to(torch.bfloat16)}))
    model = Gemma2ForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["int8", torch.int64, "fp8", 3])
def test_another_dtype_is_refused(folder: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype is .*: it must be float32, bfloat16, float16"):
        Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("beside", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("stored", "dtype", "value"),
    [
        (torch.float32, "float16", 1e6),
        (torch.bfloat16, "float16", -70144.0),
        (torch.float32, "bfloat16", 3.4e38),
        (torch.float64, "float32", -1e300),
    ],
)
def test_a_value_beyond_the_dtype_is_told_and_not_made_infinite(
    folder: Path, stored: torch.dtype, dtype: str, value: float, beside: float
) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights[NORM] = torch.zeros_like(weights[NORM], dtype=stored)
        weights[NORM][3], weights[NORM][5] = value, beside

    rewrite(folder, change)
    said = f"{NORM} reaches {abs(value):.6g}, beyond {dtype}, which ends at "
    with pytest.raises(CheckpointError, match=re.escape(said)):
        Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype)


def test_infinities_and_nan_of_a_file_are_loaded_as_they_are(folder: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights[NORM][3], weights[NORM][5] = float("-inf"), float("nan")

    rewrite(folder, change)
    norm = Gemma2ForCausalLM.from_pretrained(folder, dtype="float16").model.norm.weight
    assert norm[3] == float("-inf")
    assert norm.isnan().tolist() == [i == 5 for i in range(len(norm))]


def test_settings_can_be_replaced_at_loading(folder: Path) -> None:
    assert Gemma2ForCausalLM.from_pretrained(folder, sliding_window=4).config.layer_window(0) == 4
    config = tiny_config(rope_theta=5e4)
    assert Gemma2ForCausalLM.from_pretrained(folder, config=config).config.rope_theta == 5e4
    with pytest.raises(ValueError, match="torch_dtype: no such argument"):
        Gemma2ForCausalLM.from_pretrained(folder, torch_dtype="bfloat16")


def test_a_loaded_model_does_not_live_in_the_file(folder: Path) -> None:
    """Another library that saves in place must not change, or crash, a model that runs."""
    model = Gemma2ForCausalLM.from_pretrained(folder)
    with open(folder / ONE, "r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\xff" * 4096)
        file.truncate(100)
    assert_same(model, tensors_of(tiny()))


def test_an_existing_model_is_filled_in_place(folder: Path) -> None:
    model = Gemma2ForCausalLM(tiny_config()).to(torch.bfloat16)
    parameter = model.model.norm.weight
    load_state_dict_into(model, folder)
    assert model.model.norm.weight is parameter
    assert_same(model, tensors_of(tiny(dtype=torch.bfloat16)))


def test_a_file_that_does_not_fit_leaves_an_existing_model_as_it_was(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop(NORM))
    model = tiny(Gemma2ForCausalLM)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(7)
    before = tensors_of(model)
    with pytest.raises(CheckpointError):
        load_state_dict_into(model, folder)
    assert_same(model, before)


def test_a_bar_is_shown_when_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Gemma2ForCausalLM.from_pretrained(folder)
    assert capsys.readouterr().err == ""
    Gemma2ForCausalLM.from_pretrained(folder, progress=True)
    assert "Loading model" in capsys.readouterr().err


# ---- body and heads -----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES[1:])
def test_a_head_s_file_gives_the_bare_body(cls: Any, tmp_path: Path) -> None:
    model = tiny(cls)
    save_pretrained(model, tmp_path)
    assert_same(Gemma2Model.from_pretrained(tmp_path), tensors_of(model.model))


def test_a_bare_body_gives_a_causal_model(tmp_path: Path) -> None:
    body = tiny(Gemma2Model)
    save_pretrained(body, tmp_path)
    assert "norm.weight" in load_file(tmp_path / ONE)
    loaded = Gemma2ForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded.model, tensors_of(body))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("cls", CLASSES[2:])
@pytest.mark.parametrize("source", CLASSES[:2])
def test_a_new_head_must_be_asked_for(source: Any, cls: Any, tmp_path: Path) -> None:
    body = tiny(source)
    save_pretrained(body, tmp_path)
    with pytest.raises(CheckpointError, match="pass new_head=True") as caught:
        cls.from_pretrained(tmp_path)
    assert caught.value.missing[-1] == "score.weight"
    with pytest.warns(UserWarning, match=r"score\.weight.*: newly initialised, train before use"):
        model = cls.from_pretrained(tmp_path, new_head=True, num_labels=40)
    assert_same(model.model, tensors_of(body.base_model))
    assert model.score.weight.shape == (40, 32)
    assert 0.015 < model.score.weight.std().item() < 0.025
    if model.score.bias is not None:
        assert not model.score.bias.any()


def test_a_head_with_other_labels_is_replaced_when_asked(tmp_path: Path) -> None:
    save_pretrained(tiny(Gemma2ForSequenceClassification, num_labels=3), tmp_path)
    text = r"score\.weight: \[3, 32\] in the file, \[5, 32\] in the model\n  pass new_head=True"
    with pytest.raises(CheckpointError, match=text):
        Gemma2ForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    with pytest.warns(UserWarning, match="newly initialised"):
        model = Gemma2ForSequenceClassification.from_pretrained(
            tmp_path, num_labels=5, new_head=True
        )
    assert model.score.weight.shape == (5, 32)


def test_users_a_classifier_s_head_is_loaded(tmp_path: Path) -> None:
    """vllm#11802: sequence-classification weights were not loaded."""
    model = tiny(Gemma2ForSequenceClassification, num_labels=3)
    save_pretrained(model, tmp_path)
    loaded = Gemma2ForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.score.weight, model.score.weight)


def test_a_classifier_is_no_causal_model(tmp_path: Path) -> None:
    save_pretrained(tiny(Gemma2ForSequenceClassification), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Gemma2ForCausalLM.from_pretrained(tmp_path)
    assert caught.value.unexpected == ["score.weight"]


def test_a_token_head_is_no_sequence_head(tmp_path: Path) -> None:
    save_pretrained(tiny(Gemma2ForTokenClassification), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Gemma2ForSequenceClassification.from_pretrained(tmp_path)
    assert caught.value.unexpected == ["score.bias"]


# ---- what does not fit --------------------------------------------------------------------------


def test_all_that_does_not_fit_comes_in_one_error(folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[NORM]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["surprise"] = torch.zeros(1)
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 31)
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(32, 32, dtype=torch.int8)

    rewrite(folder, damage)
    with pytest.raises(CheckpointError) as caught:
        Gemma2ForCausalLM.from_pretrained(folder)
    assert str(caught.value) == (
        f"{folder / ONE} does not fit Gemma2ForCausalLM:\n"
        "  missing in the file (2):\n"
        "    model.layers.1.mlp.up_proj.weight\n"
        "    model.norm.weight\n"
        "  not part of the model (2):\n"
        "    model.layers.2.mlp.up_proj.weight\n"
        "    surprise\n"
        "  of the wrong shape (1):\n"
        "    model.layers.0.self_attn.q_proj.weight: [64, 31] in the file, [64, 32] in the model\n"
        "  of the wrong dtype (1):\n"
        "    model.layers.0.self_attn.k_proj.weight: I8, but a weight is float32, bfloat16, "
        "float16 or float64"
    )
    error = caught.value
    assert error.missing == ["model.layers.1.mlp.up_proj.weight", NORM]
    assert error.unexpected == ["model.layers.2.mlp.up_proj.weight", "surprise"]
    assert error.mismatched == ["model.layers.0.self_attn.q_proj.weight"]
    assert error.wrong_dtype == ["model.layers.0.self_attn.k_proj.weight"]


def test_names_of_a_hostile_file_cannot_forge_the_error(folder: Path) -> None:
    rewrite(
        folder,
        lambda t: t.update({"a\n  all is well\x1b[2J": torch.zeros(1), "b" * 999: t[NORM].clone()}),
    )
    with pytest.raises(CheckpointError) as caught:
        Gemma2ForCausalLM.from_pretrained(folder)
    assert r"    'a\n  all is well\x1b[2J'" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_sizes_are_compared_before_memory_is_taken(folder: Path) -> None:
    """A config that claims a huge model over a small file must not cost the huge model's memory."""
    with pytest.raises(CheckpointError, match=r"\[97, 32\] in the file, \[16000000, 32\] in the m"):
        Gemma2ForCausalLM.from_pretrained(folder, vocab_size=16_000_000, num_hidden_layers=50)


def test_a_model_s_constants_are_not_wanted_from_a_file(folder: Path) -> None:
    class WithConstant(Gemma2ForCausalLM):
        def __init__(self, config: Gemma2Config) -> None:
            super().__init__(config)
            self.register_buffer("table", torch.ones(2, device="cpu"), persistent=False)

    assert_same(from_pretrained(WithConstant, folder), tensors_of(tiny()))


def test_a_constant_without_memory_is_told(folder: Path) -> None:
    class WithConstant(Gemma2ForCausalLM):
        def __init__(self, config: Gemma2Config) -> None:
            super().__init__(config)
            self.register_buffer("table", torch.ones(2), persistent=False)

    with pytest.raises(RuntimeError, match="table is still on the meta device"):
        from_pretrained(WithConstant, folder)


# ---- malformed files ----------------------------------------------------------------------------


def header(entries: Any, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LYING: dict[str, bytes] = {
    "empty": b"",
    "cut in the length": b"\x10\x00\x00",
    "cut in the header": header({NORM: entry("F32", [2], 0, 8)})[:30],
    "cut in the data": header({NORM: entry("F32", [2], 0, 8)}, b"\0" * 7),
    "more data than described": header({NORM: entry("F32", [2], 0, 8)}, b"\0" * 9),
    "header as long as the universe": struct.pack("<Q", 2**63) + b"{}",
    "header longer than the file": struct.pack("<Q", 4096) + b"{}",
    "no JSON": header(b"{]"),
    "no UTF-8": header(b'{"\xff\xfe": 1}'),
    "shape larger than its bytes": header({NORM: entry("F32", [4], 0, 8)}, b"\0" * 8),
    "shape that overflows": header({NORM: entry("F32", [2**40, 2**40], 0, 8)}, b"\0" * 8),
    "negative shape": header({NORM: entry("F32", [-2], 0, 8)}, b"\0" * 8),
    "unknown dtype": header({NORM: entry("F99", [2], 0, 8)}, b"\0" * 8),
    "offsets backwards": header({NORM: entry("F32", [2], 8, 0)}, b"\0" * 8),
    "offsets beyond the file": header({NORM: entry("F32", [2], 800, 808)}, b"\0" * 8),
    "overlapping tensors": header(
        {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, b"\0" * 8
    ),
    "a gap between tensors": header(
        {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, b"\0" * 12
    ),
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("content", LYING.values(), ids=LYING.keys())
def test_a_damaged_or_lying_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / ONE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors f"):
        Gemma2ForCausalLM.from_pretrained(folder)


def test_a_cut_shard_is_named(tmp_path: Path) -> None:
    save_pretrained(tiny(), tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name}: not a readable safetensors file"):
        Gemma2ForCausalLM.from_pretrained(tmp_path)


def test_a_file_without_tensors_lacks_them_all(folder: Path) -> None:
    (folder / ONE).write_bytes(header({}))
    with pytest.raises(CheckpointError) as caught:
        Gemma2ForCausalLM.from_pretrained(folder)
    assert set(caught.value.missing) == set(tensors_of(tiny()))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not readable as JSON"),
        ("[]", "holds []: it must hold a JSON object"),
        ("{}", "weight_map must be an object of tensor names and files"),
        ('{"weight_map": []}', "weight_map must be an object of tensor names and files"),
        ('{"weight_map": {}}', "weight_map must be an object of tensor names and files"),
        ('{"weight_map": {"a": 1}}', "weight_map names the file '1': it must be the name of a"),
        (
            '{"weight_map": {"a": "gone.safetensors", "b": "lost.safetensors"}}',
            "it names files that are missing: gone.safetensors, lost.safetensors",
        ),
        (
            '{"weight_map": {"a": "../outside.safetensors"}}',
            "weight_map names the file '../outside.safetensors': it must be the name of a",
        ),
        (
            '{"weight_map": {"a": "/etc/passwd"}}',
            "weight_map names the file '/etc/passwd': it must be the name of a .safetensors or",
        ),
        (
            '{"weight_map": {"a": "sub/x.safetensors"}}',
            "weight_map names the file 'sub/x.safetensors': it must be the name of a",
        ),
        (
            '{"weight_map": {"a": "..\\\\x.safetensors"}}',
            "it must be the name of a .safetensors or .bin file in the same folder",
        ),
        (
            '{"weight_map": {"a": "x\\u0000.safetensors"}}',
            "it must be the name of a .safetensors or .bin file in the same folder",
        ),
        (
            '{"weight_map": {"a": "\\ud800.safetensors"}}',
            "not readable as JSON: 'utf-8' codec can't encode character",
        ),
        (
            '{"weight_map": {"a": "' + "x" * 5000 + '.safetensors"}}',
            "it must be the name of a .safetensors or .bin file in the same folder",
        ),
        (
            '{"weight_map": {"a": "circle.safetensors"}}',
            "it names files that are missing: circle.safetensors",
        ),
        ('{"weight_map": {"a": ".."}}', "weight_map names the file '..': it must be the name of a"),
        (
            '{"weight_map": {"a": "config.json"}}',
            "weight_map names the file 'config.json': it must be the name of a .safetensors or .b",
        ),
        (
            '{"weight_map": {"a": "link.safetensors"}}',
            "weight_map names the file 'link.safetensors', a link to ",
        ),
    ],
)
def test_a_bad_index_is_refused(folder: Path, content: str, text: str) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / ONE).rename(outside)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        Gemma2ForCausalLM.from_pretrained(folder)
    assert str(caught.value).startswith(str(folder / INDEX))
    assert text in str(caught.value)


def test_an_index_that_disagrees_with_its_files_is_told(tmp_path: Path) -> None:
    save_pretrained(tiny(), tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / INDEX).read_text())
    first, last = index["weight_map"][EMBEDDING], index["weight_map"].pop(NORM)
    index["weight_map"]["ghost"] = first
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        Gemma2ForCausalLM.from_pretrained(tmp_path)
    assert f"{INDEX} puts ghost into {first}, which does not hold it" in str(caught.value)
    assert f"{last} holds {NORM}, which {INDEX} does not name" in str(caught.value)


def test_the_hub_s_cache_of_links_is_read(tmp_path: Path) -> None:
    """snapshots/<revision>/ holds links into blobs/ of the same repository."""
    repository = tmp_path / "models--google--gemma-2-2b"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    save_pretrained(tiny(), snapshot, max_shard_size="20KB")
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert_same(Gemma2ForCausalLM.from_pretrained(snapshot), tensors_of(tiny()))


def test_a_folder_without_weights_says_what_it_holds(folder: Path) -> None:
    (folder / ONE).unlink()
    text = r"no model\.safetensors, model\.safetensors\.index\.json or pytorch_model\.bin here"
    with pytest.raises(FileNotFoundError, match=text + "; it holds config.json"):
        Gemma2ForCausalLM.from_pretrained(folder)


def test_a_name_of_the_hub_is_no_folder() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"google/gemma-2-2b: does not exist.*is downloaded"
    ):
        Gemma2ForCausalLM.from_pretrained("google/gemma-2-2b")


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is a file: give the folder"):
        read_config(folder / ONE)


# ---- pytorch_model.bin --------------------------------------------------------------------------


class Touch:
    """What runs when a hostile pickle is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def to_bin(folder: Path, **options: Any) -> Path:
    """Turn a folder's safetensors into pytorch_model.bin."""
    torch.save(load_file(folder / ONE), folder / "pytorch_model.bin", **options)
    (folder / ONE).unlink()
    return folder / "pytorch_model.bin"


def test_pytorch_model_bin_is_read_where_nothing_else_is(folder: Path) -> None:
    to_bin(folder)
    assert_same(Gemma2ForCausalLM.from_pretrained(folder), tensors_of(tiny()))


def test_pytorch_model_bin_in_shards_is_read(folder: Path) -> None:
    tensors = load_file(folder / ONE)
    (folder / ONE).unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:7], names[7:]), start=1):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(Gemma2ForCausalLM.from_pretrained(folder), tensors_of(tiny()))


def test_safetensors_come_before_a_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert find_weights(folder).entry == folder / ONE


def test_code_in_a_pickle_does_not_run(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "owned"
    torch.save({"a": torch.zeros(1), "b": Touch(target)}, folder / "pytorch_model.bin")
    (folder / ONE).unlink()
    with pytest.raises(CheckpointError, match="refused: it is damaged, holds more than tensors"):
        Gemma2ForCausalLM.from_pretrained(folder)
    assert not target.exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([torch.zeros(1)], "it must hold a dict of names and tensors"),
        ({"model_state_dict": {"a": torch.zeros(1)}}, "it must hold a dict of names and tensors"),
        (
            {NORM: torch.zeros(1).expand(2**40)},
            r"model\.norm\.weight of shape .* is not stored in f",
        ),
        (
            {NORM: torch.zeros(3, 3).to_sparse()},
            r"refused: .* \(the global 'torch\._utils _rebuild_sparse_tensor'\)",
        ),
    ],
    ids=["list", "nested", "expanded", "sparse"],
)
def test_a_pickle_of_something_else_is_refused(folder: Path, value: Any, text: str) -> None:
    (folder / ONE).unlink()
    torch.save(value, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=text):
        Gemma2ForCausalLM.from_pretrained(folder)


def test_the_format_before_torch_1_6_is_refused(folder: Path) -> None:
    to_bin(folder, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"refused: it is damaged, .* older than torch 1\.6"):
        Gemma2ForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 10, 1000])
def test_a_cut_pickle_is_refused(folder: Path, kept: int) -> None:
    path = to_bin(folder)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="refused: it is damaged, holds more than tensors"):
        Gemma2ForCausalLM.from_pretrained(folder)


def test_integers_in_a_pickle_are_no_weights(folder: Path) -> None:
    tensors = load_file(folder / ONE)
    (folder / ONE).unlink()
    tensors[NORM] = tensors[NORM].to(torch.int64)
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: int64, but a weight is float"):
        Gemma2ForCausalLM.from_pretrained(folder)


# ---- saving -------------------------------------------------------------------------------------


def test_shards_keep_to_their_size_and_the_index_names_all(tmp_path: Path) -> None:
    model = tiny()
    save_pretrained(model, tmp_path, max_shard_size=16_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors_of(model))
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == 4 * sum(t.numel() for t in model.parameters())
    for shard in shards:
        with safe_open(tmp_path / shard, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            tensors = [handle.get_tensor(name) for name in handle.keys()]  # noqa: SIM118
        assert sum(t.numel() * 4 for t in tensors) <= 16_000 or len(tensors) == 1


def test_tensors_are_aligned_in_the_file(folder: Path) -> None:
    content = (folder / ONE).read_bytes()
    assert (8 + struct.unpack("<Q", content[:8])[0]) % 64 == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("500mb", 5 * 10**8), ("7", 7), (9, 9)],
)
def test_sizes_are_read_as_people_write_them(text: int | str, size: int) -> None:
    assert saving.parse_size(text) == size


@pytest.mark.parametrize("size", ["", "5 apples", "-1", 0, -5, "0GB", True, None, "1e9"])
def test_a_size_that_is_none_is_refused(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_shard_size is .*: it must be"):
        save_pretrained(tiny(), tmp_path / "x", max_shard_size=size)
    assert not (tmp_path / "x").exists()


def test_saving_again_replaces_shards_and_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("mine")
    save_pretrained(tiny(), tmp_path, max_shard_size="10KB")
    save_pretrained(tiny(), tmp_path, max_shard_size="20KB")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "tokenizer.json",
        "config.json",
        "generation_config.json",
        INDEX,
        *json.loads((tmp_path / INDEX).read_text())["weight_map"].values(),
    }
    save_pretrained(tiny(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "config.json", "generation_config.json", ONE}
    assert_same(Gemma2ForCausalLM.from_pretrained(tmp_path), tensors_of(tiny()))


def test_a_loaded_model_can_be_saved_over_its_own_files(folder: Path) -> None:
    model = Gemma2ForCausalLM.from_pretrained(folder)
    save_pretrained(model, folder)
    assert_same(Gemma2ForCausalLM.from_pretrained(folder), tensors_of(tiny()))


class StopError(Exception):
    """The moment of an interruption."""


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("step", range(1, 40))
def test_an_interrupted_save_leaves_the_old_or_says_so(
    step: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at every call that changes the disk: the folder is the old, the new, or refused."""
    old, new = tensors_of(tiny()), tiny()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    before = state_of(folder)
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                raise StopError
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        patch.setattr(saving, "_write_text", counted(saving._write_text))
        try:
            save_pretrained(new, folder, max_shard_size="20KB")
            stopped = False
        except StopError:
            stopped = True
    if not stopped:
        assert calls < step
        assert_same(Gemma2ForCausalLM.from_pretrained(folder), tensors_of(new))
        return
    try:
        loaded = Gemma2ForCausalLM.from_pretrained(folder)
    except CheckpointError as error:
        assert "a save was interrupted while it replaced the files" in str(error)  # noqa: PT017
    else:
        if torch.equal(loaded.model.norm.weight, old[NORM]):
            assert_same(loaded, old)
            assert state_of(folder) == before
        else:
            assert_same(loaded, tensors_of(new))
    save_pretrained(new, folder)
    assert_same(Gemma2ForCausalLM.from_pretrained(folder), tensors_of(new))
    assert not list(folder.glob(".*"))


def test_a_failed_first_save_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(tiny(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_without_memory_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Gemma2ForCausalLM(tiny_config())
    with pytest.raises(ValueError, match="is on the meta device: it has no values yet"):
        save_pretrained(model, tmp_path)


def test_a_head_that_left_its_embedding_is_not_dropped_silently(tmp_path: Path) -> None:
    model = tiny()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding while"):
        save_pretrained(model, tmp_path)
    model.config.tie_word_embeddings = False
    save_pretrained(model, tmp_path)
    assert_same(Gemma2ForCausalLM.from_pretrained(tmp_path), tensors_of(model))


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(NotADirectoryError, match="x is a file: give a folder"):
        save_pretrained(tiny(), tmp_path / "x")


def test_a_module_without_our_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model\.config is None: it must be a Gemma2Config"):
        save_pretrained(nn.Linear(2, 2), tmp_path)


# ---- transformers -------------------------------------------------------------------------------

# Run by the interpreter that finds transformers, in either major version: saves random models with
# their tensors beside them, and loads what we saved. What goes wrong is written to a file.
THEIRS = """
import sys, traceback
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file

def save(cls, folder, tensors):
    model = cls(transformers.Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=8,
        max_position_embeddings=64, num_labels=3)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, max_shard_size="20KB")
    save_file({name: value.detach().clone() for name, value in model.named_parameters()}, tensors)

def load(cls, folder, tensors):
    model, info = cls.from_pretrained(folder, output_loading_info=True, dtype="auto")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    found, expected = dict(model.named_parameters()), load_file(tensors)
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    for name, value in expected.items():
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], value), name
    assert model.config.num_labels == 3
    assert model.config.query_pre_attn_scalar == 144

root = Path(sys.argv[1])
for action in (save, load):
    place = root / action.__name__
    place.mkdir(exist_ok=True)
    try:
        for name in sys.argv[2:]:
            action(getattr(transformers, name), place / name, place / f"{name}.tensors")
    except Exception:
        (place / "error").write_text(traceback.format_exc())
print("transformers", transformers.__version__)
"""


@pytest.fixture(scope="module", params=[4, 5])
def exchange(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with save/, what transformers saved, and load/, what we saved and it has loaded."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    if request.param == 5:
        place = os.environ.get("GEMMA2_TEST_TRANSFORMERS5")
        if not place:
            pytest.skip("GEMMA2_TEST_TRANSFORMERS5 names no folder with transformers 5")
        old = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (place, old)))
    else:
        pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("exchange")
    (root / "load").mkdir()
    for cls in CLASSES:
        model = tiny(
            cls,
            torch.bfloat16,
            num_labels=3,
            query_pre_attn_scalar=144,
            # as the hub's files have them
            extra={"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"},
        )
        save_pretrained(model, root / "load" / cls.__name__, max_shard_size="20KB")
        save_file(tensors_of(model), root / "load" / f"{cls.__name__}.tensors")
    done = subprocess.run(
        [sys.executable, "-c", THEIRS, str(root), *(cls.__name__ for cls in CLASSES)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"transformers {request.param}." in done.stdout, done.stderr[-3000:]
    return root


def test_transformers_loads_what_we_save(exchange: Path) -> None:
    error = exchange / "load" / "error"
    assert not error.exists(), error.read_text()


def test_we_load_what_transformers_saves(exchange: Path) -> None:
    error = exchange / "save" / "error"
    assert not error.exists(), error.read_text()
    for cls in CLASSES:
        loaded: Any = from_pretrained(cls, exchange / "save" / cls.__name__)
        assert_same(loaded, load_file(exchange / "save" / f"{cls.__name__}.tensors"))
        assert loaded.config.num_labels == 3
        assert loaded.config.layer_types == ["sliding_attention", "full_attention"]


# ---- memory -------------------------------------------------------------------------------------

PEAK = """
import sys, threading, time
from pathlib import Path
import torch
from gemma2.checkpoint import from_pretrained, save_pretrained
from gemma2.config import Gemma2Config
from gemma2.heads import Gemma2ForCausalLM

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024

def peak(function):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    before = status("VmRSS")
    result = function()
    return result, status("VmHWM") - before

sizes = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=4,
             head_dim=64)
# what torch imports at the first use of the meta device is not what is measured
warm = Gemma2ForCausalLM(Gemma2Config(vocab_size=8, num_hidden_layers=1, **sizes))
save_pretrained(warm, sys.argv[1] + "/warm")
from_pretrained(Gemma2ForCausalLM, sys.argv[1] + "/warm", dtype="bfloat16")
config = Gemma2Config(vocab_size=32000, num_hidden_layers=16, **sizes)
torch.manual_seed(0)
model = Gemma2ForCausalLM(config).to(torch.bfloat16)
size = sum(p.numel() * 2 for p in model.parameters())
_, saving = peak(lambda: save_pretrained(model, sys.argv[1]))
del model
loaded, loading = peak(lambda: from_pretrained(Gemma2ForCausalLM, sys.argv[1]))
del loaded
loaded, converting = peak(lambda: from_pretrained(Gemma2ForCausalLM, sys.argv[1], dtype="float32"))
print(size, config.vocab_size * config.hidden_size * 2, saving, loading, converting)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc"
)
def test_the_peak_is_the_model_and_one_tensor(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    size, tensor, saving_peak, loading, converting = map(int, done.stdout.split())
    slack = 16 * 2**20
    assert size > 2 * tensor > 2 * slack
    assert saving_peak < tensor + slack
    assert loading < size + tensor + slack
    assert converting < 2 * size + 2 * tensor + slack

"""The configuration: what is read, what is written, what is refused and with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma2.config import Gemma2Config

TINY: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 64,
}


def read(**changes: Any) -> Gemma2Config:
    return Gemma2Config.from_dict({**TINY, **changes})


# ---- presets and derived values -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "hidden", "inner", "layers", "heads", "kv_heads", "head_dim", "scalar"),
    [
        ("gemma2_2b", 2304, 9216, 26, 8, 4, 256, 256),
        ("gemma2_9b", 3584, 14336, 42, 16, 8, 256, 256),
        ("gemma2_27b", 4608, 36864, 46, 32, 16, 128, 144),
    ],
)
def test_presets_are_the_published_models(
    preset: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scalar: int,
) -> None:
    config = getattr(Gemma2Config, preset)()
    assert (config.hidden_size, config.intermediate_size) == (hidden, inner)
    assert (config.num_hidden_layers, len(config.layer_types)) == (layers, layers)
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, kv_heads)
    assert (config.head_dim, config.query_pre_attn_scalar) == (head_dim, scalar)
    assert config.query_scale == pytest.approx(scalar**-0.5)
    assert (config.vocab_size, config.max_position_embeddings) == (256000, 8192)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10000.0)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, 2)
    assert config.tie_word_embeddings


def test_a_preset_takes_single_changes() -> None:
    assert Gemma2Config.gemma2_9b(num_hidden_layers=2).layer_types == [
        "sliding_attention",
        "full_attention",
    ]


def test_the_hub_s_file_of_the_2b_is_the_preset() -> None:
    published = """{
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.42.4",
        "use_cache": true, "vocab_size": 256000
    }"""
    config = Gemma2Config.from_dict(json.loads(published))
    expected = Gemma2Config.gemma2_2b(
        dtype="float32", architectures=["Gemma2ForCausalLM"], extra=config.extra
    )
    assert config == expected
    assert set(config.extra) == {"cache_implementation", "hidden_act", "transformers_version"}


def test_layer_zero_slides_and_layers_alternate() -> None:
    config = read()
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert [config.layer_window(i) for i in range(3)] == [8, 0, 8]


def test_layer_types_of_the_file_win_over_the_pattern() -> None:
    config = read(layer_types=["full_attention"] * 3, sliding_window=None)
    assert [config.layer_window(i) for i in range(3)] == [0, 0, 0]


def test_the_query_scale_is_not_that_of_head_dim() -> None:
    assert read(query_pre_attn_scalar=144).query_scale == 1 / 12


def test_heads_times_head_dim_need_not_be_hidden_size() -> None:
    assert read(head_dim=24).head_dim == 24


# ---- spellings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e4},
        {"rope_theta": 50000, "rope_scaling": None},
        {"rope_theta": 5e4, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        {"rope_parameters": {"rope_theta": 5e4}, "rope_theta": 5e4},
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
                "full_attention": {"rope_type": "default", "rope_theta": 5e4},
            }
        },
        {"rope_theta": 5e4, "partial_rotary_factor": 1.0},
    ],
)
def test_both_spellings_of_rope_are_read(spelling: dict[str, Any]) -> None:
    config = read(**spelling)
    assert config.rope_theta == 5e4
    written = config.to_dict()
    assert written["rope_theta"] == 5e4
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e4}
    assert "rope_scaling" not in written


def test_rope_theta_is_10000_where_no_file_says_so() -> None:
    assert read().rope_theta == 10000.0
    assert read(rope_parameters=None, rope_theta=None).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"dtype": "auto"}, None),
        ({}, None),
    ],
)
def test_both_spellings_of_the_dtype_are_read(spelling: dict[str, Any], dtype: str | None) -> None:
    config = read(**spelling)
    assert config.dtype == dtype
    assert config.to_dict().get("dtype") == dtype
    assert config.to_dict().get("torch_dtype") == dtype


def test_the_activation_has_an_older_name() -> None:
    config = read(hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh")
    assert config.to_dict()["hidden_act"] == "gelu_pytorch_tanh"
    assert read(hidden_activation=None).hidden_activation == "gelu_pytorch_tanh"
    # where both are given transformers looks at hidden_activation only
    assert read(hidden_act="gelu", hidden_activation="gelu_pytorch_tanh").extra == {
        "hidden_act": "gelu"
    }


def test_the_window_has_an_older_name() -> None:
    old = {**TINY, "sliding_window_size": 6}
    del old["sliding_window"]
    assert Gemma2Config.from_dict(old).sliding_window == 6
    assert read(sliding_window_size=6).sliding_window == 8


def test_labels_come_with_names_or_with_a_number() -> None:
    named = read(id2label={"1": "b", "0": "a", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    assert (named.num_labels, named.id2label) == (3, {0: "a", 1: "b", 2: "c"})
    counted = read(num_labels=3)
    assert counted.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert counted.label2id["LABEL_2"] == 2
    assert read().num_labels == 2


def test_dropout_of_the_token_head_falls_back_as_in_transformers() -> None:
    assert read().classifier_dropout == 0.1
    assert read(classifier_dropout=None, hidden_dropout=0.3).classifier_dropout == 0.3
    assert read(classifier_dropout=0.2, hidden_dropout=0.3).classifier_dropout == 0.2


def test_instruction_tuned_models_end_at_several_tokens() -> None:
    assert read(eos_token_id=[1, 107]).eos_token_id == [1, 107]


# ---- overrides ----------------------------------------------------------------------------------


def test_overrides_win_over_the_file_in_any_spelling() -> None:
    values = {**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert Gemma2Config.from_dict(values, rope_theta=7.0).rope_theta == 7.0
    assert Gemma2Config.from_dict(values, sliding_window=4).sliding_window == 4


def test_another_number_of_labels_replaces_the_names() -> None:
    values = {**TINY, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    assert Gemma2Config.from_dict(values, num_labels=2).id2label == {0: "a", 1: "b"}
    assert Gemma2Config.from_dict(values, num_labels=3).id2label[2] == "LABEL_2"


def test_fewer_layers_keep_the_published_pattern() -> None:
    values = read().to_dict()
    assert Gemma2Config.from_dict(values, num_hidden_layers=2).layer_types == [
        "sliding_attention",
        "full_attention",
    ]


def test_a_misspelt_override_is_an_error_and_not_a_setting() -> None:
    with pytest.raises(TypeError, match="dtpye: no such argument, and no setting of Gemma 2"):
        Gemma2Config.from_dict(TINY, dtpye="bfloat16")


# ---- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(),
        Gemma2Config.gemma2_27b(),
        read(num_labels=5, problem_type="regression", dtype="bfloat16"),
        read(attn_logit_softcapping=None, final_logit_softcapping=None, rope_theta=1e6),
        read(hidden_dropout=0.3, classifier_dropout=0.1),
        read(query_pre_attn_scalar=12.5),
    ],
)
def test_what_is_written_is_read_back(config: Gemma2Config) -> None:
    assert Gemma2Config.from_dict(json.loads(config.to_json())) == config


def test_unknown_keys_are_kept_and_written_back() -> None:
    unknown = {"_name_or_path": "x", "cache_implementation": "hybrid", "nested": {"a": [1, None]}}
    config = read(**unknown)
    assert config.extra == unknown
    written = config.to_dict()
    assert {name: written[name] for name in unknown} == unknown


def test_a_copy_of_the_unknown_keys_is_kept() -> None:
    nested = {"a": [1]}
    config = read(nested=nested)
    nested["a"].append(2)
    config.to_dict()["nested"]["a"].append(3)
    assert config.extra == {"nested": {"a": [1]}}


def test_the_scalar_is_written_as_an_integer() -> None:
    # transformers 5 declares it so and refuses 256.0
    written = read(query_pre_attn_scalar=256.0).to_json()
    assert '"query_pre_attn_scalar": 256,' in written


def test_a_field_set_to_nonsense_is_not_written() -> None:
    config = read()
    config.head_dim = 5
    with pytest.raises(ValueError, match="head_dim is 5: it must be even"):
        config.to_dict()


def test_transformers_reads_what_we_write() -> None:
    transformers = pytest.importorskip("transformers")
    config = read(
        id2label={"0": "a", "1": "b", "2": "c"},
        problem_type="regression",
        dtype="bfloat16",
        rope_theta=5e4,
        query_pre_attn_scalar=144,
        eos_token_id=[1, 107],
    )
    theirs = transformers.Gemma2Config.from_dict(config.to_dict())
    for name in (*TINY, "layer_types", "problem_type", "query_pre_attn_scalar", "eos_token_id"):
        assert getattr(theirs, name) == getattr(config, name), name
    assert theirs.num_labels == 3
    assert theirs.id2label == config.id2label
    assert theirs.rope_theta == 5e4
    assert str(theirs.dtype).removeprefix("torch.") == "bfloat16"


def test_we_read_what_transformers_writes() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Gemma2Config(**{**TINY, "num_labels": 4}, cache_implementation="hybrid")
    for values in (theirs.to_dict(), theirs.to_diff_dict()):
        values.setdefault("num_hidden_layers", theirs.num_hidden_layers)
        config = Gemma2Config.from_dict(values)
        assert config.num_labels == 4
        assert config.layer_types == theirs.layer_types
        for name in TINY:
            assert getattr(config, name) == getattr(theirs, name), name


# ---- refusals -----------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gemma"}, "model_type is 'gemma': it must be \"gemma2\""),
    ({"hidden_size": 0}, "hidden_size is 0: it must be between 1 and 16777216"),
    ({"vocab_size": -1}, "vocab_size is -1: it must be between 1 and 16777216"),
    ({"hidden_size": "32"}, "hidden_size is '32': it must be a positive integer"),
    ({"intermediate_size": 48.0}, "intermediate_size is 48.0: it must be a positive integer"),
    ({"head_dim": None}, "head_dim is None: it must be a positive integer"),
    ({"num_attention_heads": True}, "num_attention_heads is True: it must be a positive integer"),
    ({"head_dim": 15}, "head_dim is 15: it must be even, since RoPE rotates its two halves"),
    (
        {"num_key_value_heads": 3},
        "num_attention_heads is 4, num_key_value_heads is 3: the number of query heads must be a "
        "multiple of the number of key/value heads",
    ),
    (
        {"num_hidden_layers": 10**9},
        "num_hidden_layers is 1000000000: it must be between 1 and 1000",
    ),
    ({"hidden_size": 10**12}, "hidden_size is 1000000000000: it must be between 1 and 16777216"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0: it must be a positive number"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6': it must be a positive number"),
    (
        {"query_pre_attn_scalar": -256},
        "query_pre_attn_scalar is -256: it must be a positive number",
    ),
    ({"rope_theta": float("inf")}, "rope_theta is inf: it must be a positive number"),
    ({"rope_theta": float("nan")}, "rope_theta is nan: it must be a positive number"),
    (
        {"attn_logit_softcapping": 0.0},
        "attn_logit_softcapping is 0.0: it must be a positive number, or null for no cap",
    ),
    (
        {"final_logit_softcapping": -30},
        "final_logit_softcapping is -30: it must be a positive number, or null for no cap",
    ),
    ({"sliding_window": 0}, "sliding_window is 0: it must be between 1 and 2147483647"),
    ({"sliding_window": 8.5}, "sliding_window is 8.5: it must be a positive integer"),
    (
        {"sliding_window": None},
        "sliding_window is None while layer_types has sliding layers: it must be a positive",
    ),
    (
        {"layer_types": ["full_attention"]},
        "layer_types has 1 entries and num_hidden_layers is 3: it must be a list of 3 times",
    ),
    (
        {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
        "layer_types[1] is 'chunked_attention': it must be \"sliding_attention\" or",
    ),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention': it must be a list of 3"),
    (
        {"hidden_activation": "silu"},
        "hidden_activation is 'silu': it must be gelu_pytorch_tanh",
    ),
    ({"hidden_act": "relu"}, "hidden_act is 'relu': it must be gelu_pytorch_tanh"),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "rope_scaling has rope_type 'linear': only \"default\" is supported",
    ),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling has rope_type 'dynamic': only \"default\" is supported",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        "rope_parameters has rope_type 'yarn': only \"default\" is supported",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "factor": 4.0}},
        "rope_parameters has ['factor']: only rope_type and rope_theta are supported",
    ),
    ({"rope_parameters": [1]}, "rope_parameters is [1]: it must be an object or null"),
    (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        "RoPE is given as rope_theta 10000.0, rope_parameters.rope_theta 1000000.0: they must",
    ),
    (
        {
            "rope_parameters": {
                "sliding_attention": {"rope_theta": 1e4},
                "full_attention": {"rope_theta": 1e6},
            }
        },
        "rope_parameters.full_attention.rope_theta 1000000.0: they must agree",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: the whole head is rotated"),
    ({"attention_bias": True}, "attention_bias is True: projections with a bias are not part"),
    (
        {"attention_dropout": 0.1},
        "attention_dropout is 0.1: it must be 0, since attention weights are never stored",
    ),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True: attention here"),
    (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config is {'quant_method': 'gptq', 'bits': 4}: quantised checkpoints of",
    ),
    ({"add_cross_attention": True}, "add_cross_attention is True: there is no cross attention"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes': it must be true or false"),
    ({"dtype": "int8"}, "dtype is 'int8': it must be one of float32, bfloat16, float16, float64"),
    ({"pad_token_id": 97}, "pad_token_id is 97: it must be less than vocab_size, 97"),
    ({"pad_token_id": -1}, "pad_token_id is -1: it must be a token id or null"),
    ({"bos_token_id": [2]}, "bos_token_id is [2]: it must be a token id or null"),
    (
        {"eos_token_id": [1, "x"]},
        "eos_token_id is [1, 'x']: it must be a token id, a list of token ids or null",
    ),
    ({"num_labels": 0}, "num_labels is 0: it must be between 1 and 100000"),
    (
        {"num_labels": 3, "id2label": {"0": "a"}},
        "num_labels is 3 and id2label names 1 labels: they must agree",
    ),
    ({"id2label": {"0": "a", "2": "b"}}, "id2label has the numbers [0, 2]: they must be 0 to 1"),
    ({"id2label": {"x": "a"}}, "id2label has 'x': 'a': it must map a label's number to its name"),
    ({"id2label": ["a", "b"]}, "id2label is ['a', 'b']: it must be an object of number: name"),
    ({"label2id": {"a": 7}}, "label2id has 'a': 7: it must map a label's name to a number from 0"),
    (
        {"problem_type": "ranking"},
        "problem_type is 'ranking': it must be one of regression, single",
    ),
    ({"classifier_dropout": 1.0}, "classifier_dropout is 1.0: it must be a probability below 1"),
    (
        {"architectures": "Gemma2Model"},
        "architectures is 'Gemma2Model': it must be a list of class",
    ),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED, ids=[text[:50] for _, text in REFUSED])
def test_a_bad_value_is_named_with_what_is_wanted(changes: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        read(**changes)
    assert str(caught.value).startswith("config: ")
    assert text in str(caught.value)


def test_fields_of_their_own_cannot_hide_in_extra() -> None:
    with pytest.raises(ValueError, match=r"extra holds .'head_dim'.: these are fields"):
        Gemma2Config(extra={"head_dim": 4})


def test_a_hostile_value_is_not_printed_at_length() -> None:
    with pytest.raises(TypeError) as caught:
        read(hidden_size="x" * 10**6)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not readable as JSON"),
        (b'{"model_type": "gemma2",', "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[1, 2]", "holds [1, 2]: it must hold a JSON object"),
        (b"{}", 'model_type is missing: it must be "gemma2"'),
        (b'{"model_type": "llama"}', "config: model_type is 'llama': it must be \"gemma2\""),
        (b'{"model_type": "gemma2", "rope_theta": NaN}', "NaN is no JSON number"),
        (b'{"model_type": "gemma2", "head_dim": 3}', "config: head_dim is 3: it must be even"),
        (b'{"a":' * 100_000, "not readable as JSON"),
        (b'{"model_type": "gemma2", "head_dim": ' + b"9" * 10_000 + b"}", "not readable as JSON"),
    ],
    ids=["empty", "cut", "bytes", "list", "no type", "llama", "nan", "odd", "deep", "digits"],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: ") as caught:
        Gemma2Config.from_pretrained(tmp_path)
    assert text in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match="the file has 1073741824 bytes: at most 2097152 are read"):
        Gemma2Config.from_pretrained(tmp_path)


def test_a_folder_without_config_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: a model's folder holds"):
        Gemma2Config.from_pretrained(tmp_path)


def test_users_scalar_224_in_a_9b_is_told(tmp_path: Path) -> None:
    """transformers#31891: the converter of 2024 wrote 224 into the 9B."""
    values = Gemma2Config.gemma2_9b(query_pre_attn_scalar=224).to_dict()
    with pytest.warns(UserWarning, match="query_pre_attn_scalar is 224 in a Gemma 2 9B"):
        config = Gemma2Config.from_dict(values)
    assert config.query_pre_attn_scalar == 224
    assert Gemma2Config.from_dict(values, query_pre_attn_scalar=256).query_scale == 1 / 16

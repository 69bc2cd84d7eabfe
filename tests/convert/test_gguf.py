"""GGUF: what is written is read by others, what others write is read, what lies is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma2.convert import gguf as ours
from gemma2.convert.gguf_file import File
from gemma2.generation import GenerationConfig
from gemma2.weights import CheckpointError
from tests.convert.sources import MemorySource, config, logits, model_of
from tests.model import factories

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer:UserWarning")
Quant = gguf.GGMLQuantizationType


def written(folder: Path, source: Any, **options: Any) -> Path:
    target = folder / "model.gguf"
    assert ours.write(source, target, **options) == [target]
    return target


def by_hand(
    path: Path,
    cfg: Any,
    state: dict[str, torch.Tensor],
    kind: Any = Quant.F32,
    alter: Any = None,
    **tensors: np.ndarray,
) -> Path:
    """A file made by the library alone, with the names of its own table and llama.cpp's +1.

    `alter` gets the writer; `tensors` are more of them, "." written as "__".
    """
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_attn_logit_softcapping(cfg.attn_logit_softcapping)
    writer.add_final_logit_softcapping(cfg.final_logit_softcapping)
    writer.add_sliding_window(cfg.sliding_window)
    if alter is not None:
        alter(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, cfg.num_hidden_layers)
    for name, tensor in state.items():
        key = names.get_name(name.removesuffix(".weight")) + ".weight"
        values = tensor.float().numpy()
        if name.endswith("norm.weight"):
            writer.add_tensor(key, values + np.float32(1))
        elif kind == Quant.F32:
            writer.add_tensor(key, values)
        else:
            writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, values in tensors.items():
        writer.add_tensor(name.replace("__", "."), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "q8_0"])
@pytest.mark.parametrize("shape", ["2b", "9b", "27b"])
def test_a_model_comes_back_from_a_file(tmp_path: Path, shape: str, kind: str) -> None:
    # rows of whole blocks, or q8_0 would write float16
    cfg = config(shape, hidden_size={"2b": 64, "9b": 96, "27b": 288}[shape])
    source = MemorySource(cfg)
    back = ours.open_source(written(tmp_path, source, dtype=kind))
    assert back.config == cfg
    assert list(back.tensors) == list(source.tensors)
    assert back.dtype == {"q8_0": torch.bfloat16}.get(kind, getattr(torch, kind, None))
    for name, tensor in source.state.items():
        found = back.read(name)
        assert (found.dtype, found.shape) == (back.tensors[name].dtype, back.tensors[name].shape)
        if name.endswith("norm.weight"):
            assert found.dtype == torch.float32
            assert torch.allclose(found, tensor, rtol=0, atol=2**-24)
        elif kind == "q8_0":
            step = tensor.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            error = (found - tensor).reshape(-1, 32).abs()
            assert bool((error <= 0.6 * step + 1e-6).all())
            assert not torch.equal(found, tensor)
        else:  # the weights are bfloat16 numbers in float16's range
            assert torch.equal(found, tensor.to(getattr(torch, kind)))


def test_a_file_of_ours_is_what_the_library_reads(tmp_path: Path) -> None:
    cfg = config("2b", rope_theta=12345.0)
    source = MemorySource(cfg, generation=GenerationConfig(eos_token_id=[1, 7]))
    reader = gguf.GGUFReader(written(tmp_path, source, dtype="bfloat16"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, cfg.num_hidden_layers)
    wanted = {names.get_name(n.removesuffix(".weight")) + ".weight": n for n in source.state}
    assert {tensor.name for tensor in reader.tensors} == set(wanted)
    for tensor in reader.tensors:
        values = source.state[wanted[tensor.name]].numpy()
        if "norm" in tensor.name:
            assert tensor.tensor_type == Quant.F32
            assert np.array_equal(tensor.data, values + np.float32(1))
        else:
            assert tensor.tensor_type == Quant.BF16
            assert np.array_equal(gguf.quants.dequantize(tensor.data, Quant.BF16), values)
        assert tensor.data_offset % 32 == 0

    def key(name: str) -> Any:
        return reader.fields[name].contents()

    assert key("general.architecture") == "gemma2"
    assert key("gemma2.attention.head_count_kv") == cfg.num_key_value_heads
    assert key("gemma2.attention.key_length") == key("gemma2.attention.value_length") == 256
    assert key("gemma2.attn_logit_softcapping") == cfg.attn_logit_softcapping
    assert key("gemma2.final_logit_softcapping") == cfg.final_logit_softcapping
    assert key("gemma2.attention.sliding_window") == cfg.sliding_window
    assert key("gemma2.rope.freq_base") == 12345.0
    assert (key("tokenizer.ggml.eos_token_id"), key("tokenizer.ggml.eot_token_id")) == (1, 7)
    assert ours.open_source(tmp_path / "model.gguf").generation.eos_token_id == [1, 7]


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_transformers_reads_the_same_model(tmp_path: Path, kind: str) -> None:
    import transformers

    cfg = config("9b")
    written(tmp_path, MemorySource(cfg), dtype=kind)
    # its table of keys lacks the caps and the query scalar
    theirs = factories.twin(cfg).config
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=theirs, dtype=torch.float32
    )
    # float16 has subnormals where the weights have not
    exact = logits(factories.twin(cfg))
    assert factories.relative_error(logits(model.eval()), exact) <= (kind == "float16") * 1e-4
    back = model_of(ours.open_source(tmp_path / "model.gguf"))
    assert factories.relative_error(logits(back), logits(model)) < 2e-5


@pytest.mark.parametrize("kind", [Quant.F32, Quant.F16, Quant.BF16])
def test_a_file_of_the_library_is_read(tmp_path: Path, kind: Any) -> None:
    cfg = config("2b")
    state = factories.state_dict(cfg)
    back = ours.open_source(by_hand(tmp_path / "m.gguf", cfg, state, kind))
    assert back.config == cfg
    assert factories.relative_error(logits(model_of(back)), logits(factories.twin(cfg))) < 2e-5


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_are_those_of_the_library(tmp_path: Path, name: str) -> None:
    cfg = config("2b", hidden_size=64)
    state = factories.state_dict(cfg)
    kind = Quant[name]
    back = ours.open_source(by_hand(tmp_path / "m.gguf", cfg, state, kind))
    for key, tensor in state.items():
        if tensor.dim() > 1:
            packed = gguf.quants.quantize(tensor.numpy(), kind)
            assert np.array_equal(back.read(key).numpy(), gguf.quants.dequantize(packed, kind))


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_types_with_blocks_of_256_are_expanded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config("2b", hidden_size=256, num_hidden_layers=1, intermediate_size=256, head_dim=256)
    kind = Quant[name]
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    packed: dict[int, np.ndarray] = {}

    def random(values: np.ndarray, kind: Any) -> np.ndarray:
        generator = np.random.default_rng(len(packed))
        shape = (values.shape[0], values.shape[1] // 256 * block_bytes)
        packed[len(packed)] = generator.integers(0, 256, shape, dtype=np.uint8)
        return packed[len(packed) - 1]

    # the library expands these and cannot make them; few rows at a time, to see them joined
    with monkeypatch.context() as patched:
        patched.setattr(gguf.quants, "quantize", random)
        path = by_hand(tmp_path / "m.gguf", cfg, factories.state_dict(cfg), kind)
    monkeypatch.setattr(ours, "_CHUNK", 4 * 256 * 7)
    back = ours.open_source(path)
    dense = [key for key, info in back.tensors.items() if len(info.shape) > 1]
    for key, rows in zip(dense, packed.values(), strict=True):
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(rows, kind)
        assert np.array_equal(back.read(key).numpy(), expected, equal_nan=True)


# ---- the +1 of norms -----------------------------------------------------------------------------


def test_a_bfloat16_norm_comes_back_exactly_from_2_to_the_minus_16_on(tmp_path: Path) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    kept = every[every.isfinite() & (every.abs() < 2**16)]
    exact = (kept.abs() >= 2**-16) | (kept == 0)
    cfg = config("single", hidden_size=len(kept), query_pre_attn_scalar=64, vocab_size=4)
    cfg.intermediate_size, cfg.num_hidden_layers, cfg.layer_types = 1, 1, cfg.layer_types[:1]
    state = {
        name: kept.clone() if len(info) == 1 else torch.zeros(info, dtype=torch.bfloat16)
        for name, info in ours.hub_shapes(cfg).items()
    }
    back = ours.open_source(written(tmp_path, MemorySource(cfg, state)))
    found = back.read("model.norm.weight")
    assert torch.equal(found[exact], kept[exact].float())
    assert float((found - kept.float()).abs().max()) <= 2**-24  # half a step of 1 + w
    assert torch.equal(found[exact].to(torch.bfloat16), kept[exact])


@pytest.mark.parametrize("kind", [Quant.F32, Quant.F16, Quant.BF16])
def test_the_one_is_taken_off_norms_of_any_type(tmp_path: Path, kind: Any) -> None:
    cfg = config("2b")
    state = factories.state_dict(cfg)
    path = by_hand(tmp_path / "m.gguf", cfg, state, kind)
    found = ours.open_source(path).read("model.layers.1.post_feedforward_layernorm.weight")
    wanted = state["model.layers.1.post_feedforward_layernorm.weight"]
    assert torch.allclose(found, wanted, rtol=0, atol=2**-22)
    assert float((found - wanted).abs().max()) < 0.5 < float((found + 1 - wanted).abs().max())


# ---- what the format cannot say ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query_pre_attn_scalar": 144}, "query_pre_attn_scalar is 144"),
        ({"layer_types": ["full_attention", "full_attention"]}, "layer_types is"),
        ({"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping is None"),
        ({"rope_theta": 1234567.891}, r"rope_theta is 1234567\.891: .* takes 1234567\.9"),
        ({"rms_norm_eps": 1e-60}, "rms_norm_eps is 1e-60: "),
    ],
)
def test_a_setting_that_a_reader_would_not_see_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        ours.write(MemorySource(config("2b", **change)), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_head_of_its_own_is_refused_and_an_equal_one_left_out(tmp_path: Path) -> None:
    cfg = config("2b", tie_word_embeddings=False)
    state = factories.state_dict(cfg)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    back = ours.open_source(written(tmp_path, MemorySource(cfg, state)))
    assert "lm_head.weight" not in back.tensors
    assert back.config.tie_word_embeddings
    state["lm_head.weight"][3, 5] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        ours.write(MemorySource(cfg, state), tmp_path / "other.gguf")


@pytest.mark.parametrize("kind", ["float16", "q8_0"])
def test_a_value_beyond_the_type_is_refused_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    source = MemorySource(config("2b", hidden_size=64))
    source.state["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e9
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj"):
        ours.write(source, tmp_path / "m.gguf", dtype=kind)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_gives_back_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ours.GGUFSource.read

    def broken(self: Any, name: str) -> torch.Tensor:
        out = read(self, name)
        if name == "model.layers.1.mlp.gate_proj.weight":
            out[7, 3] += 2**-8
        return out

    monkeypatch.setattr(ours.GGUFSource, "read", broken)
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight does not read back"):
        ours.write(MemorySource(config("2b")), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_norm_beyond_float32_is_told(tmp_path: Path) -> None:
    source = MemorySource(config("2b"))
    source.state["model.norm.weight"] = torch.full((72,), 1e300, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight reaches 1e\+300"):
        ours.write(source, tmp_path / "m.gguf")


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'q4_0'"):
        ours.write(MemorySource(config("2b")), tmp_path / "m.gguf", dtype="q4_0")


def test_rows_of_broken_blocks_are_float16(tmp_path: Path) -> None:
    path = written(tmp_path, MemorySource(config("2b")), dtype="q8_0")  # hidden_size 72
    kinds = {name: stored.kind_name for name, stored in File(path).tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.attn_output.weight"] == kinds["blk.0.ffn_down.weight"] == "Q8_0"


# ---- files of others -----------------------------------------------------------------------------


def test_an_output_weight_must_be_the_embedding(tmp_path: Path) -> None:
    cfg = config("2b")
    state = factories.state_dict(cfg)
    table = state["model.embed_tokens.weight"].numpy()
    ours.open_source(by_hand(tmp_path / "same.gguf", cfg, state, output__weight=table))
    other = table.copy()
    other[-1, -1] += 1
    path = by_hand(tmp_path / "other.gguf", cfg, state, output__weight=other)
    with pytest.raises(CheckpointError, match=r"output\.weight differs from token_embd"):
        ours.open_source(path)


def test_all_that_does_not_fit_comes_in_one_error(tmp_path: Path) -> None:
    cfg = config("2b")
    state = factories.state_dict(cfg)
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.norm.weight"] = torch.zeros(9)
    key = "model.layers.0.self_attn.q_proj.weight"
    whole = state.pop(key).numpy().astype(np.int32)
    path = by_hand(
        tmp_path / "m.gguf",
        cfg,
        state,
        blk__0__attn_q__weight=whole,
        rope_freqs__weight=np.zeros(3, np.float32),
    )
    with pytest.raises(CheckpointError) as caught:
        ours.open_source(path)
    assert caught.value.missing == ["blk.1.ffn_up.weight"]
    assert caught.value.unexpected == ["rope_freqs.weight"]
    assert caught.value.mismatched == ["output_norm.weight"]
    assert caught.value.wrong_dtype == ["blk.0.attn_q.weight"]
    assert str(caught.value).startswith(f"{path} ")
    assert "blk.0.attn_q.weight: I32" in str(caught.value)


def test_a_given_configuration_must_agree_with_the_file(tmp_path: Path) -> None:
    cfg = config("27b", num_hidden_layers=2)
    cfg.query_pre_attn_scalar = 128
    path = written(tmp_path, MemorySource(cfg))
    given = config("27b", num_hidden_layers=2)  # what the shape does not say: 144
    assert ours.open_source(path, given).config.query_pre_attn_scalar == 144
    given.attn_logit_softcapping = 50.0
    with pytest.raises(CheckpointError, match=r"attn_logit_softcapping is 2\.0 in the file and 50"):
        ours.open_source(path, given)


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (lambda w: w.add_uint16("split.count", 3), "llama-gguf-split --merge"),
        (lambda w: w.add_string("gemma2.block_count", "two"), "block_count is a string"),
        (lambda w: w.add_uint32("gemma2.block_count", 10**9), "num_hidden_layers is 1000000000"),
        (lambda w: w.add_array("gemma2.attention.head_count", [4, 4]), "an array of 2 entries"),
        (lambda w: w.add_float32("gemma2.attn_logit_softcapping", float("nan")), "softcapping"),
        (lambda w: w.add_uint32("gemma2.attention.value_length", 7), "value_length is 7"),
        (lambda w: w.add_string("gemma2.rope.scaling.type", "yarn"), "scaling.type is yarn"),
        (lambda w: w.add_float32("gemma2.rope.scaling.factor", 8.0), "scaling.factor is 8"),
        (lambda w: w.add_float32("gemma2.rope.scale_linear", 4.0), "scale_linear is 4"),
        (lambda w: w.add_uint32("gemma2.rope.dimension_count", 64), "dimension_count is 64"),
        (lambda w: w.add_string("general.architecture", "llama"), "architecture is llama"),
        (lambda w: w.add_uint32("tokenizer.ggml.padding_token_id", 98), "pad_token_id"),
        (
            lambda w: w.add_uint32("tokenizer.ggml.eos_token_id", 2**31),
            "eos_token_id is 2147483648",
        ),
        (lambda w: w.add_uint32("tokenizer.ggml.eot_token_id", 97), "eot_token_id is 97"),
    ],
)
def test_keys_that_make_no_sense_are_named(tmp_path: Path, alter: Any, said: str) -> None:
    cfg = config("2b")
    path = by_hand(tmp_path / "m.gguf", cfg, factories.state_dict(cfg), alter=alter)
    with pytest.raises(CheckpointError, match=said) as caught:
        ours.open_source(path)
    assert str(caught.value).startswith(f"{path}: ")


# ---- hostile files -------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(
    *parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def tensor(name: bytes, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


ARRAY, STRING, U8 = (struct.pack("<I", number) for number in (9, 8, 0))
HOSTILE = {
    "empty": (b"", "does not begin with"),
    "short": (b"GGUF\3\0\0\0", "does not begin with"),
    "magic": (header(magic=b"GGML"), "does not begin with"),
    "version": (header(version=1), "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "keys": (header(keys=2**63), "claims 9223372036854775808 keys"),
    "tensors": (header(tensors=2**40), "claims 1099511627776 tensors"),
    "key-length": (header(struct.pack("<Q", 2**63), keys=1), "a key has 9223372036854775808 bytes"),
    "key-twice": (header(*[text(b"k") + U8 + b"\1"] * 2, keys=2), "k is there twice"),
    "key-utf8": (header(text(b"\xff") + U8 + b"\1", keys=1), "not UTF-8"),
    "value-type": (header(text(b"k") + struct.pack("<I", 13), keys=1), "type 13"),
    "value-absent": (header(text(b"k") + struct.pack("<I", 10), keys=1), "the file ends"),
    "string-length": (
        header(text(b"k") + STRING + struct.pack("<Q", 2**64 - 1), keys=1),
        "18446744073709551615 bytes",
    ),
    "array-length": (
        header(text(b"k") + ARRAY + U8 + struct.pack("<Q", 2**64 - 1), keys=1),
        "the file ends",
    ),
    "array-product": (
        header(text(b"k") + ARRAY + struct.pack("<IQ", 10, 2**61), keys=1),
        "the file ends",
    ),
    "array-strings": (
        header(text(b"k") + ARRAY + STRING + struct.pack("<Q", 2**50), keys=1),
        "claims 1125899906842624 strings",
    ),
    "array-array": (
        header(text(b"k") + ARRAY + ARRAY + struct.pack("<Q", 2**50), keys=1),
        "type 9",
    ),
    "alignment": (
        header(text(b"general.alignment") + struct.pack("<II", 4, 24), keys=1),
        "power of two",
    ),
    "alignment-0": (
        header(text(b"general.alignment") + struct.pack("<II", 4, 0), keys=1),
        "power of two",
    ),
    "name-length": (header(tensor(b"n" * 65, [1]), tensors=1), "at most 64"),
    "dims": (header(text(b"t") + struct.pack("<I", 2**31), tensors=1), "2147483648 dimensions"),
    "dims-0": (header(text(b"t") + struct.pack("<I", 0), tensors=1), "0 dimensions"),
    "empty-tensor": (header(tensor(b"t", [4, 0]), bytes(64), tensors=1), "none may be empty"),
    "product": (header(tensor(b"t", [2**32, 2**32]), bytes(64), tensors=1), "must lie inside"),
    "beyond": (header(tensor(b"t", [17]), bytes(64), tensors=1), "must lie inside"),
    "offset": (header(tensor(b"t", [1], 0, 2**63), bytes(64), tensors=1), "must lie inside"),
    "unaligned": (header(tensor(b"t", [1], 0, 4), bytes(96), tensors=1), "multiple of 32"),
    "tensor-type": (header(tensor(b"t", [1], 4), bytes(64), tensors=1), "has the type 4"),
    "broken-block": (header(tensor(b"t", [33], 8), bytes(96), tensors=1), "whole blocks"),
    "tensor-twice": (
        header(tensor(b"t", [1]), tensor(b"t", [1], 0, 32), bytes(128), tensors=2),
        "there twice",
    ),
    "overlap": (
        header(tensor(b"t", [16]), tensor(b"u", [1], 0, 32), bytes(256), tensors=2),
        "t and u overlap",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_lying_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    data, said = HOSTILE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=said) as caught:
        ours.open_source(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_every_cut_of_a_file_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, MemorySource(config("single", query_pre_attn_scalar=64)))
    data = path.read_bytes()
    first = min(stored.offset for stored in File(path).tensors.values())
    for count in [*range(0, first, 7), first, len(data) // 2, len(data) - 33]:
        path.write_bytes(data[:count])
        with pytest.raises(CheckpointError):
            ours.open_source(path)


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, MemorySource(config("2b")))
    source = ours.open_source(path)
    path.write_bytes(path.read_bytes()[: 2**16])
    with pytest.raises(CheckpointError, match="has become shorter"):
        source.read("model.norm.weight")


def test_without_the_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'gemma2\[gguf\]'"):
        ours.open_source(tmp_path / "m.gguf")

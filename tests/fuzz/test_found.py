"""What fuzzing has found: each was a crash, a hang, wrong weights, memory, or an error of no use."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma2 import Gemma2Config, Gemma2ForCausalLM
from gemma2.archive import check_archive
from gemma2.checkpoint import CheckpointError
from gemma2.config import parse_json
from gemma2.convert.gguf import open_source as open_gguf
from gemma2.generation.config import GenerationConfig
from gemma2.tokenizer import Tokenizer
from tests.fuzz import samples
from tests.fuzz.damage import Call

BIN = "pytorch_model.bin"


def repacked(
    content: bytes, change: Callable[[str, bytes], Any], method: int = zipfile.ZIP_STORED
) -> bytes:
    """The archive with what `change(name, content)` gives for each record; None: without it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", method) as new:
        for info in old.infolist():
            kept = change(info.filename, old.read(info))
            if kept is not None:
                new.writestr(info.filename, kept)
    return out.getvalue()


def with_pickle(pickled: bytes) -> bytes:
    def change(name: str, content: bytes) -> bytes:
        return pickled if name.endswith("data.pkl") else content

    return repacked(bytes(samples.pickle_file()[BIN]), change)  # type: ignore[arg-type]


def refusal(content: bytes, tmp_path: Path) -> str:
    """Give the error's text for a folder whose pytorch_model.bin is `content`."""
    folder = tmp_path / "model"
    samples.write({**samples.pickle_file(), BIN: content}, folder)
    with pytest.raises(CheckpointError) as caught:
        Gemma2ForCausalLM.from_pretrained(folder)
    assert str(caught.value).startswith(str(folder / BIN))
    return str(caught.value)


# ---- archives of torch.save ---------------------------------------------------------------------


def test_compressed_records_are_refused_and_not_taken_for_weights(tmp_path: Path) -> None:
    """torch maps them as they lie there, without a word."""
    packed = repacked(
        bytes(samples.pickle_file()[BIN]),  # type: ignore[arg-type]
        lambda name, content: content,
        zipfile.ZIP_DEFLATED,
    )
    assert "compressed" in refusal(packed, tmp_path)


def test_a_record_that_is_too_short_does_not_borrow_from_the_next(tmp_path: Path) -> None:
    cut = repacked(
        bytes(samples.pickle_file()[BIN]),  # type: ignore[arg-type]
        lambda name, content: content[:-1] if name.endswith("data/3") else content,
    )
    assert "which are not there" in refusal(cut, tmp_path)


def test_nested_tuples_as_a_key_do_not_crash(tmp_path: Path) -> None:
    """torch.load(weights_only=True) dies of them: hashing goes down by recursion in C."""
    bomb = b"\x80\x02})" + b"\x85" * 500_000 + b"K\1s."
    assert "nested more than" in refusal(with_pickle(bomb), tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        Call(bytearray, 2**29),
        Call(torch.Tensor, 2**36),
        Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (2**50,), (1,), False),
        torch.zeros(8, device="meta"),
    ],
    ids=["bytearray", "tensor", "meta", "saved meta"],
)
def test_nothing_that_takes_memory_at_will_is_called(value: Any, tmp_path: Path) -> None:
    state = {**samples.tensors(), "model.norm.weight": value}
    assert "holds more than tensors" in refusal(samples.pickled(state), tmp_path)


def test_a_pickle_that_takes_what_is_not_there_is_refused(tmp_path: Path) -> None:
    for i, pickled in enumerate(
        (b"\x80\x02h\x07.", b"\x80\x02e.", b"\x80\x02}]K\1s.", b"\x80\x02.")
    ):
        refusal(with_pickle(pickled), tmp_path / str(i))


def test_a_damaged_pickle_is_told_by_its_checksum(tmp_path: Path) -> None:
    content = bytearray(samples.pickle_file()[BIN])  # type: ignore[arg-type]
    at = content.index(b"embed_tokens")
    content[at] ^= 1
    assert "a pickle that is damaged" in refusal(bytes(content), tmp_path)


def test_a_record_of_two_names_is_refused(tmp_path: Path) -> None:
    """Its content would begin elsewhere than the directory says."""
    content = bytearray(samples.pickle_file()[BIN])  # type: ignore[arg-type]
    at = content.index(b"PK\3\4") + 26
    content[at] += 1
    assert "two names" in refusal(bytes(content), tmp_path)


def test_sizes_that_disagree_are_refused(tmp_path: Path) -> None:
    content = bytearray(samples.pickle_file()[BIN])  # type: ignore[arg-type]
    at = content.index(b"PK\1\2") + 20
    content[at : at + 4] = struct.pack("<I", 7)
    assert "two sizes" in refusal(bytes(content), tmp_path)


def test_a_negated_view_is_not_taken_for_what_is_stored(tmp_path: Path) -> None:
    eight = torch.arange(8.0)
    state = {**samples.tensors(), "model.norm.weight": torch.complex(eight, eight).conj().imag}
    assert "not stored in full" in refusal(samples.pickled(state), tmp_path)


def test_a_large_pickle_is_not_followed_for_ever(tmp_path: Path) -> None:
    start = time.process_time()
    assert "a pickle of" in refusal(with_pickle(b"\x80\x02]" + b"Na" * 2_000_000 + b"."), tmp_path)
    assert time.process_time() - start < 2


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    """`torch.serialization.set_crc32_options(False)` writes such."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(samples.tensors(), tmp_path / BIN)
    finally:
        torch.serialization.set_crc32_options(True)
    check_archive(tmp_path / BIN)


# ---- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' is given 2 times"),
        ('{"a": 1e999}', "1e999 is no finite number"),
        ('{"a": "\\ud800"}', "can't encode"),
        ('{"a": ' + "[" * 60 + "]" * 60 + "}", "nested more than 50 deep"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "not readable as JSON"),
        ('{"a": [' + "[]," * 200_000 + "0]}", "more than 100000 lists and objects"),
    ],
    ids=["twice", "infinite", "half a letter", "nested", "very nested", "many lists"],
)
def test_json_that_no_model_needs_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text.encode())


def test_a_key_among_many_that_is_there_twice_is_found_at_once() -> None:
    pairs = ",".join(f'"{i}":0' for i in range(150_000))
    start = time.process_time()
    with pytest.raises(ValueError, match="'149999' is given 2 times"):
        parse_json(f'{{{pairs},"149999":1}}'.encode())
    assert time.process_time() - start < 2


def test_what_is_written_can_be_read_again() -> None:
    labels = {i: f"{i} " + "x" * 400 for i in range(3000)}
    with pytest.raises(ValueError, match="but at most 2097152 are read: give shorter or fewer"):
        Gemma2Config(id2label=labels).to_json()


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
     "model.safetensors", "model.gguf"],
)  # fmt: skip
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    samples.write({**samples.one_file(), **samples.tokenizer()}, tmp_path / "model")
    path = tmp_path / "model" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    read: Callable[[Path], Any] = Gemma2ForCausalLM.from_pretrained
    if name == "generation_config.json":
        read = GenerationConfig.from_pretrained
    elif name.startswith("tokenizer"):
        read = Tokenizer.from_pretrained
    if name == "tokenizer_config.json":  # optional, and only a file counts
        assert read(path.parent).vocab_size > 0
        return
    with pytest.raises((ValueError, OSError), match=str(path.parent)):
        open_gguf(path) if name.endswith("gguf") else read(path.parent)


def test_a_generation_setting_is_shown_short_and_a_mapping_is_no_list() -> None:
    with pytest.raises(ValueError, match="temperature is") as caught:
        GenerationConfig(temperature=-(10**400))
    assert len(str(caught.value)) < 300
    with pytest.raises(TypeError, match="eos_token_id"):
        GenerationConfig.from_dict({"eos_token_id": {}})


def test_an_error_of_the_tokenizers_library_is_told_short(tmp_path: Path) -> None:
    """It repeats a string that stands in the wrong place, all of it."""
    files = samples.tokenizer()
    content = json.loads(files["tokenizer.json"])
    content["model"]["vocab"] = "x" * 1_000_000
    samples.write({**files, "tokenizer.json": json.dumps(content).encode()}, tmp_path / "model")
    with pytest.raises(ValueError, match="invalid type: string") as caught:
        Tokenizer.from_pretrained(tmp_path / "model")
    assert str(caught.value).startswith(str(tmp_path / "model" / "tokenizer.json"))
    assert len(str(caught.value)) < 2000


def test_a_panic_of_the_tokenizers_library_is_an_error(tmp_path: Path) -> None:
    """Rust's panics are no Exception in Python, and would end a program that handles errors."""
    files = samples.tokenizer()
    content = json.loads(files["tokenizer.json"])
    content["model"]["continuing_subword_prefix"] = "CON"  # longer than what it cuts it off
    samples.write({**files, "tokenizer.json": json.dumps(content).encode()}, tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: not a readable tokenizer: byte index 3"
    ):
        Tokenizer.from_pretrained(tmp_path / "model")


def test_ctrl_c_while_a_tokenizer_is_read_is_not_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tokenizers

    class Library:
        @staticmethod
        def from_file(path: str) -> None:
            raise KeyboardInterrupt

    samples.write(samples.tokenizer(), tmp_path / "model")
    monkeypatch.setattr(tokenizers, "Tokenizer", Library)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.from_pretrained(tmp_path / "model")


# ---- others -------------------------------------------------------------------------------------


def test_a_safetensors_header_names_a_tensor_once(tmp_path: Path) -> None:
    """Two entries of the same bytes pass the library, which takes the last one."""
    folder = samples.one_file()
    content = bytes(folder["model.safetensors"])  # type: ignore[arg-type]
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].rstrip()
    twice = header[:-1] + b',"model.norm.weight":' + json.dumps(
        json.loads(header)["model.norm.weight"]
    ).encode() + b"}"  # fmt: skip
    folder = {
        **folder,
        "model.safetensors": struct.pack("<Q", len(twice)) + twice + content[8 + length :],
    }
    samples.write(folder, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is given 2 times"):
        Gemma2ForCausalLM.from_pretrained(tmp_path / "model")


def test_a_tensor_in_two_shards_is_told(tmp_path: Path) -> None:
    folder = samples.pickle_shards()
    twice = {name: samples.tensors()[name] for name in sorted(samples.tensors())}
    folder = {**folder, "pytorch_model-00001-of-00002.bin": samples.pickled(twice)}
    samples.write(folder, tmp_path / "model")
    text = r"pytorch_model-00001-of-00002\.bin holds \S+, which \S+ puts into pytorch_model-00002"
    with pytest.raises(CheckpointError, match=text):
        Gemma2ForCausalLM.from_pretrained(tmp_path / "model")


def test_a_tokenizer_s_error_names_the_folder_and_is_short(tmp_path: Path) -> None:
    files = samples.tokenizer()
    files = {**files, "tokenizer_config.json": json.dumps({"eos_token": "x" * 100_000}).encode()}
    samples.write(files, tmp_path / "model")
    with pytest.raises(ValueError, match="eos_token is 'xxx") as caught:
        Tokenizer.from_pretrained(tmp_path / "model")
    assert str(caught.value).startswith(str(tmp_path / "model"))
    assert len(str(caught.value)) < 500

"""`gemma2 perplexity` and `gemma2 convert`: what they ask of the library, and what they print."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import gemma2
from gemma2 import cli
from gemma2.evaluation import perplexity
from tests.cli.chat_model import chat_folder
from tests.model.factories import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return chat_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(capfd):
    """Runs the command; gives exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        return code, out, err

    return run


TEXT = "hello there, größe <eos> ab ab\n" * 4


def test_a_file_is_scored_as_the_library_scores_it(command, folder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    options = ["--model", folder, "--context", 20, "--stride", 5]
    code, out, err = command("perplexity", "--json", *options, file)
    assert (code, err) == (0, "")
    report = json.loads(out)
    tokenizer = gemma2.Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode(TEXT, add_bos=False, allow_special=False)
    assert tokenizer.eos_id not in ids, "what is written in a file is text"
    model = gemma2.Gemma2ForCausalLM.from_pretrained(folder)
    wanted = perplexity(model, ids, context=20, stride=5)
    assert report["tokens"] == len(ids) == wanted.tokens
    assert report["tokens_read"] == wanted.read
    assert report["perplexity"] == wanted.perplexity
    assert report["bytes"] == len(TEXT.encode())
    assert report["bits_per_byte"] == pytest.approx(
        math.log2(wanted.perplexity) * len(ids) / len(TEXT.encode())
    )
    code, out, err = command("perplexity", *options, file)
    assert (code, err) == (0, ""), "no bar where stderr is no terminal"
    assert out.startswith(f"perplexity {wanted.perplexity:.4f}, {report['bits_per_byte']:.4f} bits")
    assert f"{len(ids)} tokens, " in out


def test_the_default_is_the_context_of_the_model_and_half_of_it(command, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    report = json.loads(command("perplexity", "--json", "--model", folder, "-")[1])
    assert (report["context"], report["stride"], report["windows"]) == (8192, 4096, 1)


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "No such file"), (b"", "is empty"), (b"a\xff", "is not UTF-8: byte 1")],
)
def test_what_is_no_text_ends_with_one_line(command, folder, tmp_path, monkeypatch, content, text):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    code, out, err = command("perplexity", "--model", folder, file)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("gemma2: error: ")
    assert text in line
    assert str(file) in line
    if content is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert (
            command("perplexity", "--model", folder, "-")[2]
            == line.replace(str(file), "stdin") + "\n"
        )


def test_all_bytes_of_a_text_count_wherever_it_comes_from(command, folder, tmp_path, monkeypatch):
    data = "a\r\nb\rgröße\n\n".encode()
    file = tmp_path / "text.txt"
    file.write_bytes(data)
    ids = gemma2.Tokenizer.from_pretrained(folder).encode(
        data.decode(), add_bos=False, allow_special=False
    )
    for name in (file, "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        report = json.loads(command("perplexity", "--json", "--model", folder, name)[1])
        assert (report["bytes"], report["tokens"]) == (len(data), len(ids))


def test_a_context_beyond_the_models_is_pointed_out(command, folder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    code, out, err = command("perplexity", "--model", folder, "--context", 9000, file)
    assert code == 0
    assert "1 window of up to 9000" in out
    assert err == "gemma2: warning: --context 9000: the model was made for 8192 tokens\n"


# ---- convert ------------------------------------------------------------------------------------


def test_a_checkpoint_goes_to_googles_layout_and_back(command, tmp_path):
    folder = tmp_path / "hub"
    tiny().save_pretrained(folder)
    there, back = tmp_path / "original", tmp_path / "back"
    code, out, err = command("convert", "--json", "--to", "original", folder, there)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["bytes"] == sum(Path(file).stat().st_size for file in report["files"]) > 0
    code, out, err = command(
        "convert", "--config", f"{folder}/config.json", "--dtype", "bfloat16", there, back
    )
    assert code == 0
    assert [Path(line).parent for line in out.splitlines()] == [back] * len(out.splitlines())
    assert f"{report['tensors']} tensors, " in err.splitlines()[-1]
    ours = gemma2.Gemma2ForCausalLM.from_pretrained(back)
    before = gemma2.Gemma2ForCausalLM.from_pretrained(folder)
    assert ours.dtype == torch.bfloat16
    for name, tensor in before.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor.bfloat16()), name


def test_what_cannot_be_converted_ends_with_one_line(command, folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for words, text in (
        (["/nowhere", tmp_path / "new"], "/nowhere: does not exist"),
        ([folder, tmp_path / "full"], "pass --overwrite"),
        (["--max-shard-size", "much", folder, tmp_path / "new"], "much"),
        ([folder, folder], "the source itself"),
    ):
        code, out, err = command("convert", *words)
        assert (code, out) == (1, "")
        (line,) = err.splitlines()
        assert line.startswith("gemma2: error: ")
        assert text in line
    assert not (tmp_path / "new").exists()

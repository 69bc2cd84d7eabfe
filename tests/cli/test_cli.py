"""What the command `gemma2` promises: its output, its exit codes, its errors in one line."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gemma2
from gemma2 import _C, cli, tiny
from tests.model.factories import build, config

ROOT = Path(gemma2.__file__).parent.parent


def tokenizer_json() -> str:
    """A tokenizer whose tokens are <pad>, <eos>, <bos> and the 256 bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<eos>", "<bos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*special, *alphabet])}
    made = Tokenizer(models.BPE(vocab, []))
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made.to_str()


def folder_with(path: Path, kind: str = "causal", **overrides) -> str:
    """A random model with that tokenizer, in the layout of the hub."""
    model = build(config("three", vocab_size=259, **overrides), kind)
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer_json())
    return str(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    return folder_with(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> str:
    labels = {"num_labels": 3, "id2label": {0: "good", 1: "bad", 2: "odd"}}
    return folder_with(tmp_path_factory.mktemp("sequence"), "sequence", **labels)


@pytest.fixture(scope="session")
def endless(tmp_path_factory) -> str:
    """A model whose texts do not end of themselves."""
    path = tmp_path_factory.mktemp("endless")
    model = build(config("three", vocab_size=259))
    model.generation_config = gemma2.GenerationConfig(eos_token_id=[], do_sample=True)
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer_json())
    return str(path)


@pytest.fixture
def gemma2_command(capfd):
    """Runs the command in this process; gives exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        return code, out, err

    return run


def process(*arguments: str, **options) -> subprocess.Popen:
    """The command in a process of its own, with pipes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "gemma2", *arguments]
    # A shell's background jobs ignore Ctrl-C, and so would their children.
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(command, env=environment, **{**pipes, **heed, **options})


# ---- help ---------------------------------------------------------------------------------------


def test_help_version_and_wrong_usage_do_not_wait_for_torch():
    code = (
        "import sys\n"
        "from gemma2 import cli\n"
        "for words in (['--help'], ['--version'], ['generate', '--help'], ['generate'], [],\n"
        "        ['chat', '--help'], ['perplexity', '--help'], ['convert', '--help']):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit: pass\n"
        "for name in ('torch', 'rich', 'tqdm', 'tokenizers', 'readline'):\n"
        "    assert name not in sys.modules, f'{name} was imported'\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"gemma2 {gemma2.__version__}" in done.stdout


COMMANDS = ["generate", "chat", "classify", "perplexity", "convert", "info", "bench"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_shows_examples(gemma2_command, command):
    code, out, err = gemma2_command(*command, "--help")
    assert (code, err) == (0, "")
    assert f"gemma2 {' '.join(command) or 'generate'} " in out.partition("examples:")[2]


def test_python_m_gemma2_is_the_command():
    out, _ = process("--version").communicate(timeout=60)
    assert out.decode() == f"gemma2 {gemma2.__version__}\n"


# ---- generate -----------------------------------------------------------------------------------


def test_generate_writes_the_text_that_the_model_writes(gemma2_command, folder):
    code, out, err = gemma2_command("generate", "--model", folder, "--max-new-tokens", 12, "bird")
    assert (code, err) == (0, "")
    tokenizer = gemma2.Tokenizer.from_pretrained(folder)
    model = gemma2.Gemma2ForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode("bird")])
    wanted = tokenizer.decode(model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :])
    assert out == wanted.lstrip() + "\n"


def test_generate_json_is_one_object_a_line_with_text_tokens_and_speed(gemma2_command, folder):
    arguments = ["--model", folder, "--max-new-tokens", 9, "--seed", 3, "a bird", "a tree"]
    code, out, err = gemma2_command("generate", "--json", *arguments)
    assert (code, err) == (0, "")
    first, second = (json.loads(line) for line in out.splitlines())
    assert (first["prompt"], second["prompt"]) == ("a bird", "a tree")
    for found in (first, second):
        assert found["new_tokens"] == len(found["tokens"]) <= 9
        assert found["prompt_tokens"] == 7
        assert found["seed"] == 3
        assert found["prefill_tokens_per_s"] > 0
        assert found["decode_tokens_per_s"] > 0
        assert found["finish_reason"] == ("eos" if found["tokens"][-1] == 1 else "length")
    code, out, err = gemma2_command("generate", *arguments)
    assert out == f"> a bird\n{first['text']}\n\n> a tree\n{second['text']}\n"
    assert gemma2_command("generate", "--no-stream", *arguments)[1] == out


def test_generate_is_greedy_until_a_sampling_option_is_given(gemma2_command, folder):
    def text(*options):
        code, out, _ = gemma2_command("generate", "--json", "--model", folder, *options, "bird")
        assert code == 0
        found = json.loads(out)
        return found["text"], found["seed"]

    greedy, seed = text()
    assert seed is None
    assert text("--greedy") == (greedy, None)
    assert text("--temperature", 0)[0] == greedy
    assert text("--top-k", 1)[0] == greedy
    wild, seed = text("--temperature", 5, "--top-k", 0)
    assert wild != greedy
    assert text("--temperature", 5, "--top-k", 0, "--seed", seed) == (wild, seed), (
        "named: had again"
    )


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--num-beams", 3], {"num_beams": 3}),
        (["--min-new-tokens", 9], {"min_new_tokens": 9}),
        (["--no-repeat-ngram-size", 1], {"no_repeat_ngram_size": 1}),
        (["--prompt-lookup", 3], {"prompt_lookup_num_tokens": 3}),
        (["--repetition-penalty", 1.5], {"repetition_penalty": 1.5}),
    ],
)
def test_options_of_generate_are_those_of_the_library(gemma2_command, folder, words, options):
    arguments = ["--json", "--model", folder, "--max-new-tokens", 12]
    code, out, err = gemma2_command("generate", *arguments, *words, "bird bird")
    assert (code, err) == (0, "")
    found = json.loads(out)
    tokenizer = gemma2.Tokenizer.from_pretrained(folder)
    model = gemma2.Gemma2ForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode("bird bird")])
    wanted = model.generate(ids, max_new_tokens=12, **options)
    assert found["tokens"] == wanted[0, ids.shape[1] :].tolist()
    assert (found["prefill_tokens_per_s"] is None) == ("num_beams" in options)
    assert "tokens/s" in gemma2_command("generate", *arguments[1:], *words, "--stats", "x")[2]


def test_generate_stops_at_a_string(gemma2_command, folder):
    arguments = ["generate", "--json", "--model", folder, "--temperature", 2, "--seed", 1]
    _, out, _ = gemma2_command(*arguments, "--min-new-tokens", 12, "--max-new-tokens", 12, "bird")
    whole = json.loads(out)
    letter = next(c for c in whole["text"][3:] if c.isascii() and c not in whole["text"][:3])
    stop = ["--stop", "nowhere in it", "--stop", letter]
    _, out, _ = gemma2_command(*arguments, *stop, "--max-new-tokens", 12, "bird")
    found = json.loads(out)
    assert found["finish_reason"] == "stop"
    assert found["text"] == whole["text"][: whole["text"].index(letter) + 1]


def test_generate_reads_stdin_for_a_dash(gemma2_command, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ein Vögelchen\n".encode())))
    _, out, _ = gemma2_command("generate", "--json", "--model", folder, "--max-new-tokens", 3, "-")
    assert json.loads(out)["prompt"] == "ein Vögelchen"


def test_statistics_go_to_stderr_only(gemma2_command, folder):
    arguments = ["generate", "--model", folder, "--max-new-tokens", 5, "bird"]
    _, plain, _ = gemma2_command(*arguments)
    code, out, err = gemma2_command(*arguments, "--stats")
    assert (code, out) == (0, plain)
    assert len(err.splitlines()) == 1
    assert "prompt 5 tokens, " in err
    assert "tokens/s" in err


def test_text_streams_as_it_comes(folder, monkeypatch, capfd):
    """Every token is printed before the next one is computed."""
    order = []
    forward = gemma2.Gemma2ForCausalLM.forward

    def counted(self, *args, **options):
        order.append("step")
        return forward(self, *args, **options)

    class Out(io.StringIO):
        def write(self, text):
            order.append("write")
            return super().write(text)

    monkeypatch.setattr(gemma2.Gemma2ForCausalLM, "forward", counted)
    monkeypatch.setattr(sys, "stdout", Out())
    assert cli.main(["generate", "--model", folder, "--max-new-tokens", "20", "bird"]) == 0
    first = order.index("write")
    assert order[:first].count("step") < order.count("step")


def test_a_terminal_that_cannot_show_a_letter_gets_a_question_mark(endless):
    words = ["generate", "--model", endless, "--max-new-tokens", "60", "--seed", "1", "bird"]
    running = process(*words, env={"PYTHONIOENCODING": "ascii"})
    out, err = running.communicate(timeout=120)
    assert (running.returncode, err) == (0, b"")
    assert b"?" in out
    assert out.decode("ascii").strip()


def test_a_reader_that_goes_away_ends_the_command_quietly(endless):
    running = process("generate", "--model", endless, "--max-new-tokens", "100000", "bird")
    assert running.stdout.read(1)
    running.stdout.close()
    err = running.stderr.read()
    assert (running.wait(timeout=120), err) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "words", [["info", "--size", "2b"], ["generate", "bird"]], ids=lambda w: w[0]
)
def test_output_that_cannot_be_written_ends_with_one_line(words):
    """Python buffers what goes to a file, and would fail only when it ends, in its own words."""
    with open("/dev/full", "wb") as full:
        running = process(*words, stdout=full, env={"PYTHONUNBUFFERED": ""})
        _, err = running.communicate(timeout=120)
    assert running.returncode == 1
    assert err.decode().splitlines() == ["gemma2: error: [Errno 28] No space left on device"]


def test_a_reader_that_is_gone_before_anything_is_written_is_no_error():
    there, here = os.pipe()
    os.close(there)
    running = process("info", "--size", "2b", stdout=here, env={"PYTHONUNBUFFERED": ""})
    os.close(here)
    _, err = running.communicate(timeout=120)
    assert (running.returncode, err) == (0, b"")


def test_closed_streams_are_empty_ones():
    command = [sys.executable, "-m", "gemma2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words, code in (
        ("generate --max-new-tokens 2 bird <&- >&-", 0),
        ("generate - <&-", 1),
        ("chat <&-", 0),
    ):
        line = " ".join([*command, words])
        done = subprocess.run(
            ["sh", "-c", line], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr == ("gemma2: error: stdin is empty\n" if code else "")


def test_ctrl_c_ends_with_130_and_keeps_what_was_written(endless):
    running = process("generate", "--model", endless, "--max-new-tokens", "100000", "bird")
    assert running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert (running.returncode, err) == (130, b"")
    assert out.endswith(b"\n")


def test_warnings_are_one_line_without_our_source(gemma2_command, folder, tmp_path):
    model = gemma2.Gemma2ForCausalLM.from_pretrained(folder)
    model.generation_config.pad_token_id = 2  # which is <bos>, that every prompt begins with
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    code, _, err = gemma2_command("generate", "--model", tmp_path, "--max-new-tokens", 2, "bird")
    assert code == 0
    assert err.startswith("gemma2: warning: generate: input_ids contains pad_token_id (2)")
    assert len(err.splitlines()) == 1


# ---- classify -----------------------------------------------------------------------------------


def test_classify_prints_the_most_probable_classes_first(gemma2_command, classifier):
    code, out, err = gemma2_command("classify", "--model", classifier, "a large cat")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert {label for _, label in rows} == {"good", "bad", "odd"}
    values = [float(value) for value, _ in rows]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1, abs=1e-3)
    assert (
        len(gemma2_command("classify", "--model", classifier, "--top", 2, "x")[1].splitlines()) == 2
    )


def test_classify_json_and_a_text_is_classified_as_if_alone(gemma2_command, classifier):
    texts = ["a large cat", "x"]
    _, out, _ = gemma2_command("classify", "--json", "--model", classifier, *texts)
    found = [json.loads(line) for line in out.splitlines()]
    assert [item["text"] for item in found] == texts
    for text, item in zip(texts, found, strict=True):
        _, alone, _ = gemma2_command("classify", "--json", "--model", classifier, text)
        assert json.loads(alone) == item
        assert set(item["classes"][0]) == {"label", "probability"}


def test_classify_tokens_labels_every_token_but_bos(gemma2_command, tmp_path):
    folder = folder_with(tmp_path, "token", num_labels=2, id2label={0: "no", 1: "yes"})
    code, out, _ = gemma2_command("classify", "--tokens", "--json", "--model", folder, "a cat")
    assert code == 0
    found = json.loads(out)["tokens"]
    assert "".join(item["token"] for item in found) == "a cat"
    assert {item["label"] for item in found} <= {"no", "yes"}
    code, out, _ = gemma2_command("classify", "--tokens", "--model", folder, "a cat")
    assert len(out.splitlines()) == 5


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"num_labels": 1, "problem_type": "regression"}, "value"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "probability"),
    ],
)
def test_classify_gives_numbers_of_a_regression_and_independent_labels(
    gemma2_command, tmp_path, overrides, name
):
    folder = folder_with(tmp_path, "sequence", **overrides)
    _, out, _ = gemma2_command("classify", "--json", "--model", folder, "a cat")
    classes = json.loads(out)["classes"]
    assert len(classes) == overrides["num_labels"]
    model = gemma2.Gemma2ForSequenceClassification.from_pretrained(folder)
    ids = torch.tensor([gemma2.Tokenizer.from_pretrained(folder).encode("a cat")])
    with torch.no_grad():
        logits = model(ids).logits[0]
    wanted = logits if name == "value" else logits.sigmoid()
    assert [item[name] for item in classes] == pytest.approx(sorted(wanted.tolist(), reverse=True))


# ---- info ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "parameters"), [("2b", 2614341888), ("9b", 9241705984), ("27b", 27227128320)]
)
def test_info_counts_the_published_models(gemma2_command, size, parameters):
    code, out, _ = gemma2_command("info", "--size", size, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["model"]["parameters"] == parameters
    assert report["model"]["weights"]["bfloat16, float16"] == 2 * parameters
    assert report["machine"]["in_use"] in report["machine"]["runs"]
    assert set(report["machine"]["runs"]) <= set(report["build"]["instruction_sets"])


def test_info_counts_the_cache_with_its_rings(gemma2_command, folder):
    _, out, _ = gemma2_command("info", "--model", folder, "--json")
    model = gemma2.Gemma2ForCausalLM.from_pretrained(folder)
    shown = json.loads(out)["model"]["cache_by_tokens"]
    cache = gemma2.HybridCache(model.config, 1, 512, device="cpu", dtype=torch.bfloat16)
    assert shown == {"512": cache.nbytes}
    full = 2 * 2 * 512 * model.config.num_key_value_heads * model.config.head_dim * 2
    assert cache.nbytes < full


def test_info_names_build_machine_and_what_is_missing(gemma2_command):
    code, out, err = gemma2_command("info", "--size", "2b")
    assert (code, err) == (0, "")
    cuda = "in this build (CUDA" if _C.build_info()["cuda"] else "not in this build"
    if torch.cuda.is_available():
        cuda = "in use (CUDA" if _C.build_info()["cuda"] else cuda
    for text in ("2,614,341,888", "compiler", "in use", "threads", cuda, "5.23 GB"):
        assert text in out


# ---- bench --------------------------------------------------------------------------------------


def test_bench_measures_a_model(gemma2_command, folder):
    words = ["--prompt-tokens", 8, "--new-tokens", 4, "--runs", 2, "--json"]
    code, out, _ = gemma2_command("bench", "--model", folder, *words)
    assert code == 0
    report = json.loads(out)
    (row,) = report["results"]
    assert row["prefill_tokens_per_s"] >= row["prefill_tokens_per_s_median"] > 0
    assert row["decode_tokens_per_s"] > 0
    assert row["dtype"] == "float32"
    assert report["machine"]["isa"]


def test_bench_measures_operators(gemma2_command, folder):
    words = ["rms_norm", "attention", "--model", folder, "--context", 128, "--json"]
    code, out, _ = gemma2_command("bench", *words)
    assert code == 0
    rows = json.loads(out)["results"]
    names = [row["operator"] for row in rows]
    assert names == ["rms_norm", "attention, prefill", "attention, decode"]
    assert all(row["us"] > 0 and row["GB/s"] > 0 for row in rows)


def test_bench_lists_all_operators(gemma2_command, folder):
    code, out, _ = gemma2_command("bench", "all", "--model", folder, "--context", 128)
    assert code == 0
    from gemma2.bench import OPERATORS

    assert all(f"| {name}" in out for name in OPERATORS)


# ---- what goes wrong ----------------------------------------------------------------------------

WRONG_USAGE = [
    [],
    ["write"],
    ["generate"],
    ["generate", "--temperature", "hot", "x"],
    ["generate", "--temperature", "-1", "x"],
    ["generate", "--temperature", "nan", "x"],
    ["generate", "--top-p", "0", "x"],
    ["generate", "--top-p", "1.5", "x"],
    ["generate", "--top-k", "-1", "x"],
    ["generate", "--min-p", "2", "x"],
    ["generate", "--repetition-penalty", "0", "x"],
    ["generate", "--seed", "-1", "x"],
    ["generate", "--max-new-tokens", "0", "x"],
    ["generate", "--greedy", "--temperature", "1", "x"],
    ["generate", "--num-beams", "2", "--prompt-lookup", "2", "x"],
    ["generate", "--stop", "", "x"],
    ["chat", "--greedy", "--seed", "1"],
    ["chat", "--context", "0"],
    ["chat", "hello"],
    ["perplexity"],
    ["perplexity", "--context", "1", "x"],
    ["perplexity", "--context", "8", "--stride", "8", "x"],
    ["convert", "x"],
    ["convert", "--to", "onnx", "x", "y"],
    ["convert", "--size", "2b", "--config", "z", "x", "y"],
    ["convert", "--dtype", "q8_0", "x", "y"],
    ["generate", "--chat", "x"],
    ["generate", "--raw", "--model", "folder", "x"],
    ["generate", "--dtype", "int8", "x"],
    ["generate", "--threads", "0", "x"],
    ["generate", "--threads", "100000", "x"],
    ["classify", "--top", "0", "x"],
    ["info", "--size", "3b"],
    ["info", "--size", "2b", "--model", "folder"],
    ["bench", "--layers", "2"],
    ["bench", "conv2d"],
]


@pytest.mark.parametrize("words", WRONG_USAGE, ids=" ".join)
def test_wrong_usage_exits_with_2_and_says_how_to_use_it(gemma2_command, words):
    code, out, err = gemma2_command(*words)
    assert (code, out) == (2, "")
    assert "usage: gemma2" in err
    assert "error:" in err.splitlines()[-1]


def failing(tmp_path: Path, folder: str) -> dict[str, tuple[list[str], str]]:
    """name -> arguments, and what the one line says."""
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("x")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    (broken / "tokenizer.json").write_text(tokenizer_json())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    (other / "tokenizer.json").write_text(tokenizer_json())
    return {
        "no folder": (["generate", "--model", "/nowhere", "x"], "--model /nowhere: does not exist"),
        "a file": (["generate", "--model", str(file), "x"], "is not a folder"),
        "an empty folder": (["generate", "--model", str(empty), "x"], "tokenizer.json"),
        "a broken config": (["generate", "--model", str(broken), "x"], "config.json"),
        "another model": (["generate", "--model", str(other), "x"], "llama"),
        "info of an empty folder": (["info", "--model", str(empty)], "holds no config.json"),
        "bench of an empty folder": (["bench", "--model", str(empty)], "tokenizer.json"),
        "an empty text": (["generate", "--model", folder, " "], "TEXT is empty"),
        "not UTF-8": (["generate", "--model", folder, "a\udcff"], "TEXT is not UTF-8"),
        "too many tokens": (
            ["generate", "--model", folder, "--max-new-tokens", "1" * 20, "x"],
            "max_new_tokens is 1",
        ),
        "no chat": (["generate", "--model", folder, "--chat", "x"], "<start_of_turn>"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "no folder",
        "a file",
        "an empty folder",
        "a broken config",
        "another model",
        "info of an empty folder",
        "bench of an empty folder",
        "an empty text",
        "not UTF-8",
        "too many tokens",
        "no chat",
    ],
)
def test_a_failure_exits_with_1_and_one_line(gemma2_command, tmp_path, folder, name):
    words, text = failing(tmp_path, folder)[name]
    code, out, err = gemma2_command(*words)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("gemma2: error: ")
    assert text in line


def test_keys_that_do_not_fit_are_all_listed(gemma2_command, folder):
    code, _, err = gemma2_command("classify", "--model", folder, "x")
    assert code == 1
    assert "score.weight" in err
    assert "Traceback" not in err


def test_debug_shows_where_an_error_comes_from(gemma2_command):
    code, _, err = gemma2_command("generate", "--debug", "--model", "/nowhere", "x")
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("gemma2: error: --model /nowhere: does not exist: ")


def test_an_installation_without_the_embedded_model_says_so(gemma2_command, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "path", lambda: tmp_path)
    code, _, err = gemma2_command("generate", "x")
    assert code == 1
    assert "no embedded model" in err
    assert "--model FOLDER" in err
    code, out, _ = gemma2_command("info", "--json")
    assert code == 0
    assert json.loads(out)["model"] is None

"""Nothing is fetched and nothing of a model's folder is run, whatever lies in it."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma2
from gemma2 import Gemma2ForCausalLM
from gemma2.checkpoint import CheckpointError
from gemma2.convert import convert
from tests.cli.test_cli import folder_with

PACKAGE = Path(gemma2.__file__).parent
NETWORK = {
    *("socket", "ssl", "http", "urllib", "ftplib", "smtplib", "xmlrpc", "telnetlib", "asyncio"),
    *("requests", "urllib3", "httpx", "aiohttp", "huggingface_hub", "fsspec"),
}
# Everything that people do with a model's folder, argv[1]; argv[2] is where to write.
EVERYTHING = """
import sys
from pathlib import Path

events = []
def watch(event, arguments):
    network = event.startswith(("socket.", "urllib.", "http.")) and event != "socket.gethostname"
    if network or event in ("os.system", "os.exec", "os.posix_spawn"):
        events.append((event, str(arguments)))
        raise RuntimeError(f"{event} {arguments}")
sys.addaudithook(watch)

import torch
import gemma2
from gemma2.cli import main
from gemma2.convert import convert
from gemma2.tokenizer import Tokenizer

folder, out = sys.argv[1], Path(sys.argv[2])
torch.set_num_threads(1)
model = gemma2.Gemma2ForCausalLM.from_pretrained(folder)
tokenizer = Tokenizer.from_pretrained(folder)
ids = tokenizer("a bird")["input_ids"]
text = tokenizer.decode(model.generate(ids, max_new_tokens=3)[0])
assert isinstance(text, str)
model.save_pretrained(out / "saved")
tokenizer.save_pretrained(out / "saved")
convert(folder, out / "model.ckpt", to="original")
convert(out / "model.ckpt", out / "hub", config=folder)
text = out / "text.txt"
text.write_text("a small bird sings, and another one listens to it")
for arguments in (
    ["generate", "--model", folder, "--max-new-tokens", "2", "a"],
    ["perplexity", "--model", folder, str(text)],
    ["info", "--model", folder],
    ["convert", folder, str(out / "by-command")],
    ["generate", "--max-new-tokens", "2", "bird"],
    ["classify", "a large cat"],
):
    assert main(arguments) in (0, None), arguments
assert not events, events
"""


def run(
    *command: str, cwd: Path | None = None, text: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    values = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    values.pop("PYTHONPATH", None)
    values["PYTHONPATH"] = str(PACKAGE.parent)
    return subprocess.run(
        command,
        cwd=cwd,
        env=values,
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.name)
def test_no_module_knows_a_network(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        found = {name.partition(".")[0] for name in names} & NETWORK
        assert not found, f"{file}: line {node.lineno}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(folder_with(tmp_path_factory.mktemp("model")))


def _without_network() -> list[str]:
    """Give the command that runs another one where there is no network, [] if there is none."""
    for command in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare"):
            tried = subprocess.run([*command, "true"], capture_output=True, check=False)
            if tried.returncode == 0:
                return command
    return []


def test_everything_works_without_a_network(folder: Path, tmp_path: Path) -> None:
    """Where the system can, in a network namespace that has none; sockets are refused anyway."""
    script = tmp_path / "everything.py"
    script.write_text(EVERYTHING)
    done = run(*_without_network(), sys.executable, str(script), str(folder), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_watcher_sees_a_socket(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "everything.py"
    opened = "import socket; socket.create_connection(('127.0.0.1', 9))\nimport gemma2"
    script.write_text(EVERYTHING.replace("import gemma2", opened, 1))
    done = run(sys.executable, str(script), str(folder), str(tmp_path))
    assert done.returncode != 0
    assert "RuntimeError: socket." in done.stderr


# ---- a folder full of code ----------------------------------------------------------------------

MODULES = (
    *(
        "torch",
        "json",
        "re",
        "numpy",
        "safetensors",
        "tokenizers",
        "tqdm",
        "rich",
        "gguf",
        "typing",
    ),
    *(
        "sitecustomize",
        "usercustomize",
        "conftest",
        "setup",
        "__init__",
        "__main__",
        "_C",
        "gemma2",
    ),
    *("modeling_gemma2", "configuration_gemma2", "tokenization_evil", "generate", "argparse"),
)
JINJA = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x.__init__.__globals__ }}{% endfor %}"
    "{{ cycler.__init__.__globals__.os.system('touch SENTINEL') }}{{ lipsum.__globals__ }}"
)


class Touch:
    """What runs when a pickle is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """A file that exists once any code of the hostile folder has run."""
    return tmp_path / "owned"


@pytest.fixture
def hostile(folder: Path, tmp_path: Path, sentinel: Path) -> Path:
    place = tmp_path / "hostile"
    shutil.copytree(folder, place)
    code = f"open({str(sentinel)!r}, 'a').write(__name__)\n"
    for name in MODULES:
        (place / f"{name}.py").write_text(code)
    (place / "custom_generate").mkdir()
    (place / "custom_generate" / "generate.py").write_text(code)
    (place / "evil.pth").write_text(f"import os; {code}")
    config = json.loads((place / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_gemma2.Gemma2Config",
        "AutoModelForCausalLM": "modeling_gemma2.Gemma2ForCausalLM",
    }
    config["custom_pipelines"] = {"x": {"impl": "modeling_gemma2.X", "pt": ["AutoModel"]}}
    config["trust_remote_code"] = True
    (place / "config.json").write_text(json.dumps(config))
    jinja = JINJA.replace("SENTINEL", str(sentinel))
    (place / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Evil",
                "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
                "chat_template": jinja,
            }
        )
    )
    (place / "chat_template.jinja").write_text(jinja)
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "model.pkl",
        "scheduler.pth",
        "rng_state.npy",
    ):
        (place / name).write_bytes(pickle.dumps(Touch(sentinel)))
    return place


def test_a_folder_s_code_is_not_run_by_the_library(
    hostile: Path, sentinel: Path, tmp_path: Path
) -> None:
    """The working directory is the folder, too."""
    script = tmp_path / "everything.py"
    script.write_text(EVERYTHING)
    done = run(sys.executable, str(script), str(hostile), str(tmp_path), cwd=hostile)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not sentinel.exists(), sentinel.read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", ".", "--max-new-tokens", "2", "a"],
        ["convert", ".", "../converted"],
        ["chat", "--model", "."],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_s_code_is_not_run_by_the_command_in_it(
    arguments: list[str], hostile: Path, sentinel: Path
) -> None:
    """The script `gemma2` does not look for modules where it is called, unlike `python -m gemma2`."""
    script = Path(sys.executable).with_name("gemma2")
    if not script.is_file():
        pytest.skip(f"{script} is not installed")
    done = run(str(script), *arguments, cwd=hostile, text="hello\n")
    # this vocabulary knows no turns
    assert done.returncode == (1 if arguments[0] == "chat" else 0), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert not sentinel.exists(), sentinel.read_text()


def test_the_sentinel_would_show(hostile: Path, sentinel: Path) -> None:
    """By Python's own rule `python -m` looks for modules where it is called; `-P` ends that."""
    run(sys.executable, "-m", "gemma2", "--version", cwd=hostile)
    assert sentinel.exists()
    sentinel.unlink()
    if sys.version_info >= (3, 11):
        assert run(sys.executable, "-P", "-m", "gemma2", "--version", cwd=hostile).returncode == 0
        assert not sentinel.exists()


@pytest.mark.parametrize("place", ["value", "beside", "bare", "old"])
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.ckpt"]
)
def test_code_in_a_pickle_is_refused_and_not_run(
    name: str, place: str, folder: Path, tmp_path: Path, sentinel: Path
) -> None:
    hostile = tmp_path / "pickles"
    hostile.mkdir()
    shutil.copy(folder / "config.json", hostile)
    weights = {"model.norm.weight": torch.zeros(8)}
    state: Any = {
        "value": {**weights, "x": Touch(sentinel)},
        "beside": {"model_state_dict": weights, "optimizer": Touch(sentinel)},
    }.get(place, Touch(sentinel))
    if place == "bare":
        (hostile / name).write_bytes(pickle.dumps(state))
    else:
        torch.save(state, hostile / name, _use_new_zipfile_serialization=place != "old")
    index = {"weight_map": {"model.norm.weight": name}}
    (hostile / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for read in (
        lambda: Gemma2ForCausalLM.from_pretrained(hostile),
        lambda: convert(hostile, tmp_path / "converted"),
        lambda: convert(hostile / name, tmp_path / "converted", config=hostile),
    ):
        with pytest.raises((CheckpointError, ValueError, OSError)):
            read()
        assert not sentinel.exists()
    pickle.loads(pickle.dumps(Touch(sentinel)))
    assert sentinel.exists()

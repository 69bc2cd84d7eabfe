"""`gemma2 chat`: a session in a terminal, and as a part of a script."""

from __future__ import annotations

import io
import json
import os
import re
import sys

import pytest

from gemma2 import cli
from gemma2.cli.terminal import complete_part
from tests.cli.chat_model import chat_folder
from tests.cli.terminal import PROMPT, Terminal
from tests.model.libraries import END

COUNTS = r"(\d+) messages, (\d+) tokens of \d+\nthe model has read (\d+) tokens in all, (\d+) of "
COUNTS += r"them again; its cache holds (\d+) in"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return chat_folder(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def terminal(folder):
    """Opens a terminal with a chat in it, at its first prompt."""
    opened = []

    def make(*options: str, **environment: str) -> Terminal:
        words = ["chat", "--model", folder, *options]
        made = Terminal(*words, **{"TERM": "dumb", **environment})
        opened.append(made)
        made.wait_for(rf"(?m)^{PROMPT}")
        return made

    yield make
    for made in opened:
        made.close()


def counts(shown: str) -> dict[str, int]:
    found = re.search(COUNTS, shown)
    assert found, shown
    names = ("messages", "tokens", "read", "again", "cached")
    return dict(zip(names, map(int, found.groups()), strict=True))


# ---- in a terminal ------------------------------------------------------------------------------


def test_a_session(terminal, tmp_path):
    """Two turns, the second one stopped, a third one, saved, begun anew, left."""
    file = tmp_path / "talk.json"
    chat = terminal("--max-new-tokens", "1200")
    assert "room for 8192 tokens" in chat.screen
    first = chat.ask("hello there")
    assert "(cut after 1200 tokens" in first
    chat.type("a b\n")
    chat.wait_for("\n[a-z ]{3}")
    chat.type("\x03")
    stopped = chat.wait_for(rf"(?m)^{PROMPT}")
    assert "(stopped)" in stopped
    third = chat.ask("hell")
    assert "(cut after" in third
    found = counts(chat.ask("/stats"))
    assert found["messages"] == 6
    assert found["read"] == found["cached"] == found["tokens"] - 2
    assert found["again"] == 0
    assert "6 messages in" in chat.ask(f"/save {file}")
    assert "(a new conversation)" in chat.ask("/reset")
    assert counts(chat.ask("/stats")) == dict.fromkeys(found, 0)
    chat.type("\x04")
    assert chat.ended() == 0
    assert "Traceback" not in chat.screen
    assert "\x1b" not in chat.screen, "TERM=dumb"
    saved = json.loads(file.read_text())
    assert [m["content"] for m in saved["messages"][::2]] == ["hello there", "a b", "hell"]
    lengths = [len(m["content"]) for m in saved["messages"][1::2]]
    assert 3 <= lengths[1] < lengths[0] / 2
    assert saved["messages"][1]["content"] in first
    assert saved["messages"][5]["content"] in third


def test_ctrl_c_twice_at_the_prompt_leaves_and_once_does_not(terminal):
    chat = terminal("--max-new-tokens", "5")
    chat.ctrl_c()
    chat.wait_for(rf"Ctrl-C again.*?(?m:^){PROMPT}")
    chat.ask("hello")
    chat.ctrl_c()
    chat.wait_for(rf"Ctrl-C again.*?(?m:^){PROMPT}")
    chat.ctrl_c()
    assert chat.ended() == 130
    assert "Traceback" not in chat.screen


def test_a_message_has_several_lines(terminal, tmp_path):
    file = tmp_path / "talk.json"
    chat = terminal("--max-new-tokens", "2")
    chat.type("hello\\\n")
    chat.wait_for(r"(?m)^\. ")
    chat.ask("there")
    chat.type('"""a\n')
    chat.wait_for(r"(?m)^\. ")
    chat.type("\n")
    chat.wait_for(r"(?m)^\. ")
    chat.ask('/b"""')
    chat.ask(" /a")
    chat.ask(f"/save {file}")
    chat.ask("/nonsense")
    assert "there is no command /nonsense" in chat.screen
    chat.type("/quit\n")
    assert chat.ended() == 0
    messages = json.loads(file.read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == ["hello\nthere", "a\n\n/b", "/a"]


CODES = r"\x1b\[[\d;?]*[A-Za-z]"


def test_markdown_is_drawn_where_the_terminal_can(terminal):
    """The same answer twice; what erases and colours is only in the first."""
    erases = r"\x1b\[(\d*[AK]|[\d;]*m)"
    chat = terminal("--max-new-tokens", "30", TERM="xterm-256color")
    drawn = chat.ask("hello")
    assert re.search(erases, drawn)
    chat.type("/quit\n")
    assert chat.ended() == 0
    plain = terminal("--max-new-tokens", "30", TERM="xterm-256color", NO_COLOR="1").ask("hello")
    assert not re.search(erases, plain)
    text = re.sub(rf"{CODES}|\(cut.*|\s", "", plain)
    assert len(text) >= 20
    assert text in re.sub(rf"{CODES}|\s", "", drawn)


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("a", ""),
        ("a\n\n", ""),
        ("a\n\nb", "a\n\n"),
        ("a\n\n  still a's item", ""),
        ("```\na\n\nb\n", ""),
        ("```\na\n\nb\n```\n\nc\n\nd", "```\na\n\nb\n```\n\nc\n\n"),
        ("\n\na", "\n\n"),
    ],
)
def test_paragraphs_are_complete_when_nothing_can_change_them(text, complete):
    assert text[: complete_part(text)] == complete


# ---- in a script --------------------------------------------------------------------------------


@pytest.fixture
def script(capfd, monkeypatch):
    """Runs the chat with lines on stdin; gives exit code, stdout, stderr."""

    def run(lines: str, *options: str) -> tuple[int, str, str]:
        stdin = io.TextIOWrapper(io.BytesIO(lines.encode("utf-8", "surrogateescape")), "utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        try:
            code = cli.main(["chat", *map(str, options)])
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_a_backslash_at_the_end_of_the_input_loses_no_message(script, folder):
    options = ["--model", folder, "--max-new-tokens", 9]
    whole = script("hello\n", *options)
    assert whole[1]
    assert script("hello\\", *options) == script("hello\\\n", *options) == whole


def test_a_script_gets_an_object_for_each_answer(script, folder):
    options = ["--model", folder, "--json", "--max-new-tokens", 9]
    code, out, err = script("hello\na b\n/stats\n", *options)
    assert (code, err.count("(cut after 9 tokens")) == (0, 2)
    first, second, stats = map(json.loads, out.splitlines())
    assert second["prompt_tokens"] == first["prompt_tokens"] + second["prompt_tokens_read"] + 8
    assert stats["read_tokens"] == stats["cached_tokens"] == stats["conversation_tokens"] - 2
    assert second["tokens"][-1] != END
    code, out, _ = script("hello\na b\n", *options[:2], *options[3:])
    assert (code, out) == (0, f"{first['text'].lstrip()}\n{second['text'].lstrip()}\n")


def test_a_conversation_is_saved_and_goes_on(script, folder, tmp_path):
    file = tmp_path / "talk.json"
    options = ["--model", folder, "--max-new-tokens", 9, "--temperature", 0.7, "--seed", 4]
    code, out, _ = script(f"hello\n/save {file}\na b\n", *options)
    assert code == 0
    saved = json.loads(file.read_text())
    assert saved["settings"] == {
        "temperature": 0.7, "do_sample": True, "max_new_tokens": 9, "seed": 5,
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [file], "no temporary file stays"
    code, again, err = script("a b\n", "--model", folder, "--load", file)
    assert (code, again) == (0, out.splitlines(keepends=True)[1])
    assert "(2 messages from" in err
    _, other, _ = script(f"/load {file}\na b\n", "--model", folder, "--greedy")
    assert other != again, "options of the command line go before those of the file"


def test_a_conversation_is_saved_at_home(script, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--model", folder, "--max-new-tokens", 2]
    assert script("hello\n/save ~/talk.json\n/reset\n/load ~/talk.json\n", *options)[0] == 0
    assert (tmp_path / "talk.json").is_file()


def test_a_place_that_cannot_be_written_is_named(script, folder, tmp_path):
    place = tmp_path / "nowhere" / "talk.json"
    code, _, err = script(f"hello\n/save {place}\n", "--model", folder, "--max-new-tokens", 2)
    assert code == 1
    assert err.splitlines()[-1] == f"gemma2: error: {place}: No such file or directory"


def test_saving_replaces_conversations_only_and_never_in_part(
    script, folder, tmp_path, monkeypatch
):
    file = tmp_path / "notes.txt"
    file.write_text("dear diary")
    code, _, err = script(f"hello\n/save {file}\n", "--model", folder, "--max-new-tokens", 2)
    assert code == 1
    assert "exists and is no conversation" in err
    assert file.read_text() == "dear diary"
    talk = tmp_path / "talk.json"
    script(f"hello\n/save {talk}\n", "--model", folder, "--max-new-tokens", 2)
    before = talk.read_text()
    assert talk.stat().st_mode == file.stat().st_mode  # not for its owner's eyes only

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = script(f"/save {talk}\n", "--model", folder)
    assert code == 1
    assert "No space left" in err
    assert talk.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "talk.json"]


@pytest.mark.parametrize(
    ("lines", "options", "text"),
    [
        ("/system be kind\n", [], "put the text at the beginning of your first message"),
        ("/sing\n", [], "there is no command /sing"),
        ("/save\n", [], "/save needs a FILE"),
        ("/reset now\n", [], "/reset takes nothing more"),
        ("/retry\n", [], "there is no answer yet"),
        ("/load /nowhere\n", [], "/nowhere: does not exist"),
        ("hello\n", ["--context", "9"], "the context is full"),
        ("hello\n", ["--context", "8193"], "the model was made for 8192 tokens"),
        ("hello\n", ["--load", "/nowhere"], "/nowhere: does not exist"),
        ("\udcff\n", [], "stdin is not UTF-8"),
        ('"""hello\n', [], "ends within"),
    ],
)
def test_what_goes_wrong_in_a_script_ends_it_with_one_line(script, folder, lines, options, text):
    code, out, err = script(lines, "--model", folder, *options)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("gemma2: error: ")
    assert text in line


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"messages": [1]}', '{"messages": 1}', "\0"])
def test_a_file_that_is_no_conversation_is_named(script, folder, tmp_path, content):
    file = tmp_path / "file.json"
    file.write_text(content)
    code, _, err = script("", "--model", folder, "--load", file)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert f"{file}: " in err


def test_nothing_to_say_is_no_error(script, folder):
    assert script("", "--model", folder) == (0, "", "")
    assert script("\n\n", "--model", folder) == (0, "", "")


def test_a_model_without_turns_is_no_partner(script, tmp_path):
    from tests.cli.test_cli import folder_with

    code, _, err = script("hello\n", "--model", folder_with(tmp_path))
    assert code == 1
    assert "the vocabulary has no <start_of_turn>: it knows no turns" in err


def test_the_embedded_model_defines_each_message(script):
    code, out, err = script("a small bird\na tree\na small bird\n")
    assert (code, err) == (0, "")
    first, second, third = out.splitlines()
    assert first == third != second

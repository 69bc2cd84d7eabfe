"""`gemma2 chat`: a conversation in the terminal, whose history stays in the cache."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2.cli.options import (
    Commands,
    check_sampling,
    count,
    sampling_given,
    sampling_of,
    sampling_options,
    weights_options,
)
from gemma2.cli.shared import CommandError, device_of, load_causal_lm, say, set_threads
from gemma2.cli.terminal import Answer, answer_view, read_message

if TYPE_CHECKING:
    from gemma2.cli.conversation import Conversation

__all__ = ["add"]

EXAMPLES = """\
The model reads each token once: what has been said stays in its cache. Ctrl-C stops an answer and
keeps what was written; Ctrl-C twice, Ctrl-D or /quit leave. /help lists the commands. A line that
ends with a backslash goes on in the next one, and \"\"\" begins and ends a message of several lines.
Without --model, each message is a word or phrase that the embedded model defines.

examples:
  gemma2 chat --model gemma-2-2b-it
  gemma2 chat --model gemma-2-9b-it --device cuda --temperature 0.8 --seed 1
  gemma2 chat --model gemma-2-2b-it --load talk.json
  echo "Why is the sky blue?" | gemma2 chat --model gemma-2-2b-it --json
"""
HELP = """\
/reset       begin a new conversation
/retry       write the last answer again (another one when sampling)
/save FILE   keep the conversation in a file
/load FILE   go on with one from a file, and its settings unless the command line has some
/stats       tokens, what the model has read of them, memory, speed
/help        this list
/quit        leave (also Ctrl-D, or Ctrl-C twice)
A message that begins with a slash: put a space before it."""


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    chat = commands.add(
        "chat",
        _run,
        "talk with an instruction-tuned model",
        EXAMPLES,
        weights_options(),
        sampling_options(new_tokens=1024),
    )
    chat.add_argument("--load", metavar="FILE", help="go on with a conversation from /save")
    chat.add_argument(
        "--context",
        type=count,
        metavar="N",
        help="tokens that the conversation can have (as many as the model was made for)",
    )
    chat.add_argument("--plain", action="store_true", help="show answers as text, not as Markdown")


def _run(args: argparse.Namespace) -> None:
    check_sampling(args)
    if args.load:
        args.load = _read(args.load)
    set_threads(args)
    chat = _Chat(args, _conversation(args))
    if args.load:
        chat.load(args.load)
    chat.run()


def _conversation(args: argparse.Namespace) -> Conversation:
    model, tokenizer = load_causal_lm(args, device_of(args))
    from gemma2.cli.conversation import Conversation, Definitions

    most = model.config.max_position_embeddings
    if args.context is not None and args.context > most:
        raise CommandError(f"--context {args.context}: the model was made for {most} tokens")
    options, seed = sampling_of(args, model.generation_config)
    kind = Definitions if args.model is None else Conversation
    return kind(model, tokenizer, options, args.context or most, seed)


# ---- files --------------------------------------------------------------------------------------


def _read(name: str) -> dict[str, Any]:
    """Read what `_write` wrote."""
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(f"{name}: does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CommandError(f"{name}: not readable as JSON: {error}") from error
    messages = found.get("messages") if isinstance(found, dict) else None
    settings = found.get("settings", {}) if isinstance(found, dict) else None
    if not isinstance(messages, list) or not isinstance(settings, dict):
        raise CommandError(f"{name}: holds no conversation: /save writes one")
    for message in messages:
        if not isinstance(message, dict):
            raise CommandError(f"{name}: holds the message {message!r}: it must be an object")
    return {"name": name, "messages": messages, "settings": settings}


def _write(name: str, content: dict[str, Any]) -> None:
    """Write a file that is whole at every moment; replaces a conversation and nothing else."""
    from gemma2.staging import staged_file

    path = Path(name)
    if path.exists():
        try:
            _read(name)
        except CommandError:
            raise CommandError(
                f"{name}: exists and is no conversation: it stays as it is"
            ) from None
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        path.parent.stat()  # a folder that is missing may be a slip: it is not made
        with staged_file(path) as writing:
            writing.write_text(text, encoding="utf-8")
    except OSError as error:  # which may name the temporary file, or none
        raise CommandError(f"{name}: {error.strerror}") from error


# ---- the session --------------------------------------------------------------------------------


class _Chat:
    """Reads messages and commands until there are no more."""

    def __init__(self, args: argparse.Namespace, conversation: Conversation) -> None:
        self.args, self.conversation = args, conversation
        self.interactive = sys.stdin.isatty()
        self.view = answer_view(args.plain, args.json)

    def run(self) -> None:
        if self.interactive:
            say(self._greeting())
        interrupted = False
        while True:
            try:
                self._take(read_message())
                interrupted = False
            except EOFError:
                if self.interactive:
                    say("")
                return
            except KeyboardInterrupt:
                if interrupted or not self.interactive:
                    raise
                interrupted = True
                say("\n(Ctrl-C again, Ctrl-D or /quit leave)")
            except (CommandError, OSError) as error:
                # what only a person can put right; a script must not go on without it
                if not self.interactive or isinstance(error, BrokenPipeError):
                    raise
                say(f"gemma2: error: {error}")

    def _greeting(self) -> str:
        if self.args.model is None:
            return (
                "The embedded model is no partner for a conversation: it defines each word or "
                "phrase on its own, and remembers nothing. --model FOLDER talks to one that does."
            )
        return (
            f"{self.args.model}, room for {self.conversation.context} tokens. /help lists commands."
        )

    def _take(self, text: str) -> None:
        if not text.strip():
            return
        found = re.fullmatch(r"/([a-z]+|\?)(?:\s+(.*))?", text.rstrip(), re.S)
        if not found:
            self._answer(self.conversation.ask(text))
            return
        name, rest = found[1], (found[2] or "").strip()
        commands = {
            "reset": self._reset, "retry": self._retry, "save": self._save, "load": self._load,
            "stats": self._stats, "help": self._help, "?": self._help, "quit": self._quit,
            "exit": self._quit, "system": self._system,
        }  # fmt: skip
        if name not in commands:
            raise CommandError(f"there is no command /{name}: /help lists them")
        if bool(rest) != (name in ("save", "load")) and name != "system":
            raise CommandError(f"/{name} " + ("takes nothing more" if rest else "needs a FILE"))
        commands[name](rest)

    def _answer(self, pieces: Generator[str, None, None]) -> None:
        conversation = self.conversation
        before = conversation.written
        try:
            with _ctrl_c_stops(conversation):
                self._show(pieces)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            if conversation.written == before:
                say("(stopped before the answer began: the message is not in the history)")
                return
        if self.args.json:
            print(json.dumps({**conversation.last, **conversation.stats()}), flush=True)
        reason = conversation.last["finish_reason"]
        if reason == "stopped" and not self.interactive:
            raise KeyboardInterrupt
        notes = {
            "stopped": "(stopped)",
            "length": f"(cut after {conversation.last['new_tokens']} tokens: --max-new-tokens)",
            "context": f"(the context of {conversation.context} tokens is full: /reset, /save FILE)",
        }
        if reason in notes:
            say(notes[reason])

    def _show(self, pieces: Generator[str, None, None]) -> None:
        view: Answer = self.view()
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    view.put(piece)
        finally:
            view.end()

    # ---- commands -------------------------------------------------------------------------------

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        say("(a new conversation)")

    def _retry(self, _: str) -> None:
        pieces = self.conversation.ask_again()
        if self.conversation.seed is None:
            say("(the most probable answer is the same each time: --temperature 0.8 would vary it)")
        self._answer(pieces)

    def _save(self, name: str) -> None:
        conversation = self.conversation
        content = {
            "model": self.args.model,
            "settings": conversation.settings(),
            "messages": conversation.messages,
        }
        _write(os.path.expanduser(name), content)
        say(f"({len(conversation.messages)} messages in {name})")

    def _load(self, name: str) -> None:
        self.load(_read(os.path.expanduser(name)))

    def load(self, found: dict[str, Any]) -> None:
        """Go on with what `_read` found."""
        settings = {} if sampling_given(self.args) else found["settings"]
        try:
            self.conversation.replay(found["messages"], settings)
        except (TypeError, ValueError) as error:
            raise CommandError(f"{found['name']}: {error}") from error
        say(f"({len(found['messages'])} messages from {found['name']})")

    def _stats(self, _: str) -> None:
        found = self.conversation.stats()
        if self.args.json:
            print(json.dumps(found), flush=True)
            return
        print(
            f"{found['messages']} messages, {found['conversation_tokens']} tokens of {found['context']}\n"
            f"the model has read {found['read_tokens']} tokens in all, "
            f"{found['read_again_tokens']} of them again; its cache holds "
            f"{found['cached_tokens']} in {found['cache_bytes'] / 2**20:.1f} MiB"
        )
        last = self.conversation.last
        if last:
            print(
                f"last answer: {last['prompt_tokens_read']} tokens read at "
                f"{last['prefill_tokens_per_s']:.0f} tokens/s, {last['new_tokens']} written at "
                f"{last['decode_tokens_per_s']:.1f} tokens/s"
                + ("" if last["seed"] is None else f", seed {last['seed']}")
            )
        sys.stdout.flush()

    def _help(self, _: str) -> None:
        print(HELP, flush=True)

    def _quit(self, _: str) -> None:
        raise EOFError

    def _system(self, _: str) -> None:
        raise CommandError(
            "Gemma 2 has no system role: put the text at the beginning of your first message, "
            "followed by an empty line"
        )


@contextlib.contextmanager
def _ctrl_c_stops(conversation: Conversation) -> Iterator[None]:
    """Let Ctrl-C end the answer between two tokens, and a second one at once."""
    before = signal.signal(signal.SIGINT, lambda signum, frame: conversation.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

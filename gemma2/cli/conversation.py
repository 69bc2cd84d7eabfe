"""A conversation with a model: its tokens, its messages, and the cache that has read them.

The tokens are the truth. What the model writes is kept as it was written and never tokenised again, and
a new message is tokenised alone and appended, so the cache always holds the beginning of the next
prompt and the model reads each token once.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.cli.options import SETTINGS
from gemma2.cli.shared import CommandError, per_second
from gemma2.generation import GenerationConfig

if TYPE_CHECKING:
    from gemma2 import Gemma2ForCausalLM, Tokenizer

__all__ = ["Conversation", "Definitions"]

# The end of the text before the last message, and of that message: so that it can be taken back, or
# answered again, when the sliding layers have forgotten what was before.
_SNAPSHOTS = 2


class _CountingCache(HybridCache):
    """Counts the tokens that the model reads."""

    read = 0

    def commit(self, q_start: Tensor, kv_len: Tensor, columns: int) -> None:
        super().commit(q_start, kv_len, columns)
        self.read += columns

    def advance(self, n: int) -> None:  # a replayed graph has read them
        super().advance(n)
        self.read += n


class Conversation:
    """Messages of a user and a model in turn.

    Args:
        options: of `generate`; `max_new_tokens` among them.
        context: tokens that the conversation can have.
        seed: of the first answer when sampling; each later one has the next. None: greedy.

    Attributes:
        ids: every token of the conversation so far. The model has read all but the last few.
        messages: the same as {"role": "user" or "assistant", "content"}.
        last: figures of the last answer; empty before it.

    Raises:
        ValueError: the vocabulary knows no turns.
    """

    def __init__(
        self,
        model: Gemma2ForCausalLM,
        tokenizer: Tokenizer,
        options: Mapping[str, Any],
        context: int,
        seed: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.options, self.context, self.seed = dict(options), context, seed
        self.written = 0  # answers, for their seeds
        self._begun = self._stopped = False  # of the answer that is being written
        self._end = self._end_of_turn()
        own = model.generation_config.eos_token_ids
        ends = {*own, self._end, tokenizer.eos_id}
        self._ends = sorted(end for end in ends if end is not None)
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.ids: list[int] = []
        self.messages: list[dict[str, str]] = []
        self.last: dict[str, Any] = {}
        self._answers: list[int] = []  # where in `ids` each answer begins
        self.cache = _CountingCache(self.model.config, 1, keep_snapshots=_SNAPSHOTS)

    # ---- tokens of a turn -----------------------------------------------------------------------

    def _end_of_turn(self) -> int | None:
        self.tokenizer.encode_chat([])  # raises without turns
        return self.tokenizer.end_of_turn_id

    def _prompt(self, text: str) -> list[int]:
        """Give the conversation's tokens with `text` as the user's next message, up to the answer."""
        turn = self.tokenizer.encode_chat([{"role": "user", "content": text}])
        if not self.ids:
            return turn
        first = 0 if self.tokenizer.bos_id is None else 1
        return [*self.ids, *self.tokenizer.encode("\n", add_bos=False), *turn[first:]]

    def _closed(self, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        """Give prompt and answer with one end of turn, whether the model wrote it or not."""
        body = answer[:-1] if answer and answer[-1] in self._ends else answer
        return [*prompt, *body, *([] if self._end is None else [self._end])]

    # ---- answers --------------------------------------------------------------------------------

    def ask(self, text: str) -> Generator[str, None, None]:
        """Give the answer to a message in pieces; it is in the history when the last has been taken.

        An answer that is stopped, interrupted or closed is in the history as far as it has come. Before
        its first token KeyboardInterrupt passes through, and the message is not in the history either.

        Raises:
            CommandError: the message is empty, or the context is full. Nothing has been changed.
        """
        if not text.strip():
            raise CommandError("the message is empty")
        message = {"role": "user", "content": text.strip()}
        return self._answer(self._prompt(text), [*self.messages, message], self._answers)

    def ask_again(self) -> Generator[str, None, None]:
        """Give another answer to the last message, in place of the last one; as `ask`."""
        if not self.messages:
            raise CommandError("there is no answer yet that could be written again")
        prompt = self.ids[: self._answers[-1]]
        return self._answer(prompt, self.messages[:-1], self._answers[:-1])

    def stop(self) -> None:
        """End the answer after the token that is being computed; for signal handlers.

        Raises:
            KeyboardInterrupt: it has not begun, or this is the second time.
        """
        if self._stopped or not self._begun:
            raise KeyboardInterrupt
        self._stopped = True

    def _answer(
        self, prompt: list[int], messages: list[dict[str, str]], answers: list[int]
    ) -> Generator[str, None, None]:
        room = self.context - len(prompt)
        if room < 1:
            raise CommandError(
                f"the context is full: with this message the conversation has {len(prompt)} tokens, "
                f"and there is room for {self.context}: /reset begins a new one, /save FILE keeps "
                "this one, and --context N makes more room where the model allows it"
            )
        return self._write(prompt, messages, answers, room)

    def _write(
        self, prompt: list[int], messages: list[dict[str, str]], answers: list[int], room: int
    ) -> Generator[str, None, None]:
        cache, options = self.cache, dict(self.options)
        most = min(options.pop("max_new_tokens"), room)
        seed = None if self.seed is None else (self.seed + self.written) % 2**63
        decoder = self.tokenizer.decode_stream()
        tokens: list[int] = []
        pieces: list[str] = []
        self._begun = self._stopped = False
        before, start = cache.read, time.perf_counter()
        content = torch.tensor([prompt], device=self.model.device)
        steps = self.model.stream(
            content,
            # all of it are tokens, even one that is called padding and that the model has written
            attention_mask=torch.ones_like(content),
            past_key_values=cache,
            max_new_tokens=most,
            eos_token_id=self._ends,
            seed=seed,
            **options,
        )
        try:
            for step in steps:
                if not tokens:
                    read, first = cache.read - before, time.perf_counter()
                tokens.append(int(step))
                self._begun = True
                piece = "" if tokens[-1] in self._ends else decoder.put(tokens[-1])
                if piece:
                    pieces.append(piece)
                    yield piece
                if self._stopped:
                    break
            pieces.append(decoder.end())
            yield pieces[-1]
        except (KeyboardInterrupt, GeneratorExit):
            if not tokens:
                raise
        finally:
            self._begun = False
            steps.close()  # type: ignore[attr-defined]  # a generator
        end = time.perf_counter()
        text = "".join(pieces) + decoder.end()
        self.ids = self._closed(prompt, tokens)
        self.messages = [*messages, {"role": "assistant", "content": text.strip()}]
        self._answers = [*answers, len(prompt)]
        self.written += 1
        self.last = {
            "text": text,
            "tokens": tokens,
            "finish_reason": self._reason(tokens, most, room),
            "seed": seed,
            "prompt_tokens": len(prompt),
            "prompt_tokens_read": read,
            "new_tokens": len(tokens),
            "prefill_tokens_per_s": per_second(read, first - start),
            "decode_tokens_per_s": per_second(len(tokens) - 1, end - first),
        }

    def _reason(self, tokens: Sequence[int], most: int, room: int) -> str:
        """Tell why an answer of these tokens has ended; `most` were allowed, for `room` is room."""
        if tokens[-1] in self._ends:
            return "end"
        if len(tokens) < most:
            return "stopped"
        return "length" if most < room else "context"

    # ---- what is known of it --------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Give counts of tokens: all, cached, read by the model in all, read again; and bytes."""
        return {
            "messages": len(self.messages),
            "conversation_tokens": len(self.ids),
            "context": self.context,
            "cached_tokens": self.cache.get_seq_length(),
            "read_tokens": self.cache.read,
            "read_again_tokens": self.cache.reprocessed,
            "cache_bytes": self.cache.nbytes,
        }

    # ---- files ----------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Give the options, and as `seed` that of the next answer."""
        if self.seed is None:
            return dict(self.options)
        return {**self.options, "seed": (self.seed + self.written) % 2**63}

    def replay(
        self, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any] | None = None
    ) -> None:
        """Take the messages of a conversation for this one's; they are read with the next prompt.

        Args:
            settings: as `settings` gave them. None or empty: those that this conversation has.

        Raises:
            TypeError, ValueError: they do not take turns, or the last one has no answer, or the
                settings make no sense. Nothing has been changed.
        """
        given = settings or self.settings()
        options = {name: value for name, value in given.items() if value is not None}
        seed = options.pop("seed", None)
        unknown = sorted(set(options) - set(SETTINGS))
        if unknown:
            raise ValueError(f"there is no setting {unknown[0]!r}")
        GenerationConfig(**options)  # raises for values that make no sense
        if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
            raise ValueError(f"the seed is {seed!r}: it must be a whole number in [0, 2**63)")
        self.tokenizer.encode_chat(messages)  # raises where they are no conversation
        if len(messages) % 2:
            raise ValueError("the last message has no answer")
        self.options = {"max_new_tokens": self.options["max_new_tokens"], **options}
        self.seed, self.written = seed, 0
        self.reset()
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            prompt = self._prompt(question["content"])
            text = answer["content"].strip()
            body = self.tokenizer.encode(text, add_bos=False, allow_special=False)
            self.ids = self._closed(prompt, body)
            self._answers.append(len(prompt))
            self.messages += [
                {"role": "user", "content": question["content"].strip()},
                {"role": "assistant", "content": text},
            ]


class Definitions(Conversation):
    """The embedded model as a partner: it defines what it is told, and remembers nothing of it."""

    def _end_of_turn(self) -> None:
        return None

    def _prompt(self, text: str) -> list[int]:
        from gemma2 import tiny

        return self.tokenizer.encode(tiny.prompt(text), allow_special=False)

    def replay(
        self, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any] | None = None
    ) -> None:
        """Refuse: there is nothing that a later answer would depend on."""
        raise ValueError(
            "the embedded model remembers no conversation: load it with --model FOLDER"
        )

"""The options of generation: names, defaults, checks, and the file `generation_config.json`.

Names and defaults are those of transformers, so that the files of the hub mean here what they mean
there.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma2.config import read_json, show

__all__ = ["DEFAULT_NEW_TOKENS", "GenerationConfig"]

FILE_NAME = "generation_config.json"

# What transformers gives when neither max_new_tokens nor max_length is set.
DEFAULT_NEW_TOKENS = 20

# Of any count or id: sizes of tensors are made of these.
MOST = 2**31 - 1

# What scores, which are float32, are multiplied with or divided by.
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-30, 1e30

# Options of transformers that change the result and are not implemented, with the values at which
# they do nothing. Anything else is an error when text is generated, never silently ignored.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "custom_generate": (None,),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "max_time": (None,),
    "negative_prompt_ids": (None,),
    "num_beam_groups": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "penalty_alpha": (None, 0.0),
    "position_ids": (None,),
    "prefix_allowed_tokens_fn": (None,),
    "renormalize_logits": (None, False),
    "sequence_bias": (None,),
    "token_healing": (None, False),
    "typical_p": (None, 1.0),
    "use_cache": (None, True),
    "watermarking_config": (None,),
}


def refuse_unsupported(options: Mapping[str, Any], source: str) -> None:
    """Raise ValueError for the first option that asks for what is not implemented.

    Args:
        options: names and values; names that are not known here are left to the caller.
        source: where they come from, for the error's text.
    """
    for name, value in options.items():
        neutral = UNSUPPORTED.get(name)
        # `is` and types first: comparing a tensor or an array with == gives no bool
        if neutral is None or value is None:
            continue
        if not any(type(value) in (type(n), int, float) and value == n for n in neutral):
            simple = isinstance(value, (bool, int, float, str))
            shown = repr(value) if simple else f"a {type(value).__name__}"
            default = neutral[-1]
            raise ValueError(
                f"generate: {name} is {shown} ({source}): this option is not supported yet; "
                f"leave it out or set it to {default}"
            )


def _error(name: str, value: object, wanted: str) -> str:
    return f"generate: {name} is {show(value)}: it must be {wanted}"


def _integer(name: str, value: object, wanted: str, least: int = 0) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(_error(name, value, wanted)) from None
    if number < least:
        raise ValueError(_error(name, value, wanted))
    if number > MOST:
        raise ValueError(_error(name, value, f"{wanted}, and at most {MOST}"))
    return number


def _real(name: str, value: object, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(_error(name, value, wanted))
    try:
        number = float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(_error(name, value, wanted))
    return number


def _factor(name: str, value: object, zero: bool = False) -> float:
    wanted = f"a number from {SMALLEST_FACTOR:g} to {LARGEST_FACTOR:g}"
    if zero:
        wanted += ", or 0, which is greedy"
    number = _real(name, value, wanted)
    if not (SMALLEST_FACTOR <= number <= LARGEST_FACTOR or (zero and number == 0)):
        raise ValueError(_error(name, value, wanted))
    return number


def _token_ids(name: str, value: Any, wanted: str) -> int | list[int]:
    scalar = isinstance(value, (str, bytes)) or getattr(value, "ndim", None) == 0
    if isinstance(value, Iterable) and not scalar and not isinstance(value, Mapping):
        return [_integer(name, item, wanted) for item in value]
    return _integer(name, value, wanted)


def _strings(name: str, value: Any) -> list[str] | None:
    """Give what is meant by a string, a list of strings, or None."""
    if value is None:
        return None
    wanted = "a string that is not empty, or a list of them"
    if not isinstance(value, (str, list, tuple)):
        raise TypeError(_error(name, value, wanted))
    strings = [value] if isinstance(value, str) else list(value)
    for item in strings:
        if not isinstance(item, str):
            raise TypeError(_error(name, value, wanted))
        if not item:
            raise ValueError(_error(name, value, wanted))
    return strings


@dataclass
class GenerationConfig:
    """How to generate. What a field leaves at None is taken from the model's own settings.

    max_new_tokens: how many tokens to generate at most. None: `max_length`; both None: 20.
    max_length: columns of prompt and new tokens together. `max_new_tokens` wins over it.
    do_sample: False takes the most probable token each time (greedy).
    temperature: divides the logits before sampling; 0 is greedy.
    top_k: keeps the k most probable tokens; 0 keeps all.
    top_p: keeps the fewest tokens whose probabilities sum to at least top_p, in (0, 1].
    min_p: keeps the tokens with at least min_p times the probability of the most probable one.
    repetition_penalty: divides positive and multiplies negative logits of tokens that occurred in
        the prompt or the text so far (Keskar et al. 2019, arXiv 1909.05858); also when greedy.
    no_repeat_ngram_size: no n tokens in a row occur twice in prompt and text; 0: they may.
    suppress_tokens: ids that are never generated.
    min_new_tokens: no end-of-text token before so many new tokens. None: `min_length`.
    min_length: the same, counted in columns of prompt and new tokens together.
    stop_strings: a row ends when its new text contains one of them; needs `tokenizer=`.
    num_beams: texts kept per prompt while the best ones are looked for (beam search); 1: none are.
    length_penalty: a finished beam counts its log-probability / length ** length_penalty, so that
        more than 0 favours long texts.
    early_stopping: when beam search ends. True: when num_beams texts have ended; False: when the
        best running one, as long as it is now, is worse than these; "never": when it cannot become
        better by going on, either.
    num_return_sequences: texts per prompt; they stand next to each other in the output. Without
        sampling, num_beams at most.
    return_dict_in_generate: give a `GenerateOutput` in place of the sequences.
    output_scores, output_logits: with it, keep what each token was chosen from.
    prefill_chunk_size: prompt tokens read at a time; None: 2048.
    num_assistant_tokens: tokens that an assistant_model drafts at a time, at most.
    prompt_lookup_num_tokens: tokens drafted at a time, at most, by looking up in prompt and text how
        their end went on when it occurred before; None: none are. The text stays the same.
    max_matching_ngram_size: tokens of the end that are looked up, at most.
    bos_token_id, eos_token_id, pad_token_id: special tokens; several ends of text may be given as a
        list, an empty list generates on regardless.
    extra: keys of the file that have no meaning here; they are written back unchanged.

    The order is: repetition penalty, n-grams, suppressed tokens, minimal length, what `generate` is
    given as logits_processor, temperature, top-k, top-p, min-p. Beams go by log-probabilities, so
    there these are what the penalty works on, as in transformers.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of its range.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppress_tokens: list[int] | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    stop_strings: str | list[str] | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    prefill_chunk_size: int | None = None
    num_assistant_tokens: int = 5
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if getattr(self, item.name) is None and item.default is not dataclasses.MISSING:
                setattr(self, item.name, item.default)
        for name in (
            "max_new_tokens",
            "max_length",
            "prefill_chunk_size",
            "prompt_lookup_num_tokens",
        ):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, _integer(name, value, "an int of at least 1, or None", least=1))
        if self.min_new_tokens is not None:
            wanted = "an int of at least 0, or None"
            self.min_new_tokens = _integer("min_new_tokens", self.min_new_tokens, wanted)
        for name in ("no_repeat_ngram_size", "min_length"):
            setattr(self, name, _integer(name, getattr(self, name), "an int of at least 0"))
        for name in ("do_sample", "return_dict_in_generate", "output_scores", "output_logits"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(_error(name, getattr(self, name), "a bool"))
        self.length_penalty = _real("length_penalty", self.length_penalty, "a finite number")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(
                _error("early_stopping", self.early_stopping, 'True, False or "never"')
            )
        self.stop_strings = _strings("stop_strings", self.stop_strings)
        if self.suppress_tokens is not None:
            wanted = "a list of token ids"
            ids = _token_ids("suppress_tokens", self.suppress_tokens, wanted)
            self.suppress_tokens = [ids] if isinstance(ids, int) else ids
        self.temperature = _factor("temperature", self.temperature, zero=True)
        self.top_k = _integer("top_k", self.top_k, "an int of at least 0 (0 keeps all tokens)")
        self.top_p = _real("top_p", self.top_p, "a number in (0, 1]")
        if not 0 < self.top_p <= 1:
            raise ValueError(_error("top_p", self.top_p, "a number in (0, 1]"))
        self.min_p = _real("min_p", self.min_p, "a number in [0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(_error("min_p", self.min_p, "a number in [0, 1]"))
        self.repetition_penalty = _factor("repetition_penalty", self.repetition_penalty)
        for name in (
            "num_beams",
            "num_return_sequences",
            "num_assistant_tokens",
            "max_matching_ngram_size",
        ):
            value = _integer(name, getattr(self, name), "an int of at least 1", least=1)
            setattr(self, name, value)
        token = "a token id (an int of at least 0)"
        for name in ("bos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, _integer(name, value, f"{token}, or None"))
        if self.eos_token_id is not None:
            wanted = f"{token}, or a list of them"
            self.eos_token_id = _token_ids("eos_token_id", self.eos_token_id, wanted)

    @property
    def eos_token_ids(self) -> list[int]:
        """All ids that end a text; empty if none does."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """Give the config that `values`, the content of the file, describes; null = default."""
        known = {item.name for item in dataclasses.fields(cls)} - {"extra"}
        given = {name: values[name] for name in values if name in known}
        extra = {name: values[name] for name in values if name not in known}
        return cls(**given, extra=extra)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> GenerationConfig:
        """Read a `generation_config.json`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no JSON object, or holds a value that makes no sense.
        """
        path = Path(path)
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> GenerationConfig:
        """Read the folder's `generation_config.json`; the defaults if it has none."""
        path = Path(folder) / FILE_NAME
        return cls.from_json_file(path) if path.exists() else cls()

    def to_dict(self) -> dict[str, Any]:
        """Give what belongs into the file: fields that differ from the defaults, and `extra`."""
        out = dict(self.extra)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name != "extra" and value != item.default:
                out[item.name] = value
        return out

    def replaced(self, **given: Any) -> GenerationConfig:
        """Give a copy in which the arguments that are not None take the place of the fields."""
        return dataclasses.replace(
            self, **{name: value for name, value in given.items() if value is not None}
        )

"""What `generate` and `stream` do before the loop: check everything, and make ready what it needs.

Whatever the host has to know of the prompt is looked at here, so that the loop need not ask.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma2.cache import HybridCache
from gemma2.generation import graph
from gemma2.generation.config import (
    DEFAULT_NEW_TOKENS,
    UNSUPPORTED,
    GenerationConfig,
    refuse_unsupported,
)
from gemma2.generation.prefix import kept_tokens, make_room, new_cache, will_forget
from gemma2.generation.processors import Processors
from gemma2.generation.prompts import Prompts
from gemma2.generation.record import Record
from gemma2.generation.run import Beams, Draft, Reading, Run
from gemma2.generation.sampling import Sampler
from gemma2.generation.stopping import Stops, StopStrings

if TYPE_CHECKING:
    from gemma2.generation.mixin import GenerationMixin

__all__ = ["SPECIAL", "prepare", "refuse_unknown"]

# Tokens read at a time from a prompt: enough to run at full speed, 0.2 GB of activations in a 2B.
PREFILL_CHUNK = 2048

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

# Of e, for numbers that float32 has with room to spare.
_LARGEST_EXPONENT = 60.0

# With beams, so that sums of log-probabilities divided by it stay above what marks a dead beam.
_LEAST_TEMPERATURE = 1e-4

# What only sampling looks at; given to a greedy call, it is most likely a mistake.
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")

# The same of beam search, with the values that say nothing.
_BEAMS_ONLY = {"length_penalty": 1.0, "early_stopping": False}


def prepare(
    model: GenerationMixin,
    named: dict[str, Any],
    *,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    past_key_values: HybridCache | None,
    seed: int | None,
    generation_config: GenerationConfig | None,
    assistant_model: GenerationMixin | None,
    logits_processor: list[Any] | None,
    stopping_criteria: list[Any] | None,
    tokenizer: Any,
    cuda_graph: bool | None,
) -> Run:
    """Check everything and give what the loop needs. Changes nothing but a growing cache.

    Called by what the user calls, which the warnings point at.

    Args:
        named: the options that stand in a `GenerationConfig`, None where not given.
        Others: as `GenerationMixin.generate`.
    """
    options = _options(model, generation_config, named)
    functions = _functions("logits_processor", logits_processor)
    criteria = _functions("stopping_criteria", stopping_criteria)
    _check_tokenizer(options, tokenizer)
    device = _check_device(model, input_ids, inputs_embeds, attention_mask)
    _check_special(model, options)
    prompts = Prompts.of(model, input_ids, inputs_embeds, attention_mask, options, device)
    prompt, rows, longest_prompt = prompts.shown(), prompts.rows, max(prompts.counts)
    new_tokens = _new_tokens(options, prompt.shape[1])
    _point_out(options, named, new_tokens, assistant_model is not None)
    beams = _beams(options, new_tokens)
    drafted = _check_drafting(model, assistant_model, options, prompts, device)
    if drafted and rows > 1:
        _refuse_functions(functions, criteria, rows)
    ahead = drafted + 1 if drafted else 0  # what is written and may be taken back
    is_kept = past_key_values is not None or options.return_dict_in_generate
    known = prompts.tokens() if is_kept and prompts.are_tokens else None
    cached, found = kept_tokens(model, past_key_values, rows, prompts.lengths, device, known)
    need = longest_prompt + new_tokens - 1  # the last token is not read
    cache, others = past_key_values, 0
    if cache is None:
        cache = new_cache(model, rows, need + ahead, device, ahead)
        cache.growable = is_kept
    else:
        others = max(cache.lengths[rows:].tolist(), default=0)
        make_room(cache, longest_prompt, new_tokens, ahead)
    longest = max(longest_prompt, others) + new_tokens - 1
    models = [model] if assistant_model is None else [model, assistant_model]
    room = longest + ahead <= cache.max_cache_len
    captured = graph.wanted(cuda_graph, models, device, new_tokens - 1, room)
    captured = captured and _can_be_captured(options, functions, cuda_graph)

    ends = options.eos_token_ids
    pad = options.pad_token_id if options.pad_token_id is not None else (*ends, 0)[0]
    record = _record(options, rows, drafted + 1, model.config.vocab_size, device)
    processors = Processors.of(options, prompt.shape[1], functions, model.config.vocab_size, device)
    columns = F.pad(prompt, (0, new_tokens + ahead), value=pad) if functions or criteria else None
    sampler = Sampler(
        options,
        seed,
        prompts.text(need + 1 + ahead) if processors.reads_text or drafted else None,
        prompts.starts(),
        processors if record or beams or not processors.only_penalty else None,
        columns,
        prompt.shape[1],
    )
    chunk = options.prefill_chunk_size or PREFILL_CHUNK
    draft = None
    if drafted:
        reading = _reading(assistant_model, prompts, need + ahead, ahead, chunk)
        draft = Draft(drafted, reading, options.max_matching_ngram_size)
    packed = prompts.pack(cached)
    stops = None
    if options.stop_strings or criteria:
        strings = _stop_strings(options, tokenizer, prompts)
        stops = Stops(strings, criteria, rows, sampler.columns)
    most = [count + new_tokens - 1 + ahead for count in prompts.counts]
    forgets = known is not None and will_forget(cache, most, prompts.counts)
    if found is not None:
        found.apply(cache, most)
    return Run(
        prompt=prompt,
        reading=Reading(model, cache, *packed, prompts.repeats, chunk, known, forgets),
        new_tokens=new_tokens,
        lengths=[count for count in prompts.counts for _ in range(prompts.repeats)],
        prompts=None if known is None else [row for row in known for _ in range(prompts.repeats)],
        is_kept=is_kept,
        as_dict=options.return_dict_in_generate,
        others=others,
        longest=longest,
        sampler=sampler,
        eos=torch.tensor(ends, device=device) if ends else None,
        pad=pad,
        graph=captured,
        draft=draft,
        beams=beams,
        stops=stops,
        waits=bool(functions) or stops is not None,
        record=record,
        training=[module for m in models for module in m.modules() if module.training],
    )


def _options(
    model: GenerationMixin, generation_config: GenerationConfig | None, named: dict[str, Any]
) -> GenerationConfig:
    """Give what holds for this call: arguments, over `generation_config`, over the model's."""
    own = model.generation_config
    if generation_config is None:
        generation_config = own
    elif not isinstance(generation_config, GenerationConfig):
        raise TypeError(
            f"generate: generation_config is a {type(generation_config).__name__}: it must be "
            "a gemma2.GenerationConfig"
        )
    refuse_unsupported(generation_config.extra, "from the generation config")
    for name in SPECIAL:
        if named.get(name) is None and getattr(generation_config, name) is None:
            named[name] = getattr(own, name)
    options = generation_config.replaced(**named)
    texts, beams = options.num_return_sequences, options.num_beams
    if texts > 1 and beams == 1 and not (options.do_sample and options.temperature):
        why = "temperature is 0" if options.do_sample else "do_sample is False"
        raise ValueError(
            f"generate: num_return_sequences is {texts} and {why}: greedy texts would all be the "
            "same; pass do_sample=True and a temperature, or num_beams"
        )
    if texts > beams > 1:
        raise ValueError(
            f"generate: num_return_sequences is {texts}, num_beams is {beams}: there are only as "
            "many texts as beams"
        )
    # what the call says goes before what a file says
    if named.get("max_length") is not None and named.get("max_new_tokens") is None:
        options.max_new_tokens = None
    if named.get("min_length") is not None and named.get("min_new_tokens") is None:
        options.min_new_tokens = None
    return options


def _point_out(
    options: GenerationConfig, named: dict[str, Any], new_tokens: int, has_assistant: bool
) -> None:
    """Warn of options that do not do what they seem to do."""
    said = []
    useless = [name for name in _SAMPLING_ONLY if named.get(name) is not None]
    if useless and not options.do_sample and named.get("temperature") != 0:
        said.append(
            f"{', '.join(useless)} given, but do_sample is False: the most probable token is taken "
            "each time; pass do_sample=True to sample"
        )
    useless = [name for name in _BEAMS_ONLY if named.get(name) not in (None, _BEAMS_ONLY[name])]
    if useless and options.num_beams == 1:
        said.append(
            f"{', '.join(useless)} given, but num_beams is 1: there are no beams to compare"
        )
    for counted, other in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if named.get(counted) is not None and named.get(other) is not None:
            said.append(f"{counted} and {other} are both given: {counted} counts")
    if named.get("num_assistant_tokens") is not None and not has_assistant:
        said.append("num_assistant_tokens given, but there is no assistant_model to draft them")
    if named.get("max_matching_ngram_size") is not None and not options.prompt_lookup_num_tokens:
        said.append("max_matching_ngram_size given, but prompt_lookup_num_tokens is not")
    if options.min_new_tokens is not None and options.min_new_tokens > new_tokens:
        said.append(
            f"min_new_tokens is {options.min_new_tokens}, but there are at most {new_tokens}"
        )
    for name in ("output_scores", "output_logits"):
        if getattr(options, name) and not options.return_dict_in_generate:
            said.append(
                f"{name} is True, but return_dict_in_generate is False: only the sequences are given"
            )
    for text in said:
        warnings.warn(f"generate: {text}", stacklevel=4)


def _functions(name: str, given: Any) -> list[Callable[..., Any]]:
    """Give the list of functions that the option `name` is, or stands for."""
    if given is None:
        return []
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"generate: {name} is a {type(given).__name__}: it must be a list")
    for number, function in enumerate(given):
        if not callable(function):
            raise TypeError(
                f"generate: {name}[{number}] is a {type(function).__name__}: it must be a function"
            )
    return list(given)


def _check_tokenizer(options: GenerationConfig, tokenizer: Any) -> None:
    if options.stop_strings and tokenizer is None:
        raise ValueError(
            f"generate: stop_strings is {options.stop_strings}, but there is no tokenizer: pass "
            "tokenizer=, which tells the text of tokens"
        )
    if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
        raise TypeError(
            f"generate: tokenizer is a {type(tokenizer).__name__}: it must have decode()"
        )


def _beams(options: GenerationConfig, new_tokens: int) -> Beams | None:
    if options.num_beams == 1:
        return None
    exponent = options.length_penalty
    if abs(exponent) * math.log(new_tokens) > _LARGEST_EXPONENT:
        raise ValueError(
            f"generate: length_penalty is {exponent}: {new_tokens} ** {exponent} is out of range"
        )
    if options.do_sample and 0 < options.temperature < _LEAST_TEMPERATURE:
        raise ValueError(
            f"generate: temperature is {options.temperature} and num_beams {options.num_beams}: "
            f"with beams it must be at least {_LEAST_TEMPERATURE}, or 0, which is greedy"
        )
    ends = len(options.eos_token_ids)
    return Beams(
        count=options.num_beams,
        returned=options.num_return_sequences,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        # so that something remains to go on with when all ends of text are among the best
        least=ends + 1 if ends else 2,
        candidates=max(2, ends + 1) * options.num_beams,
    )


def _refuse_functions(functions: list[Any], criteria: list[Any], rows: int) -> None:
    """Raise for functions that would have to look at drafted tokens of several rows."""
    if functions or criteria:
        name = "logits_processor" if functions else "stopping_criteria"
        raise ValueError(
            f"generate: {name} and drafted tokens for {rows} rows: rows accept different numbers of "
            "them, so there are no columns to show; generate row by row, or without drafts"
        )


def _can_be_captured(
    options: GenerationConfig, functions: list[Callable[..., Any]], cuda_graph: bool | None
) -> bool:
    """Tell whether there is nothing in a step that only Python can do; an error if there must not."""
    obstacle = ""
    if options.num_beams > 1:
        obstacle = f"num_beams is {options.num_beams}, and beams are chosen by the host"
    elif functions:
        obstacle = "there is a logits_processor, which a replayed graph would not call"
    if obstacle and cuda_graph:
        raise ValueError(f"generate: cuda_graph is True, but {obstacle}; leave it out")
    return not obstacle


def _record(
    options: GenerationConfig, rows: int, width: int, vocab: int, device: torch.device
) -> Record | None:
    """Give what keeps scores and logits of up to `width` tokens a step; None: nothing is kept."""
    names = [name for name in ("scores", "logits") if getattr(options, f"output_{name}")]
    if not names or not options.return_dict_in_generate:
        return None
    return Record(names, rows, width, vocab, device)


def _reading(
    assistant: GenerationMixin | None, prompts: Prompts, columns: int, ahead: int, chunk: int
) -> Reading | None:
    """Give what a drafting model reads, into a cache of its own; None: tokens are looked up."""
    if assistant is None:
        return None
    cache = new_cache(assistant, prompts.rows, columns, prompts.content.device, ahead)
    whole = prompts.pack(torch.zeros_like(prompts.lengths))
    return Reading(assistant, cache, *whole, prompts.repeats, chunk)


def _stop_strings(
    options: GenerationConfig, tokenizer: Any, prompts: Prompts
) -> StopStrings | None:
    if not options.stop_strings:
        return None
    return StopStrings(options.stop_strings, tokenizer, prompts.last())


def _check_device(model: GenerationMixin, *tensors: Tensor | None) -> torch.device:
    """Give the model's device; all of `tensors` must be tensors on it."""
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ValueError("generate: the model is on the meta device: it has no weights yet")
    names = ("input_ids", "inputs_embeds", "attention_mask")
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"generate: {name} is a {type(tensor).__name__}: it must be a tensor; "
                "torch.tensor([ids]) makes one of a list"
            )
        if tensor.device != device:
            raise ValueError(
                f"generate: {name} is on {tensor.device}, the model on {device}: move one"
            )
    return device


def _check_special(model: GenerationMixin, options: GenerationConfig) -> None:
    named = [(name, getattr(options, name)) for name in ("bos_token_id", "pad_token_id")]
    named += [("eos_token_id", token) for token in options.eos_token_ids]
    named += [("suppress_tokens", token) for token in options.suppress_tokens or ()]
    for name, token in named:
        if token is not None and token >= model.config.vocab_size:
            raise ValueError(
                f"generate: {name} is {token}: the vocabulary has {model.config.vocab_size} tokens"
            )


def refuse_unknown(options: dict[str, Any], known: Collection[str]) -> None:
    """Raise for what `generate` was given and does not know, or cannot do yet."""
    for name in options:
        if name not in UNSUPPORTED:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise TypeError(f"generate: unknown option {name!r}{hint}")
    refuse_unsupported(options, "in the call")


def _check_drafting(
    model: GenerationMixin,
    assistant: GenerationMixin | None,
    options: GenerationConfig,
    prompts: Prompts,
    device: torch.device,
) -> int:
    """Give how many tokens are drafted a step; 0: the model writes without assistance."""
    if assistant is None and options.prompt_lookup_num_tokens is None:
        return 0
    if options.num_beams > 1:
        raise ValueError(
            f"generate: num_beams is {options.num_beams}, and tokens are to be drafted: that is for "
            "one text a row; leave out assistant_model and prompt_lookup_num_tokens"
        )
    if assistant is not None and options.prompt_lookup_num_tokens is not None:
        raise ValueError(
            "generate: assistant_model and prompt_lookup_num_tokens are both given: tokens are "
            "drafted by one of them"
        )
    if not prompts.are_tokens:
        raise ValueError(
            "generate: inputs_embeds is given: tokens are drafted from input_ids; leave out "
            "assistant_model and prompt_lookup_num_tokens"
        )
    if assistant is None:
        return options.prompt_lookup_num_tokens or 0
    from gemma2.generation.mixin import GenerationMixin  # which imports this

    if not isinstance(assistant, GenerationMixin):
        raise TypeError(
            f"generate: assistant_model is a {type(assistant).__name__}: it must be a "
            "Gemma2ForCausalLM"
        )
    ours, theirs = model.config.vocab_size, assistant.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"generate: assistant_model has a vocabulary of {theirs} tokens, the model of {ours}: "
            "they must have the same"
        )
    home = next(assistant.parameters()).device
    if home != device:
        raise ValueError(f"generate: assistant_model is on {home}, the model on {device}: move one")
    return options.num_assistant_tokens


def _new_tokens(options: GenerationConfig, columns: int) -> int:
    if options.max_new_tokens is not None:
        return options.max_new_tokens
    if options.max_length is None:
        return DEFAULT_NEW_TOKENS
    if options.max_length <= columns:
        raise ValueError(
            f"generate: max_length is {options.max_length}, the prompt has {columns} columns "
            "already: raise it, or use max_new_tokens, which does not count the prompt"
        )
    return options.max_length - columns

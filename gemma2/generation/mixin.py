"""`generate` and `stream`, mixed into the causal model.

Before the loop, everything is checked and made ready: options, cache, seed. What the cache does not
hold of the prompt yet is packed to the right, wherever its padding stood, and read in chunks of
bounded memory. Each later step reads one token a row. A row that has ended is masked and no longer
written to the cache.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemma2.cache import HybridCache
from gemma2.config import Gemma2Config
from gemma2.generation.config import (
    DEFAULT_NEW_TOKENS,
    UNSUPPORTED,
    GenerationConfig,
    refuse_unsupported,
)
from gemma2.generation.sampling import Sampler
from gemma2.generation.streamers import Streamer

if TYPE_CHECKING:
    from gemma2.model import Gemma2Model

__all__ = ["GenerationMixin"]

# Tokens read at a time from a prompt: enough to run at full speed, 0.2 GB of activations in a 2B.
PREFILL_CHUNK = 2048

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

# What only sampling looks at; given to a greedy call, it is most likely a mistake.
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")


@dataclass
class _Run:
    """One call of generate, checked and ready to go.

    prompt: int64 [N, S], what stands before the new tokens in the output; S is 0 for inputs_embeds.
    pending: int64 [B, P], or [B, P, hidden_size], what the cache does not hold yet, padded at the
        left; `repeats` copies of each row are made after it has been read: N = B repeats.
    mask: bool [B, P], True = token; None: all are.
    """

    prompt: Tensor
    pending: Tensor
    mask: Tensor | None
    repeats: int
    chunk: int
    new_tokens: int
    cache: HybridCache
    sampler: Sampler
    eos: Tensor | None
    pad: int
    training: list[nn.Module]


class GenerationMixin(nn.Module):
    """Gives a causal model `generate`, `stream` and a `generation_config`.

    The model has a `config`, its body as `model`, and `Gemma2ForCausalLM`'s `forward`.
    """

    config: Gemma2Config
    model: Gemma2Model

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's own settings: from `generation_config.json`, else from its config."""
        own: GenerationConfig | None = self.__dict__.get("_generation_config")
        if own is None:
            self.generation_config = own = GenerationConfig()
        for name in _SPECIAL:
            if getattr(own, name) is None:
                setattr(own, name, getattr(self.config, name))
        return own

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if not isinstance(value, GenerationConfig):
            raise TypeError(
                f"generation_config is a {type(value).__name__}: it must be a GenerationConfig"
            )
        self.__dict__["_generation_config"] = value

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_return_sequences: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        prefill_chunk_size: int | None = None,
        seed: int | None = None,
        streamer: Streamer | None = None,
        **unsupported: Any,
    ) -> Tensor:
        """Continue prompts; give int64 [B * num_return_sequences, prompt + new].

        The output is the prompt as given, then the new tokens, then pad_token_id after a row's
        first eos. It ends where every row has ended, or after max_new_tokens. Prompts of unequal
        length are padded left or right; a row goes on from its last real token, and with right
        padding its new tokens stand after the padded columns. No gradients, no dropout.

        Options that are None come from `generation_config`, else from the model's own
        (`model.generation_config`, read from `generation_config.json`); see `GenerationConfig` for
        their meaning and order.

        Args:
            input_ids: int64 [B, S]. None, and no inputs_embeds: one row that begins with bos.
            attention_mask: [B, S], 1 = token, 0 = padding. None: all are tokens, except that pads
                in input_ids are taken as padding (and that is said) unless pad also ends texts.
            inputs_embeds: [B, S, hidden_size], already scaled, in place of input_ids; then the
                output has the new tokens only.
            past_key_values: a cache to use, left holding all but the last new token of each row.
                If it holds tokens, input_ids is the whole text so far, of which only the
                rest is read. None: a cache of the size needed, gone afterwards.
            prefill_chunk_size: prompt tokens read at a time, 2048 if None. Bounds the memory.
            seed: makes sampling repeatable. None: drawn from torch's generator.
            streamer: gets the prompt, then each step's tokens; see `Streamer`.

        Raises:
            TypeError: unknown option, or one of the wrong type.
            ValueError: an option out of range or not supported yet, a row without a token, a token
                id outside of the vocabulary, a cache that does not fit or is too small. Nothing has
                been run then.
        """
        if streamer is not None and not isinstance(streamer, Streamer):
            raise TypeError(
                f"generate: streamer is a {type(streamer).__name__}: it must have put() and end()"
            )
        run = self._prepare(
            input_ids,
            attention_mask,
            inputs_embeds,
            past_key_values,
            seed,
            generation_config,
            unsupported,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            num_return_sequences=num_return_sequences,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            prefill_chunk_size=prefill_chunk_size,
        )
        new = []
        try:
            if streamer is not None:
                streamer.put(run.prompt.cpu())
            for tokens in self._steps(run):
                new.append(tokens)
                if streamer is not None:
                    streamer.put(tokens.cpu())
        finally:
            if streamer is not None:
                streamer.end()
        return torch.cat([run.prompt, torch.stack(new, dim=1)], dim=1)

    def stream(self, input_ids: Tensor | None = None, **options: Any) -> Iterator[Tensor]:
        """Give the new tokens of `generate` one step at a time, int64 [B] each.

        Takes the options of `generate`, except `streamer`. Options are checked by this call, the
        prompt is read when the first token is asked for. The iterator may be dropped at any time; a
        cache that was passed in then holds the text up to, and without, the last token given.

        Raises:
            TypeError, ValueError: as `generate`.
        """
        named = {name: options.pop(name, None) for name in _PREPARED}
        return self._steps(
            self._prepare(
                input_ids,
                options.pop("attention_mask", None),
                options.pop("inputs_embeds", None),
                options.pop("past_key_values", None),
                options.pop("seed", None),
                options.pop("generation_config", None),
                options,
                **named,
            )
        )

    # ---- before the loop ------------------------------------------------------------------------

    def _prepare(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: HybridCache | None,
        seed: int | None,
        generation_config: GenerationConfig | None,
        unsupported: dict[str, Any],
        **named: Any,
    ) -> _Run:
        """Check everything and give what the loop needs. Changes nothing but a growing cache."""
        _refuse(unsupported)
        options = self._options(generation_config, named)
        if not options.do_sample:
            useless = [name for name in _SAMPLING_ONLY if named.get(name) is not None]
            if useless and named.get("temperature") != 0:
                warnings.warn(
                    f"generate: {', '.join(useless)} given, but do_sample is False: the most "
                    "probable token is taken each time; pass do_sample=True to sample",
                    stacklevel=3,
                )
        device = self._check_device(input_ids, inputs_embeds, attention_mask)
        self._check_special(options)
        content = self._content(input_ids, inputs_embeds, options, device)
        mask = _padding_mask(content, attention_mask, options)
        batch, columns = content.shape[:2]
        repeats = options.num_return_sequences
        if content.dim() == 2:
            _check_vocabulary(content, mask, self.config.vocab_size)
            prompt = content.repeat_interleave(repeats, dim=0)
            known = content if mask is None else content.masked_fill(~mask, -1)
            known = known.repeat_interleave(repeats, dim=0)
        else:
            prompt = known = content.new_empty((batch * repeats, 0), dtype=torch.int64)
        new_tokens = _new_tokens(options, prompt.shape[1])
        sampler = Sampler(options, seed, known, new_tokens)

        lengths = torch.full((batch,), columns, device=device) if mask is None else mask.sum(1)
        if bool((lengths == 0).any()):
            row = int((lengths == 0).nonzero()[0])
            raise ValueError(
                f"generate: row {row} has no token, only padding: there is nothing to go on from"
            )
        cached = self._check_cache(cache, batch * repeats, lengths, device)
        longest = int(lengths.max())
        need = longest + new_tokens - 1  # the last token is not read
        if cache is None:
            cache = HybridCache(self.config, batch * repeats, need, device=device)
        elif need > cache.max_cache_len:
            if not cache.growable:
                raise ValueError(
                    f"generate: past_key_values has max_cache_len {cache.max_cache_len}, but "
                    f"{longest} tokens and {new_tokens} new ones need {need}: make it larger, call "
                    f"grow({need}), or lower max_new_tokens"
                )
            cache.grow(need)
        pending, pending_mask = _pack(content, mask, lengths, cached)
        ends = options.eos_token_ids
        return _Run(
            prompt=prompt,
            pending=pending,
            mask=pending_mask,
            repeats=repeats,
            chunk=options.prefill_chunk_size or PREFILL_CHUNK,
            new_tokens=new_tokens,
            cache=cache,
            sampler=sampler,
            eos=torch.tensor(ends, device=device) if ends else None,
            pad=options.pad_token_id if options.pad_token_id is not None else (*ends, 0)[0],
            training=[module for module in self.modules() if module.training],
        )

    def _options(
        self, generation_config: GenerationConfig | None, named: dict[str, Any]
    ) -> GenerationConfig:
        """Give what holds for this call: arguments, over `generation_config`, over the model's."""
        own = self.generation_config
        if generation_config is None:
            generation_config = own
        elif not isinstance(generation_config, GenerationConfig):
            raise TypeError(
                f"generate: generation_config is a {type(generation_config).__name__}: it must be "
                "a gemma2.GenerationConfig"
            )
        refuse_unsupported(generation_config.extra, "from the generation config")
        for name in _SPECIAL:
            if named.get(name) is None and getattr(generation_config, name) is None:
                named[name] = getattr(own, name)
        options = generation_config.replaced(**named)
        if options.num_return_sequences > 1 and not options.do_sample:
            raise ValueError(
                f"generate: num_return_sequences is {options.num_return_sequences} and do_sample "
                "is False: greedy texts would all be the same; pass do_sample=True"
            )
        if named.get("max_length") is not None and named.get("max_new_tokens") is None:
            options.max_new_tokens = None  # what the call says goes before what a file says
        return options

    def _check_device(self, *tensors: Tensor | None) -> torch.device:
        """Give the model's device; all of `tensors` must be tensors on it."""
        device = next(self.parameters()).device
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

    def _check_special(self, options: GenerationConfig) -> None:
        named = [(name, getattr(options, name)) for name in ("bos_token_id", "pad_token_id")]
        named += [("eos_token_id", token) for token in options.eos_token_ids]
        for name, token in named:
            if token is not None and token >= self.config.vocab_size:
                raise ValueError(
                    f"generate: {name} is {token}: the vocabulary has {self.config.vocab_size} "
                    "tokens"
                )

    def _content(
        self,
        input_ids: Tensor | None,
        embeds: Tensor | None,
        options: GenerationConfig,
        device: torch.device,
    ) -> Tensor:
        """Give what is to be continued: int64 [B, S], or [B, S, hidden_size]."""
        if input_ids is not None and embeds is not None:
            raise ValueError("generate: input_ids and inputs_embeds are both given: pass one")
        if input_ids is not None:
            return _check_ids(input_ids)
        if embeds is None:
            if options.bos_token_id is None:
                raise ValueError(
                    "generate: neither input_ids nor inputs_embeds is given, and there is no "
                    "bos_token_id to begin with"
                )
            return torch.tensor([[options.bos_token_id]], device=device)
        hidden = self.config.hidden_size
        if embeds.dim() != 3 or embeds.shape[2] != hidden or 0 in embeds.shape:
            raise ValueError(
                f"generate: inputs_embeds has shape {list(embeds.shape)}: it must be [rows, "
                f"tokens, {hidden}], with at least one row and one token"
            )
        if not embeds.is_floating_point():
            raise TypeError(f"generate: inputs_embeds is {embeds.dtype}: it must be floating")
        return embeds

    def _check_cache(
        self, cache: HybridCache | None, rows: int, lengths: Tensor, device: torch.device
    ) -> Tensor:
        """Give how many tokens of each prompt the cache holds, int64 [B].

        rows: of the cache, as many as the output has. lengths: int64 [B], tokens of the prompts.
        """
        if cache is None:
            return torch.zeros_like(lengths)
        if not isinstance(cache, HybridCache):
            raise TypeError(
                f"generate: past_key_values is a {type(cache).__name__}: it must be a HybridCache"
            )
        cache.check_model(self.config, rows, device)
        cached = cache.lengths[: lengths.shape[0]].to(device)
        left = lengths - cached
        if bool((left <= 0).any()):
            row = int((left <= 0).nonzero()[0])
            raise ValueError(
                f"generate: past_key_values holds {int(cached[row])} tokens of row {row}, the "
                f"prompt has {int(lengths[row])}: pass the whole text so far and at least one "
                "token more, crop() the cache, or reset() it"
            )
        return cached

    # ---- the loop -------------------------------------------------------------------------------

    def _steps(self, run: _Run) -> Iterator[Tensor]:
        """Give the new tokens of each step, int64 [N]; no mode of torch is on between steps."""
        finished = torch.zeros(run.prompt.shape[0], dtype=torch.bool, device=run.prompt.device)
        tokens = finished
        for step in range(run.new_tokens):
            with self._inference(run):
                logits = self._read_prompt(run) if step == 0 else self._read(run, tokens, finished)
                tokens = run.sampler(logits)
                run.sampler.remember(tokens.masked_fill(finished, -1))
            # an inference tensor would be of little use to the caller
            tokens = tokens.masked_fill(finished, run.pad)
            if run.eos is not None:
                finished = finished | torch.isin(tokens, run.eos)
            yield tokens.clone()
            if bool(finished.all()):
                return

    @contextlib.contextmanager
    def _inference(self, run: _Run) -> Iterator[None]:
        """Run without gradients and in eval mode, and put every module's mode back."""
        for module in run.training:
            module.training = False
        try:
            with torch.inference_mode():
                yield
        finally:
            for module in run.training:
                module.training = True

    def _read(self, run: _Run, tokens: Tensor, finished: Tensor) -> Tensor:
        """Give the logits [N, V] after one more token a row, except where a row has ended."""
        mask = (~finished)[:, None] if bool(finished.any()) else None
        out = self(
            input_ids=tokens[:, None],
            attention_mask=mask,
            past_key_values=run.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _read_prompt(self, run: _Run) -> Tensor:
        """Read what is pending; give the logits [N, V] after each row's last token."""
        name = "input_ids" if run.pending.dim() == 2 else "inputs_embeds"
        columns = run.pending.shape[1]
        for first in range(0, columns, run.chunk):
            piece = slice(first, first + run.chunk)
            call = {
                name: run.pending[:, piece],
                "attention_mask": None if run.mask is None else run.mask[:, piece],
                "past_key_values": run.cache,
                "use_cache": True,
            }
            if first + run.chunk < columns:
                self.model(**call)  # nobody wants these logits
        logits: Tensor = self(**call, logits_to_keep=1).logits[:, -1]
        if run.repeats > 1:
            source = torch.arange(logits.shape[0], device=logits.device)
            source = source.repeat_interleave(run.repeats)
            run.cache.reorder(source)
            logits = logits[source]
        return logits


# The options that are resolved against the generation config, by their names in `generate`.
_PREPARED = tuple(
    name
    for name in inspect.signature(GenerationMixin.generate).parameters
    if name in GenerationConfig.__dataclass_fields__
)
_ALL_OPTIONS = tuple(inspect.signature(GenerationMixin.generate).parameters)[1:-1]


def _refuse(options: dict[str, Any]) -> None:
    """Raise for what `generate` was given and does not know, or cannot do yet."""
    for name in options:
        if name not in UNSUPPORTED:
            close = difflib.get_close_matches(name, _ALL_OPTIONS, n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise TypeError(f"generate: unknown option {name!r}{hint}")
    refuse_unsupported(options, "in the call")


def _check_ids(ids: Tensor) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"generate: input_ids is {ids.dtype}: it must be int64")
    if ids.dim() != 2:
        hint = "; input_ids[None] makes one row of it" if ids.dim() == 1 else ""
        raise ValueError(
            f"generate: input_ids has shape {list(ids.shape)}: it must be [rows, tokens]{hint}"
        )
    if 0 in ids.shape:
        raise ValueError(
            f"generate: input_ids has shape {list(ids.shape)}: at least one row and one token are "
            "wanted; a text begins with bos_token_id"
        )
    return ids.to(torch.int64)


def _check_vocabulary(ids: Tensor, mask: Tensor | None, vocab: int) -> None:
    bad = (ids < 0) | (ids >= vocab)
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"generate: input_ids[{row}, {column}] is {int(ids[row, column])}: the vocabulary has "
            f"{vocab} tokens"
        )


def _padding_mask(
    content: Tensor, attention_mask: Tensor | None, options: GenerationConfig
) -> Tensor | None:
    """Give bool [B, S], True = token; None if all are.

    Like transformers, takes pads in the prompt as padding unless pad also ends texts.
    """
    batch, columns = content.shape[:2]
    if attention_mask is None:
        pad = options.pad_token_id
        if content.dim() != 2 or pad is None or pad in options.eos_token_ids:
            return None
        mask = content != pad
        if bool(mask.all()):
            return None
        warnings.warn(
            f"generate: input_ids contains pad_token_id ({pad}) and no attention_mask is given: "
            "these tokens are taken as padding; pass attention_mask to say what is meant",
            stacklevel=4,
        )
        return mask
    if attention_mask.shape != (batch, columns):
        raise ValueError(
            f"generate: attention_mask has shape {list(attention_mask.shape)}: it must be "
            f"[{batch}, {columns}] like the prompt, with 1 for a token and 0 for padding"
        )
    if bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise ValueError(
            "generate: attention_mask has other values than 1 for a token and 0 for padding"
        )
    mask = attention_mask != 0
    return None if bool(mask.all()) else mask


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


def _pack(
    content: Tensor, mask: Tensor | None, lengths: Tensor, cached: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Give the tokens after the first `cached` of each row, padded at the left, and their mask.

    So the last column is each row's last token, and padding costs no more than the longest row has.

    Args:
        content: [B, S] or [B, S, hidden_size].
        mask: bool [B, S], True = token; None: all are.
        lengths, cached: int64 [B], tokens of each row, and how many of them to leave out.

    Returns:
        [B, P] or [B, P, hidden_size], and bool [B, P], None if all are tokens.
    """
    counts = lengths - cached
    width = int(counts.max())
    if mask is not None:
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)  # real tokens first
    else:
        order = torch.arange(content.shape[1], device=content.device).expand(content.shape[:2])
    # number of the token among the row's real ones, [B, P]; padding repeats the row's first
    number = lengths[:, None] - width + torch.arange(width, device=content.device)
    kept = number >= cached[:, None]
    column = order.gather(1, number.clamp(min=0))
    rows = torch.arange(content.shape[0], device=content.device)[:, None]
    return content[rows, column], None if bool(kept.all()) else kept

"""`generate` and `stream`, mixed into the causal model.

Before the loop, everything is checked and made ready: options, cache, seed (prepare.py). What the
cache does not hold of the prompt yet is packed to the right, wherever its padding stood, and read in
chunks of bounded memory. Each later step reads one token a row (step.py, loop.py), or several that
have been drafted (assisted.py), on a GPU as a captured graph (graph.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemma2.cache import HybridCache
from gemma2.config import Gemma2Config
from gemma2.generation.config import GenerationConfig
from gemma2.generation.loop import new_tokens, steps_ahead
from gemma2.generation.prepare import SPECIAL, prepare, refuse_unknown
from gemma2.generation.streamers import Streamer

if TYPE_CHECKING:
    from gemma2.model import Gemma2Model

__all__ = ["GenerationMixin"]


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
        for name in SPECIAL:
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
        assistant_model: GenerationMixin | None = None,
        num_assistant_tokens: int | None = None,
        prompt_lookup_num_tokens: int | None = None,
        max_matching_ngram_size: int | None = None,
        seed: int | None = None,
        streamer: Streamer | None = None,
        cuda_graph: bool | None = None,
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
                rest is read. A cache as `generate` left it knows its text: then what input_ids
                begins with, too, is kept as far as the sliding layers reach back, and what they
                do not is read again and counted in its `reprocessed`. None: a cache of the size
                needed, gone afterwards.
            prefill_chunk_size: prompt tokens read at a time, 2048 if None. Bounds the memory.
            assistant_model: a smaller model with the same vocabulary. It drafts
                num_assistant_tokens at a time, which this model then checks in one call; the text
                is the one that this model writes alone. How many were right is logged (DEBUG,
                logger "gemma2.generation.loop").
            seed: makes sampling repeatable. None: drawn from torch's generator.
            streamer: gets the prompt, then each step's tokens; see `Streamer`.
            cuda_graph: capture the step that reads one token in a CUDA graph, which spares the host
                launching its kernels. None: where it can be and pays; True: an error where it cannot
                be (no CUDA device, several devices, hooks); False: never.

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
        refuse_unknown(unsupported, _ALL)
        named = {
            "max_new_tokens": max_new_tokens,
            "max_length": max_length,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "num_return_sequences": num_return_sequences,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "prefill_chunk_size": prefill_chunk_size,
            "num_assistant_tokens": num_assistant_tokens,
            "prompt_lookup_num_tokens": prompt_lookup_num_tokens,
            "max_matching_ngram_size": max_matching_ngram_size,
        }
        run = prepare(
            self,
            named,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            seed=seed,
            generation_config=generation_config,
            assistant_model=assistant_model,
            cuda_graph=cuda_graph,
        )
        ahead = steps_ahead(run.prompt.device, streaming=streamer is not None)
        new = []
        try:
            if streamer is not None:
                streamer.put(run.prompt.cpu())
            for tokens in new_tokens(self, run, ahead, "cpu"):
                new.append(tokens)
                if streamer is not None:
                    streamer.put(tokens)
        finally:
            if streamer is not None:
                streamer.end()
        return torch.cat([run.prompt, torch.stack(new, dim=1).to(run.prompt.device)], dim=1)

    def stream(self, input_ids: Tensor | None = None, **options: Any) -> Iterator[Tensor]:
        """Give the new tokens of `generate` one step at a time, int64 [B] each.

        Takes the options of `generate`, except `streamer`. Options are checked by this call, the
        prompt is read when the first token is asked for. The iterator may be dropped at any time; a
        cache that was passed in then holds the text up to, and without, the last token given.

        Raises:
            TypeError, ValueError: as `generate`.
        """
        named = {name: options.pop(name, None) for name in _NAMED}
        others = {name: options.pop(name, None) for name in _OTHERS}
        refuse_unknown(options, (*_NAMED, *_OTHERS))
        run = prepare(self, named, input_ids=input_ids, **others)
        if run.draft is not None and len(run.lengths) > 1:
            raise ValueError(
                f"stream: {len(run.lengths)} rows and drafted tokens: rows accept different numbers "
                "of them, so a cache could not be left at the last token given; use generate()"
            )
        return new_tokens(self, run, 0, run.prompt.device)


_ALL = tuple(inspect.signature(GenerationMixin.generate).parameters)[1:-1]
# The options that are resolved against the generation config, and those that are not.
_NAMED = tuple(name for name in _ALL if name in GenerationConfig.__dataclass_fields__)
_OTHERS = tuple(name for name in _ALL if name not in (*_NAMED, "input_ids", "streamer"))

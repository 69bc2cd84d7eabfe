"""`generate` and `stream`, mixed into the causal model.

Before the loop, everything is checked and made ready: options, cache, seed (prepare.py). What the
cache does not hold of the prompt yet is packed to the right, wherever its padding stood, and read in
chunks of bounded memory. Each later step reads one token a row (step.py, loop.py), or several that
have been drafted (assisted.py), on a GPU as a captured graph (graph.py). Beams have a loop of their own
(beam.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemma2.cache import HybridCache
from gemma2.config import Gemma2Config
from gemma2.generation.beam import Found, beam_search
from gemma2.generation.config import GenerationConfig
from gemma2.generation.loop import new_tokens, steps_ahead
from gemma2.generation.prepare import SPECIAL, prepare, refuse_unknown
from gemma2.generation.run import Run
from gemma2.generation.streamers import Streamer
from gemma2.outputs import GenerateOutput

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
        no_repeat_ngram_size: int | None = None,
        suppress_tokens: list[int] | None = None,
        min_new_tokens: int | None = None,
        min_length: int | None = None,
        logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
        stop_strings: str | list[str] | None = None,
        stopping_criteria: Sequence[Callable[[Tensor, Any], Any]] | None = None,
        tokenizer: Any = None,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | str | None = None,
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
        return_dict_in_generate: bool | None = None,
        output_scores: bool | None = None,
        output_logits: bool | None = None,
        seed: int | None = None,
        streamer: Streamer | None = None,
        cuda_graph: bool | None = None,
        **unsupported: Any,
    ) -> Tensor | GenerateOutput:
        """Continue prompts; give int64 [B * num_return_sequences, prompt + new].

        The output is the prompt as given, then the new tokens, then pad_token_id after a row's
        first eos. It ends where every row has ended, or after max_new_tokens. Prompts of unequal
        length are padded left or right; a row goes on from its last real token, and with right
        padding its new tokens stand after the padded columns. No gradients, no dropout. With
        return_dict_in_generate: a `GenerateOutput`, of which this is `sequences`.

        Options that are None come from `generation_config`, else from the model's own
        (`model.generation_config`, read from `generation_config.json`); see `GenerationConfig` for
        their meaning and order.

        Args:
            input_ids: int64 [B, S]. None, and no inputs_embeds: one row that begins with bos.
            attention_mask: [B, S], 1 = token, 0 = padding. None: all are tokens, except that pads
                in input_ids are taken as padding (and that is said) unless pad also ends texts.
            inputs_embeds: [B, S, hidden_size], already scaled, in place of input_ids; then the
                output has the new tokens only.
            past_key_values: a cache to use, left holding all but the last new token of each row. What
                it holds is of this model as it is: reset() it when weights or adapters change.
                If it holds tokens, input_ids is the whole text so far, of which only the
                rest is read. A cache as `generate` left it knows its text: then what input_ids
                begins with, too, is kept as far as the sliding layers or snapshots of them (its
                `keep_snapshots`) reach back, and what they do not is read again and counted in its
                `reprocessed`. An exception leaves it with what has been read. Beams need B * num_beams
                rows; row i is then left with as much of text i as a beam still held in the end.
                None: a cache of the size needed, gone afterwards.
            prefill_chunk_size: prompt tokens read at a time, 2048 if None. Bounds the memory.
            logits_processor: functions, or a LogitsProcessorList of transformers, called in turn as
                f(input_ids, scores): int64 [N, S + n], prompts with their padding and n new
                tokens, and float32 [N, V], to be changed or replaced; gives the scores. They come
                after the options for the text so far and before temperature and filters.
            stop_strings: a row ends when its new text contains one of these strings. The text is not
                cut: a string may end inside a token.
            stopping_criteria: functions, or a StoppingCriteriaList, called as f(input_ids, None);
                each gives bool [N], which rows have ended, or one bool for all.
            tokenizer: of the model, ours or transformers'; for stop_strings.
            num_beams: search for the num_return_sequences best texts of each prompt, K = num_beams
                at a time. Drafts, streams and captured graphs are for one text a row.
            assistant_model: a smaller model with the same vocabulary. It drafts
                num_assistant_tokens at a time, which this model then checks in one call; the text
                is the one that this model writes alone. How many were right is logged (DEBUG,
                logger "gemma2.generation.loop").
            seed: makes sampling repeatable. None: drawn from torch's generator.
            streamer: gets the prompt, then each step's tokens; see `Streamer`.
            cuda_graph: capture the step that reads one token in a CUDA graph, which spares the host
                launching its kernels. None: where it can be and pays; True: an error where it cannot
                be (no CUDA device, several devices, hooks, beams, a logits_processor); False: never.

        Raises:
            TypeError: unknown option, or one of the wrong type.
            ValueError: an option out of range or not supported yet, a row without a token, a token
                id outside of the vocabulary, a cache that does not fit or is too small. Nothing has
                been run then.
        """
        given = dict(locals())
        if streamer is not None and not isinstance(streamer, Streamer):
            raise TypeError(
                f"generate: streamer is a {type(streamer).__name__}: it must have put() and end()"
            )
        refuse_unknown(unsupported, _ALL)
        named = {name: given[name] for name in _NAMED}
        others = {name: given[name] for name in _OTHERS}
        _refuse_soft_prompts(self)
        run = prepare(self, named, input_ids=input_ids, **others)
        if run.beams is not None and streamer is not None:
            raise ValueError(
                f"generate: streamer and num_beams ({run.beams.count}) are both given: beam search "
                "knows no token for sure before its end; leave one out"
            )
        if run.beams is not None:
            found = beam_search(self, run)
            first = torch.arange(0, len(run.prompt), run.beams.count, device=run.prompt.device)
            prompt = run.prompt[first.repeat_interleave(run.beams.returned)]
            sequences = torch.cat([prompt, found.tokens], dim=1)
            return _output(run, sequences, found) if run.as_dict else sequences
        ahead = steps_ahead(run.prompt.device, streaming=streamer is not None)
        ahead = 0 if run.waits else ahead
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
        sequences = torch.cat([run.prompt, torch.stack(new, dim=1).to(run.prompt.device)], dim=1)
        return _output(run, sequences) if run.as_dict else sequences

    def stream(self, input_ids: Tensor | None = None, **options: Any) -> Iterator[Tensor]:
        """Give the new tokens of `generate` one step at a time, int64 [B] each.

        Takes the options of `generate`, except `streamer`. Options are checked by this call, the
        prompt is read when the first token is asked for. The iterator may be dropped at any time; a
        cache that was passed in then holds the text up to, and without, the last token given. Another
        call of generate or stream with that cache, its reset() and the like end the iterator.

        Raises:
            TypeError, ValueError: as `generate`.
        """
        named = {name: options.pop(name, None) for name in _NAMED}
        others = {name: options.pop(name, None) for name in _OTHERS}
        refuse_unknown(options, (*_NAMED, *_OTHERS))
        for name in ("return_dict_in_generate", "output_scores", "output_logits"):
            if named[name]:
                raise ValueError(f"stream: {name} is {named[name]}: a stream gives tokens only")
            named[name] = False
        _refuse_soft_prompts(self)
        run = prepare(self, named, input_ids=input_ids, **others)
        if run.beams is not None:
            raise ValueError(
                f"stream: num_beams is {run.beams.count}: beam search knows no token for sure before "
                "its end; use generate()"
            )
        if run.draft is not None and len(run.lengths) > 1:
            raise ValueError(
                f"stream: {len(run.lengths)} rows and drafted tokens: rows accept different numbers "
                "of them, so a cache could not be left at the last token given; use generate()"
            )
        tokens = new_tokens(self, run, 0, run.prompt.device)
        run.cache.lend(tokens)
        return tokens

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """Give the score of each new token, float32 [B * R, T]; 0 after the end of a beam's text.

        Args:
            sequences, scores, beam_indices: of a `GenerateOutput`.
            normalize_logits: give log-probabilities, where scores are not (without beams).
        """
        new = sequences[:, sequences.shape[1] - len(scores) :]
        table = torch.stack(list(scores))  # [T, N, V]
        if beam_indices is not None:
            new = sequences[:, sequences.shape[1] - beam_indices.shape[1] :]
            table = table[: beam_indices.shape[1]]
        if normalize_logits:
            table = table.log_softmax(dim=-1)
        rows = torch.arange(len(new), device=new.device)[:, None].expand_as(new)
        source = rows if beam_indices is None else beam_indices
        steps = torch.arange(new.shape[1], device=new.device)
        return table[steps, source.clamp(min=0), new].masked_fill(source < 0, 0.0)


def _refuse_soft_prompts(model: nn.Module) -> None:
    """PEFT's prompt learning replaces a method through which transformers' loop runs, not this one."""
    replaced = vars(model).get("prepare_inputs_for_generation")
    if replaced is not None and getattr(replaced, "__self__", None) is not model:
        raise ValueError(
            "generate: the model is one of PEFT's prompt learning, whose prompts would be left out: "
            "use transformers' Gemma 2 with gemma2.integrations.transformers"
        )


def _output(run: Run, sequences: Tensor, found: Found | None = None) -> GenerateOutput:
    record = run.record
    return GenerateOutput(
        sequences=sequences,
        sequences_scores=None if found is None else found.scores,
        scores=None if record is None else record.columns("scores"),
        logits=None if record is None else record.columns("logits"),
        beam_indices=None if found is None else found.sources,
        past_key_values=run.cache,
    )


_ALL = tuple(inspect.signature(GenerationMixin.generate).parameters)[1:-1]
# The options that are resolved against the generation config, and those that are not.
_NAMED = tuple(name for name in _ALL if name in GenerationConfig.__dataclass_fields__)
_OTHERS = tuple(name for name in _ALL if name not in (*_NAMED, "input_ids", "streamer"))

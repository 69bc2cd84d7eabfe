"""`gemma2 generate`: continue texts, streaming what is written."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gemma2.cli.options import (
    Commands,
    check_sampling,
    count,
    sampling_of,
    sampling_options,
    weights_options,
)
from gemma2.cli.shared import device_of, load_causal_lm, per_second, say, set_threads, texts_of
from gemma2.cli.terminal import answer_view

if TYPE_CHECKING:
    import torch

    from gemma2 import Gemma2ForCausalLM, Tokenizer

__all__ = ["add"]

EXAMPLES = """\
The most probable text is written, unless one of the sampling options is given.

examples:
  gemma2 generate "a small bird"
  gemma2 generate --seed 1 --temperature 0.8 "a small bird" "a tall tree"
  gemma2 generate --model gemma-2-2b --max-new-tokens 50 "Once upon a time"
  gemma2 generate --model gemma-2-2b-it --chat "Why is the sky blue?"
  gemma2 generate --model gemma-2-9b --device cuda "Once upon a time"
  echo "a kind of boat" | gemma2 generate --json -
"""


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    generate = commands.add(
        "generate",
        _run,
        "write text, streaming it as it comes",
        EXAMPLES,
        weights_options(),
        sampling_options(new_tokens=128),
    )
    generate.add_argument(
        "text", nargs="+", metavar="TEXT", help="what to continue, each on its own; - reads stdin"
    )
    generate.add_argument(
        "--chat", action="store_true", help="TEXT is a message to an instruction-tuned model"
    )
    generate.add_argument(
        "--raw",
        action="store_true",
        help="continue TEXT itself, not a definition of it (embedded model)",
    )
    generate.add_argument(
        "--no-stream", action="store_true", help="print each text when it is complete"
    )
    generate.add_argument("--stats", action="store_true", help="speed on stderr")
    generate.add_argument(
        "--stop", action="append", metavar="STRING",
        help="end where the text contains STRING; may be given several times",
    )  # fmt: skip
    faster = generate.add_mutually_exclusive_group()
    faster.add_argument(
        "--num-beams", type=count, metavar="N", help="look for the best text, N at a time"
    )
    faster.add_argument(
        "--prompt-lookup", type=count, metavar="N",
        help="check N tokens at a time that are looked up in prompt and text; the text stays the same",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    check_sampling(args)
    if args.raw and args.model is not None:
        args.parser.error(
            "--raw is for the embedded model: with --model, TEXT is continued as it is"
        )
    if args.stop and "" in args.stop:
        args.parser.error("--stop: an empty STRING is in every text")
    if args.chat and args.model is None:
        args.parser.error("--chat needs --model: the embedded model writes definitions only")
    texts = texts_of(args.text)
    set_threads(args)
    start = time.perf_counter()
    model, tokenizer = load_causal_lm(args, device_of(args))
    load_seconds = time.perf_counter() - start
    options, seed = sampling_of(args, model.generation_config)
    if args.stop:
        options.update(stop_strings=args.stop, tokenizer=tokenizer)
    if args.num_beams:
        options["num_beams"] = args.num_beams
    if args.prompt_lookup:
        options["prompt_lookup_num_tokens"] = args.prompt_lookup
    for number, text in enumerate(texts):
        ids = _prompt_ids(args, tokenizer, text)
        shown = not (args.json or args.no_stream)
        if len(texts) > 1 and not args.json:
            print(f"{'' if number == 0 else chr(10)}> {text}", flush=True)
        result = _write(model, tokenizer, ids, options, seed, print_text=shown)
        if args.json:
            print(json.dumps({"prompt": text, **result, "load_seconds": load_seconds}), flush=True)
        elif args.no_stream:
            print(result["text"], flush=True)
        if args.stats and not args.json:
            reading = result["prefill_tokens_per_s"]
            say(
                f"prompt {result['prompt_tokens']} tokens, "
                + ("" if reading is None else f"{reading:.0f} tokens/s; ")
                + f"text {result['new_tokens']} tokens, "
                f"{result['decode_tokens_per_s']:.1f} tokens/s; loaded in {load_seconds:.1f} s"
                + ("" if seed is None else f"; seed {seed}")
            )


def _prompt_ids(args: argparse.Namespace, tokenizer: Tokenizer, text: str) -> list[int]:
    if args.chat:
        return tokenizer.encode_chat([{"role": "user", "content": text}])
    if args.model is None and not args.raw:
        from gemma2 import tiny

        text = tiny.prompt(text)
    return tokenizer.encode(text)


def _write(
    model: Gemma2ForCausalLM,
    tokenizer: Tokenizer,
    ids: list[int],
    options: dict[str, Any],
    seed: int | None,
    print_text: bool,
) -> dict[str, Any]:
    """Continue one prompt, printing the text as it comes if asked to; give it with its figures."""
    import torch

    decoder = tokenizer.decode_stream()
    ends = set(model.generation_config.eos_token_ids)
    view = answer_view(plain=True, silent=not print_text)()
    pieces: list[str] = []
    new: list[int] = []
    prompt = torch.tensor([ids], device=model.device)
    start = time.perf_counter()
    first = start
    try:
        for token in _tokens(model, prompt, {**options, "seed": seed}):
            if not new:
                first = time.perf_counter()
            new.append(token)
            pieces.append(decoder.put(token))
            view.put(pieces[-1])
        pieces.append(decoder.end())
        view.put(pieces[-1])
    except BaseException:
        if any(pieces):
            view.end()
        raise
    view.end()
    end = time.perf_counter()
    together = "num_beams" in options  # all tokens come at once, in the end
    return {
        "text": "".join(pieces).lstrip(),
        "tokens": new,
        "finish_reason": _reason(new, ends, options["max_new_tokens"]),
        "seed": seed,
        "prompt_tokens": len(ids),
        "new_tokens": len(new),
        "prefill_tokens_per_s": None if together else per_second(len(ids), first - start),
        "decode_tokens_per_s": per_second(len(new) - 1, end - (start if together else first)),
    }


def _tokens(
    model: Gemma2ForCausalLM, prompt: torch.Tensor, options: dict[str, Any]
) -> Iterator[int]:
    """Give the new tokens as they come; the best of several beams is known in the end only."""
    if "num_beams" in options:
        found: Any = model.generate(prompt, **options)
        yield from found[0, prompt.shape[1] :].tolist()
    else:
        yield from map(int, model.stream(prompt, **options))


def _reason(new: list[int], ends: set[int], most: int) -> str:
    if new[-1] in ends:
        return "eos"
    return "length" if len(new) == most else "stop"

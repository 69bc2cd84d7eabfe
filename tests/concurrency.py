"""What the tests of threads, forks and signals have in common: texts to write, and processes."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gemma2 import HybridCache
from tests.model.factories import tokens

DEADLINE = (
    60.0  # seconds, after which what has not answered hangs; all of it takes a fraction of one
)
NEVER: dict[str, Any] = {"eos_token_id": []}
SPAWN: Any = multiprocessing.get_context("spawn")
FORK: Any = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
HANGS = "hangs"


# ---- texts --------------------------------------------------------------------------------------


def prompt(length: int, seed: int = 0) -> Tensor:
    return tokens(1, length, seed)


def greedy(model: Any, ids: Tensor, cache: HybridCache | None = None, **options: Any) -> list[int]:
    out = model.generate(ids, past_key_values=cache, max_new_tokens=12, **NEVER, **options)
    return out[0, ids.shape[1] :].tolist()


def by_hand(model: Any, ids: Tensor, cache: HybridCache) -> list[int]:
    """A loop as users write it, which samples with a generator of its own."""
    generator, last, new = torch.Generator().manual_seed(3), ids, []
    with torch.no_grad():
        for _ in range(12):
            logits = model(last, past_key_values=cache, logits_to_keep=1).logits[0, -1]
            last = torch.multinomial(logits.softmax(-1), 1, generator=generator)[None]
            new.append(int(last))
    return new


def two_turns(model: Any, ids: Tensor, cache: HybridCache) -> list[int]:
    """Something is written, and gone on with, in a cache that knows its text."""
    first = greedy(model, ids, cache)
    text = torch.cat([ids, torch.tensor([first]), tokens(1, 20, 7)], dim=1)
    return first + greedy(model, text, cache)


SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_p": 0.9}
WORKS: dict[str, Callable[[Any, Tensor, HybridCache], list[int]]] = {
    "greedy": greedy,
    "turns": two_turns,
    "sampled": functools.partial(greedy, seed=1, **SAMPLED),
    "by hand": by_hand,
    "lookup": functools.partial(greedy, prompt_lookup_num_tokens=3),
    "penalty": functools.partial(greedy, seed=2, repetition_penalty=1.5, **SAMPLED),
    "beams": functools.partial(greedy, num_beams=3),
}


# ---- processes ----------------------------------------------------------------------------------


def answer_of(
    context: Any, work: Callable[..., Any], *args: Any, deadline: float = DEADLINE
) -> Any:
    """Give what `work` gives in a process of its own; HANGS if it does not; an error as text."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, work, *args))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(deadline) else HANGS
    except EOFError:
        process.join()
        return f"ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _answer(there: Any, work: Callable[..., Any], *args: Any) -> None:
    try:
        there.send(work(*args))
    except BaseException:
        there.send(traceback.format_exc())


@contextlib.contextmanager
def forked(work: Callable[..., None], *args: Any) -> Iterator[tuple[Any, Any]]:
    """A process that does `work(channel, *args)`, and this end of the channel."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=work, args=(there, *args))
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join()


def heard(channel: Any) -> Any:
    assert channel.poll(DEADLINE), "no answer: it hangs"
    return channel.recv()

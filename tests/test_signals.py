"""Signals: what they interrupt ends at once and can be gone on with; their handlers disturb nothing."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from gemma2 import HybridCache, evaluation
from gemma2.ring import readable
from tests.concurrency import DEADLINE, FORK, NEVER, WORKS, forked, greedy, heard, prompt
from tests.model.factories import lively, padded, relative_error

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@functools.cache
def told(lengths: tuple[int, ...], count: int) -> tuple[Tensor, Tensor, list[list[int]], Tensor]:
    """Ids, mask, what is written after them by uncached forwards, row by row, and the logits."""
    model, rows, all_logits = lively("three"), [], []
    prompts = [prompt(n, seed=n)[0] for n in lengths]
    with torch.no_grad():
        for text in prompts:
            for _ in range(count):
                logits = model(text[None], use_cache=False).logits[0]
                text = torch.cat([text, logits[-1:].argmax(-1)])
            rows.append(text.tolist())
            all_logits.append(model(text[None], use_cache=False).logits[0])
    return *padded(prompts, "left"), rows, torch.nn.utils.rnn.pad_sequence(all_logits, True)


class Counter:
    """Counts steps where another process sees it."""

    def __init__(self, steps: Any) -> None:
        self.steps = steps

    def put(self, value: Tensor) -> None:
        self.steps.value += 1

    def end(self) -> None:
        pass


CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((140,), {}),
    ((150, 20), {"prefill_chunk_size": 40}),
    ((140,), {"prompt_lookup_num_tokens": 3}),
]
STEPS = 40


def check_cache(cache: HybridCache, lengths: tuple[int, ...], number: int) -> None:
    """It holds the beginning of what would have been written, and either way of going on works."""
    model = lively("three")
    ids, mask, whole, logits = told(lengths, STEPS)
    held = cache.lengths.tolist()
    if any(held):
        assert cache.text is not None
        assert cache.text == [row[:n] for row, n in zip(whole, held, strict=True)]
    if number % 2:
        more = {"attention_mask": mask, "max_new_tokens": STEPS, **NEVER}
        out = model.generate(ids, past_key_values=cache, **more)
        new = [row[n:] for row, n in zip(whole, lengths, strict=True)]
        assert out[:, ids.shape[1] :].tolist() == new
        return
    with torch.no_grad():
        rest = [torch.tensor(row[n : n + 20]) for row, n in zip(whole, held, strict=True)]
        chunk, seen = padded(rest, "right")
        earlier = padded([torch.ones(n, dtype=torch.int64) for n in held], "left")[1]
        seen = torch.cat([earlier, seen], dim=1)
        out = model(chunk, attention_mask=seen, past_key_values=cache).logits
    for row, n in enumerate(held):
        count = len(rest[row])
        assert relative_error(out[row, :count], logits[row, n : n + count]) < 1e-4


def interrupted(channel: Any, steps: Any) -> None:
    """Write again and again, and each time wait for SIGINT; say what has come of it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = copy.deepcopy(lively("three")).train()
    for number in itertools.count():
        lengths, options = CASES[number % len(CASES)]
        ids, mask, _, _ = told(lengths, STEPS)
        cache = HybridCache(model.config, len(lengths))
        verdict, at = "", -1
        if not channel.recv():
            return
        steps.value = 0  # not before: the other side reads the last number until it sends
        try:
            channel.send("begins")
            options = {"attention_mask": mask, "max_new_tokens": STEPS, **options, **NEVER}
            streamer = Counter(steps)
            model.generate(ids, past_key_values=cache, streamer=streamer, **options)
            channel.send("ended")
            time.sleep(DEADLINE / 2)
            verdict = "KeyboardInterrupt was not raised"
        except KeyboardInterrupt:
            at = steps.value
        if not verdict:
            try:
                assert not torch.is_inference_mode_enabled()
                assert all(module.training for module in model.modules())
                check_cache(cache, lengths, number)
            except BaseException:
                verdict = traceback.format_exc()
        channel.send((verdict, at))


def test_an_interrupt_ends_generation_at_once_and_leaves_a_cache_that_goes_on() -> None:
    draw, steps = random.Random(0), FORK.Value("q", 0, lock=False)
    for lengths, _ in CASES:
        told(lengths, STEPS)  # before the fork, so that the other process has it
    took: list[float] = []
    ends: list[bool] = []
    with forked(interrupted, steps) as (process, channel):
        for number in range(36):
            channel.send(True)
            assert heard(channel) == "begins"
            begun, case = time.monotonic(), number % len(CASES)
            if number < len(CASES):
                assert heard(channel) == "ended"
                took.append(time.monotonic() - begun)
            else:
                time.sleep(draw.uniform(0, took[case]))
            os.kill(process.pid, signal.SIGINT)
            counted = steps.value
            answer = heard(channel)
            ends.append(answer == "ended")
            verdict, at = heard(channel) if ends[-1] else answer
            assert not verdict, verdict
            # it may have been in a step, which gives one token, or those that were drafted with it
            assert at <= counted + (5 if "prompt_lookup_num_tokens" in CASES[case][1] else 2)
        channel.send(False)
    assert not all(ends[len(CASES) :])  # some came in time


# ---- the same at chosen moments -----------------------------------------------------------------


class AtTheNthCall:
    """Passes everything on to `real`, and raises instead at the n-th call."""

    def __init__(self, real: Callable[..., Any], n: int, error: type[BaseException]) -> None:
        self.real, self.left, self.error = real, n, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("what", ["generate", "perplexity"])
def test_an_interrupt_leaves_no_module_in_another_mode_than_the_rest(what: str) -> None:
    """Ctrl-C may come wherever Python runs, as it does when `training` is set in a loop."""
    model, real = copy.deepcopy(lively("three")).train(), torch.nn.Module.__setattr__
    modules = len(list(model.modules()))

    def at_mode(n: int) -> Callable[..., None]:
        numbers = itertools.count()

        def setattr_(module: Any, name: str, value: Any) -> None:
            real(module, name, value)
            if name == "training" and next(numbers) == n:
                raise KeyboardInterrupt

        return setattr_

    for n in range(0, 2 * modules, 7):
        with (
            mock.patch.object(torch.nn.Module, "__setattr__", at_mode(n)),
            contextlib.suppress(KeyboardInterrupt),
        ):
            if what == "generate":
                greedy(model, prompt(5))
            else:
                evaluation.token_log_probs(model, prompt(5))
        assert all(module.training for module in model.modules()), n


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_memory_that_is_not_got_leaves_the_cache_as_it_was(error: type[BaseException]) -> None:
    """Of the keys or the values, of one layer or another, at the beginning or when it grows."""
    model, rang = lively("three"), 0
    for first, n in itertools.product((0, 60, 100), range(1, 9)):
        cache = HybridCache(model.config, 1)
        if first:
            greedy(model, prompt(first), cache)
        alarm = AtTheNthCall(torch.zeros, n, error)
        longer = torch.cat([prompt(first), prompt(150, seed=1)], dim=1)
        with mock.patch.object(torch, "zeros", alarm), contextlib.suppress(error):
            greedy(model, longer, cache)
        rang += alarm.left <= 0
        with torch.no_grad():  # goes on from what it holds, without a look at the text
            held = cache.get_seq_length()
            text = torch.tensor([cache.text[0] if cache.text else []], dtype=torch.int64)
            whole = torch.cat([text, prompt(40, seed=2)], dim=1)
            out = model(whole[:, held:], past_key_values=cache).logits
            wanted = model(whole, use_cache=False).logits[:, held:]
        assert relative_error(out, wanted) < 1e-4, (first, n)
    assert rang > 8


@pytest.mark.parametrize("n", range(1, 9))
def test_an_interrupt_of_spreading_prompts_leaves_no_text_that_a_row_does_not_hold(n: int) -> None:
    model, prompts = lively("three"), torch.cat([prompt(20), prompt(20, seed=1)])
    cache = HybridCache(model.config, 6, 100)
    alarm = AtTheNthCall(readable, n, KeyboardInterrupt)
    real = cache.reorder

    def reorder(*args: Any) -> None:
        with mock.patch("gemma2.cache.readable", alarm):
            real(*args)

    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "seed": 1, **NEVER}
    with mock.patch.object(cache, "reorder", reorder), contextlib.suppress(KeyboardInterrupt):
        model.generate(prompts, past_key_values=cache, max_new_tokens=3, **options)
    out = model.generate(prompts, past_key_values=cache, max_new_tokens=3, **NEVER)
    assert torch.equal(out, model.generate(prompts, max_new_tokens=3, **NEVER))


# ---- other signals ------------------------------------------------------------------------------


def terminated(channel: Any, handled: bool) -> None:
    torch.set_num_threads(1)
    model = lively("three")
    cache = HybridCache(model.config, 1)
    ids, _, whole, _ = told((140,), STEPS)

    def leave(number: int, frame: Any) -> None:
        sys.exit(7)

    class Telling:
        def put(self, value: Tensor) -> None:
            channel.send("writes")

        def end(self) -> None:
            pass

    if handled:
        signal.signal(signal.SIGTERM, leave)
    try:
        with contextlib.suppress(BrokenPipeError):
            while True:
                model.generate(ids, past_key_values=cache, max_new_tokens=STEPS, streamer=Telling())
    except SystemExit:
        assert cache.text == [whole[0][: cache.get_seq_length()]]
        raise


@pytest.mark.parametrize(("handled", "code"), [(False, -signal.SIGTERM), (True, 7)])
def test_sigterm_ends_the_process(handled: bool, code: int) -> None:
    """As the system does it, or as a handler wants it, which raises SystemExit."""
    told((140,), STEPS)
    with forked(terminated, handled) as (process, channel):
        for _ in range(20):
            assert heard(channel) == "writes"
        os.kill(process.pid, signal.SIGTERM)
        until = time.monotonic() + DEADLINE / 4
        with contextlib.suppress(EOFError):
            while time.monotonic() < until:
                heard(channel)
        process.join(DEADLINE / 4)
        assert process.exitcode == code


@pytest.mark.parametrize("name", WORKS)
def test_a_handler_that_runs_while_tokens_are_written_does_not_disturb_them(name: str) -> None:
    """It writes a text of its own with the same model, and leaves torch's modes to others."""
    model, ticks, busy = lively("three"), 0, False
    other = greedy(model, prompt(20, seed=5))

    def handler(number: int, frame: Any) -> None:
        nonlocal ticks, busy
        if busy:
            return
        busy = True
        ticks += 1
        try:
            assert ticks % 3 or greedy(model, prompt(20, seed=5)) == other
        finally:
            busy = False

    def work() -> list[int]:
        return WORKS[name](model, prompt(170), HybridCache(model.config, 3, 400))

    alone = work()
    before = signal.signal(signal.SIGALRM, handler)
    until = time.monotonic() + DEADLINE
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.003)
        while ticks < 12 and time.monotonic() < until:
            assert work() == alone
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ticks >= 12

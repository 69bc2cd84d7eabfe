"""Processes that are forked or spawned write the same, and none of them hangs."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import gemma2
from gemma2 import tiny
from tests.concurrency import DEADLINE, FORK, HANGS, SPAWN, answer_of, greedy, prompt
from tests.model.factories import lively

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def write(threads: int) -> list[int]:
    """Generate with `threads` threads; the prompt's products and attention are shared by them."""
    torch.set_num_threads(threads)
    return greedy(lively("three", vocab_size=20_000, intermediate_size=512), prompt(300))


def torch_alone(threads: int) -> float:
    torch.set_num_threads(threads)
    return float((torch.ones(1000, 1000) * 2).sum())


def write_and_fork() -> dict[str, Any]:
    """Give what forked processes write, by threads before and after the fork."""
    fork = functools.partial(answer_of, FORK, deadline=DEADLINE / 4)
    found: dict[str, Any] = {"imported only": fork(write, 1), "1": write(1)}
    found |= {"1, then 1": fork(write, 1), "1, then 2": fork(write, 2)}
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            write(1)

    thread = threading.Thread(target=go_on)
    thread.start()
    found["beside a thread that writes"] = [fork(write, 1) for _ in range(5)]
    stop.set()
    thread.join()
    found |= {"2": write(2), "2, then 1": fork(write, 1)}
    found["torch alone"] = answer_of(FORK, torch_alone, 2, deadline=3)
    if found["torch alone"] != HANGS:
        found["2, then 2"] = fork(write, 2)
    return found


@pytest.fixture(scope="module")
def forks() -> dict[str, Any]:
    """A new process, in which nothing has ever run in threads, writes and is forked."""
    found = answer_of(SPAWN, write_and_fork, deadline=4 * DEADLINE)
    assert isinstance(found, dict), found
    return found


@pytest.mark.parametrize("case", ["imported only", "1, then 1", "1, then 2", "2, then 1"])
def test_a_fork_writes_the_same(case: str, forks: dict[str, Any]) -> None:
    """With one thread, and with more unless the parent has used more."""
    assert forks[case] == forks["1"]


def test_a_fork_beside_a_thread_that_writes_writes_the_same(forks: dict[str, Any]) -> None:
    assert forks["beside a thread that writes"] == [forks["1"]] * 5


def test_a_fork_of_many_threads_with_many_threads(forks: dict[str, Any]) -> None:
    """OpenMP's threads are not forked; a child may have as many as its torch survives."""
    if forks["torch alone"] == HANGS:
        pytest.skip("torch's own operators hang when parent and fork use several threads (libgomp)")
    assert forks["2, then 2"] == forks["1"]


def test_a_spawned_process_writes_the_same_with_many_threads(forks: dict[str, Any]) -> None:
    assert forks["1"] == forks["2"] == write(1)


class Texts(Dataset[list[list[int]]]):
    """Tokens of texts: by the tokenizer that it was given, and by one that the worker has loaded."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.tokenizer = texts, tiny.load_tokenizer()
        self.tokenizer.batch_decode(self.tokenizer(texts)["input_ids"])  # in the parent, too

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> list[list[int]]:
        text = self.texts[number]
        own = gemma2.Tokenizer.from_pretrained(tiny.path())
        return [it([text, text])["input_ids"][1].tolist() for it in (self.tokenizer, own)]


@pytest.mark.parametrize("kind", ["fork", "spawn"])
def test_workers_of_a_loader_tokenise(kind: str) -> None:
    texts = ["a small bird", "to run quickly", "Größe 3", "a large wild cat with stripes"]
    loader = DataLoader(
        Texts(texts), batch_size=1, num_workers=2 if kind == "fork" else 1, collate_fn=list,
        multiprocessing_context=kind, timeout=DEADLINE,
    )  # fmt: skip
    tokenizer = tiny.load_tokenizer()
    wanted = [tokenizer(text)["input_ids"][0].tolist() for text in texts]
    assert [rows for (rows,) in loader] == [[row, row] for row in wanted]

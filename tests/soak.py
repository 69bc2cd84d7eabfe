"""Hours of random use of long-lived caches: `python -m tests.soak --minutes 60 --seed 1`.

A few models, each with one cache that is never thrown away, take turns. Each step is one of STEPS:
calls of the model (chunks, padding, holes, documents), generation (greedy, sampled, drafts, beams, in
chunks, continued, of an edited text, cancelled), and what is done to a cache in between. After it the
cache is what an uncached float64 forward of each row's text says, or the text is that of a
generation without a cache. Memory at the end is that after the warm-up.

What fails is printed with the steps since the cache was last empty, as JSON lines;
`python -m tests.soak --replay FILE` does them again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from gemma2 import HybridCache
from tests.model import factories as F
from tests.model.test_cache_machine import LONGEST, CacheMachine, Row

Step = dict[str, Any]
# window, margin, rows, whether the cache grows by itself, snapshots that generation keeps
PLACES = [(8, 64, 2, True, 0), (100, 28, 3, False, 2), (120, 8, 1, True, 1), (128, 0, 2, False, 0)]
WARM_UP = 300  # steps
GROWTH = 24 * 2**20  # bytes of resident memory that may come after the warm-up
CLOSE = 1e-4  # of two logits, which of them is larger may differ


class Place(CacheMachine):
    """A model and its cache for ever; `do` runs a step, `draw` makes one up."""

    tolerance = 4e-4  # of lively models, whose later layers add as much as the first

    def __init__(self, number: int) -> None:
        super().__init__()
        window, margin, rows, grows, snapshots = PLACES[number]
        self.number, self.window = number, window
        self.model = F.lively("three", sliding_window=window)
        self.config, self.state = self.model.config, self.model.state_dict()
        self.assistant = F.tiny("three", sliding_window=window)
        length = None if grows else LONGEST
        self.cache = HybridCache(self.config, rows, length, margin=margin, keep_snapshots=snapshots)
        self.rows = [Row() for _ in range(rows)]
        self.saved, self.lowest_write, self.calls = None, [LONGEST] * rows, 0
        self.steps: list[Step] = []

    def do(self, step: Step) -> None:
        """Runs a step and checks what it says; AssertionError or what the package raised, else."""
        self.steps.append(step)
        arguments = {name: value for name, value in step.items() if name != "kind"}
        self.calls = arguments.pop("seed", 0)
        getattr(self, f"do_{step['kind']}")(**arguments)
        self.lengths_are_exact()
        if not any(row.tokens for row in self.rows) and self.saved is None:
            self.steps = []

    def draw(self, rng: random.Random) -> Step:
        """Gives a step that can be taken now."""
        kinds = list(STEPS)
        while True:
            kind = rng.choices(kinds, [STEPS[k][0] for k in kinds])[0]
            arguments = STEPS[kind][1](self, rng)
            if arguments is not None:
                return {"kind": kind, **arguments}

    def longest(self) -> int:
        return max(len(row.tokens) for row in self.rows)

    # ---- calls of the model ---------------------------------------------------------------------

    def do_feed(self, mask: list[list[int]], documents: bool, positions: bool) -> None:
        self.call(torch.tensor(mask), documents, positions)

    # ---- generation -----------------------------------------------------------------------------

    def prompts(self, keep: list[int], new: list[int]) -> list[list[int]]:
        """The first `keep` tokens of each row and `new` fresh ones."""
        fresh = F.tokens(len(new), max(new), seed=self.calls).tolist()
        return [
            [*row.tokens[:k], *more[:n]]
            for row, k, more, n in zip(self.rows, keep, fresh, new, strict=False)
        ]

    def do_generate(
        self, keep: list[int], new: list[int], side: str, options: dict[str, Any], drafts: str
    ) -> None:
        prompts = self.prompts(keep, new)
        given = self.options(options, drafts)
        ids, mask = F.padded([torch.tensor(p) for p in prompts], side)
        given.update(attention_mask=mask, eos_token_id=[])
        out = self.model.generate(ids, past_key_values=self.cache, **given)
        written = out[:, ids.shape[1] :].tolist()
        if "num_beams" in given or given["do_sample"]:
            alone = self.model.generate(ids, **given)[:, ids.shape[1] :].tolist()
            assert written == alone, f"{written} with the cache, {alone} without"
        else:
            for prompt, more in zip(prompts, written, strict=True):
                self.check_greedy(prompt, more)
        if "num_beams" in given:
            self.take_beams(prompts[0])
        else:
            self.take_text(prompts, written)

    def do_cancel(self, keep: list[int], new: list[int], after: int, count: int) -> None:
        prompts = self.prompts(keep, new)
        ids, mask = F.padded([torch.tensor(p) for p in prompts], "left")
        stream = self.model.stream(
            ids,
            attention_mask=mask,
            past_key_values=self.cache,
            eos_token_id=[],
            max_new_tokens=count,
            do_sample=False,
        )
        tokens = [t.tolist() for t in itertools.islice(stream, after)]
        stream.close()  # type: ignore[attr-defined]
        written = [list(row) for row in zip(*tokens, strict=True)] or [[] for _ in prompts]
        for prompt, more in zip(prompts, written, strict=True):
            self.check_greedy(prompt, more)
        self.take_text(prompts, written)

    def options(self, options: dict[str, Any], drafts: str) -> dict[str, Any]:
        given = {"do_sample": False, **options}
        if drafts == "lookup":
            given["prompt_lookup_num_tokens"] = 4
        elif drafts == "assistant":
            given.update(assistant_model=self.assistant, num_assistant_tokens=3)
        return given

    def check_greedy(self, prompt: list[int], written: list[int]) -> None:
        """Every token has the largest logit of an uncached forward, up to CLOSE of them."""
        if not written:
            return
        row = Row()
        for token in (*prompt, *written):
            row.append(token, False)
        logits = self.truth(row)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(written)[:, None])[:, 0]
        short = (logits.amax(1) - chosen).max() / logits.square().mean().sqrt()
        assert short < CLOSE, f"after {len(prompt)} tokens {written}, short by {short:.1e}"

    def take_text(self, prompts: list[list[int]], written: list[list[int]]) -> None:
        """The rows of these prompts are now what the cache holds of their texts."""
        lengths, text = self.cache.lengths.tolist(), self.cache.text
        for b, (prompt, more) in enumerate(zip(prompts, written, strict=True)):
            held = [*prompt, *more][: lengths[b]]
            assert len(held) == lengths[b], f"row {b} holds {lengths[b]} tokens of {len(held)}"
            known = text is not None and b < len(text)
            assert not known or text[b] == held, f"row {b}: text is {text[b]}, not {held}"
            self.hold(b, held)

    def take_beams(self, prompt: list[int]) -> None:
        """The rows are what the cache says: as much of each text as a beam held in the end."""
        for b in range(len(self.rows)):
            assert self.cache.text is not None
            held = self.cache.text[b]
            assert held[: len(prompt)] == prompt[: len(held)], f"row {b}: {held} after {prompt}"
            self.hold(b, held)

    def hold(self, b: int, tokens: list[int]) -> None:
        written = int(self.cache._written[b])
        self.rows[b] = Row(list(tokens), [0] * len(tokens), written)

    # ---- what is done between calls -------------------------------------------------------------

    def do_crop(self, lengths: list[int]) -> None:
        self.cache.crop(torch.tensor(lengths))
        for row, n in zip(self.rows, lengths, strict=True):
            self.cut(row, n)

    def do_crop_by(self, n: int, negative: bool) -> None:
        self.crop_all(n, negative)

    def do_reorder(self, beams: list[int]) -> None:
        self.cache.reorder(torch.tensor(beams))
        self.saved = None
        self.rows = [self.rows[i].copy() for i in beams]

    def do_reset(self) -> None:
        self.cache.reset()
        self.rows = [Row() for _ in self.rows]
        self.saved = None

    def do_snapshot(self) -> None:
        self.saved = self.cache.snapshot(), [row.copy() for row in self.rows]

    def do_restore(self) -> None:
        assert self.saved is not None
        snapshot, rows = self.saved
        try:
            self.cache.restore(snapshot)
        except ValueError as error:
            # beams may have reordered the rows; the full layers are not in the snapshot
            if not re.search("written again since|reordered since", str(error)):
                raise
            return
        self.rows = [row.copy() for row in rows]
        for b, row in enumerate(self.rows):
            row.written = int(self.cache._written[b])

    def do_grow(self, more: int) -> None:
        self.cache.grow(min(self.cache.max_cache_len + more, LONGEST))


# ---- Steps: how often, and arguments that make sense now (None: not this one) --------------------


def _feed(place: Place, rng: random.Random) -> Step | None:
    columns = min(rng.choice([1, 1, 2, 5, 9, 30, 129, 150]), place.room())
    if columns < 1:
        return None
    mask = [[1] * columns for _ in place.rows]
    kind = rng.choice(["none", "none", "left", "right", "holes", "empty rows"])
    for row in mask:
        pads = rng.randint(0, columns)
        if kind == "left":
            row[:pads] = [0] * pads
        elif kind == "right":
            row[columns - pads :] = [0] * pads
        elif kind == "holes":
            row[:] = [rng.randint(0, 1) for _ in row]
        elif kind == "empty rows" and pads % 2:
            row[:] = [0] * columns
    documents = rng.random() < 0.15
    seed = rng.randrange(10**6)
    return {"mask": mask, "documents": documents, "positions": rng.random() < 0.1, "seed": seed}


def _prompts(place: Place, rng: random.Random, count: int) -> Step | None:
    """`keep` and `new` of prompts for the first rows, with room for `count` tokens more."""
    if place.cache.has_history:
        return None
    rows = len(place.rows) if rng.random() < 0.7 else rng.randint(1, len(place.rows))
    lengths = [len(row.tokens) for row in place.rows[:rows]]
    known = place.cache.text is not None
    keep = [rng.randint(0, n) if known and rng.random() < 0.3 else n for n in lengths]
    new = [rng.choice([1, 2, 6, 20, 140]) for _ in keep]
    room = LONGEST - count - 8  # 8: drafts
    if any(k + n > room for k, n in zip(keep, new, strict=True)):
        return None
    return {"keep": keep, "new": new, "seed": rng.randrange(10**6)}


def _generate(place: Place, rng: random.Random) -> Step | None:
    count = rng.choice([1, 2, 5, 12, 40])
    step = _prompts(place, rng, count)
    if step is None:
        return None
    options: dict[str, Any] = {"max_new_tokens": count}
    if rng.random() < 0.5:
        options["prefill_chunk_size"] = rng.choice([1, 7, 64, 100])
    drafts, rows = "", len(step["keep"])
    way = rng.choice(["greedy", "greedy", "sample", "lookup", "assistant", "beams"])
    if way == "sample":
        options.update(do_sample=True, temperature=0.7, top_k=20, seed=rng.randrange(10**6))
    elif way == "beams":
        if rows > 1 or len(place.rows) == 1:
            return None
        options.update(num_beams=len(place.rows), num_return_sequences=1)
    elif way != "greedy":
        margins = [layer.margin for layer in place.cache.layers if layer.wraps]
        if margins and min(margins) < 4:
            return None
        drafts = way
    return {**step, "side": rng.choice(["left", "right"]), "options": options, "drafts": drafts}


def _cancel(place: Place, rng: random.Random) -> Step | None:
    count = rng.choice([3, 10, 30])
    step = _prompts(place, rng, count)
    return step and {**step, "count": count, "after": rng.randint(0, count)}


def _crop(place: Place, rng: random.Random) -> Step | None:
    lengths = [len(row.tokens) for row in place.rows]
    floors = [place.floor(row) for row in place.rows]
    wanted = [rng.randint(min(low, n), n) for low, n in zip(floors, lengths, strict=True)]
    return {"lengths": wanted} if any(lengths) else None


def _crop_by(place: Place, rng: random.Random) -> Step | None:
    return {"n": rng.randint(1, 40), "negative": rng.random() < 0.5} if place.longest() else None


def _reorder(place: Place, rng: random.Random) -> Step | None:
    return {"beams": [rng.randrange(len(place.rows)) for _ in place.rows]}


def _grow(place: Place, rng: random.Random) -> Step | None:
    room = LONGEST - place.cache.max_cache_len
    return {"more": rng.randint(1, room)} if place.cache.growable and room > 0 else None


def _reset(place: Place, rng: random.Random) -> Step | None:
    # a full cache, or documents, which generation does not take
    due = place.longest() > LONGEST - 60 or place.cache.has_history
    return {} if due or rng.random() < 0.05 else None


STEPS: dict[str, tuple[float, Callable[[Place, random.Random], Step | None]]] = {
    "feed": (6, _feed),
    "generate": (6, _generate),
    "cancel": (2, _cancel),
    "crop": (2, _crop),
    "crop_by": (2, _crop_by),
    "reorder": (1, _reorder),
    "snapshot": (1, lambda place, rng: {}),
    "restore": (1, lambda place, rng: None if place.saved is None else {}),
    "grow": (0.5, _grow),
    "reset": (2, _reset),
}


# ---- The run -------------------------------------------------------------------------------------


def memory() -> tuple[int, int]:
    """Resident bytes of this process, and how many tensors Python knows."""
    gc.collect()
    tensors = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    return psutil.Process().memory_info().rss, tensors


def steps(seed: int, places: list[Place]) -> Iterator[tuple[Place, Step]]:
    """Turns of 1 to 30 steps at one place after the other, for ever."""
    rng = random.Random(seed)
    while True:
        number = rng.randrange(len(places))
        for _ in range(rng.randint(1, 30)):
            yield places[number], places[number].draw(rng)


def kind_of(step: Step) -> str:
    """The kind, of generation with its way."""
    if step["kind"] != "generate":
        return str(step["kind"])
    options = step["options"]
    if "num_beams" in options:
        return "generate: beams"
    return f"generate: {step['drafts'] or ('sample' if options.get('do_sample') else 'greedy')}"


def soak(seconds: float, seed: int, report: Callable[[str], None] = print) -> int:
    """Runs for so long; gives the number of failures, memory that grew counted as one."""
    places = [Place(number) for number in range(len(PLACES))]
    counts: Counter[str] = Counter()
    failures = 0
    start = spoken = time.monotonic()
    before = (0, 0)
    for total, (place, step) in enumerate(steps(seed, places)):
        now = time.monotonic()
        if now - start > seconds:
            break
        if total == WARM_UP:
            before = memory()
        if now - spoken > 300:
            spoken = now
            rss = memory()[0] / 2**20
            report(
                f"{(now - start) / 60:.0f} min: {total} steps, {failures} failures, {rss:.0f} MiB"
            )
        counts[kind_of(step)] += 1
        try:
            with torch.no_grad():
                place.do(step)
        except Exception:
            failures += 1
            counts["failed"] += 1
            report(f"FAILED: seed {seed}, step {total}, place {place.number}")
            report(traceback.format_exc())
            for done in place.steps:
                report(json.dumps({"place": place.number, **done}))
            places[place.number] = Place(place.number)
            if failures >= 20:
                break
    rss, tensors = memory()
    read_again = sum(place.cache.reprocessed for place in places)
    report(f"seed {seed}, {counts.total()} steps in {time.monotonic() - start:.0f} s:")
    for kind, count in sorted(counts.items()):
        report(f"  {kind:<22} {count:>8}")
    report(f"  tokens that generation read again: {read_again}")
    if before != (0, 0):
        report(f"  memory after {WARM_UP} steps {before[0] / 2**20:.0f} MiB, {before[1]} tensors")
        report(f"  memory at the end       {rss / 2**20:.0f} MiB, {tensors} tensors")
        # caches that grew with their texts, and snapshots: a few tensors for each place
        if rss - before[0] > GROWTH or tensors - before[1] > 30 * len(places):
            failures += 1
            report("FAILED: memory grows")
    report(f"{failures} failures")
    return failures


def replay(path: Path) -> None:
    """Does the steps of a file of JSON lines; the failing one raises."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("{")]
    done = [json.loads(line) for line in lines]
    place = Place(done[0].pop("place"))
    for step in done:
        step.pop("place", None)
        print(kind_of(step), {k: v for k, v in step.items() if k not in ("kind", "mask")})
        with torch.no_grad():
            place.do(step)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=Path, help="a file with the steps of a failure")
    options = parser.parse_args()
    if options.replay:
        replay(options.replay)
        return 0
    return 1 if soak(60 * options.minutes, options.seed, lambda s: print(s, flush=True)) else 0


if __name__ == "__main__":
    sys.exit(main())

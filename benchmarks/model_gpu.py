"""The whole model on a GPU, beside transformers with the same weights: prompts and steps of decoding.

One process serves all cases of a size: the model is made where it runs, and transformers' model
shares its weights. Peers are transformers' eager attention, the one that has the cap on every
release, and its own compiled decoding with a static cache. Tokens come through `generate` of each,
greedily: a prompt is timed with a single new token, decoding as the steps after the first eight, in
which graphs are captured and caches settle.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import time_limit
from gemma2 import Gemma2Config, Gemma2ForCausalLM
from gemma2.bench import Timing, random_model

__all__ = ["cuda_cases", "peak_bytes", "run_on", "tiny"]

SETTLING = 8  # steps of decoding that are not timed
RUNS = 3
EAGER_BYTES = 20e9  # what the eager peer may need for the scores of a prompt
COMPILE_SECONDS = 75.0  # what compiling the peer may take
SAMPLED = 16  # tokens that are drawn with and without a graph


def cuda_cases() -> list[dict[str, Any]]:
    def case(size: str, kind: str, tokens: int, batch: int = 1, peer: str = "eager") -> Any:
        return {
            "size": size,
            "kind": kind,
            "tokens": tokens,
            "batch": batch,
            "new": 64 if kind == "decode" else 1,
            "peer": peer,
            "dtype": "bfloat16",
        }

    found = []
    for size in ("2b", "9b"):
        found += [case(size, "decode", 512), case(size, "prefill", 2048)]
        found += [case(size, "decode", 8192), case(size, "prefill", 8192)]
        found += [case(size, "decode", tokens, batch=8) for tokens in (8192, 512)]
        found += [case(size, "prefill", 512)]
    # Ours again, beside the peer that may take longest to get ready, or fail.
    return [*found, case("2b", "decode", 512, peer="compiled")]


def tiny(case: dict[str, Any]) -> dict[str, Any]:
    """Give a GPU's case at a size for any CPU."""
    return {
        **case,
        "size": "small",
        "tokens": max(8, case["tokens"] // 128),
        "batch": min(case["batch"], 2),
        "new": min(case["new"], SETTLING + 4),
    }


# ---- sizes --------------------------------------------------------------------------------------


def parameter_count(config: Gemma2Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Gemma2ForCausalLM(config).parameters())


def flop_of_prompt(config: Gemma2Config, batch: int, tokens: int) -> int:
    """Give the products of a prompt: layers, visible pairs, and the head for one token a row."""
    head = config.vocab_size * config.hidden_size
    seen = 0
    for kind in config.layer_types:
        window = config.sliding_window if kind == "sliding_attention" else tokens
        seen += sum(min(p + 1, window) for p in range(tokens))
    layers = 2 * (parameter_count(config) - head) * tokens
    attention = 4 * config.head_dim * config.num_attention_heads * seen
    return batch * (layers + attention + 2 * head)


def bytes_of_step(config: Gemma2Config, batch: int, context: int, size: int) -> int:
    """Give what a step must read: every weight once, and the keys and values that are seen."""
    keys = sum(
        min(context, config.sliding_window) if kind == "sliding_attention" else context
        for kind in config.layer_types
    )
    cache = 2 * batch * keys * config.num_key_value_heads * config.head_dim
    return size * (parameter_count(config) + cache)


def eager_bytes(case: dict[str, Any], config: Gemma2Config) -> int:
    """Give what the eager peer needs for the scores of the prompt, in three forms."""
    return 8 * case["batch"] * config.num_attention_heads * case["tokens"] ** 2


def peak_bytes(case: dict[str, Any], config: Gemma2Config) -> int:
    """Give an upper bound of what a GPU must hold at once for the case."""
    weights = 2 * parameter_count(config)
    # Without windows, as transformers' caches may be.
    rows = case["batch"] * (case["tokens"] + case["new"])
    cache = 4 * rows * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    scores = eager_bytes(case, config)
    if scores > EAGER_BYTES:
        scores = 0  # the peer is not run
    # transformers' model is made with weights of its own before it takes ours.
    return weights + max(weights, 3 * cache // 2 + scores)


# ---- the models ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def ours(size: str, dtype: torch.dtype, device: torch.device) -> Gemma2ForCausalLM:
    from benchmarks.model import sized

    return random_model(sized(size), dtype, device)


@functools.lru_cache(maxsize=1)
def twin(model: Gemma2ForCausalLM) -> Any:
    """Give transformers' model with the very tensors of `model`."""
    import transformers

    weight = model.model.embed_tokens.weight
    config = transformers.Gemma2Config(**model.config.to_dict())
    config._attn_implementation = "eager"
    default = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with torch.device(weight.device):
            other = transformers.Gemma2ForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"transformers' model has other weights: {missing} {unexpected}")
    other.tie_weights()
    if other.config._attn_implementation != "eager":
        raise RuntimeError(f"transformers takes {other.config._attn_implementation}, without a cap")
    shared = {p.data_ptr() for p in model.parameters()}
    if any(p.data_ptr() not in shared for p in other.parameters()):
        raise RuntimeError("transformers' model does not share all weights")
    return other.eval()


class Clock:
    """A streamer of transformers' that notes when the prompt and each token came to the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


# ---- times --------------------------------------------------------------------------------------


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device, call: Callable[[], Timing]) -> tuple[Timing, dict[str, float]]:
    """Give what `call` gives, and the most that the GPU held meanwhile, weights included."""
    if device.type != "cuda":
        return call(), {}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    took = call()
    return took, {"peak GB": torch.cuda.max_memory_allocated(device) / 1e9}


def _timing(seconds: list[float]) -> Timing:
    return Timing(min(seconds), statistics.median(seconds), len(seconds))


def time_prompt(prompt: Callable[[], object], device: torch.device) -> Timing:
    """Time what reads a prompt and gives a token, after a run to get ready."""
    seconds = []
    for _ in range(RUNS + 1):
        _wait(device)
        start = time.perf_counter()
        prompt()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return _timing(seconds[1:])


def time_steps(times_of: Callable[[], list[float]]) -> Timing:
    """Time a step of decoding; `times_of` writes a text and gives when each token came."""
    seconds = []
    for _ in range(RUNS):
        times = times_of()[SETTLING:]
        seconds.append((times[-1] - times[0]) / (len(times) - 1))
    return _timing(seconds)


def time_ours(model: Gemma2ForCausalLM, ids: Tensor, new: int, graph: bool | None) -> Timing:
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": [], "cuda_graph": graph}
    if new == 1:
        return time_prompt(lambda: model.generate(ids, max_new_tokens=1, **options), ids.device)

    def times_of() -> list[float]:
        tokens = model.stream(ids, max_new_tokens=new, **options)
        return [time.perf_counter() for _ in tokens]

    return time_steps(times_of)


def time_transformers(model: Any, ids: Tensor, new: int, compiled: bool) -> Timing:
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "eos_token_id": model.config.vocab_size,  # which ends nothing
        "pad_token_id": 0,
        "max_new_tokens": new,
    }
    if compiled:
        # transformers compiles decoding by itself for a cache of this kind, on a GPU
        options["cache_implementation"] = "static"
    if new == 1:
        return time_prompt(lambda: model.generate(ids, **options), ids.device)

    def times_of() -> list[float]:
        clock = Clock()
        model.generate(ids, streamer=clock, **options)
        return clock.times[1:]

    if compiled:
        times_of()  # compiles
    return time_steps(times_of)


def assert_same_text(model: Gemma2ForCausalLM, ids: Tensor, new: int) -> None:
    """A graph changes no token, greedily or drawn.

    Raises:
        AssertionError: it does.
    """
    ways: tuple[dict[str, Any], ...] = (
        {"do_sample": False, "max_new_tokens": new},
        {"do_sample": True, "seed": 0, "max_new_tokens": min(new, SAMPLED)},
    )
    for options in ways:
        texts = [
            model.generate(ids, eos_token_id=[], cuda_graph=graph, **options)[:, ids.shape[1] :]
            for graph in (None, False)
        ]
        same = (texts[0] == texts[1]).all(0)
        if not bool(same.all()):
            drawn = "drawn" if options["do_sample"] else "greedy"
            raise AssertionError(
                f"with and without a graph the {drawn} texts differ from token "
                f"{int((~same).nonzero()[0])}"
            )


# ---- for the runner -----------------------------------------------------------------------------


def run_on(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Give the timings of a case: ours, without a graph where that is one row, and the peer."""
    dtype, batch, tokens, new = (case[n] for n in ("dtype", "batch", "tokens", "new"))
    decode = case["kind"] == "decode"
    model = ours(case["size"], getattr(torch, dtype), device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator)
    ids = ids.to(device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    parts: dict[str, Any] = {}
    notes: dict[str, Any] = {"weights GB": weights / 1e9}
    alone = decode and batch == 1 and case["peer"] == "eager"
    if alone:
        assert_same_text(model, ids, new)
    parts["ours"], peak = _peak(device, lambda: time_ours(model, ids, new, None))
    notes |= peak
    if alone:
        parts["no graph"] = time_ours(model, ids, new, False)
    parts[f"transformers, {case['peer']}"] = _peer(case, model, ids, notes)
    if decode:
        size = getattr(torch, dtype).itemsize
        parts["bytes"] = bytes_of_step(model.config, batch, tokens + new // 2, size)
    else:
        parts["flop"] = flop_of_prompt(model.config, batch, tokens)
    return {**parts, "tokens": batch * (1 if decode else tokens), **notes}


def _peer(
    case: dict[str, Any], model: Gemma2ForCausalLM, ids: Tensor, notes: dict[str, Any]
) -> Timing | Exception:
    """Give the peer's timing, or why there is none."""
    compiled, needed = case["peer"] == "compiled", eager_bytes(case, model.config)
    if needed > EAGER_BYTES:
        return MemoryError(f"the prompt's scores would need {needed / 1e9:.0f} GB")
    end = time.monotonic() + (COMPILE_SECONDS if compiled else float("inf"))
    try:
        with time_limit(end):
            other = twin(model)
            took, peak = _peak(
                ids.device, lambda: time_transformers(other, ids, case["new"], compiled)
            )
    except Exception as error:  # whatever a release of transformers does not do
        return error
    notes |= {f"transformers {name}": value for name, value in peak.items()}
    return took

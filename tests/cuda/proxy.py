"""A pytest plugin: the operators' contract tests, unmodified, on the kernels of a real GPU.

`pytest -p tests.cuda.proxy tests/ops/test_rms_norm.py` puts itself in the place of the operators' CPU
kernels. What a test gives to an operator is copied to the GPU, storage for storage, so that strides,
offsets, gaps and shared memory are those of the test; the operator runs there, twice; what it gave
and what it changed comes back. Besides what the test asserts, an operator fails

* if its two runs differ in a bit,
* if it changed an argument that its schema calls an input.

Autograd and fake kernels stay torch's own; `torch.library.opcheck` runs a second time, on tensors of
the GPU. A run in which an operator of the test file was never called fails: it tested nothing.

`--proxy-device cpu` copies to other CPU tensors and calls the CPU's kernels: for a machine without
a GPU, where it shows that the plugin itself changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda import lines

# Operators by the test file that holds their contract.
OPERATORS = {
    "test_embed": ("embed",),
    "test_rms_norm": ("rms_norm", "add_rms_norm", "add_rms_norm_"),
    "test_rope": ("rope", "rope_cache"),
    "test_cache_write": ("cache_write",),
    "test_geglu": ("geglu",),
    "test_softcap": ("softcap",),
    "test_sample": ("sample",),
    "test_attention": ("attention",),
    "test_linear": ("linear",),
}


class ProxyError(AssertionError):
    """An operator did what no test file would notice."""


# ---- copies -------------------------------------------------------------------------------------


class Copies:
    """Copies of tensors on a device; tensors that share a storage share its copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def storage(self, original: torch.UntypedStorage) -> torch.UntypedStorage:
        key = original._cdata
        if key not in self._storages:
            copy = torch.UntypedStorage(original.nbytes(), device=self.device)
            if original.nbytes() > 0:
                copy.copy_(original)
            self._storages[key] = original, copy
        return self._storages[key][1]

    def tensor(self, original: Tensor) -> Tensor:
        """The copy: same dtype, shape, strides and storage offset."""
        copy = torch.empty(0, dtype=original.dtype, device=self.device)
        return copy.set_(
            self.storage(original.untyped_storage()),
            original.storage_offset(),
            original.shape,
            original.stride(),
        )

    def arguments(self, values: Any) -> Any:
        """A list, tuple, dict or value with all its tensors copied."""
        if isinstance(values, Tensor):
            return self.tensor(values)
        if isinstance(values, (list, tuple)):
            return type(values)(self.arguments(value) for value in values)
        if isinstance(values, dict):
            return {key: self.arguments(value) for key, value in values.items()}
        return values

    def __iter__(self) -> Iterator[tuple[torch.UntypedStorage, torch.UntypedStorage]]:
        return iter(self._storages.values())


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A storage's bytes, on the CPU."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu()


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among results: one, several, or none."""
    if isinstance(values, Tensor):
        return [values]
    return [t for t in values if isinstance(t, Tensor)] if isinstance(values, (list, tuple)) else []


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


# ---- errors that depend on data -----------------------------------------------------------------

# On a GPU the host does not wait to look at ids and logits: the kernel stops at a bad id, which ends
# every work of the process on that device, a row without a token gets a number that says why,
# and a position that a sum could overflow reads and writes no wrong memory.
# In the contract, which is the CPU's, all are a ValueError. So such calls are left to the CPU:
# of bad ids and positions before the GPU sees them, of bad rows after it has marked them.


def _bad_ids(args: Mapping[str, Any]) -> bool:
    ids, weight = args["ids"], args["weight"]
    if ids.dtype != torch.int64 or weight.dim() != 2 or ids.numel() == 0:
        return False
    return int(ids.min()) < 0 or int(ids.max()) >= weight.shape[0]


def _bad_history(args: Mapping[str, Any]) -> bool:
    history, logits = args["history"], args["logits"]
    if history is None or history.dtype != torch.int64 or history.numel() == 0:
        return False
    return logits.dim() == 2 and int(history.max()) >= logits.shape[1]


def _far_positions(args: Mapping[str, Any]) -> bool:
    numbers = [args.get(name) for name in ("q_start", "kv_len", "k_base")]
    return any(bool(((n > 2**62) | (n < -(2**62))).any()) for n in numbers if n is not None)


BEFORE: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "embed": _bad_ids,
    "sample": _bad_history,
    "attention": _far_positions,
    "attention_backward": _far_positions,
    "cache_write": _far_positions,
    "rope_cache": _far_positions,
}
AFTER: dict[str, Callable[[Any], bool]] = {"sample": lambda tokens: bool((tokens < 0).any())}


# ---- one operator -------------------------------------------------------------------------------


class Proxy:
    """Runs one operator on a device for arguments that are on the CPU."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.op = getattr(torch.ops.gemma2, name).default
        self.schema = self.op._schema
        self.calls = 0  # that ran on the device
        self.differing = 0  # of which the second run gave other bits
        self._host = torch.library.get_kernel(self.op, "CPU")  # before it is replaced

    def on_the_host(self, args: tuple[Any, ...], numbers: Mapping[str, Any] | None = None) -> Any:
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        return self._host.call_boxed(keys, *args, **(numbers or {}))

    def _there(self, args: tuple[Any, ...], numbers: Mapping[str, Any]) -> Any:
        if self.device.type == "cpu":
            return self.on_the_host(args, numbers)
        return self.op(*args, **numbers)

    def __call__(self, *args: Any, **numbers: Any) -> Any:
        """Tensors are positional in every schema; what stands behind the asterisk are numbers."""
        named = {a.name: None for a in self.schema.arguments}
        named.update(zip(named, args, strict=False))
        if self.name in BEFORE and BEFORE[self.name](named):
            return self._refused_on_the_host(args, numbers, "the GPU was not asked")
        copies, again = Copies(self.device), Copies(self.device)
        there, there_again = copies.arguments(args), again.arguments(args)
        written = {
            t.untyped_storage()._cdata
            for argument, t in zip(self.schema.arguments, args, strict=False)
            if isinstance(t, Tensor) and argument.is_write
        }
        try:
            out = self._there(there, numbers)
            home = Copies(torch.device("cpu"))
            back = home.arguments(out)
            repeated = Copies(torch.device("cpu")).arguments(self._there(there_again, numbers))
        except Exception:
            self._compare_inputs(copies, set())  # an error leaves everything as it was
            raise
        self.calls += 1
        if self.name in AFTER and AFTER[self.name](back):
            return self._refused_on_the_host(args, numbers, f"the GPU gave {back}")
        self._compare_inputs(copies, written)
        self._compare_runs(copies, again, back, repeated)
        for original, copy in copies:
            if original._cdata in written and original.nbytes() > 0:
                original.copy_(copy)
        return back

    def _refused_on_the_host(
        self, args: tuple[Any, ...], numbers: Mapping[str, Any], what: str
    ) -> Any:
        self.on_the_host(args, numbers)
        raise ProxyError(f"{self.name}: {what}, yet the CPU's kernel has nothing to refuse")

    def _compare_inputs(self, copies: Copies, written: set[int]) -> None:
        for original, copy in copies:
            if original._cdata not in written and not torch.equal(
                bytes_of(original), bytes_of(copy)
            ):
                raise ProxyError(f"{self.name}: an argument that is no output has been changed")

    def _compare_runs(self, one: Copies, two: Copies, out: Any, again: Any) -> None:
        same = all(
            same_bits(a, b) for a, b in zip(tensors_in(out), tensors_in(again), strict=True)
        ) and all(
            torch.equal(bytes_of(a), bytes_of(b)) for (_, a), (_, b) in zip(one, two, strict=True)
        )
        if not same:
            self.differing += 1
            raise ProxyError(f"{self.name}: two runs on the same arguments differ")


class Proxies:
    """The operators of `names`, replaced for CPU tensors."""

    def __init__(self, names: list[str], device: torch.device) -> None:
        import gemma2.ops  # noqa: F401 - loads the operators

        self.device = device
        self.by_name = {name: Proxy(name, device) for name in names}
        self._opcheck = torch.library.opcheck
        self._library: torch.library.Library | None = None

    def install(self) -> None:
        self._library = torch.library.Library("gemma2", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that a kernel is replaced
            for name, proxy in self.by_name.items():
                self._library.impl(name, proxy, "CPU", allow_override=True)
        torch.library.opcheck = self.opcheck

    def uninstall(self) -> None:
        if self._library is not None:
            self._library._destroy()
        torch.library.opcheck = self._opcheck

    def opcheck(self, op: Any, args: Any, kwargs: Any = None, **options: Any) -> Any:
        """opcheck of the operator as the tests see it, then on tensors of the device."""
        found = self._opcheck(op, args, kwargs, **options)
        copies = Copies(self.device)
        there = copies.arguments(tuple(args))
        for original, copy in zip(args, there, strict=True):
            if isinstance(original, Tensor):
                copy.requires_grad_(original.requires_grad)
        self._opcheck(op, there, copies.arguments(kwargs), **options)
        return found


# ---- the plugin ---------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("proxy", "operators on a GPU")
    group.addoption("--proxy-device", default="cuda", help="cuda, or cpu to try the plugin itself")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--proxy-device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--proxy-device cuda: torch finds no CUDA device")
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("-p tests.cuda.proxy counts calls in one process: leave out -n")
    names = [name for group in OPERATORS.values() for name in group]
    plugin = Plugin(Proxies(names, device))
    plugin.proxies.install()
    config.pluginmanager.register(plugin, "gemma2-proxy")


class Plugin:
    def __init__(self, proxies: Proxies) -> None:
        self.proxies = proxies
        self.wanted: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self.wanted.update(OPERATORS.get(item.path.stem, ()))

    @property
    def idle(self) -> list[str]:
        """Operators that were to be tested and were not called."""
        return sorted(n for n in self.wanted if self.proxies.by_name[n].calls == 0)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.config.pluginmanager.hasplugin("tests.cuda.lines"):
            self.add_lines(session.config)
        if self.idle and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def add_lines(self, config: pytest.Config) -> None:
        for name in sorted(self.wanted):
            proxy = self.proxies.by_name[name]
            values = {"calls": proxy.calls, "differing": proxy.differing}
            if proxy.calls == 0:
                lines.add(config, f"operator {name}", "failed", **values, why="never called")
            else:
                outcome = "failed" if proxy.differing else "passed"
                lines.add(config, f"operator {name}", outcome, **values)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        calls = {n: p.calls for n, p in self.proxies.by_name.items() if p.calls}
        said = ", ".join(f"{name} {count}" for name, count in calls.items()) or "none"
        terminalreporter.write_line(f"calls on {self.proxies.device}, each run twice: {said}")
        for name in self.idle:
            terminalreporter.write_line(f"ERROR: {name} was never called", red=True)

    def pytest_unconfigure(self) -> None:
        self.proxies.uninstall()

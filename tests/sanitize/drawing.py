"""Arguments for an operator, good ones and bad ones: shapes, strides, dtypes, devices, numbers."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64, torch.int8)
EXTREMES = (2**63 - 1, -(2**63), 2**62, 2**62 + 1, -(2**62) - 1, 2**63 - 64, 2**32)
SPECIAL = (float("nan"), float("inf"), -float("inf"), 1e-42, 3e38, -3e38, 0.0, -0.0)
NUMBERS = (0.0, -1.0, float("nan"), float("inf"), 1e300, 1e-300, -0.0, 1e-30)


class Draw:
    """Draws arguments. `wrong`: may they be wrong? `names` collects them for the log."""

    def __init__(self, data: st.DataObject, wrong: bool) -> None:
        self.data, self.wrong = data, wrong
        self.names: dict[str, Any] = {}

    def one(self, *choices: Any) -> Any:
        return self.data.draw(st.sampled_from(choices))

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def chance(self, one_in: int) -> bool:
        return self.number(1, one_in) == one_in

    def mistake(self, one_in: int) -> bool:
        return self.wrong and self.chance(one_in)

    def scalar(self, name: str, *usual: Any, odd: tuple[Any, ...] = NUMBERS) -> Any:
        self.names[name] = self.one(*odd) if self.mistake(6) else self.one(*usual)
        return self.names[name]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Another one, if it may be wrong."""
        if not self.mistake(10):
            return shape
        at = self.number(0, max(len(shape) - 1, 0))
        way = self.one("more", "less", "none", "without", "with")
        if way == "with" or not shape:
            return (*shape[:at], 1, *shape[at:])
        change = {"more": shape[at] + 1, "less": max(shape[at] - 1, 0), "none": 0}
        middle = (change[way],) if way in change else ()
        return (*shape[:at], *middle, *shape[at + 1 :])

    def laid_out(self, values: Tensor, own_memory: bool) -> Tensor:
        """The same values in another layout, with a dense last dimension unless it may be wrong."""
        ways = ["dense", "dense", "offset", "wide rows", "permuted", "odd stride"]
        ways += [] if own_memory and not self.wrong else ["expanded"]
        way = self.one(*ways, *(["sparse rows"] if self.wrong else []))
        if values.dim() == 0 or way == "dense":
            return values
        if way == "offset":
            memory = values.new_full((values.numel() + 3,), 7)
            memory[3:] = values.flatten()
            return memory[3:].view(values.shape)
        if way == "wide rows":
            return torch.cat([values, values[..., :1]], -1)[..., : values.shape[-1]]
        if way == "permuted" and values.dim() > 2:
            order = self.data.draw(st.permutations(range(values.dim() - 1)))
            back = [order.index(i) for i in range(values.dim() - 1)]
            return values.permute(*order, -1).contiguous().permute(*back, values.dim() - 1)
        if way == "odd stride" and 1 in values.shape:
            strides = [1 if n != 1 else 2**62 for n in values.shape]
            dense = values.stride()
            strides = [
                s if n == 1 else d for n, s, d in zip(values.shape, strides, dense, strict=True)
            ]
            return values.as_strided(values.shape, strides)
        if way == "expanded" and values.numel():
            at = self.number(0, values.dim() - 1 if self.wrong else max(values.dim() - 2, 0))
            if values.dim() > 1 or self.wrong:
                return values.narrow(at, 0, 1).expand(values.shape)
        if way == "sparse rows":
            return torch.stack([values, values], -1)[..., 0]
        return values

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        own_memory: bool = False,
        special: bool = True,
    ) -> Tensor:
        """Floating numbers; special: NaN and infinities among them."""
        shape = self.shape(shape)
        seed, size = self.number(0, 99), self.one(1.0, 1.0, 20.0)
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator) * size
        for _ in range(self.number(1, 3) if special and values.numel() and self.chance(5) else 0):
            at = self.number(0, values.numel() - 1)
            values.view(-1)[at] = self.one(*SPECIAL)
        dtype = self.one(*FLOATS, *OTHERS) if self.mistake(12) else dtype
        out = self.laid_out(values.to(dtype), own_memory)
        return self.keep(name, out)

    def integers(self, name: str, shape: tuple[int, ...], low: int, high: int) -> Tensor:
        shape = self.shape(shape)
        values = torch.zeros(shape, dtype=torch.int64)
        for i in range(values.numel()):
            extreme = self.mistake(10)
            values.view(-1)[i] = self.one(*EXTREMES) if extreme else self.number(low, high)
        if self.mistake(15):
            values = values.clamp(-100, 100).to(self.one(torch.int32, torch.float32))
        return self.keep(name, self.laid_out(values, False))

    def keep(self, name: str, out: Tensor) -> Tensor:
        if self.mistake(25):
            out = out.to("meta")
        self.names[name] = out
        return out

    def described(self) -> str:
        def say(value: Any) -> str:
            if not isinstance(value, Tensor):
                return repr(value)
            numbers = f" = {value.tolist()}" if value.dtype == torch.int64 and value.is_cpu else ""
            strides = "" if value.is_contiguous() else f" strides {value.stride()}"
            return f"{value.dtype} {list(value.shape)}{strides} on {value.device}{numbers}"

        return "\n".join(f"{name}: {say(value)}" for name, value in self.names.items())

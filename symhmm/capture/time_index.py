"""The loop variable of a vectorised time loop, and the vmap level that holds all its steps at once."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    _add_batch_dim,
    _remove_batch_dim,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_level,
)
from torch._functorch.vmap import vmap_increment_nesting

from symhmm.capture.marks import Mark, set_mark
from symhmm.capture.names import Names
from symhmm.recorder import tracing as being_traced

# A branch such as `if t < 3` is followed by running that many more steps one by one, up to this many.
MOST_PEELED = 16


class NotVectorisable(Exception):
    """The loop body cannot be run for all steps at once; capture falls back to running it step by step.

    ``peel`` more concrete steps at the start of the loop would make the branch uniform, if it is not zero.
    """

    def __init__(self, reason: str, peel: int = 0) -> None:
        super().__init__(reason)
        self.peel = peel


class Level:
    """One vectorised loop: a hidden batch dimension of ``length`` steps.

    ``torch._functorch`` names are private but have been stable since torch 2.0; nothing outside this class uses them
    to make or remove a batch dimension.
    """

    def __init__(self, loop: str, length: int, history: int, names: Names, run: object) -> None:
        self.loop, self.length, self.history, self.names, self.run = loop, length, history, names, run
        self.lag = 0
        self.number = -1
        self.open = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """The extent of the level; tensors batched in it must not outlive it."""
        with vmap_increment_nesting(self.length, "different") as self.number:
            self.open = True
            try:
                yield
            finally:
                self.open = False

    def batch(self, x: Tensor) -> Tensor:
        """Hide the first dimension (the steps) of ``x``."""
        out = _add_batch_dim(x, 0, self.number)
        set_mark(out, Mark(self.run, level=self))
        return out

    def unbatch(self, x: Tensor) -> Tensor:
        """Show the hidden steps of ``x`` as its first dimension again."""
        return _remove_batch_dim(x, self.number, self.length, 0)

    def holds(self, x: Tensor) -> bool:
        """Whether ``x`` differs between the steps of this level (and is not the same tensor for all of them)."""
        while is_functorch_wrapped_tensor(x):
            if is_batchedtensor(x) and maybe_get_level(x) == self.number:
                return True
            x = get_unwrapped(x)
        return False


def innermost(x: Tensor) -> Tensor:
    """The plain tensor under all functorch wrappers."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


class FirstStep(int):
    """The loop variable in the concrete first steps: an ordinary int, but as a dictionary key also the same step of a
    vectorised pass, so that ``states[t - 1]`` finds what an earlier step has left there."""

    def __eq__(self, other: object) -> bool:
        return other.values[0] == int(self) if isinstance(other, TimeIndex) else int(self) == other

    __hash__ = int.__hash__


class TimeIndex:
    """What the loop variable is while the body runs for all steps at once: one known integer per step.

    Comparisons and arithmetic stay exact integers, branches are taken where all steps agree, names get a token per
    use, and torch functions see a tensor.

    Args:
        level: the vectorised loop.
        values: the integer at each step.
        base: what the loop itself gave at each step, from which ``values`` was computed.
    """

    def __init__(self, level: Level, values: tuple[int, ...], base: tuple[int, ...]) -> None:
        self.level, self.values, self.base = level, values, base

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(x: Any) -> Any:
            return x.tensor() if isinstance(x, TimeIndex) else x

        return func(*map(plain, args), **{k: plain(v) for k, v in (kwargs or {}).items()})

    def tensor(self, device: torch.device | None = None) -> Tensor:
        """The integers as a scalar tensor batched over the level."""
        return self.level.batch(torch.tensor(self.values, device=device))

    def _uniform(self, use: str) -> int:
        # The first steps of a pass that stands for previous steps have been run one by one; it only names their states.
        last = self.values[-1]
        if all(v == last for v in self.values[self.level.lag :]):
            return last
        settled = next(i for i in range(len(self.values), 0, -1) if self.values[i - 1] != last)
        peel = settled if settled <= MOST_PEELED and len(self.values) - settled >= 2 else 0
        raise NotVectorisable(f"{use} of the loop variable differs between steps", peel)

    def _text(self, spec: str, digits: bool = False) -> str:
        texts = tuple(format(v, spec) for v in self.values)
        return self.level.names.text(self.level.loop, texts, self._shift(), digits=digits)

    def _shift(self) -> int | None:
        offset = self.values[0] - self.base[0]
        if any(v - b != offset for v, b in zip(self.values, self.base, strict=True)):
            return None
        if offset == 0:
            return -self.level.lag
        stride = self.base[1] - self.base[0]
        even = all(b - a == stride for a, b in zip(self.base, self.base[1:], strict=False))
        return offset // stride - self.level.lag if even and stride and offset % stride == 0 else None

    def __bool__(self) -> bool:
        return bool(self._uniform("the truth value"))

    def __int__(self) -> int:
        # "%d" % t asks for an integer: it gets one that is recognised in names and is of no use as a number.
        return int(self._text("", digits=True))

    def __index__(self) -> int:
        # Python lists of states, xs[t] and xs[t - 1], hold one entry per pass, after those of the concrete steps.
        return self.values[0] + self.level.history

    def __float__(self) -> float:
        raise NotVectorisable("float() of the loop variable (use torch functions instead of the math module)")

    def __hash__(self) -> int:
        return hash(self.values[0])

    def __format__(self, spec: str) -> str:
        return self._text(spec)

    def __str__(self) -> str:
        return self._text("")

    def __repr__(self) -> str:
        return self._text("")

    def __neg__(self) -> "TimeIndex":
        return TimeIndex(self.level, tuple(-v for v in self.values), self.base)


def _binary(op: Callable[[Any, Any], Any], reverse: bool) -> Callable[[TimeIndex, Any], Any]:
    def method(self: TimeIndex, other: Any) -> Any:
        if isinstance(other, Tensor):
            mine = self.tensor(other.device)
            return op(other, mine) if reverse else op(mine, other)
        if isinstance(other, TimeIndex) and other.level is self.level:
            others: tuple[Any, ...] = other.values
        elif isinstance(other, (int, float)):
            others = (other,) * len(self.values)
        else:
            return NotImplemented
        out = tuple(op(b, a) if reverse else op(a, b) for a, b in zip(self.values, others, strict=True))
        if any(isinstance(v, float) for v in out):
            return self.level.batch(torch.tensor(out))
        return TimeIndex(self.level, out, self.base)

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow", "and_", "or_"):
    setattr(TimeIndex, f"__{_name.strip('_')}__", _binary(getattr(operator, _name), reverse=False))
    setattr(TimeIndex, f"__r{_name.strip('_')}__", _binary(getattr(operator, _name), reverse=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(TimeIndex, f"__{_name}__", _binary(getattr(operator, _name), reverse=False))


def select(x: Tensor, index: Any, read: Callable[[Tensor], int]) -> Tensor:
    """``x[..., t, ...]`` and ``x[t - 1 : t]`` with the meaning that they have for an integer ``t``.

    A 0-dim tensor index counts as an integer too: as an ordinary tensor index it would be read by ``item`` while
    tracing, and would move dimensions while batched.

    Args:
        x: tensor of any shape.
        index: what stands between the brackets.
        read: makes an integer of a tensor in a slice.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    tracing = being_traced()
    if not any(_moves(e, tracing) for e in entries):
        return torch.Tensor.__getitem__(x, index)
    entries = _without_ellipsis(entries, x.dim())
    kept: list[Any] = []
    dim = 0
    for entry in entries:
        if isinstance(entry, Tensor) and _moves(entry, tracing):
            x = x.index_select(dim, entry.reshape(1)).squeeze(dim)
            continue
        if isinstance(entry, TimeIndex):
            x = _gather(x, dim, [(v,) for v in entry.values], entry.level).squeeze(dim)
            continue
        if isinstance(entry, slice) and _moves(entry, tracing):
            if isinstance(entry.start, TimeIndex) or isinstance(entry.stop, TimeIndex):
                x = _window(x, dim, entry)
                entry = slice(None)
            else:
                entry = slice(*(read(p) if isinstance(p, Tensor) else p for p in (entry.start, entry.stop, entry.step)))
        kept.append(entry)
        dim += 0 if entry is None else entry.dim() if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1
    return torch.Tensor.__getitem__(x, tuple(kept)) if kept else x


def _moves(entry: Any, tracing: bool) -> bool:
    """Whether an index entry needs our own reading."""
    if isinstance(entry, slice):
        parts = (entry.start, entry.stop, entry.step)
        return any(isinstance(p, TimeIndex) or (tracing and isinstance(p, Tensor)) for p in parts)
    if isinstance(entry, Tensor):
        integer = entry.dim() == 0 and not entry.is_floating_point() and entry.dtype != torch.bool
        return integer and (tracing or is_batchedtensor(entry))
    return isinstance(entry, TimeIndex)


def _without_ellipsis(entries: list[Any], dims: int) -> list[Any]:
    def consumed(entry: Any) -> int:
        return entry.dim() if isinstance(entry, Tensor) and entry.dtype == torch.bool else int(entry is not None)

    at = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    if not at:
        return entries
    used = sum(consumed(entry) for entry in entries if entry is not Ellipsis)
    return entries[: at[0]] + [slice(None)] * (dims - used) + entries[at[0] + 1 :]


def _window(x: Tensor, dim: int, window: slice) -> Tensor:
    index = window.start if isinstance(window.start, TimeIndex) else window.stop
    length = index.level.length

    def bounds(part: Any, default: int) -> list[int]:
        return list(part.values) if isinstance(part, TimeIndex) else [default if part is None else part] * length

    starts, stops = bounds(window.start, 0), bounds(window.stop, x.shape[dim])
    size = stops[0] - starts[0]
    if window.step not in (None, 1) or any(b - a != size for a, b in zip(starts, stops, strict=True)):
        raise NotVectorisable("a slice has a length that depends on the loop variable")
    if min(starts) < 0:
        raise NotVectorisable("a slice starts before the beginning of a tensor")
    return _gather(x, dim, [tuple(range(a, a + size)) for a in starts], index.level)


def _gather(x: Tensor, dim: int, rows: list[tuple[int, ...]], level: Level) -> Tensor:
    size = x.shape[dim]
    outside = [v for row in rows for v in row if not -size <= v < size]
    if outside:
        raise IndexError(f"index {outside[0]} is out of bounds for dimension {dim} with size {size}")
    index = torch.tensor([[v % size for v in row] for row in rows], device=x.device)
    return x.index_select(dim, level.batch(index))

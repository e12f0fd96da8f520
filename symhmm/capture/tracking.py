"""What is known of every tensor while a program is captured, kept up to date by watching all torch calls.

Each tensor remembers the discrete sites it was computed from, the loops in whose first (concrete) steps it was made,
and the vectorised loop in which it is batched. These marks decide what shapes cannot: which variable a dimension
belongs to, whether a value was carried over more steps than the history, whether it outlived its loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.overrides import TorchFunctionMode

from symhmm.capture.marks import Mark, find_mark, get_mark, set_mark, union
from symhmm.capture.names import Names
from symhmm.capture.time_index import Level, NotVectorisable, TimeIndex, select
from symhmm.recorder import SHAPE_ONLY, require_constant, tracing, untraced

_SCALARS: dict[Callable[..., Any], Callable[[Any], Any]] = {
    torch.Tensor.__bool__: bool,
    torch.Tensor.is_nonzero: bool,
    torch.is_nonzero: bool,
    torch.Tensor.__int__: int,
    torch.Tensor.__float__: float,
    torch.Tensor.__index__: int,
    torch.Tensor.item: lambda value: value,
}
_EXPORTS = {
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.__array__,
    torch.equal,
    torch.Tensor.equal,
    torch.allclose,
    torch.Tensor.allclose,
}
# What these return holds no numbers: they are asked so often that nothing else is looked at.
_ASIDE = {
    *(getattr(torch.Tensor, name).__get__ for name in (
        "_base", "grad", "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "_version",
    )),
    *(getattr(torch.Tensor, name) for name in (
        "dim", "size", "stride", "numel", "is_floating_point", "is_complex", "is_contiguous", "__len__", "__hash__",
    )),
    torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip
_FRESH = {"zeros", "ones", "full", "empty", "eye", "clone"} | SHAPE_ONLY
_NONE: frozenset[str] = frozenset()
_ATOMS = {int, float, bool, str, type(None), type(...), torch.dtype, torch.device}  # most arguments that are no tensors
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__", "__ixor__"}


@dataclass
class Position:
    """Where the program is: the steps that it stands in, outermost first, and the vectorised loops that are open."""

    run: object = field(default_factory=object)
    names: Names = field(default_factory=Names)
    steps: list[tuple[str, str, int]] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)

    def concrete_loops(self) -> frozenset[str]:
        """Loops that will be vectorised and stand in one of their first, concrete steps."""
        for _, role, _ in self.steps:
            if role == "init":
                return frozenset(loop for loop, role, _ in self.steps if role == "init")
        return _NONE


class Tracker(TorchFunctionMode):
    """Sees every torch call of the program, gives it its meaning for all steps at once, and keeps the marks.

    Args:
        position: kept up to date by the loops.
        fresh: give tensors made in a vectorised body the time dimension from the start, so that they can be written
            in place.
    """

    def __init__(self, position: Position, fresh: bool) -> None:
        super().__init__()
        self.position, self.fresh = position, fresh
        self.run = position.run
        self.instead: dict[int, tuple[Tensor, Tensor]] = {}
        self.quiet = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ASIDE:
            return func(*args, **kwargs)
        if getattr(func, "__self__", None) is torch.Tensor.data:
            func = torch.Tensor.detach  # .data has no batching rule
        if self.instead:
            args, kwargs = _map((args, kwargs), self._substitute)
        inputs: list[Tensor] = []
        timed = _sort(args, inputs) | (_sort(kwargs, inputs) if kwargs else False)
        marks = [mark for x in inputs if (mark := find_mark(self.run, x)) is not None]
        for mark in marks:
            if mark.level is not None and not mark.level.open:
                raise NotVectorisable("a value computed inside the loop is used after it")
        if func in _SCALARS:
            return self._scalar(func, args[0])
        if func in _EXPORTS and tracing():
            for x in inputs:
                require_constant(getattr(func, "__name__", "a function"), x)
            with untraced():
                return func(*args, **kwargs)
        if timed and func is not torch.Tensor.__getitem__:
            device = inputs[0].device if inputs else None
            args, kwargs = _map((args, kwargs), lambda x: x.tensor(device) if isinstance(x, TimeIndex) else x)
        out = self._call(func, args, kwargs)
        first = _NONE if self.quiet else self.position.concrete_loops()
        if marks or first or self.position.levels:
            self._mark(func, inputs, marks, first, out, args, kwargs)
        return iter(out) if func is torch.Tensor.__iter__ else out

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.Tensor.__getitem__:
            return select(args[0], args[1], lambda x: self._scalar(torch.Tensor.__index__, x))
        if func is torch.Tensor.__iter__:
            return list(torch.Tensor.unbind(args[0]))
        if not self.position.levels:
            return func(*args, **kwargs)
        if func is torch.Tensor.__setitem__ and not isinstance(args[2], Tensor):
            index = args[1]
            if isinstance(index, Tensor) and index.dtype == torch.bool:
                return args[0].masked_fill_(index, args[2])  # a boolean index has no batching rule
        if func is torch.nn.functional.one_hot and len(args) > 1:
            return (args[0].unsqueeze(-1) == torch.arange(args[1], device=args[0].device)).long()
        if func is torch.tensor and args and isinstance(args[0], Tensor):
            return args[0].clone()
        out = func(*args, **kwargs)
        if self.fresh and getattr(func, "__name__", "") in _FRESH and isinstance(out, Tensor):
            level = self.position.levels[-1]
            if not level.holds(out):
                return level.batch(out.expand(level.length, *out.shape).clone())
        return out

    def mark(self, x: Tensor) -> Mark:
        """What is known of ``x``."""
        return get_mark(self.run, x)

    def forget(self, x: Tensor) -> Tensor:
        """``x``, of which nothing is known any more: a value that stands on its own."""
        set_mark(x, Mark(self.run))
        return x

    def union(self, *tensors: Tensor) -> Mark:
        """What is known of anything computed from ``tensors``."""
        return union(self.run, [self.mark(x) for x in tensors])

    def _mark(
        self,
        func: Any,
        inputs: list[Tensor],
        marks: list[Mark],
        first: frozenset[str],
        out: Any,
        args: Any,
        kwargs: Any,
    ) -> None:
        """Note what is known of the tensors that ``func`` made or wrote to; ``first`` are loops in their first steps."""
        name = getattr(func, "__name__", "")
        changed = _in_place_target(name, args, kwargs)
        made: list[Tensor] = []
        if changed is not None:
            made.append(changed)
        else:
            _sort((out,), made)
            made = [x for x in made if not any(x is y for y in inputs)]
        known = union(self.run, () if name in SHAPE_ONLY else marks)
        carried = known.carried | first if first else known.carried
        level = self.position.levels[-1] if self.position.levels else None
        for x in made:
            own = level if level is not None and is_batchedtensor(x) else None
            if not (known.sites or carried or own is not None):
                continue
            same = carried is known.carried and own is known.level
            mark = known if same else Mark(self.run, known.sites, carried, own)
            set_mark(x, mark)
            if changed is not None and x._base is not None:
                set_mark(x._base, union(self.run, (mark, self.mark(x._base))))

    def _scalar(self, func: Any, x: Tensor) -> Any:
        """Truth value or number: read where it is no graph input and the same at all steps, refused otherwise."""
        if tracing():
            require_constant(getattr(func, "__name__", "a function"), x)
        with untraced():
            levels = [level for level in self.position.levels if level.holds(x)]
            if not levels:
                return func(x)
            for level in reversed(levels):
                x = level.unbatch(x)
            x = x.reshape(-1)
            same = x == x[-1]
            if bool(same.all()):
                return _SCALARS[func](x[-1].item())
            settled = int((~same).nonzero().max()) + 1
            raise NotVectorisable(
                f"the value read by {func.__name__} differs between steps",
                settled if len(levels) == 1 and settled <= 3 and self.position.levels[-1].length - settled > 2 else 0,
            )

    def _substitute(self, x: Any) -> Any:
        found = self.instead.get(id(x)) if isinstance(x, Tensor) else None
        return found[1] if found is not None else x


def _in_place_target(name: str, args: Any, kwargs: Any) -> Tensor | None:
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]
    written = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
    return args[0] if written and args and isinstance(args[0], Tensor) else None


def _sort(xs: Any, tensors: list[Tensor]) -> bool:
    """Put the tensors among arguments into ``tensors``; whether a loop variable is among them as well."""
    timed = False
    for x in xs.values() if isinstance(xs, dict) else xs:
        if isinstance(x, Tensor):
            tensors.append(x)
        elif type(x) in _ATOMS:
            pass
        elif isinstance(x, (tuple, list, dict)):
            timed |= _sort(x, tensors)
        elif isinstance(x, slice):
            timed |= _sort((x.start, x.stop, x.step), tensors)
        elif isinstance(x, TimeIndex):
            timed = True
    return timed


def _map(x: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return tuple(_map(entry, change) for entry in x)
    if isinstance(x, list):
        return [_map(entry, change) for entry in x]
    if isinstance(x, dict):
        return {key: _map(entry, change) for key, entry in x.items()}
    return change(x)

"""How a `pyro.markov` loop is run: step by step, or a few steps and then the body once for all other steps."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symhmm.capture.time_index import FirstStep, Level, NotVectorisable, TimeIndex
from symhmm.capture.tracking import Position
from symhmm.errors import DataError


@dataclass
class Loop:
    """One execution of a time loop.

    Args:
        key: tells apart the loops of a run.
        where: file and line of the user's loop.
        total: number of steps.
        history: as given to `pyro.markov`.
        lead: steps run one by one before the vectorised ones.
        steps: the steps of enclosing loops that it stands in.
        vector: whether the other steps are run at once.
        reason: why not, if not.
    """

    key: str
    where: str
    total: int
    history: int
    lead: int
    steps: tuple[tuple[str, str, int], ...]
    vector: bool
    reason: str = ""

    @property
    def length(self) -> int:
        """Steps after the lead."""
        return self.total - self.lead

    @property
    def helper(self) -> bool:
        """Whether it stands in a pass that only prepares the state of another pass."""
        return any(role == "prev" for _, role, _ in self.steps)


Schedule = Callable[[int, int], list[int]]


class LoopRunner:
    """Runs the time loops of one run of the program, in place of `MarkovMessenger.__iter__`.

    Args:
        position: where the program is; updated here.
        vector: whether to run loops for all steps at once.
        peel: further concrete steps at the start of each loop.
        schedule: steps to run of a loop of given length and history, when run step by step; all by default.
        validate: called with False while the body runs for all steps at once, with True after it.
    """

    def __init__(
        self, position: Position, vector: bool, peel: int, schedule: Schedule | None, validate: Callable[[bool], None]
    ) -> None:
        self.position, self.vector, self.peel, self.schedule, self.validate = position, vector, peel, schedule, validate
        self.loops: dict[str, Loop] = {}
        self.entered = False
        self.incomplete: list[str] = []
        self._open: list[ExitStack] = []

    def close(self) -> None:
        """End the levels of loops that were left by an exception; their generators may live on in its traceback."""
        while self._open:
            self._open.pop().close()

    def iterate(self, markov: Any) -> Iterator[Any]:
        """The items of a loop, each inside its context."""
        caller = sys._getframe(1)
        where = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        items = _items(markov._iterable)
        total, history = len(items), markov.history
        if total == 0:
            raise DataError(f"the time loop at {where} has no steps.", suggestion="drop empty sequences from the data")
        lead = max(history, 1) + self.peel
        vector = self.vector and total - lead >= 2 and not markov.keep
        reason = "keep=True lets every step see every other" if markov.keep and self.vector else ""
        loop = Loop(f"loop {len(self.loops)}", where, total, history, lead, tuple(self.position.steps), vector, reason)
        self.loops[loop.key] = loop
        with ExitStack() as contexts:
            if vector:
                yield from self._at_once(loop, items, markov, contexts)
            else:
                for k in range(total) if self.schedule is None else self.schedule(total, history):
                    yield from self._step(loop, "concrete", k, items[k], markov, contexts)

    def _step(self, loop: Loop, role: str, k: int, item: Any, markov: Any, contexts: ExitStack) -> Iterator[Any]:
        contexts.enter_context(markov)
        self.position.steps.append((loop.key, role, k))
        try:
            yield item
        except GeneratorExit:
            if loop.vector:
                self.incomplete.append(loop.where)
            raise
        finally:
            if self.position.steps:
                self.position.steps.pop()

    def _at_once(self, loop: Loop, items: Any, markov: Any, contexts: ExitStack) -> Iterator[Any]:
        for k in range(loop.lead):
            item = items[k]
            item = FirstStep(item) if type(item) is int else item
            yield from self._step(loop, "init", k, item, markov, contexts)
        level = Level(loop.key, loop.length, loop.history, self.position.names, self.position.run)
        self.entered = True
        with ExitStack() as stack:
            stack.enter_context(level.active())
            self.position.levels.append(level)
            stack.callback(self.position.levels.remove, level)
            # Some constraint checks index by mask, which has no batching rule.
            self.validate(False)
            stack.callback(self.validate, True)
            # A few operations run in a loop under functorch; which ones is no news to the author of the program.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            self._open.append(stack)
            for lag in range(loop.history, -1, -1):
                level.lag = lag
                start = loop.lead - lag
                item = _batched(items[start : start + loop.length], level)
                yield from self._step(loop, "prev" if lag else "curr", lag, item, markov, contexts)
            self._open.remove(stack)


def _items(iterable: Iterable[Any]) -> Any:
    """Items that can be counted and sliced; a tensor stays one, so that its slices cost no work per step."""
    return iterable if isinstance(iterable, (Tensor, range)) else list(iterable)


def _batched(items: Any, level: Level) -> Any:
    """One loop item that stands for all of ``items``."""
    if isinstance(items, Tensor):
        return level.batch(items)
    first = items[0]
    if any(type(item) is not type(first) for item in items):
        raise NotVectorisable("the items of the loop have different types")
    if all(item is first for item in items):
        return first
    if isinstance(first, (tuple, list)):
        if len({len(item) for item in items}) != 1:
            raise NotVectorisable("the items of the loop have different lengths")
        parts = [_batched(part, level) for part in zip(*items, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if isinstance(first, Tensor):
        if len({(item.shape, item.dtype) for item in items}) != 1:
            raise NotVectorisable("the items of the loop have different shapes")
        return level.batch(torch.stack(tuple(items)))
    if isinstance(first, float):
        return level.batch(torch.tensor(items))
    if hasattr(first, "__index__"):
        values = tuple(map(int, items))
        return TimeIndex(level, values, values)
    raise NotVectorisable(f"the items of the loop are of type {type(first).__name__}")

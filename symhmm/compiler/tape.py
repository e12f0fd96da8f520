"""Tapes: small operations of a recorded graph written as instructions for one kernel.

A small tensor is an array of places in one memory. Views only move places, and cost nothing when the tape is played.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST = 4096  # numbers of a tensor that is small; operations on more of them take longer than it takes to call one

Row = tuple[str, int, int, int, int, int, int]


@dataclass
class Tape:
    """A tape being written. Tensors are given as the places of their numbers (int64, in their shape).

    Args:
        constants: first numbers of the memory, which the tape does not make; the first of them is zero.
        size: numbers of the memory.
        rows: instructions of each part, by the part's number: a word, where its result begins, how many numbers that has, how
            many are reduced to one of them, and where up to three operands begin. Parts are played in order.
        places: of the numbers that are gathered, instruction by instruction.
        part: the part that is being written; parts may be written in any order.

    >>> tape = Tape(size=10)
    >>> x = tape.new(6).reshape(2, 3)
    >>> tape.add("exp", (2,), x[:, 1])
    tensor([18, 19])
    >>> tape.rows[0]
    [('gather', 16, 2, 1, 0, 0, 0), ('exp', 18, 2, 1, 16, 0, 0)]
    """

    constants: list[float] = field(default_factory=lambda: [0.0])
    size: int = 0
    rows: dict[int, list[Row]] = field(default_factory=dict)
    places: list[NDArray[np.int32]] = field(default_factory=list)
    part: int = 0
    _literals: dict[str, int] = field(default_factory=lambda: {"0.0": 0})
    _gathered: dict[bytes, list[tuple[int, int]]] = field(default_factory=dict)
    _length: int = 0

    def literal(self, x: float) -> int:
        """The place of a number that is known now."""
        key = repr(float(x))
        if key not in self._literals:
            self._literals[key] = len(self.constants)
            self.constants.append(float(x))
        return self._literals[key]

    def new(self, count: int) -> Tensor:
        """Places for ``count`` numbers."""
        first, self.size = self.size, self.size + count
        return torch.arange(first, first + count)

    def start(self, index: Tensor) -> int:
        """Where the numbers at some places begin when they lie in a row, for which they may have to be gathered."""
        flat = index.reshape(-1).numpy()
        first = int(flat[0])
        if flat[-1] - first == flat.size - 1 and bool((flat == np.arange(first, first + flat.size)).all()):
            return first
        key = flat.tobytes()
        for part, place in self._gathered.get(key, ()):
            if part <= self.part:
                return place
        place = int(self.new(flat.size)[0])
        self._row("gather", place, flat.size, 1, self._length)
        self.places.append(flat.astype(np.int32))
        self._length += flat.size
        self._gathered.setdefault(key, []).append((self.part, place))
        return place

    def add(self, name: str, like: Sequence[int], *operands: Tensor | float, reduced: int = 1) -> Tensor:
        """The places of what an operation makes of operands, which are repeated to the shape of its result.

        Args:
            like: the shape of the result.
            reduced: numbers that each of the results is made of; the operands then have one more dimension.
        """
        full = [*like, reduced] if reduced > 1 or name in REDUCTIONS else list(like)
        starts = [self.start(self.spread(x, full)) for x in operands]
        result = self.new(prod(like))
        self._row(name, int(result[0]), result.numel(), reduced, *starts)
        return result.reshape(tuple(like))

    def scan(self, name: str, x: Tensor, dim: int) -> Tensor:
        """The places of cumulated sums or products along a dimension."""
        moved = x.movedim(dim, -1)
        start = self.start(moved)
        result = self.new(x.numel())
        self._row(name, int(result[0]), x.numel() // x.shape[dim], x.shape[dim], start)
        return result.reshape(moved.shape).movedim(-1, dim)

    def spread(self, x: Tensor | float, shape: Sequence[int]) -> Tensor:
        """A tensor or a number, repeated to a shape."""
        return x.expand(tuple(shape)) if isinstance(x, Tensor) else torch.full(tuple(shape), self.literal(x))

    def _row(self, name: str, place: int, count: int, reduced: int, *starts: int) -> None:
        a, b, c = (*starts, 0, 0, 0)[:3]
        self.rows.setdefault(self.part, []).append((name, place, count, reduced, a, b, c))


REDUCTIONS = ("sum", "amax", "logsumexp", "dot")

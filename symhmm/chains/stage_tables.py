"""Where each stage of a step finds its numbers: as strides, or as a list of the moves that are possible."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from symhmm.chains.stages import Stage, Stages

Integers = NDArray[np.int64]
SPARSE = 0.125  # share of possible moves below which a stage goes through a list of them
FEWEST = 48  # states of a chain from which the possible moves are counted; below, a matrix is as fast as a list

# The head of a stage: whether it is listed, entries of its result and of what it reads, the range of its weights, where its
# lists begin; and for a stage with strides sizes and strides of the variable that appears and of the one that is summed
# out, and where the places of the others begin.
LISTED, SUMS, INPUTS, FIRST, LAST, ROWS, COLUMNS, ENTRIES, NEW, READ = range(10)
OUT_NEW, IN_READ, WEIGHT_NEW, WEIGHT_READ, OUTER, OUTERS, INNER, INNERS, HEAD = range(10, 19)


@dataclass(frozen=True, eq=False)
class Tables:
    """How the stages of a step are carried out.

    A stage is ``out[n, u, i] = sum_r weight[n, r, u] * in[r, u, i]``: r is the variable that is summed out, n one that
    appears, u all others of the factor, i what the factor does not look at. Weights that never are anything but zero can
    be left out; those that are left are numbered anew.

    Args:
        numbers: one memory for all tables. First one head for each stage, whose entries are named above. Its ``OUTER``
            leads to the places of each u in the result, in what is read and among the weights, and to whether it is the
            first of those that read the same: four lists in a row. ``INNER`` leads to the places of each i in the result and
            in what is read. ``ROWS`` leads to one number more than there are sums: where the terms of each begin and end,
            two numbers each, the place in what is read and the weight. ``COLUMNS``, of a listed stage, is the same by what
            is read, with places in the result, and ``ENTRIES`` by weight, with places in both.
        stages: how many.
        place: of each weight, its place among the entries of all factors.
        largest: entries of the largest result.
        products: in a step.
        sums: in a step.
        most: terms of a sum.
    """

    numbers: Integers
    stages: int
    place: Integers
    largest: int
    products: int
    sums: int
    most: int

    @cached_property
    def address(self) -> int:
        """Where the numbers lie in memory."""
        return int(self.numbers.ctypes.data)


@lru_cache(maxsize=64)
def tables(stages: Stages, possible: bytes | None = None) -> Tables:
    """Tables of all stages.

    Args:
        possible: one byte for each entry of the factors, 0 where its weight is always zero; None if no such entry is known.
    """
    known = None if possible is None else np.frombuffer(possible, np.bool_)
    memory = _Memory(HEAD * len(stages.stages))
    heads, kept = [], []
    names: tuple[int, ...] = tuple(range(len(stages.sizes), 2 * len(stages.sizes)))
    offset = done = products = most = 0
    for stage, left, size in zip(stages.stages, stages.left(), stages.entries, strict=True):
        mine = np.ones(size, np.bool_) if known is None else known[offset : offset + size]
        listed = bool(mine.mean() <= SPARSE)
        mine = mine if listed else np.ones(size, np.bool_)
        number = np.cumsum(mine) - 1 + done
        out, read, weight = _every(stages, stage, names, left)
        keep = mine[weight]
        out, read, weight = out[keep], read[keep], number[weight[keep]]
        sums, inputs, last = prod(map(stages.size, left)), prod(map(stages.size, names)), done + int(mine.sum())
        head = [int(listed), sums, inputs, done, last, memory.lists(out, sums, read, weight)]
        if listed:
            head += [
                memory.lists(read, inputs, out, weight), memory.lists(weight - done, last - done, out, read),
                *[0] * (HEAD - ENTRIES - 1),
            ]  # fmt: skip
        else:
            strides, outer, inner = _strided(stages, stage, names, left, done)
            head += [0, 0, *strides]
            head += [memory.add(outer), outer.shape[1], memory.add(inner), inner.shape[1]]
        heads += head
        kept.append(np.flatnonzero(mine) + offset)
        offset, done, products, names = offset + size, last, products + out.size, left
        most = max(most, int(np.bincount(out, minlength=1).max()))
    largest = max(max(heads[k + SUMS], heads[k + INPUTS]) for k in range(0, len(heads), HEAD))
    numbers = np.concatenate([np.array(heads, np.int64), *memory.parts])
    return Tables(numbers, len(stages.stages), np.concatenate(kept), largest, products, sum(stages.sums), most)


class _Memory:
    """Numbers one after the other."""

    def __init__(self, begin: int) -> None:
        self.parts: list[Integers] = []
        self.end = begin

    def add(self, numbers: Integers) -> int:
        """Place of the first."""
        begin = self.end
        self.parts.append(numbers.reshape(-1))
        self.end += numbers.size
        return begin

    def lists(self, group: Integers, groups: int, first: Integers, second: Integers) -> int:
        """Place of the list of where the pairs of each group begin."""
        order = np.argsort(group, kind="stable")
        counts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=groups))])
        begin = self.add(self.end + groups + 1 + 2 * counts)
        self.add(np.stack([first[order], second[order]], -1))
        return begin


def _strides(stages: Stages, names: tuple[int, ...]) -> dict[int, int]:
    """Row-major strides."""
    return {v: prod(map(stages.size, names[i + 1 :])) for i, v in enumerate(names)}


def _places(stages: Stages, names: list[int], *strides: dict[int, int]) -> list[Integers]:
    """Places of all values of some variables, in row-major order."""
    sizes = [stages.size(v) for v in names]
    index, zero = np.indices(sizes).reshape(len(names), prod(sizes)), np.zeros(prod(sizes), np.int64)
    return [sum((index[i] * s.get(v, 0) for i, v in enumerate(names)), zero) for s in strides]


def _every(stages: Stages, stage: Stage, names: tuple[int, ...], left: tuple[int, ...]) -> list[Integers]:
    """Places of every product in the result, in what is read, and in the factor of the stage."""
    return _places(stages, [*left, stage.out], *(_strides(stages, found) for found in (left, names, stage.factor)))


def _strided(
    stages: Stages, stage: Stage, names: tuple[int, ...], left: tuple[int, ...], offset: int
) -> tuple[list[int], Integers, Integers]:
    """The head from `NEW` to `WEIGHT_READ`, and the outer and inner places of a stage."""
    out, read, factor = (_strides(stages, found) for found in (left, names, stage.factor))
    appear = [v for v in left if v not in names]
    new = max(appear, key=stages.size) if appear else None
    again = [v for v in appear if v != new]
    looked = [v for v in left if v in names and v in factor]
    outer = _places(stages, [*looked, *again], out, read, factor)
    fresh = np.arange(outer[0].size) % prod(map(stages.size, again)) == 0
    inner = _places(stages, [v for v in left if v in names and v not in factor], out, read)
    appears = (1, 0, 0) if new is None else (stages.size(new), out[new], factor.get(new, 0))
    strides = [appears[0], stages.size(stage.out), appears[1], read[stage.out], appears[2], factor[stage.out]]
    return strides, np.stack([outer[0], outer[1], outer[2] + offset, fresh]), np.stack(inner)

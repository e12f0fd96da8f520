"""Several chains that move together, one at a time: which variable a stage sums out, and where it finds its numbers.

Joint states of M chains with K states each make a transition matrix of K^2M entries. Where each chain's own transition is a
factor of its own, a step sums the chains out one after the other, at a cost of M K^(M+1) (Ghahramani and Jordan 1997,
"Factorial Hidden Markov Models", appendix B).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """One variable summed out of a step.

    Args:
        out: number of the variable; 0..M-1 stand for the chains before the step, M..2M-1 after it.
        factor: variables of its factor, in the order of its dimensions.
    """

    out: int
    factor: tuple[int, ...]


@dataclass(frozen=True)
class Stages:
    """How a step of M chains is carried out.

    Args:
        sizes: states of each chain.
        stages: in their order.
    """

    sizes: tuple[int, ...]
    stages: tuple[Stage, ...]

    def size(self, variable: int) -> int:
        """States of a variable, before or after the step."""
        return self.sizes[variable % len(self.sizes)]

    @property
    def states(self) -> int:
        """Joint states."""
        return prod(self.sizes)

    @property
    def entries(self) -> tuple[int, ...]:
        """Entries of the factor of each stage."""
        return tuple(prod(map(self.size, s.factor)) for s in self.stages)

    @property
    def cost(self) -> int:
        """Multiply-adds of a step."""
        return sum(
            prod(map(self.size, names)) * self.size(s.out) for s, names in zip(self.stages, self.left(), strict=True)
        )

    def left(self) -> list[tuple[int, ...]]:
        """The variables that are there after each stage; after the last one those before the step, in order."""
        count = len(self.sizes)
        names, found = set(range(count, 2 * count)), []
        for s in self.stages:
            names = (names | set(s.factor)) - {s.out}
            found.append(tuple(sorted(names)))
        return [*found[:-1], tuple(range(count))]

    @property
    def sums(self) -> tuple[int, ...]:
        """Entries of the result of each stage."""
        return tuple(prod(map(self.size, names)) for names in self.left())

    def encoded(self) -> list[int]:
        """The same as integers, which an operator can be given."""
        code = [len(self.sizes), *self.sizes]
        for s in self.stages:
            code += [s.out, len(s.factor), *s.factor]
        return code

    @classmethod
    def decoded(cls, code: Sequence[int]) -> "Stages":
        """Inverse of `encoded`.

        >>> some = Stages((2, 3), (Stage(2, (0, 2)), Stage(3, (1, 3))))
        >>> Stages.decoded(some.encoded()) == some
        True
        """
        count = code[0]
        sizes, rest, stages = tuple(code[1 : 1 + count]), list(code[1 + count :]), []
        while rest:
            out, n = rest[:2]
            stages.append(Stage(out, tuple(rest[2 : 2 + n])))
            rest = rest[2 + n :]
        return cls(sizes, tuple(stages))


def arranged(sizes: Sequence[int], factors: Sequence[Sequence[int]]) -> tuple[Stages, tuple[tuple[int, ...], ...]]:
    """The cheapest next stage again and again, and which factors are multiplied into the one of each stage.

    Args:
        sizes: states of each chain.
        factors: variables of each transition factor.

    >>> stages, groups = arranged((4, 4, 4), [(0, 3), (1, 4), (2, 5)])
    >>> stages.cost, groups
    (768, ((0,), (1,), (2,)))
    """
    count = len(sizes)
    names, waiting = set(range(count, 2 * count)), set(range(count, 2 * count))
    free = set(range(len(factors)))
    stages, groups = [], []

    def joined(out: int) -> tuple[set[int], set[int]]:
        mine = {k for k in free if out in factors[k]}
        return mine, {v for k in mine for v in factors[k]}

    def volume(out: int) -> int:
        return prod(sizes[v % count] for v in names | joined(out)[1])

    while waiting:
        out = min(sorted(waiting), key=volume)
        mine, read = joined(out)
        if len(waiting) == 1:
            # What reads only earlier states waits for the last stage.
            mine, read = free, read | {v for k in free for v in factors[k]}
        stages.append(Stage(out, tuple(sorted(read | {out}))))
        groups.append(tuple(sorted(mine)))
        names = (names | read) - {out}
        waiting, free = waiting - {out}, free - mine
    return Stages(tuple(sizes), tuple(stages)), tuple(groups)


def joined(factors: Sequence[Tensor]) -> Tensor:
    """The entries of the factors of all stages side by side: (*batch, n or 1, F)."""
    lead = np.broadcast_shapes(*(x.shape[:-1] for x in factors))
    return torch.cat([x.expand(*lead, x.shape[-1]) for x in factors], -1)


def dense(transition: Tensor, stages: Stages) -> Tensor:
    """All factors as one matrix of the joint states (*batch, n or 1, S, S)."""
    lead, count = transition.shape[:-1], len(stages.sizes)
    total = transition.new_zeros(*lead, *stages.sizes, *stages.sizes)
    for stage, part in zip(stages.stages, transition.split(list(stages.entries), -1), strict=True):
        sizes = [stages.size(v) if v in stage.factor else 1 for v in range(2 * count)]
        total = total + part.reshape(*lead, *sizes)
    return total.reshape(*lead, stages.states, stages.states)

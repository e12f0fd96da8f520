"""Rows of the table of programs that a vectorised loop body would get wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from program_table import Program, normal

STEPS = 14


@dataclass(frozen=True, repr=False)
class Negative(Program):
    """A row with what must happen.

    Args:
        outcome: ``equal`` (a lower tier with a warning, or exact in the vector tier without) or ``refused``.
        reason: regular expression that the warning or the error must match, if there is one.
        later: arguments of the same shapes, bound afterwards, on which a wrong capture would show.
        warns: whether a warning must be given.
        plain: whether Pyro is right only without `pyro.markov`, because the program reaches further back than it says.
    """

    outcome: str = "equal"
    reason: str = ""
    later: Callable[[], tuple[Any, ...]] | None = None
    warns: bool = True
    plain: bool = False


def series(seed: int = 1) -> Callable[[], tuple[Any, ...]]:
    return lambda: (normal(STEPS, seed=seed),)


def adder(table: list[Negative]) -> Callable[..., Any]:
    """A decorator that adds a program to ``table``: with its name, first and later arguments, and what must happen."""

    def negative(name: str, arguments=None, later=None, **expected: Any):
        def add(model):
            second = later or arguments or series(9)
            table.append(Negative(name, model, arguments or series(), later=second, **expected))
            return model

        return add

    return negative

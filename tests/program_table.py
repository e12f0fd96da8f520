"""The table of test programs: each row is a Pyro program, its arguments and what capture should make of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Program:
    """One row.

    Args:
        name: shown by pytest.
        model: the Pyro program.
        arguments: builds its positional arguments, the same ones every time.
        nesting: number of rightmost dimensions that its plates use.
        tier: tier expected of its slowest loop: vector, stacked, unrolled, or "none" without a loop.
        small: whether the joint table of each connected component is small enough for brute force.
        per: a plate whose members' terms sum to the whole log-density, if there is one.
    """

    name: str
    model: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    nesting: int = 0
    tier: str = "vector"
    small: bool = True
    per: str | None = None

    def __repr__(self) -> str:
        return self.name


Rows = list[Program]


def row(
    table: Rows, name: str, arguments: Callable[[], tuple[Any, ...]], **expected: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that adds a program to ``table``; several rows may share one program."""

    def add(model: Callable[..., Any]) -> Callable[..., Any]:
        table.append(Program(name, model, arguments, **expected))
        return model

    return add


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal data, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 1) -> Tensor:
    """Uniform data in (0.05, 0.95)."""
    return 0.05 + 0.9 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def binary(*shape: int, seed: int = 1, probability: float = 0.5) -> Tensor:
    """Zeros and ones, as floating point numbers."""
    return (uniform(*shape, seed=seed) < probability).double()


def integers(*shape: int, below: int, seed: int = 1) -> Tensor:
    """Integers from 0 to ``below - 1``."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))

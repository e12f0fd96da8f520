"""What simulations share: the truth behind data, what is missing from them, and streams drawn from states."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from symhmm.errors import DataError
from symhmm.tables.data import SequenceData

Emissions = Mapping[str | tuple[str, ...], Any]


@dataclass(frozen=True)
class Truth:
    """What data were drawn from.

    Args:
        parameters: by name, as they were given.
        states: shape (T, [S,] N), int64; -1 in padding. None for models without states.
        kinds: shape (N,), int64, component of each individual; None without components.
        effects: random effects by name, shape (N, ...).
    """

    parameters: Mapping[str, Any]
    states: Tensor | None = None
    kinds: Tensor | None = None
    effects: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Holes:
    """What keeps data from being complete.

    Args:
        shortest: lengths are uniform between this and the longest, which one sequence has; None gives all the longest.
        missing: probability that a value of a stream is missing, each by itself.
        gap: probability that a gap, in which no stream has a value, begins at a step; ``length`` is how long it lasts.

    Raises:
        DataError: no probabilities, or lengths below 1.

    >>> Holes(shortest=50, missing=0.1, gap=0.02)
    Holes(shortest=50, missing=0.1, gap=0.02, length=5)
    """

    shortest: int | None = None
    missing: float = 0.0
    gap: float = 0.0
    length: int = 5

    def __post_init__(self) -> None:
        if not (0 <= self.missing < 1 and 0 <= self.gap < 1) or self.length < 1 or (self.shortest or 1) < 1:
            raise DataError(
                "missing= and gap= are probabilities below 1, lengths at least 1.",
                details=[f"seen {self}"],
                suggestion="Holes(missing=0.1)",
            )


WHOLE = Holes()  # nothing is missing


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A stretch of code with random numbers of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def observed(
    z: Tensor, emissions: Emissions, holes: Holes, covariates: Mapping[str, Tensor]
) -> tuple[SequenceData, Tensor]:
    """Streams of states ``z`` (T, [S,] N) with holes, and the states with -1 in padding."""
    streams: dict[str, Tensor] = {}
    for names, distribution in emissions.items():
        every = distribution.sample(z.shape)  # a draw from each state, of which one is kept
        index = z.reshape(*z.shape, 1, *[1] * distribution.event_dim)
        index = index.expand(*z.shape, 1, *distribution.event_shape)
        own = every.gather(z.dim(), index).squeeze(z.dim())
        many = (names,) if isinstance(names, str) else names
        streams |= {names: own} if isinstance(names, str) else dict(zip(many, own.unbind(-1), strict=True))
    lengths = torch.randint(holes.shortest or len(z), len(z) + 1, z.shape[1:])
    lengths.view(-1)[0] = len(z)
    inside = torch.arange(len(z)).reshape(-1, *[1] * lengths.dim()) < lengths
    begins = torch.rand(z.shape) < holes.gap
    # A step is in a gap if one began at it or shortly before.
    in_gap = torch.stack([torch.roll(begins, k, 0) & (torch.arange(len(z)) >= k).reshape(-1, *[1] * lengths.dim())
                          for k in range(holes.length)]).any(0)  # fmt: skip
    seen = {n: ~in_gap & (torch.rand(z.shape) >= holes.missing) for n in streams}
    data = SequenceData.from_tensors(streams, observed=seen, lengths=lengths, covariates=covariates)
    return data, torch.where(inside, z, -1)


def check_sizes(sequences: int, steps: int, sessions: int | None, holes: Holes) -> None:
    """Raise `DataError` where there is nothing to simulate."""
    if min(sequences, steps, 1 if sessions is None else sessions) < 1 or (holes.shortest or 1) > steps:
        raise DataError(
            "there is nothing to simulate.",
            details=[f"seen {sequences} sequences of {holes.shortest or steps} to {steps} steps, sessions={sessions}"],
            suggestion="at least one of each, and shortest no longer than the longest",
        )


def check_emissions(emissions: Emissions, states: int) -> None:
    """Raise `DataError` unless each stream has one distribution for each state."""
    for name, distribution in emissions.items():
        if tuple(distribution.batch_shape) != (states,):
            raise DataError(
                f"the distribution of {name!r} is not one for each of {states} states.",
                details=[f"seen batch shape {tuple(distribution.batch_shape)}, wanted ({states},)"],
                suggestion="dist.Normal(loc, scale) with loc and scale of shape (states,)",
            )

"""Capture-recapture: survival and detection of marked animals (Cormack, Jolly and Seber)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from symhmm.errors import DataError, SpecError
from symhmm.models.base import Model, Program, Start, as_data, assembled
from symhmm.tables.data import SequenceData


@dataclass(frozen=True)
class CormackJollySeber(Model):
    """Survival of marked animals that are seen on some of T occasions: a chain of two states, alive and dead.

    Conditional on an animal's first capture it survives from occasion t to t + 1 with probability phi_t, and is seen at t + 1
    with probability p_{t+1} if it is alive (Lebreton et al. 1992). Dead animals stay dead and unseen.

    Args:
        survival: ``constant``, or ``time`` for one phi for each interval.
        capture: ``constant``, or ``time`` for one p for each occasion but the first. With both by time the last phi and p
            are known by their product alone.
        stream: name of the stream of captures, 1 or 0; a missing one was an occasion without search.

    Raises:
        SpecError: anything else than ``constant`` and ``time``.

    >>> print(CormackJollySeber().program_source().splitlines()[-3].strip())
    alive = pyro.sample(f"alive_{t}", dist.Bernoulli(torch.where(t > first, phi, 1.0) * alive))
    """

    survival: Literal["constant", "time"] = "constant"
    capture: Literal["constant", "time"] = "constant"
    stream: str = "seen"

    def __post_init__(self) -> None:
        for name, value in (("survival", self.survival), ("capture", self.capture)):
            if value not in ("constant", "time"):
                raise SpecError(f"{name}={value!r} is not known.", suggestion=f"{name}='constant' or {name}='time'")

    @property
    def program(self) -> Program:
        """``phi`` and ``p``, single numbers or one for each interval; ``first`` is the occasion of the first capture."""
        phi = "phi[t - 1]" if self.survival == "time" else "phi"
        p = "p[t - 1]" if self.capture == "time" else "p"
        return assembled(
            [
                'phi = pyro.param("phi", start["phi"], constraints.unit_interval)  # survival',
                'p = pyro.param("p", start["p"], constraints.unit_interval)  # being seen',
                'with pyro.plate("individual", data.num_sequences, dim=-1):',
                "    alive = 1.0",
                "    for t in pyro.markov(range(data.num_steps)):",
                f'        alive = pyro.sample(f"alive_{{t}}", dist.Bernoulli(torch.where(t > first, {phi}, 1.0) * alive))',
                f'        with pyro.poutine.mask(mask=data.observed["{self.stream}"][t] & (t > first)):',
                f'            pyro.sample(f"{self.stream}_{{t}}", dist.Bernoulli({p} * alive), obs=data["{self.stream}"][t])',
            ],
            "data, start, first",
        )

    def first(self, data: SequenceData) -> Tensor:
        """Occasion of each animal's first capture, shape (N,); T for an animal that is never seen, which counts nothing.

        Raises:
            DataError: there is no such stream, its values are not 0 and 1, or the data have sessions.
        """
        name = self.stream
        if name not in as_data(data).streams or data.mask.dim() != 2:
            raise DataError(
                f"the data have no stream {name!r} of shape (occasions, animals).",
                details=[f"streams: {', '.join(data.streams)}"],
                suggestion=f"CormackJollySeber(stream={next(iter(data.streams))!r})",
            )
        y, seen = data[name], data.observed[name]
        wrong = seen & (y != 0) & (y != 1)
        if bool(wrong.any()):
            raise DataError(
                f"stream {name!r} has values other than 0 and 1.",
                details=[f"{int(wrong.sum())} of them, the first is {y[wrong][0].item():g}"],
                suggestion="1 where an animal was seen, 0 where it was not",
            )
        caught = seen & (y == 1)
        return torch.where(caught.any(0), caught.int().argmax(0), data.num_steps)

    def arguments(self, data: Any, start: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """Data, start, and first captures."""
        return (data, start, self.first(data))

    def start(self, data: SequenceData, seed: int = 0) -> Start:
        """Even chances: the likelihood has one maximum."""
        self.first(data)

        def half(kind: str) -> Tensor:
            return torch.full((data.num_steps - 1,) if kind == "time" else (), 0.5, dtype=data.dtype)

        return {"phi": half(self.survival), "p": half(self.capture)}

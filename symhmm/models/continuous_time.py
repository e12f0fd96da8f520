"""Hidden Markov models in continuous time, for observations at irregular times."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.errors import DataError
from symhmm.models.base import Initial, Model, Program, Start, as_data, assembled, first_state, whole_number
from symhmm.models.streams import Streams
from symhmm.tables.data import SequenceData

DAY = 86400.0  # seconds


@dataclass(frozen=True)
class ContinuousTimeHMM(Model):
    """Hidden Markov model whose state changes at any time and is observed at irregular ones.

    Between observations that are ``dt`` apart the transition matrix is ``expm(generator * dt)`` (Jackson 2011, eq. 1); the
    rates of the generator are per unit of time.

    Args:
        states: K.
        emissions: family of each stream, observed at single times; angles are around 0.
        time: covariate with the times; by default those of the table. Dates are counted in days.
        initial: ``stationary``, ``uniform``, ``free``, or K probabilities.

    Raises:
        SpecError: no such number of states, family or initial state.

    >>> print(ContinuousTimeHMM(2, {"y": "gaussian"}).program_source().splitlines()[-4].strip())
    p = first if z is None else Vindex(transition_after(generator, dt[t]))[..., z, :]
    """

    states: int
    emissions: Mapping[str, str]
    time: str | None = None
    initial: Initial = "stationary"

    def __post_init__(self) -> None:
        whole_number("states", self.states, 1)
        first_state(self.initial, self.states)
        Streams.of(self.emissions)

    @property
    def _streams(self) -> Streams:
        return Streams.of(self.emissions)

    @property
    def program(self) -> Program:
        """``rates`` (K, K - 1) of moves per unit of time, and those of the streams; ``dt`` is the time since the step before."""
        first = (
            "first = stationary_of_generator(generator)"
            if self.initial == "stationary"
            else first_state(self.initial, self.states).replace("transition", "generator")
        )
        return assembled(
            [
                *self._streams.parameters(),
                'rates = pyro.param("rates", start["rates"], constraints.positive)  # [from, to], per unit of time',
                "generator = generator_matrix(rates)",
                first,
                "with sequence_plates(data):",
                "    z = None",
                "    for t in pyro.markov(range(data.num_steps)):",
                "        p = first if z is None else Vindex(transition_after(generator, dt[t]))[..., z, :]",
                '        z = pyro.sample(f"z_{t}", dist.Categorical(p))',
                *("        " + line for line in self._streams.observations()),
            ],
            "data, start, dt",
        )

    def elapsed(self, data: SequenceData) -> Tensor:
        """Time since the step before, shape of the mask; 0 at the first step and in padding.

        Raises:
            DataError: the data have no such times, or times that go back.
        """
        name = self.time or as_data(data).labels.time or "time"
        if self.time is not None:
            times = data[self.time].double()
        elif data.times is not None:
            times = _numbers(data.times)
        else:
            raise DataError(
                "the data have no times.", suggestion="time= when the table is read, or a covariate: time='t'"
            )
        inside = data.inside
        dt = torch.zeros_like(times)
        dt[1:] = torch.where(inside[1:], times[1:] - times[:-1], 0.0)
        wrong = ~(dt >= 0) & inside
        if bool(wrong.any()):
            at = [int(i) for i in wrong.nonzero()[0]]
            raise DataError(
                f"times in {name!r} go back, or are missing.",
                details=[f"first at step {at[0]} of individual {data.ids[at[-1]]!r}; {int(wrong.sum())} in all"],
                suggestion="rows sorted by individual and time",
            )
        return dt.to(data.dtype)

    def arguments(self, data: Any, start: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """Data, start, and times since the step before."""
        return (data, start, self.elapsed(data))

    def start(self, data: SequenceData, seed: int = 0) -> Start:
        """Moments of clusters of observations; a move every five of them."""
        label = self._streams.clustered(as_data(data), self.states, seed)
        dt = self.elapsed(data)
        apart = dt[dt > 0].mean() if bool((dt > 0).any()) else torch.ones((), dtype=data.dtype)
        k = self.states
        rates = (0.2 / (apart * max(k - 1, 1))).expand(k, max(k - 1, 0)).clone()
        out = self._streams.start(data, label, k) | {"rates": rates}
        return out | ({"initial": torch.full((k,), 1 / k, dtype=data.dtype)} if self.initial == "free" else {})


def _numbers(times: np.ndarray) -> Tensor:
    """Times as numbers; dates in days since the first."""
    if np.issubdtype(times.dtype, np.datetime64):
        whole = times.astype("datetime64[ns]").astype(np.int64)
        return torch.as_tensor((whole - whole.min()) / 1e9 / DAY)
    return torch.as_tensor(times.astype(np.float64))

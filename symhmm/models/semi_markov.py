"""Hidden semi-Markov models: how long a state lasts has a distribution of its own, by stages of each state."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from symhmm.distributions import NegativeBinomialMean
from symhmm.errors import SpecError
from symhmm.fitting import Fit
from symhmm.models.base import Initial, Model, Program, Start, as_data, assembled, first_state, whole_number
from symhmm.models.streams import Streams
from symhmm.tables.data import SequenceData


@dataclass(frozen=True)
class Dwell:
    """Distribution of the dwell time minus one.

    Args:
        text: in a program.
        make: of parameters by name, shape (K, 1) each.
        parameters: constraint and starting value, given a mean, of each.
    """

    text: str
    make: Callable[[Mapping[str, Tensor]], Any]
    parameters: Mapping[str, tuple[str, Callable[[float], float]]]


DWELL = {
    "geometric": Dwell(
        "dist.Geometric({prob})",
        lambda v: dist.Geometric(v["prob"]),
        {"prob": ("constraints.unit_interval", lambda m: 1 / (1 + m))},
    ),
    "poisson": Dwell(
        "dist.Poisson({rate})", lambda v: dist.Poisson(v["rate"]), {"rate": ("constraints.positive", lambda m: m)}
    ),
    "negative_binomial": Dwell(
        "NegativeBinomialMean({mean}, {dispersion})",
        lambda v: NegativeBinomialMean(v["mean"], v["dispersion"]),
        {"mean": ("constraints.positive", lambda m: m), "dispersion": ("constraints.positive", lambda m: 0.5)},
    ),
}


@dataclass(frozen=True)
class SemiMarkovHMM(Model):
    """Hidden semi-Markov model: a state lasts for a time with a distribution of its own, and is never followed by itself.

    The state is written out in stages, one for each step that it has lasted, so that the model is an ordinary chain of
    K * R states and exact: the last dwell time is cut off by the end of the data, and under ``stationary`` the first one by
    their beginning. Only moves that are possible count where they are few (R of 8 and more, K * R of 48 and more): there the
    cost grows with K^2 R, and else with (K * R)^2.

    Args:
        states: K, two or more.
        emissions: family of each stream; angles are around 0.
        dwell: distribution of the dwell time minus one: ``geometric`` (an ordinary chain), ``poisson``,
            ``negative_binomial``, or ``free`` (R probabilities for each state).
        longest: R, steps; longer dwell times have probability 0.
        initial: ``stationary``, or a state that begins with the data: ``uniform``, ``free``, or K probabilities.

    Raises:
        SpecError: no such number of states, dwell distribution, family or initial state.

    >>> SemiMarkovHMM(2, {"y": "gaussian"}, longest=3).log_density(
    ...     SequenceData.from_tensors({"y": torch.randn(9, 2)})).graph.variables["z_{time}"].size
    6
    """

    states: int
    emissions: Mapping[str, str]
    dwell: Literal["geometric", "poisson", "negative_binomial", "free"] = "negative_binomial"
    longest: int = 20
    initial: Initial = "stationary"

    def __post_init__(self) -> None:
        whole_number("states", self.states, 2)
        whole_number("longest", self.longest, 2)
        first_state(self.initial, self.states)
        Streams.of(self.emissions)
        if self.dwell not in (*DWELL, "free"):
            raise SpecError(
                f"there is no dwell time distribution {self.dwell!r}.",
                suggestion=" or ".join(map(repr, (*DWELL, "free"))),
            )

    @property
    def _streams(self) -> Streams:
        return Streams.of(self.emissions)

    @property
    def program(self) -> Program:
        """``dwell.<parameter>`` (K,) or ``dwell`` (K, R); ``moves`` (K, K - 1) for K above 2; sites are stages of states."""
        k, r = self.states, self.longest
        if self.dwell == "free":
            dwell = ['dwell = pyro.param("dwell", start["dwell"], constraints.simplex).log()  # [state, steps - 1]']
        else:
            family, names = DWELL[self.dwell], list(DWELL[self.dwell].parameters)
            own = {n: f"dwell_{n}[:, None]" for n in names}
            dwell = [
                *(f'dwell_{n} = pyro.param("dwell.{n}", start["dwell.{n}"], {family.parameters[n][0]})' for n in names),
                f"steps = torch.arange({r}.0, dtype=dwell_{names[0]}.dtype)  # dwell times, minus one",
                f"dwell = {family.text.format(**own)}.log_prob(steps)",
            ]
        moves = (
            "moves = 1 - torch.eye(2, dtype=dwell.dtype)"
            if k == 2
            else 'moves = with_zero_diagonal(pyro.param("moves", start["moves"], constraints.simplex))  # [from, to]'
        )
        if self.initial == "stationary":
            first = ["first = stationary_distribution(transition.exp())"]
        else:
            begin = first_state(self.initial, k).replace("transition", "moves").replace("first =", "begin =", 1)
            first = [begin, f"first = torch.where(torch.arange({k * r}) % {r} == 0, begin[state_of], 0.0)"]
        chosen = "dist.Categorical(first) if stage is None else dist.Categorical(logits=transition[stage])"
        return assembled(
            [
                *self._streams.parameters(),
                *dwell,
                moves,
                "transition = dwell_chain(moves, dwell)  # log-probabilities between stages",
                f"state_of = torch.arange({k}).repeat_interleave({r})",
                *first,
                "with sequence_plates(data):",
                "    stage = None",
                "    for t in pyro.markov(range(data.num_steps)):",
                f'        stage = pyro.sample(f"z_{{t}}", {chosen})',
                "        z = state_of[stage]",
                *("        " + line for line in self._streams.observations()),
            ]
        )

    def start(self, data: SequenceData, seed: int = 0) -> Start:
        """Moments of clusters of steps; dwell times of a quarter of the longest, all moves alike."""
        label = self._streams.clustered(as_data(data), self.states, seed)
        out, k, r = self._streams.start(data, label, self.states), self.states, self.longest
        mean = max(r / 4 - 1, 0.5)
        if self.dwell == "free":
            shares = (-torch.arange(r, dtype=data.dtype) / mean).softmax(-1)
            out["dwell"] = shares.expand(k, r).clone()
        else:
            for name, (_, begin) in DWELL[self.dwell].parameters.items():
                out[f"dwell.{name}"] = torch.full((k,), begin(mean), dtype=data.dtype)
        if k > 2:
            out["moves"] = torch.full((k, k - 1), 1 / (k - 1), dtype=data.dtype)
        if self.initial == "free":
            out["initial"] = torch.full((k,), 1 / k, dtype=data.dtype)
        return out

    def smooth(self, fit: Fit) -> Tensor:
        """Probabilities of the states at each step given all data, shape (T, [S,] N, K): stages of a state added up."""
        stages = fit.smooth(["z_{time}"])["z_{time}"].values
        return stages.unflatten(-1, (self.states, self.longest)).sum(-1)

    def viterbi(self, fit: Fit) -> Tensor:
        """States of the jointly most probable path, shape (T, [S,] N)."""
        return torch.div(fit.viterbi()["z_{time}"].values, self.longest, rounding_mode="floor")

    def dwell_times(self, values: Mapping[str, Tensor]) -> Tensor:
        """Probabilities of dwell times 1, ..., R at some values, ``fit.values`` for one; shape (K, R)."""
        if self.dwell == "free":
            return values["dwell"]
        family = DWELL[self.dwell]
        own = {n: values[f"dwell.{n}"][:, None] for n in family.parameters}
        steps = torch.arange(self.longest, dtype=next(iter(own.values())).dtype)
        return family.make(own).log_prob(steps).softmax(-1)

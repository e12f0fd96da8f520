"""Hidden Markov models of plain streams: counts, and any families with kinds of individuals that differ in their transitions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from symhmm import fitting
from symhmm.fitting import Fit
from symhmm.models.base import Initial, Model, Program, Start, as_data, assembled, first_state, sticky, whole_number
from symhmm.models.streams import Streams, kmeans
from symhmm.tables.data import SequenceData
from symhmm.tables.results import Optima

SHORT = 300  # gradients of the climb that every start of a mixture gets
LONG = 2  # how many of them go on


@dataclass(frozen=True)
class PoissonHMM(Model):
    """Hidden Markov model of one or several streams of counts, independent given the state.

    Args:
        states: K.
        streams: name of the stream of counts, or several.
        initial: ``stationary``, ``uniform``, ``free``, or K probabilities.

    Raises:
        SpecError: no such number of states or initial state.

    >>> from symhmm.datasets import earthquakes
    >>> data = SequenceData.from_tensors({"count": earthquakes().double()[:, None]})
    >>> round(PoissonHMM(2, "count").fit(data, restarts=1).objective, 2)
    -342.32
    """

    states: int
    streams: str | Sequence[str]
    initial: Initial = "stationary"

    def __post_init__(self) -> None:
        whole_number("states", self.states, 1)
        first_state(self.initial, self.states)

    @property
    def _streams(self) -> Streams:
        return Streams.of(dict.fromkeys([self.streams] if isinstance(self.streams, str) else self.streams, "poisson"))

    @property
    def program(self) -> Program:
        """Rates ``<stream>.rate``, ``transition`` [from, to], and ``initial`` where it is free."""
        return assembled(
            [
                *self._streams.parameters(),
                'transition = pyro.param("transition", start["transition"], constraints.simplex)  # [from, to]',
                first_state(self.initial, self.states),
                "with sequence_plates(data):",
                "    z = None",
                "    for t in pyro.markov(range(data.num_steps)):",
                '        z = pyro.sample(f"z_{t}", dist.Categorical(first if z is None else transition[z]))',
                *("        " + line for line in self._streams.observations()),
            ]
        )

    def start(self, data: SequenceData, seed: int = 0) -> Start:
        """Rates of clusters of steps; states that stay with probability 0.8."""
        label = self._streams.clustered(as_data(data), self.states, seed)
        out = self._streams.start(data, label, self.states) | {"transition": sticky(self.states, data.dtype)}
        return out | _free(self.initial, (self.states,), data.dtype)


@dataclass(frozen=True)
class MixtureHMM(Model):
    """Hidden Markov model with a discrete random effect: individuals are of C kinds, each with its own transition matrix.

    All kinds share the states and their emissions (Maruotti and Ryden 2009; Isojunno et al. 2017). The kinds are summed
    out exactly, beside the states.

    Args:
        states: K.
        components: C, kinds of individuals.
        emissions: family of each stream, ``{"step": "gamma", "angle": "vonmises"}``.
        initial: ``stationary`` (of each kind's own transitions), ``uniform``, ``free``, or K probabilities.

    Raises:
        SpecError: no such number of states or components, unknown family or initial state.

    ``fit`` first fits one kind, groups the individuals by their expected moves between states, and climbs from each
    grouping, ``restarts`` in all: all of them a little, the best two to the end.

    >>> print(MixtureHMM(2, 3, {"step": "gamma"}).program_source().splitlines()[-3])
            z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(first)[kind] if z is None else Vindex(transition)[kind, z]))
    """

    states: int
    components: int
    emissions: Mapping[str, str]
    initial: Initial = "stationary"

    def __post_init__(self) -> None:
        whole_number("states", self.states, 1)
        whole_number("components", self.components, 1)
        first_state(self.initial, self.states)
        Streams.of(self.emissions)

    @property
    def _streams(self) -> Streams:
        return Streams.of(self.emissions)

    @property
    def program(self) -> Program:
        """Parameters ``<stream>.<parameter>``, ``weights`` (C,) and ``logits`` (C, K, K - 1) of leaving each state."""
        choice = "Vindex(first)[kind] if z is None else Vindex(transition)[kind, z]"
        return assembled(
            [
                *self._streams.parameters(),
                'weights = pyro.param("weights", start["weights"], constraints.simplex)  # of the kinds',
                'logits = pyro.param("logits", start["logits"])  # [kind, from, to], relative to staying',
                "transition = with_zero_diagonal(logits).softmax(-1)",
                first_state(self.initial, self.states),
                'with pyro.plate("individual", data.num_sequences, dim=-1):',
                '    kind = pyro.sample("kind", dist.Categorical(weights))',
                "with sequence_plates(data):",
                "    z = None",
                "    for t in pyro.markov(range(data.num_steps)):",
                f'        z = pyro.sample(f"z_{{t}}", dist.Categorical({choice}))',
                *("        " + line for line in self._streams.observations()),
            ]
        )

    def start(self, data: SequenceData, seed: int = 0) -> Start:
        """Moments of clusters of steps; kinds that stay in their states with probabilities from 0.9 down."""
        label = self._streams.clustered(as_data(data), self.states, seed)
        level = torch.linspace(-2.5, -1.0, self.components, dtype=data.dtype)
        logits = level[:, None, None].expand(self.components, self.states, self.states - 1).clone()
        out = self._streams.start(data, label, self.states)
        out |= {
            "logits": logits,
            "weights": data.mask.new_full((self.components,), 1 / self.components, dtype=data.dtype),
        }
        return out | _free(self.initial, (self.components, self.states), data.dtype)

    def fit(self, data: Any, *, method: str = "mle", seed: int = 0, restarts: int = 6, **options: Any) -> Fit:
        """Fit the model; see the class for its starts, and `symhmm.fit` for ``options``."""
        if self.components == 1 or method != "mle" or "start" in options:
            return super().fit(data, method=method, seed=seed, restarts=restarts, **options)
        one = replace(self, components=1).fit(data, seed=seed, restarts=min(restarts, 2))
        density = self.log_density(data, seed=seed)
        most = options.pop("max_evaluations", 3000)

        def climb(start: Mapping[str, Tensor], evaluations: int) -> Fit:
            return fitting.fit(density, start=start, restarts=1, max_evaluations=evaluations, **options)

        short = [climb(s, min(SHORT, most)) for s in self._groupings(one, restarts, seed)]
        best = sorted(short, key=lambda f: f.objective, reverse=True)[:LONG]
        long = [f if f.estimate.optima.converged[0] else climb(f.values, most) for f in best]
        found = max(long, key=lambda f: f.objective)
        ends = [*long, *(f for f in short if f not in best)]
        optima = Optima(
            tuple(f.objective for f in ends), tuple(all(f.optima.converged) for f in ends), of="climbs from groupings"
        )
        return replace(found, estimate=replace(found.estimate, optima=optima))

    def _groupings(self, one: Fit, number: int, seed: int) -> list[Start]:
        """Starts from a fit of one kind: individuals clustered by their own transition logits."""
        counts = one.transition_counts().only.values + 0.5
        while counts.dim() > 3:  # sessions
            counts = counts.sum(0)
        logits = counts.log() - counts.log().diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        x = logits[:, ~torch.eye(self.states, dtype=torch.bool)]
        shared = {n: v for n, v in one.values.items() if n not in ("logits", "weights", "initial")}
        starts = []
        for i in range(number):
            label = kmeans(x.numpy(), self.components, seed + i, tries=1)
            groups = [x[torch.as_tensor(label == k)] for k in range(self.components)]
            centres = [g.mean(0) if len(g) else one.values["logits"].flatten() for g in groups]
            weights = torch.tensor([len(g) + 0.5 for g in groups], dtype=x.dtype)
            start = shared | {
                "logits": torch.stack(centres).reshape(self.components, self.states, self.states - 1),
                "weights": weights / weights.sum(),
            }
            if "initial" in one.values:
                start["initial"] = one.values["initial"].expand(self.components, -1).clone()
            starts.append(start)
        return starts


def _free(initial: Initial, shape: tuple[int, ...], dtype: torch.dtype) -> Start:
    """The start of a free distribution of the first state, if it is one."""
    return {"initial": torch.full(shape, 1 / shape[-1], dtype=dtype)} if initial == "free" else {}

"""Hidden Markov models of plain streams: counts, and any families with kinds of individuals that differ in their transitions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from symhmm import fitting
from symhmm.fitting import Fit
from symhmm.models.base import Initial, Model, Program, Start, as_data, assembled, first_state, sticky, whole_number
from symhmm.models.streams import Streams
from symhmm.tables.data import SequenceData
from symhmm.tables.results import Optima

GROUPINGS, ROUNDS = 300, 200  # random groupings of individuals, and iterations of EM on their moves
SAME = 1e-3  # nats by which optima of groupings differ


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
        emissions: family of each stream, ``{"step": "gamma", "angle": "vonmises"}``; angles are around 0.
        initial: ``stationary`` (of each kind's own transitions), ``uniform``, ``free``, or K probabilities.

    Raises:
        SpecError: no such number of states or components, unknown family or initial state.

    ``fit`` climbs by EM from ``restarts`` starts and goes on from the highest end. With several kinds these starts are the best
    groupings of individuals by their expected moves between states under a fit of one kind.

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
        if method not in ("mle", "em") or "start" in options or (self.components == 1 and method == "em"):
            return super().fit(data, method=method, seed=seed, restarts=restarts, **options)
        shared = {n: x for n, x in options.items() if n in ("fix", "tie", "order", "progress")}
        density = self.log_density(data, seed=seed)
        if self.components == 1:
            best = fitting.fit(density, method="em", seed=seed, restarts=restarts, **shared)
            ends, of = list(zip(best.optima.objectives, best.optima.converged, strict=True)), best.optima.of
        else:
            one = replace(self, components=1).fit(data, method="em", seed=seed, restarts=min(restarts, 2))
            starts = self._groupings(one, restarts, seed)
            climbs = [fitting.fit(density, method="em", start=s, restarts=1, **shared) for s in starts]
            best = max(climbs, key=lambda f: f.objective)
            ends, of = [(f.objective, all(f.optima.converged)) for f in climbs], "climbs from groupings"
        found = fitting.fit(density, method=method, start=best.values, restarts=1, **options)
        highest = max(range(len(ends)), key=lambda i: ends[i][0])
        ends[highest] = found.objective, all(found.optima.converged)
        optima = Optima(tuple(o for o, _ in ends), tuple(c for _, c in ends), of=of)
        return replace(found, estimate=replace(found.estimate, optima=optima))

    def _groupings(self, one: Fit, number: int, seed: int) -> list[Start]:
        """Starts from a fit of one kind: the best groupings of individuals by their expected moves between its states."""
        counts = one.transition_counts().only.values
        while counts.dim() > 3:  # sessions
            counts = counts.sum(0)
        shared = {n: v for n, v in one.values.items() if n not in ("logits", "weights", "initial")}
        apart = ~torch.eye(self.states, dtype=torch.bool)
        starts = []
        for weights, transition in grouped(counts, self.components, number, seed):
            logits = transition.log() - transition.log().diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            start = shared | {
                "logits": logits[:, apart].reshape(self.components, self.states, self.states - 1),
                "weights": weights,
            }
            if "initial" in one.values:
                start["initial"] = one.values["initial"].expand(self.components, -1).clone()
            starts.append(start)
        return starts


def grouped(counts: Tensor, kinds: int, number: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Kinds of individuals by their moves: the best optima of a mixture of Markov chains, by EM from random groupings.

    Args:
        counts: shape (N, K, K), moves of each individual [from, to], whole numbers or expected ones.
        kinds: C.
        number: starts wanted.

    Returns:
        weights (C,) and transition probabilities (C, K, K) of each optimum, the most likely first; where there are fewer
        than ``number``, those of random groupings follow.

    >>> moves = torch.tensor([[[9.0, 1.0], [1.0, 9.0]], [[1.0, 9.0], [9.0, 1.0]]])
    >>> grouped(moves, 2, 1, seed=0)[0][1].diagonal(dim1=-2, dim2=-1).sort(0).values.round(decimals=1)
    tensor([[0.1000, 0.1000],
            [0.9000, 0.9000]])
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(kinds, (GROUPINGS, len(counts)), generator=generator)
    drawn = belongs = torch.nn.functional.one_hot(first, kinds).to(counts.dtype)
    for _ in range(ROUNDS):
        each = _joint(counts, *_kinds(counts, belongs))
        belongs = each.softmax(-1)
    reached = each.logsumexp(-1).sum(-1)
    found: list[int] = []
    for g in reached.argsort(descending=True).tolist():
        if len(found) < number and all(abs(reached[g] - reached[other]) > SAME for other in found):
            found.append(g)
    weights, transition = _kinds(counts, torch.cat([belongs[found], drawn[: number - len(found)]]))
    return list(zip(weights, transition, strict=True))


def _kinds(counts: Tensor, belongs: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (G, C) and transition probabilities (G, C, K, K) of groupings (G, N, C)."""
    # Half a move and half an individual more keep empty kinds and unseen moves possible.
    weights = belongs.sum(1) + 0.5
    moves = torch.einsum("gnc,nij->gcij", belongs, counts) + 0.5 / counts.shape[-1]
    return weights / weights.sum(-1, keepdim=True), moves / moves.sum(-1, keepdim=True)


def _joint(counts: Tensor, weights: Tensor, transition: Tensor) -> Tensor:
    """Log-probability of each individual's moves and of being of each kind, (G, N, C)."""
    return torch.einsum("nij,gcij->gnc", counts, transition.log()) + weights.log().unsqueeze(1)


def _free(initial: Initial, shape: tuple[int, ...], dtype: torch.dtype) -> Start:
    """The start of a free distribution of the first state, if it is one."""
    return {"initial": torch.full(shape, 1 / shape[-1], dtype=dtype)} if initial == "free" else {}

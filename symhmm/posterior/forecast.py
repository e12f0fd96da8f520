"""Forecasts: states and observations of each member after the end of its data, by letting the time axis run on."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from funsor.domains import Bint
from funsor.tensor import Tensor as Term
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.lower import Named
from symhmm.errors import GraphError
from symhmm.graph import Factor, FactorGraph
from symhmm.posterior.emissions import Emission, emissions, taken
from symhmm.posterior.ends import Ends
from symhmm.posterior.evaluated import Evaluated, Values, evaluated
from symhmm.posterior.filler import other_filler
from symhmm.posterior.marginals import derivatives, probe, smooth_at
from symhmm.posterior.mixture import QUANTITY, Mixture
from symhmm.posterior.prefix import the_loop
from symhmm.posterior.series import Loop, loops
from symhmm.tables.states import STATE, Answers, Labelled

AHEAD = "ahead"
QUANTILES = (0.05, 0.5, 0.95)


def predict(
    density: Density,
    values: Values | Sequence[Values],
    horizon: int,
    sites: Iterable[str] | None = None,
    *,
    future: Density | None = None,
    quantiles: Sequence[float] = QUANTILES,
    seed: int = 0,
) -> Answers:
    """States and observations 1 to ``horizon`` steps after the last observation of each member, given all its data.

    Without ``future`` the time axis runs on without observations, so that effects, coupled chains and histories are those of
    the program; nothing may change over time then. With ``future``, the same program on data with more steps, masked, the
    forecast is the posterior of these steps: exact for any program, and covariates are those that were given. What a
    program computes from its own data (``y[t - 1]``) is computed from what was observed, and refused where that ends.

    Args:
        values: constrained parameters and continuous latents; several of them, such as draws, are averaged over.
        horizon: steps ahead, at least 1.
        sites: discrete latents and observed sites of the time loop; all of them if None.
        future: the density of longer data; the longer part is masked.
        quantiles: probabilities of the quantiles of observations.
        seed: of the quantiles of families that have no distribution function.

    Returns:
        for each discrete latent (ahead, *plates, states), probabilities; for each observed site (ahead, *plates, quantity):
        mean, standard deviation and quantiles in the units of the data.

    Raises:
        GraphError: a site depends on time or on covariates, whose future is not given; the future is shorter than the
            horizon; a site depends on observations of the future, which are not known; there is no time loop or no such site.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> def model():
    ...     z = torch.tensor(0)
    ...     for t in pyro.markov(range(3)):
    ...         z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.5, 0.5], [0.0, 1.0]])[z]))
    ...         pyro.sample(f"y_{t}", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))
    >>> found = predict(symhmm.compile(model), {}, 1)
    >>> found["z_{time}"].values, found["y_{time}"].sel(quantity="sd").values
    (tensor([[0.0625, 0.9375]]), tensor([1.]))
    """
    if horizon < 1:
        raise GraphError(f"a horizon of {horizon} steps is none.", suggestion="predict(1)")
    longer = density if future is None else future
    every = [values] if isinstance(values, Mapping) else list(values)
    found = [_Ahead.of(longer, v, horizon, future is not None) for v in every]
    states, streams = found[0].asked(sites)
    rows = [x.states(states) for x in found]
    mixtures = {site: [x.mixture(site) for x in found] for site in streams}
    if future is not None:
        _refuse_filler(found[0], rows[0], {site: x[0] for site, x in mixtures.items()})
    out = dict(rows[0].items())
    for n, x in out.items():
        out[n] = replace(x, values=torch.stack([r[n].values for r in rows]).mean(0))
    for site in streams:
        out[site] = _observation(site, mixtures[site], found[0], quantiles, seed)
    return Answers(f"{horizon} steps ahead", out)


@dataclass(frozen=True)
class _Ahead:
    """A graph whose time axis goes beyond the data, and where the steps after the last observation of each member are."""

    density: Density
    values: Values
    at: Evaluated
    loop: Loop
    ends: Ends
    horizon: int
    given: bool

    @classmethod
    def of(cls, density: Density, values: Values, horizon: int, given: bool) -> "_Ahead":
        at = evaluated(density, values)
        loop = the_loop(at)
        if given:
            return cls(density, values, at, loop, at.ends, horizon, given)
        graph = extended(at.graph, loop.axis, horizon)
        later = replace(at, graph=graph, loops=tuple(loops(graph)), ends=replace(at.ends, graph=graph, counts={}))
        return cls(density, values, later, loop, at.ends, horizon, given)

    def asked(self, sites: Iterable[str] | None) -> tuple[list[str], list[str]]:
        """Discrete latents and observed sites that are wanted."""
        at, axis = self.at, self.loop.axis
        inside = [n for n, x in at.sites.items() if x is not None and x[0].axis == axis]
        streams = [n for n, x in at.graph.observed.items() if axis in x.frames]
        if sites is None:
            if not inside and not streams:
                raise GraphError("the program has no time loop whose future could be told.")
            return inside, streams if not isinstance(self.density.program, FactorGraph) else []
        wanted = [sites] if isinstance(sites, str) else list(sites)
        for n in wanted:
            if n in at.sites and n not in inside:
                raise GraphError(f"{n!r} stands in no time loop: it has no future.", suggestion="smooth()")
            if n not in inside and n not in streams:
                raise GraphError(
                    f"there is no site {n!r} to forecast.", details=[f"known: {', '.join(inside + streams)}"]
                )
        return [n for n in wanted if n in inside], [n for n in wanted if n in streams]

    def states(self, wanted: list[str]) -> Answers:
        """Probabilities of the states at the steps ahead."""
        if not wanted:
            return Answers("states ahead", {})
        found = smooth_at(self.at, wanted)

        def make(site: str) -> Labelled:
            x = found[site]
            plates = list(x.dims[1:-1])
            index = self.index(plates, x.values.shape[0]).unsqueeze(-1).expand([self.horizon, *x.values.shape[1:]])
            return Labelled(site, x.values.gather(0, index), (AHEAD, *plates, STATE), self.labels)

        return self.at.answers("states ahead", wanted, make)

    @cached_property
    def distributions(self) -> Mapping[str, Emission]:
        """The distributions of all observed sites."""
        return emissions(self.density, self.values)

    def mixture(self, site: str) -> Mixture:
        """The forecast of an observed site: its distribution in each state at the steps ahead."""
        axis, graph = self.loop.axis, self.at.graph
        emission = self.distributions[site]
        if axis in emission.names and not self.given:
            raise _unknown_future(site, "numbers of the distribution")
        plates = self.plates(site)
        variables = [n for n in emission.names if n in graph.variables]
        length = graph.chains[axis].length
        index = self.index(plates, length)
        sizes = [self.at.size(p) for p in plates]
        weights = torch.ones([self.horizon, *sizes, 1])
        if variables:
            joint = derivatives(self.at, {site: probe(graph, site, [axis, *plates], tuple(variables))})[site]
            p = joint.data.flatten(len(plates) + 1)
            weights = self.later(Named(p / p.sum(-1, keepdim=True), [axis, *plates, STATE]), plates, index)
        states = [graph.variables[n].size for n in variables]

        def arrange(x: Named) -> Tensor:
            lead = [axis, *plates]
            full = x.aligned([*lead, *variables])
            full = full.expand([*full.shape[: len(lead)], *states]).flatten(len(lead)) if states else full.unsqueeze(-1)
            if full.shape[0] == 1:
                return full.expand([self.horizon, *sizes, full.shape[-1]])
            return self.later(Named(full, [*lead, STATE]), plates, index)

        return Mixture(weights, emission.at(arrange))

    def later(self, x: Named, plates: list[str], index: Tensor) -> Tensor:
        """A term (time, *plates, states) at the steps ahead."""
        shape = [self.at.size(p) for p in plates]
        full = x.data.expand([x.data.shape[0], *shape, x.data.shape[-1]])
        return full.gather(0, index.unsqueeze(-1).expand([self.horizon, *shape, full.shape[-1]]))

    def plates(self, site: str) -> list[str]:
        """Plates of an observed site in Pyro's order."""
        return self.at.ordered([p for p in self.at.graph.observed[site].frames if p in self.at.graph.plates])

    def index(self, plates: list[str], rows: int) -> Tensor:
        """Shape (ahead, *plates): rows of the steps ahead of each member, in a table of the loop's last ``rows`` steps."""
        mask = self.ends.steps(self.loop, frozenset(plates))
        known, total = len(self.loop.labels), len(self.loop.labels) + (0 if self.given else self.horizon)
        steps = torch.tensor(known) if mask is None else mask.aligned([*plates, self.loop.axis]).sum(-1)
        steps = steps.expand([self.at.size(p) for p in plates])
        least = total - int(steps.max()) if steps.numel() else self.horizon
        if least < self.horizon:
            raise GraphError(
                f"the data given end {least} steps after the last observation, the horizon is {self.horizon}.",
                suggestion=f"data with {self.horizon - least} more masked steps, and covariates there",
            )
        if steps.numel() and int(steps.min()) < total - rows:
            raise GraphError(
                f"the sequence of a member ends with step {int(steps.min())}, before the loop's steps are alike.",
                suggestion="sequences of more steps",
            )
        ahead = torch.arange(self.horizon).reshape([-1, *(1 for _ in plates)])
        return ahead + steps - (total - rows)

    @property
    def labels(self) -> dict[str, tuple[Any, ...]]:
        return {AHEAD: tuple(range(1, self.horizon + 1))}


def _refuse_filler(first: _Ahead, states: Answers, mixtures: Mapping[str, Mixture]) -> None:
    """Raise `GraphError` where a forecast depends on what stands in the data after the last observation."""
    for other in other_filler(first.density, first.values, first.at, first.loop):
        again = _Ahead.of(other.density, first.values, first.horizon, True)
        pairs = {n: [(states[n].values, x.values)] for n, x in again.states(list(states)).items()}
        for site, mine in mixtures.items():
            its = again.mixture(site)
            numbers = (taken(m.components, site)[1] for m in (mine, its))
            pairs[site] = [(mine.weights, its.weights), *zip(*numbers, strict=True)]
        for site, tensors in pairs.items():
            same = torch.ones(first.horizon, dtype=torch.bool)
            for a, b in tensors:
                # Transitions behind a step sum to one, up to rounding.
                rounding = torch.finfo(b.dtype).eps ** 0.5
                same &= torch.isclose(a, b, rounding, rounding, equal_nan=True).flatten(1).all(1)
            if not bool(same.all()):
                k = int(same.int().argmin()) + 1
                raise GraphError(
                    f"the forecast of {site!r} {k} steps ahead depends on observations that are not there.",
                    details=[f"the program computes it from {', '.join(other.arguments)} after the last observation"],
                    suggestion=(f"a horizon of {k - 1}; for more, " if k > 1 else "")
                    + "data in which drawn observations stand in these places, unmasked",
                )


def _observation(site: str, found: list[Mixture], first: _Ahead, quantiles: Sequence[float], seed: int) -> Labelled:
    """Forecasts at several values as one mixture of all their components."""
    one = found[0]
    if len(found) > 1:
        recipe, tensors = taken(found[0].components, site)
        parts = [tensors, *(taken(m.components, site)[1] for m in found[1:])]
        numbers = [torch.cat([x.expand(one.weights.shape) for x in column], -1) for column in zip(*parts, strict=True)]
        weights = torch.cat([m.weights for m in found], -1) / len(found)
        one = Mixture(weights, recipe.rebuild(iter(numbers)))
    summary, names = one.summary(quantiles, seed)
    plates = first.plates(site)
    events = [f"event_{i}" for i in range(summary.dim() - len(plates) - 2)]
    return Labelled(site, summary, (AHEAD, *plates, *events, QUANTITY), {**first.labels, QUANTITY: names})


def extended(graph: FactorGraph, axis: str, steps: int) -> FactorGraph:
    """The graph with ``steps`` more steps on its time axis, without observations."""
    chain = graph.chains[axis]
    factors = tuple(_longer(f, axis, chain.length, steps) if axis in f.frames else f for f in graph.factors)
    variables = tuple(
        replace(v, steps=(*v.steps, *(f"{v.current} + {k}" for k in range(1, steps + 1)))) for v in chain.variables
    )
    longer = replace(chain, length=chain.length + steps, variables=variables)
    return replace(graph, factors=factors, chains={**graph.chains, axis: longer})


def _longer(f: Factor, axis: str, length: int, steps: int) -> Factor:
    names = list(f.term.inputs)
    data = f.term.data
    if f.role == "discrete latent":
        if axis not in names:
            return f
        raise _unknown_future(f.name, "probabilities")
    if axis not in names:
        names, data = [axis, *names], data.expand([length, *data.shape])
    place = names.index(axis)
    future = data.new_zeros([steps if i == place else n for i, n in enumerate(data.shape)])
    data = torch.cat([data, future], place)
    return replace(f, term=Term(data, OrderedDict((n, Bint[s]) for n, s in zip(names, data.shape, strict=True))))


def _unknown_future(site: str, what: str) -> GraphError:
    return GraphError(
        f"a horizon without future covariates: the {what} of {site!r} change over time, and their future is not known.",
        suggestion="predict(h, *args) with the program's arguments for longer data: future covariates, masked observations",
    )

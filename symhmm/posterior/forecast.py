"""Forecasts: the states of each member after the end of its data, by letting the time axis run on."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

import torch
from funsor.domains import Bint
from funsor.tensor import Tensor as Term

from symhmm.compiler.density import Density
from symhmm.errors import GraphError
from symhmm.graph import Factor, FactorGraph
from symhmm.posterior.evaluated import Evaluated, Values, evaluated
from symhmm.posterior.marginals import smooth_at
from symhmm.posterior.prefix import the_loop
from symhmm.posterior.series import loops
from symhmm.tables.states import STATE, Answers, Labelled

AHEAD = "ahead"


def predict(density: Density, values: Values, horizon: int, sites: Iterable[str] | None = None) -> Answers:
    """Probabilities of the states 1 to ``horizon`` steps after the last observation of each member, given all its data.

    The time axis runs on without observations, so that effects, coupled chains and histories are those of the program.

    Args:
        values: constrained parameters and continuous latents.
        horizon: steps ahead, at least 1.
        sites: discrete latents of the time loop; all of them if None.

    Returns:
        for each site (ahead, *plates, states).

    Raises:
        GraphError: transitions depend on time or on covariates, whose future is not known; or there is no time loop.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> def model():
    ...     z = torch.tensor(0)
    ...     for t in pyro.markov(range(3)):
    ...         z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.5, 0.5], [0.0, 1.0]])[z]))
    ...         pyro.sample(f"y_{t}", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))
    >>> predict(symhmm.compile(model), {}, 1)["z_{time}"].values
    tensor([[0.0625, 0.9375]])
    """
    if horizon < 1:
        raise GraphError(f"a horizon of {horizon} steps is none.", suggestion="predict(1)")
    at = evaluated(density, values)
    loop = the_loop(at)
    graph = extended(at.graph, loop.axis, horizon)
    later = Evaluated(graph, tuple(loops(graph)), replace(at.ends, graph=graph, counts={}), at.compiled)
    inside = {n for n, x in later.sites.items() if x is not None and x[0].axis == loop.axis}
    wanted = [n for n in later.chosen(sites) if sites is not None or n in inside]
    for n in wanted:
        if n not in inside:
            raise GraphError(f"{n!r} stands in no time loop: it has no future.", suggestion="smooth()")
    found = smooth_at(later, wanted)

    def make(site: str) -> Labelled:
        x = found[site]
        plates = list(x.dims[1:-1])
        mask = at.ends.steps(loop, frozenset(plates))
        steps = len(loop.labels) if mask is None else mask.aligned([*plates, loop.axis]).sum(-1)
        # Position of the last observation of each member, counted where the site's own series starts.
        offset = len(loop.labels) + horizon - x.values.shape[0]
        shape = [horizon, *x.values.shape[1:]]
        ahead = torch.arange(horizon).reshape([-1, *(1 for _ in plates)])
        index = (ahead + steps - offset).unsqueeze(-1).expand(shape)
        return Labelled(site, x.values.gather(0, index), (AHEAD, *plates, STATE), {AHEAD: tuple(range(1, horizon + 1))})

    return later.answers("states ahead", wanted, make)


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
        raise GraphError(
            f"the probabilities of {f.name!r} change over time, and their future is not known.",
            suggestion="give the program longer data: future covariates, and observations that are masked",
        )
    if axis not in names:
        names, data = [axis, *names], data.expand([length, *data.shape])
    place = names.index(axis)
    future = data.new_zeros([steps if i == place else n for i, n in enumerate(data.shape)])
    data = torch.cat([data, future], place)
    return replace(f, term=Term(data, OrderedDict((n, Bint[s]) for n, s in zip(names, data.shape, strict=True))))

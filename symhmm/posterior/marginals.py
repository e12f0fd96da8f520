"""Marginals: posterior probabilities of states as derivatives of the log-density with respect to added zeros."""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from funsor.domains import Bint
from funsor.tensor import Tensor as Term
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.lower import Named, lower
from symhmm.compiler.plan import plan
from symhmm.errors import GraphError
from symhmm.graph import ChainVariable, Factor, FactorGraph
from symhmm.posterior.evaluated import Evaluated, Values, evaluated
from symhmm.tables.states import STATE, Answers, Labelled

FROM, TO = "from", "to"


def smooth(density: Density, values: Values, sites: Iterable[str] | None = None) -> Answers:
    """Posterior probabilities of each discrete latent given all data: p(z_t | y), and those of discrete effects.

    The derivative of the log-density with respect to an added log-factor of zeros is the posterior probability of the
    states it distinguishes, so that all marginals of all latents cost one backward pass.

    Args:
        values: constrained parameters and continuous latents.
        sites: ``z_{time}`` for all steps of a loop, or names outside of loops; all of them if None.

    Returns:
        for each site (time, *plates, states), probabilities; the first steps of a loop are joined with the others.

    Raises:
        GraphError: the program has no such discrete latent, or none at all.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Bernoulli(0.5))
    ...     pyro.sample("y", dist.Bernoulli(torch.tensor([0.2, 0.6])[z.long()]), obs=torch.tensor(1.0))
    >>> smooth(symhmm.compile(model), {})["z"].values
    tensor([0.2500, 0.7500])
    """
    at = evaluated(density, values)
    return smooth_at(at, at.chosen(sites))


def smooth_at(at: Evaluated, wanted: Iterable[str]) -> Answers:
    """`smooth` for a graph at values."""
    wanted = list(wanted)
    probes = {n: probe(at.graph, n, at.graph.variables[n].frames, (n,)) for site in wanted for n in at.names(site)}
    found = derivatives(at, probes)
    parts = {n: Named(normalised(x.data, 1), [*x.names[:-1], STATE]) for n, x in found.items()}
    return at.answers("smoothed states", wanted, lambda site: at.joined(site, parts, (STATE,)))


def pairwise(density: Density, values: Values, sites: Iterable[str] | None = None) -> Answers:
    """Posterior probabilities of two successive states, p(z_{t-1}, z_t | y).

    Returns:
        for each site of a loop (time, *plates, from, to), from its second step on; all pairs of a step sum to one.

    Raises:
        GraphError: the program has no such latent in a time loop.
    """
    at = evaluated(density, values)
    wanted = _in_loops(at, sites)
    probes = {n: x for site in wanted for n, x in _pair_probes(at, site).items()}
    found = derivatives(at, probes)
    parts = {n: Named(normalised(x.data, 2), [*x.names[:-2], FROM, TO]) for n, x in found.items()}
    return at.answers("pairs of states", wanted, lambda site: at.joined(site, parts, (FROM, TO)))


def occupancy(density: Density, values: Values, sites: Iterable[str] | None = None) -> Answers:
    """Expected number of steps in each state, given all data: (*plates, states); padding is left out."""
    found = smooth(density, values, sites)
    return Answers("expected steps in each state", {n: _summed(x) for n, x in found.items()})


def transition_counts(density: Density, values: Values, sites: Iterable[str] | None = None) -> Answers:
    """Expected number of moves from each state to each, given all data: (*plates, from, to); padding is left out."""
    found = pairwise(density, values, sites)
    return Answers("expected transitions", {n: _summed(x) for n, x in found.items()})


def derivatives(at: Evaluated, probes: Mapping[str, Factor]) -> dict[str, Named]:
    """Derivative of the log-density with respect to each probe."""
    probed = replace(at.graph, factors=(*at.graph.factors, *probes.values()))
    with torch.enable_grad():
        # The names of the factors say what a plan depends on besides the sizes of the graph.
        key = (len(at.graph.factors), *((f.name, *f.term.inputs.items()) for f in probes.values()))
        total = lower(probed, at.compiled.once(("probed", key), lambda: plan(probed, strategy=at.strategy)))
    if not bool(total.isfinite()):
        raise impossible(at.graph)
    gradients = torch.autograd.grad(total, [f.term.data for f in probes.values()])
    return {n: Named(g, tuple(f.term.inputs)) for (n, f), g in zip(probes.items(), gradients, strict=True)}


def impossible(graph: FactorGraph) -> GraphError:
    """The error for data that no states can explain at the values at hand."""
    bad = []
    for f in graph.factors:
        x = f.term.data.detach()
        states = [i for i, n in enumerate(f.term.inputs) if n in graph.variables]
        best = x.amax(states) if states else x
        if bool(x.isnan().any()) or bool((best == -torch.inf).any()):
            bad.append(f.name)
    return GraphError(
        "no states can explain the data at these values: the log-density is not finite.",
        details=[f"impossible or NaN: {', '.join(bad)}"] if bad else [],
        suggestion="density.nonfinite_sites(values), and other values",
    )


def _in_loops(at: Evaluated, sites: Iterable[str] | None) -> list[str]:
    known = at.sites
    free = {v.current for c in at.graph.chains.values() for v in c.variables if not v.previous}
    long = [n for n, x in known.items() if x is not None and len(set(x[1].names)) > 1 and n not in free]
    wanted = [n for n in at.chosen(sites) if sites is not None or n in long]
    for n in wanted:
        if known[n] is None:
            raise GraphError(f"{n!r} stands in no time loop: it has no pairs of successive states.")
    if not wanted:
        raise GraphError("the program has no discrete latent in a time loop.", suggestion="smooth() for the others")
    return wanted


def probe(graph: FactorGraph, name: str, frames: Iterable[str], variables: tuple[str, ...]) -> Factor:
    """A factor of zeros over some frames and variables, which are its last inputs."""
    sizes = {p: graph.plates[p].size if p in graph.plates else graph.chains[p].length for p in frames}
    sizes |= {n: graph.variables[n].size for n in variables}
    readers = [f for f in graph.factors if any(n in f.term.inputs for n in variables)]
    dtype = readers[0].term.data.dtype if readers else torch.get_default_dtype()
    data = torch.zeros(tuple(sizes.values()), dtype=dtype, requires_grad=True)
    term = Term(data, OrderedDict((n, Bint[s]) for n, s in sizes.items()))
    return Factor(f"posterior of {name}", term, "factor", tuple(frames), readers[0].scale if readers else 1.0)


def _pair_probes(at: Evaluated, site: str) -> dict[str, Factor]:
    """A probe for each pair of successive names of a site, by the later name."""
    found = at.sites[site]
    assert found is not None
    names = found[1].names
    probes = {}
    for earlier, later in itertools.pairwise(names):
        before, frames = earlier, at.graph.variables[later].frames
        chain = _chain_variable(at.graph, later)
        if chain is not None:
            if not chain.previous:
                raise GraphError(f"the steps of {site!r} are independent: no pair of them is linked.")
            before = chain.previous[-1]
        probes[later] = probe(at.graph, later, frames, (before, later))
    return probes


def _chain_variable(graph: FactorGraph, name: str) -> ChainVariable | None:
    return next((v for c in graph.chains.values() for v in c.variables if v.current == name), None)


def normalised(x: Tensor, dims: int) -> Tensor:
    """Derivatives divided by their sum over the last ``dims`` dimensions."""
    # Subsampling and poutine.scale multiply derivatives, not probabilities.
    total = x.sum(tuple(range(-dims, 0)), keepdim=True)
    return x / total


def _summed(x: Labelled) -> Labelled:
    axis = x.dims[0]
    if axis == STATE or not x.values.dim() or x.name.find("{") < 0:
        return x
    values = x.values
    if x.valid is not None:
        values = values * x.valid.reshape(x.valid.shape + (1,) * (values.dim() - x.valid.dim()))
    labels = {d: v for d, v in x.labels.items() if d != axis}
    return Labelled(x.name, values.sum(0), x.dims[1:], labels)

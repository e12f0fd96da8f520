"""Marginals: posterior probabilities of states as derivatives of the log-density with respect to added zeros."""

import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from math import prod

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
    found = joint_weights(at, {n: (n,) for site in wanted for n in at.names(site)})
    parts = {n: Named(x.data, [STATE if k == n else k for k in x.names]) for n, x in found.items()}
    return at.answers("smoothed states", wanted, lambda site: shares(at.joined(site, parts, (STATE,)), 1))


def pairwise(density: Density, values: Values, sites: Iterable[str] | None = None) -> Answers:
    """Posterior probabilities of two successive states, p(z_{t-1}, z_t | y).

    Returns:
        for each site of a loop (time, *plates, from, to), from its second step on; all pairs of a step sum to one.

    Raises:
        GraphError: the program has no such latent in a time loop.
    """
    at = evaluated(density, values)
    wanted = _in_loops(at, sites)
    pairs = {n: pair for site in wanted for n, pair in _pairs(at, site).items()}
    found = joint_weights(at, pairs)
    parts = {n: _from_to(x, pairs[n]) for n, x in found.items()}
    return at.answers("pairs of states", wanted, lambda site: shares(at.joined(site, parts, (FROM, TO)), 2))


def occupancy(density: Density, values: Values, sites: Iterable[str] | None = None) -> Answers:
    """Expected number of steps in each state, given all data: (*plates, states); padding is left out."""
    found = smooth(density, values, sites)
    return Answers("expected steps in each state", {n: _summed(x) for n, x in found.items()})


def transition_counts(density: Density, values: Values, sites: Iterable[str] | None = None) -> Answers:
    """Expected number of moves from each state to each, given all data: (*plates, from, to); padding is left out."""
    at = evaluated(density, values)
    wanted = _in_loops(at, sites)
    if at.ends.counts:
        return Answers("expected transitions", {n: _summed(x) for n, x in pairwise(density, values, wanted).items()})
    # Where no step is padding, the derivative with respect to a factor that all steps share is their sum.
    axes = frozenset(at.graph.chains)
    pairs = {n: pair for site in wanted for n, pair in _pairs(at, site).items()}
    found = {n: _from_to(x, pairs[n]) for n, x in joint_weights(at, pairs, axes).items()}

    def make(site: str) -> Labelled:
        total: Tensor | float = 0.0
        plates = at.plates(at.names(site)[-1])
        for n in at.names(site):
            if n in found:
                steps = prod(at.size(f) for f in at.graph.variables[n].frames if f in axes)
                moves = found[n].aligned([*plates, FROM, TO])
                total = total + moves * (steps / moves.sum((-2, -1), keepdim=True))
        assert isinstance(total, Tensor)
        return Labelled(site, total, (*plates, FROM, TO))

    return at.answers("expected transitions", wanted, make)


def joint_weights(
    at: Evaluated, wanted: Mapping[str, tuple[str, ...]], summed: Collection[str] = ()
) -> dict[str, Named]:
    """Joint posterior weight of some variables in all frames of the named one: what `shares` makes probabilities.

    Args:
        wanted: by name of a variable, the variables to tell apart.
        summed: time axes over whose steps the weights are summed.
    """
    graph, leaves = at.graph, {}
    for n, variables in wanted.items():
        graph, leaves[n] = watched(graph, n, variables, summed)
    return _gradients(at, graph, leaves)


def derivatives(at: Evaluated, probes: Mapping[str, Factor]) -> dict[str, Named]:
    """Derivative of the log-density with respect to each probe."""
    leaves = {n: Named(f.term.data, tuple(f.term.inputs)) for n, f in probes.items()}
    return _gradients(at, replace(at.graph, factors=(*at.graph.factors, *probes.values())), leaves)


def _gradients(at: Evaluated, graph: FactorGraph, leaves: Mapping[str, Named]) -> dict[str, Named]:
    # The names and inputs of the factors are all that a plan depends on.
    key = tuple((f.name, *f.term.inputs.items()) for f in graph.factors)
    with torch.enable_grad():
        total = lower(graph, at.compiled.once(("probed", key), lambda: plan(graph, strategy=at.strategy)))
    if not bool(total.isfinite()):
        raise impossible(at.graph)
    gradients = torch.autograd.grad(total, [x.data for x in leaves.values()])
    return {n: Named(g, x.names) for (n, x), g in zip(leaves.items(), gradients, strict=True)}


def probe(graph: FactorGraph, name: str, frames: Iterable[str], variables: tuple[str, ...]) -> Factor:
    """A factor of zeros over some frames and variables, which are its last inputs; the zeros take no memory."""
    frames = tuple(frames)
    sizes = {p: graph.plates[p].size if p in graph.plates else graph.chains[p].length for p in frames}
    sizes |= {n: graph.variables[n].size for n in variables}
    readers = [f for f in graph.factors if any(n in f.term.inputs for n in variables)]
    dtype = readers[0].term.data.dtype if readers else torch.get_default_dtype()
    zeros = torch.zeros((), dtype=dtype).expand(tuple(sizes.values())).requires_grad_()
    return Factor(
        f"posterior of {name}", _term(zeros, list(sizes)), "factor", frames, readers[0].scale if readers else 1.0
    )


def watched(
    graph: FactorGraph, name: str, variables: tuple[str, ...], summed: Collection[str] = ()
) -> tuple[FactorGraph, Named]:
    """A graph in which one factor is a leaf for differentiation, over ``variables`` and the frames of ``name``.

    A factor in the same frames is taken as it is or, where it does not depend on all of them, repeated without a copy;
    adding zeros would cost a tensor and a sum of that size. Only where there is none, zeros are added.
    """
    frames = graph.variables[name].frames
    kept = [f for f in frames if f not in summed]
    sizes = {p: graph.plates[p].size if p in graph.plates else graph.chains[p].length for p in kept}
    sizes |= {n: graph.variables[n].size for n in variables}
    fitting = [
        f for f in graph.factors
        if isinstance(f.term, Term) and not f.term.data.requires_grad and f.term.data.is_floating_point()
        and set(f.frames) == set(frames) and set(f.term.inputs) <= set(sizes)
    ]  # fmt: skip
    if not fitting:
        p = probe(graph, name, kept, variables)
        return replace(graph, factors=(*graph.factors, replace(p, frames=frames))), Named(p.term.data, list(sizes))
    best = max(fitting, key=lambda f: len(f.term.inputs))
    names = [*(n for n in sizes if n not in best.term.inputs), *best.term.inputs]
    data = best.term.data.detach()[(None,) * (len(names) - best.term.data.dim())]
    leaf = data.expand([sizes[n] for n in names]).requires_grad_()
    factors = tuple(replace(f, term=_term(leaf, names)) if f is best else f for f in graph.factors)
    return replace(graph, factors=factors), Named(leaf, names)


def _term(data: Tensor, names: list[str]) -> Term:
    return Term(data, OrderedDict((n, Bint[s]) for n, s in zip(names, data.shape, strict=True)))


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


def _pairs(at: Evaluated, site: str) -> dict[str, tuple[str, str]]:
    """Each pair of successive names of a site, by the later name."""
    found = at.sites[site]
    assert found is not None
    pairs = {}
    for earlier, later in itertools.pairwise(found[1].names):
        before, chain = earlier, _chain_variable(at.graph, later)
        if chain is not None:
            if not chain.previous:
                raise GraphError(f"the steps of {site!r} are independent: no pair of them is linked.")
            before = chain.previous[-1]
        pairs[later] = (before, later)
    return pairs


def _from_to(x: Named, pair: tuple[str, str]) -> Named:
    new = dict(zip(pair, (FROM, TO), strict=True))
    return Named(x.data, [new.get(n, n) for n in x.names])


def _chain_variable(graph: FactorGraph, name: str) -> ChainVariable | None:
    return next((v for c in graph.chains.values() for v in c.variables if v.current == name), None)


def shares(x: Labelled, dims: int) -> Labelled:
    """Weights, joined into a tensor of their own, divided by their sum over the last ``dims`` dimensions."""
    # Subsampling and poutine.scale multiply derivatives, not probabilities.
    x.values.div_(x.values.sum(tuple(range(-dims, 0)), keepdim=True))
    return x


def _summed(x: Labelled) -> Labelled:
    axis = x.dims[0]
    if axis == STATE or not x.values.dim() or x.name.find("{") < 0:
        return x
    values = x.values
    if x.valid is not None:
        values = values * x.valid.reshape(x.valid.shape + (1,) * (values.dim() - x.valid.dim()))
    labels = {d: v for d, v in x.labels.items() if d != axis}
    return Labelled(x.name, values.sum(0), x.dims[1:], labels)

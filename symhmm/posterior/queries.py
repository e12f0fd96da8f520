"""Queries of a density at given values: posteriors of the discrete latents as derivatives of the log-density."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from funsor.domains import Bint
from funsor.tensor import Tensor as Term
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.lower import lower
from symhmm.compiler.plan import plan
from symhmm.errors import GraphError
from symhmm.graph import Factor, FactorGraph


def marginals(density: Density, values: Mapping[str, Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Posterior probabilities of discrete latents given the data and ``values``.

    The derivative of the log-density with respect to an added log-factor of zeros is the posterior probability of the
    states it distinguishes, so that all marginals cost one backward pass.

    Args:
        values: constrained parameters and continuous latents.
        names: names of the graph (``component``, ``z_0``, ``z_{time}``); all current names by default.

    Returns:
        for each name a tensor of shape (*sizes of its plates and time axes, states), in the order of its frames; the last
        dimension sums to one.

    Raises:
        GraphError: the program has no such discrete latent, or none at all.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Bernoulli(0.5))
    ...     pyro.sample("y", dist.Bernoulli(torch.tensor([0.2, 0.6])[z.long()]), obs=torch.tensor(1.0))
    >>> marginals(symhmm.compile(model), {})["z"]
    tensor([0.2500, 0.7500])
    """
    graph = density.graph_at(values)
    earlier = {n for c in graph.chains.values() for v in c.variables for n in v.previous}
    known = [n for n in graph.variables if n not in earlier]
    wanted = known if names is None else list(names)
    for n in wanted:
        if n not in known:
            raise GraphError(f"there is no discrete latent {n!r}.", details=[f"known: {', '.join(known) or 'none'}"])
    if not wanted:
        raise GraphError("the program has no discrete latents to ask about.")
    probes = {n: _zeros(graph, n) for n in wanted}
    scale = {n: f.scale for f in graph.factors for n in f.inputs}
    factors = [
        Factor(f"posterior of {n}", x, "factor", graph.variables[n].frames, scale.get(n, 1.0))
        for n, x in probes.items()
    ]
    probed = replace(graph, factors=(*graph.factors, *factors))
    with torch.enable_grad():
        total = lower(probed, plan(probed, strategy=density.plan.strategy))
    gradients = torch.autograd.grad(total, [x.data for x in probes.values()])
    return {n: g / g.sum(-1, keepdim=True) for n, g in zip(probes, gradients, strict=True)}


def _zeros(graph: FactorGraph, name: str) -> Term:
    variable = graph.variables[name]
    sizes = {p: graph.plates[p].size if p in graph.plates else graph.chains[p].length for p in variable.frames}
    sizes[name] = variable.size
    dtype = next((f.term.data.dtype for f in graph.factors if name in f.inputs), torch.get_default_dtype())
    data = torch.zeros(tuple(sizes.values()), dtype=dtype, requires_grad=True)
    return Term(data, OrderedDict((n, Bint[s]) for n, s in sizes.items()))

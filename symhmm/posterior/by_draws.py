"""Distribution functions by simulation, for emissions that have none: an observation's place among draws in each state."""

from collections import OrderedDict
from dataclasses import replace

import torch
from funsor.domains import Bint
from funsor.tensor import Tensor as Term
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.errors import ProgramError
from symhmm.graph import FactorGraph
from symhmm.posterior.emissions import Emission, emissions
from symhmm.posterior.evaluated import Evaluated, Values
from symhmm.posterior.forward import data
from symhmm.posterior.series import Loop, at_label

DRAWS = 2000
BLOCK = 2**22  # comparisons at once


def simulated(density: Density, values: Values, at: Evaluated, loop: Loop, site: str, seed: int) -> FactorGraph:
    """The graph in which an observed site has log P(Y <= y) in each state, from draws; a place among ties is drawn, too.

    With r of M draws below the observation and e equal to it, the probability is (r + u (e + 1)) / (M + 1) with a uniform u
    that all states share: exactly uniform if the model is right, whatever M (Smith 1985, and Dunn and Smyth 1996 for ties).

    Raises:
        ProgramError: the site is of several dimensions, or its distribution cannot be rebuilt.
    """
    found = emissions(density, values)
    y = data(density, values)[site]
    axis = loop.axis
    if any(d.startswith("event") for d in y.dims):
        raise ProgramError(
            f"{site!r} has several dimensions: its observations have no order, and no residuals.",
            suggestion="fit.check(statistic) for a number made of them",
        )
    plates = [d for d in y.dims if d in at.graph.plates]
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(y.values.shape, generator=generator, dtype=torch.float64)
    rows = {label: k for k, label in enumerate(y.labels[axis])}
    terms = {}
    for label in loop.labels[: loop.first]:
        name = at_label(site, axis, label)
        if name in found:
            terms[name] = _places(at, found[name], y.values[rows[label]], u[rows[label]], plates, "", seed)
    count = len(loop.labels) - loop.first
    terms[site] = _places(at, found[site], y.values[-count:], u[-count:], plates, axis, seed)
    factors = tuple(replace(f, term=terms[f.name]) if f.name in terms else f for f in at.graph.factors)
    return replace(at.graph, factors=factors)


def _places(at: Evaluated, emission: Emission, y: Tensor, u: Tensor, plates: list[str], axis: str, seed: int) -> Term:
    states = [n for n in emission.names if n in at.graph.variables]
    lead = [*([axis] if axis else []), *plates]
    fn = emission.at(lambda x: x.aligned([*lead, *states]))
    shape = torch.broadcast_shapes(fn.batch_shape, (*y.shape, *(1 for _ in states)))
    value = y.nan_to_num().reshape([*y.shape, *(1 for _ in states)])
    below, equal = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    block = max(1, BLOCK // max(torch.Size(shape).numel(), 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, DRAWS, block):
            x = fn.sample((min(block, DRAWS - start),))
            below += (x < value).sum(0)
            equal += (x == value).sum(0)
    place = (below + u.reshape(value.shape) * (equal + 1)) / (DRAWS + 1)
    sizes = dict(zip([*lead, *states], shape, strict=True))
    return Term(place.log(), OrderedDict((n, Bint[s]) for n, s in sizes.items()))

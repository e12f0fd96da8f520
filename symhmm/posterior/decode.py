"""Decoding: the most probable states, jointly or one by one, and exact draws from their joint posterior."""

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.lower import Named
from symhmm.compiler.plan import plan
from symhmm.compiler.steps import ChainContract, Contract
from symhmm.errors import GraphError
from symhmm.posterior.ends import without_padding
from symhmm.posterior.evaluated import Evaluated, Values, evaluated
from symhmm.posterior.kbest import RANK, best_states, rank_dims
from symhmm.posterior.marginals import impossible, smooth
from symhmm.posterior.traceback import DRAW, Chosen, Contraction, choose, contract
from symhmm.semiring import LOG, MAX
from symhmm.tables.states import STATE, Answers, Labelled

NOWHERE = -1
CHUNK = 2**25  # elements of the largest table while drawing


def viterbi(density: Density, values: Values, sites: Iterable[str] | None = None, *, k: int = 1) -> Answers:
    """The jointly most probable states of all discrete latents given the data: paths and discrete effects together.

    The plan of the density in the max semiring, then backwards along it (Viterbi 1967, on plated graphs). Of equally
    probable states the first is taken. A path ends with the last observation of its member.

    Args:
        values: constrained parameters and continuous latents.
        sites: what to return; the states are those of the joint optimum over all latents in any case.
        k: how many, best first; see `symhmm.posterior.kbest.best_states`. The second best differs from the best in at least
            one latent of one member: for the k best of one member alone ask for its data alone.

    Returns:
        for each site (time, *plates), int64, numbers of states; -1 after the end of a sequence. ``log_prob`` is the
        log-density at these states, nats. With k above 1, (rank, time, *plates) and log-densities (rank,): fewer than k where
        fewer joint states are possible.

    Raises:
        GraphError: there are no discrete latents, no such site, or no states that can explain the data.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Bernoulli(0.4))
    ...     pyro.sample("y", dist.Bernoulli(torch.tensor([0.2, 0.6])[z.long()]), obs=torch.tensor(1.0))
    >>> viterbi(symhmm.compile(model), {})["z"].values
    tensor(1)
    """
    if k < 1:
        raise GraphError(f"there is nothing to look for: k = {k}.", suggestion="k=1")
    at = evaluated(density, values)
    wanted = at.chosen(sites)
    graph = without_padding(at.graph, at.ends, at.loops)
    # A factor of padding may have got a plate as an input that it did not have: such a graph has a plan of its own.
    recipe = plan(graph, strategy=at.strategy) if graph is not at.graph else at.compiled.plan
    if k > 1:
        scores, best = best_states(graph, recipe, k, at.ends)
        if not len(scores):
            raise impossible(at.graph)
        ranked = rank_dims(best)
        out = at.answers("most probable states", wanted, lambda site: _ended(at.joined(site, ranked, (), (RANK,))))
        return Answers(f"the {len(scores)} most probable states", out.items_, scores)
    found = contract(graph, recipe, MAX, at.ends)
    if found.total == -torch.inf or bool(found.total.isnan()):
        raise impossible(at.graph)
    chosen = {n: Named(x.data[0].long(), x.names[1:]) for n, x in choose(found).items()}
    out = at.answers("most probable states", wanted, lambda site: _ended(at.joined(site, chosen, ())))
    return Answers(out.what, out.items_, found.total)


def sample_states(
    density: Density, values: Values, draws: int = 1, *, seed: int = 0, sites: Iterable[str] | None = None
) -> Answers:
    """Exact independent draws from the joint posterior of all discrete latents given the data.

    Forward filtering and backward sampling (Carter and Kohn 1994) along the plan, time reversed: paths, discrete effects
    and everything else together.

    Args:
        values: constrained parameters and continuous latents.
        draws: how many.
        seed: the same seed gives the same draws, whatever the number of threads.
        sites: what to return.

    Returns:
        for each site (draw, time, *plates), numbers of states; -1 after the end of a sequence. Paths are in the smallest
        signed integer type that holds them: ``.long()`` before using them as indices.

    Raises:
        GraphError: there are no discrete latents, no such site, or no states that can explain the data.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Bernoulli(0.5))
    ...     pyro.sample("y", dist.Bernoulli(torch.tensor([0.0, 0.6])[z.long()]), obs=torch.tensor(1.0))
    >>> sample_states(symhmm.compile(model), {}, 3)["z"].values
    tensor([1, 1, 1])
    """
    if draws < 1:
        raise GraphError(f"there is nothing to draw: draws = {draws}.", suggestion="draws=1000")
    at = evaluated(density, values)
    wanted = at.chosen(sites)
    found = contract(at.graph, at.compiled.plan, LOG)
    if not bool(found.total.isfinite()):
        raise impossible(at.graph)
    generator = torch.Generator().manual_seed(seed)
    keep = {n for site in wanted for n in at.names(site)}
    size = max(1, min(draws, CHUNK // _largest(found, at)))
    parts: list[Chosen] = []
    for start in range(0, draws, size):
        chosen = choose(found, min(size, draws - start), generator)
        parts.append({n: x for n, x in chosen.items() if n in keep})
    joined = parts[0]
    if len(parts) > 1:
        joined = {n: Named(torch.cat([p[n].data for p in parts]), x.names) for n, x in joined.items()}
    return at.answers("draws of states", wanted, lambda site: _ended(at.joined(site, joined, (), (DRAW,))))


def posterior_decode(density: Density, values: Values, sites: Iterable[str] | None = None) -> Answers:
    """The most probable state of each step by itself (the largest of `smooth`): fewest wrong states on average.

    Unlike `viterbi`, successive states need not be possible together.
    """
    out = {}
    for site, p in smooth(density, values, sites).items():
        labels = {d: x for d, x in p.labels.items() if d != STATE}
        out[site] = _ended(Labelled(site, p.values.argmax(-1), p.dims[:-1], labels, p.valid))
    return Answers("most probable states, step by step", out)


def _ended(x: Labelled) -> Labelled:
    """The same with -1 after the end of each sequence."""
    if x.valid is None:
        return x
    values: Tensor = torch.where(x.valid, x.values, torch.tensor(NOWHERE, dtype=x.values.dtype))
    return Labelled(x.name, values, x.dims, x.labels, x.valid)


def _largest(found: Contraction, at: Evaluated) -> int:
    """Elements per draw of the largest table that a traceback makes."""
    sizes = [1]
    for step in found.plan.steps:
        members = prod(at.size(f) for f in step.result.frames)
        if isinstance(step, Contract) and step.variables:
            sizes.append(members * prod(at.graph.variables[v].size for v in step.variables))
        elif isinstance(step, ChainContract):
            sizes.append(members)
    return max(sizes)

"""Prefixes: a graph contracted up to each step of a time loop at once, for filters and one-step-ahead predictions.

A chain becomes a forward filter, which starts from what the rest of the plan says about its initial states, and the time
axis stays in every result that depends on it; the rest of the plan runs as it does for the whole data.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from funsor.tensor import Tensor as Term
from torch import Tensor

from symhmm.chains.operator import chain_message, staged_message
from symhmm.compiler.density import Density
from symhmm.compiler.lower import Named, stage_terms
from symhmm.compiler.plan import plan
from symhmm.compiler.steps import ChainContract, Contract, Plan, PlateProduct
from symhmm.errors import GraphError
from symhmm.graph import Factor, FactorGraph
from symhmm.posterior.evaluated import Evaluated, Values, evaluated
from symhmm.posterior.marginals import impossible, shares, watched
from symhmm.posterior.series import Loop
from symhmm.posterior.traceback import chain_tables, multiply, plate_product, staged_tables, sum_out
from symhmm.semiring import LOG
from symhmm.tables.states import STATE, Answers, Labelled

Pair = tuple[Named, Named]


@dataclass(frozen=True)
class Waiting:
    """A chain that has not run: terms of the past and of the last step, and what comes before it."""

    step: ChainContract
    past: Mapping[int, Named]
    last: Mapping[int, Named]


def filtered(density: Density, values: Values, sites: Iterable[str] | None = None, *, ahead: bool = False) -> Answers:
    """Probabilities of the states of each step given the data up to it, p(z_t | y_1..y_t).

    Data outside of the loop count in full; effects shared by several individuals are learned from the same steps of all.

    Args:
        values: constrained parameters and continuous latents.
        sites: discrete latents of time loops; all of them if None.
        ahead: leave out the step's own data: one-step-ahead predictions p(z_t | y_1..y_{t-1}).

    Returns:
        for each site (time, *plates, states).

    Raises:
        GraphError: the program has no such latent in a time loop, or the loop is not vectorised.
        IntractableError: the states of two loops depend on each other.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> def model():
    ...     z = torch.tensor(0)
    ...     for t in pyro.markov(range(3)):
    ...         z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.5, 0.5], [0.0, 1.0]])[z]))
    >>> filtered(symhmm.compile(model), {})["z_{time}"].values
    tensor([[0.5000, 0.5000],
            [0.2500, 0.7500],
            [0.1250, 0.8750]])
    """
    at = evaluated(density, values)
    known = at.sites
    wanted = [n for n in at.chosen(sites) if sites is not None or known[n] is not None]
    if not wanted:
        raise GraphError("the program has no discrete latent in a time loop.", suggestion="smooth() for the others")
    parts: dict[str, Named] = {}
    for site in wanted:
        found = known[site]
        if found is None:
            raise GraphError(f"{site!r} stands in no time loop.", suggestion="smooth() for latents outside of loops")
        loop = vectorised(found[0])
        for name in found[1].names:
            with torch.enable_grad():
                final, p = watched(without_data(at.graph, loop) if ahead else at.graph, name, (name,))
                total = up_to(at, loop, final, loop.position(name))
                if not bool(total.data.isfinite().all()):
                    raise impossible(at.graph)
                (g,) = torch.autograd.grad(total.data.sum(), p.data)
            parts[name] = Named(g, [STATE if n == name else n for n in p.names])
    what = "one-step-ahead states" if ahead else "filtered states"
    return at.answers(what, wanted, lambda site: shares(at.joined(site, parts, (STATE,)), 1))


def step_log_likelihood(density: Density, values: Values, plates: Sequence[str] = ()) -> Labelled:
    """One-step-ahead log-likelihood log p(y_t | y_1..y_{t-1}) of each step of the program's time loop, nats.

    Args:
        plates: whose members are kept apart; their terms add up to the log-likelihood of each member.

    Returns:
        (time, *plates); the sum over time is the log-likelihood of what depends on the loop.

    Raises:
        GraphError: there is no time loop, or there are several.
        IntractableError: members of the plates are coupled by a discrete latent outside.
    """
    at = evaluated(density, values)
    loop = the_loop(at)
    totals = [up_to(at, loop, at.graph, step, plates) for step in [-1, *range(loop.first), slice(loop.first, None)]]
    names = [loop.axis, *plates]
    shape = [at.size(p) for p in plates]
    rows = [x.aligned(names) for x in totals]
    running = torch.cat([x.expand([x.shape[0], *shape]) for x in rows])
    return Labelled("log-likelihood", running.diff(dim=0), tuple(names), {loop.axis: loop.labels})


def the_loop(at: Evaluated) -> Loop:
    """The only time loop of a program."""
    found = at.loops
    if len(found) != 1:
        raise GraphError(
            f"the program has {len(found)} time loops, wanted one.",
            details=[f"loops: {', '.join(f'{n}: {x.tier}' for n, x in at.graph.loops.items()) or 'none'}"],
        )
    return vectorised(found[0])


def vectorised(loop: Loop) -> Loop:
    """The loop itself, if its steps stand on a time axis."""
    if loop.first == len(loop.labels):
        raise GraphError(
            f"the loop {loop.axis!r} was captured step by step and left unrolled: its prefixes are not available.",
            suggestion="print(density.graph) shows the reason",
        )
    return loop


def up_to(
    at: Evaluated, loop: Loop, final: FactorGraph, step: "int | slice | None", plates: Sequence[str] = ()
) -> Named:
    """Log-density of the data before each step, times the terms of ``final`` at the step itself.

    Args:
        final: the graph with other terms in the loop, perhaps with more factors.
        step: one of the first steps (-1 for nothing of the loop), or the slice of all steps on the axis.
    """
    past = {f.name: f for f in at.graph.factors}
    chosen: list[tuple[Factor, Factor]] = []
    for f in final.factors:
        where = loop.position(f.name) if f.name in past else step
        if where is None:
            chosen.append((f, f))
        elif isinstance(step, slice):
            before = past.get(f.name, zeroed(f))
            # The first steps are past data of every step on the axis.
            chosen.append((before, f) if isinstance(where, slice) else (before, before))
        elif isinstance(where, int) and step is not None and where <= step:
            chosen.append((f, f) if where == step else (past[f.name], past[f.name]))
    graph = replace(final, factors=tuple(f for _, f in chosen))
    if isinstance(step, slice):
        recipe = plan(graph, keep=plates)
        return _run([_pair(a, b) for a, b in chosen], recipe, loop.axis, at.size(loop.axis))
    variables = {n: v for n, v in graph.variables.items() if loop.axis not in v.frames}
    graph = replace(graph, variables=variables, chains={a: c for a, c in graph.chains.items() if a != loop.axis})
    recipe = plan(graph, keep=plates)
    return _run([_pair(b, b) for _, b in chosen], recipe, "", 0)


def _run(pairs: list[Pair], recipe: Plan, axis: str, length: int) -> Named:
    """Contract terms of the past and of the last step side by side; the time axis stays."""
    terms: dict[int, Pair] = {o.index: p for o, p in zip(recipe.operands, pairs, strict=True)}
    waiting: dict[int, Waiting] = {}
    for step in recipe.steps:
        chains = [waiting.pop(i) for i in step.operands if i in waiting]
        others = [terms[i] for i in step.operands if i in terms]
        if len(chains) == 1 and isinstance(step, Contract) and _joins(chains[0], step, others, axis):
            x = _started(chains[0], step, [past for past, _ in others])
            terms[step.result.index] = (x, x)
            continue
        for chain in chains:
            x = _from_each_state(chain)
            terms[chain.step.result.index] = (x, x)
        parts = [terms[i] for i in step.operands]
        match step:
            case Contract():
                result = _both(parts, partial(sum_out, variables=step.variables, semiring=LOG))
            case PlateProduct():
                inner = replace(step, plates=tuple(p for p in step.plates if p[0] != axis))
                result = _both(parts, partial(_members, step=inner, frames=step.result.frames))
                if len(inner.plates) < len(step.plates):
                    scale = next(s for p, _, s in step.plates if p == axis)
                    result = _cumulated(result, axis, length, scale)
            case ChainContract():
                past = {i: terms[i][0] for i in step.operands}
                if step.axis == axis:
                    waiting[step.result.index] = Waiting(step, past, {i: terms[i][1] for i in step.operands})
                    continue
                x = _whole_chain(past, step)
                result = (x, x)
        terms[step.result.index] = result
    for index, chain in waiting.items():
        x = _from_each_state(chain)
        terms[index] = (x, x)
    outputs = [Named(terms[i][1].data * scale, terms[i][1].names) for i, scale in recipe.outputs]
    names = list(dict.fromkeys([*([axis] if axis else []), *(n for x in outputs for n in x.names)]))
    if not outputs:
        return Named(torch.zeros([length or 1]), [axis])
    data = multiply(outputs, names)
    return Named(data.expand([length, *data.shape[1:]]) if axis else data, names)


def _both(parts: list[Pair], f: Callable[[Sequence[Named]], Named]) -> Pair:
    past = f([a for a, _ in parts])
    return past, past if all(a is b for a, b in parts) else f([b for _, b in parts])


def _members(parts: Sequence[Named], step: PlateProduct, frames: frozenset[str]) -> Named:
    return plate_product(parts[0], step, frames)


def _cumulated(pair: Pair, axis: str, length: int, scale: float) -> Pair:
    """Sum over the steps before each step, and the last one's own term."""
    names = list(dict.fromkeys([*pair[0].names, *pair[1].names, axis]))
    past, last = (x.aligned(names) for x in pair)
    dim = names.index(axis)
    past = past.expand([*past.shape[:dim], length, *past.shape[dim + 1 :]])
    before = past.cumsum(dim).narrow(dim, 0, length - 1)
    before = torch.cat([torch.zeros_like(past.narrow(dim, 0, 1)), before], dim)
    result = Named((before + last) * scale, names)
    return result, result


def _whole_chain(terms: Mapping[int, Named], step: ChainContract) -> Named:
    if step.stages:
        message = staged_message(*stage_terms(terms, step), step.length, step.stages)
    else:
        transition, emission = chain_tables(terms, step)
        message = chain_message(
            transition, emission, length=step.length, history=step.history, strategy=step.strategy
        )  # fmt: skip
    names = [*step.batch, *(n for names in step.initial for n in names)]
    return Named(message.reshape([step.result.inputs[n] for n in names]), names)


def _joins(chain: Waiting, step: Contract, others: list[Pair], axis: str) -> bool:
    """Whether a step sums out all that comes before a chain, and nothing else in it depends on time."""
    initial = {n for names in chain.step.initial for n in names}
    return initial <= set(step.variables) and all(a is b and axis not in a.names for a, b in others)


def _started(chain: Waiting, step: Contract, others: Sequence[Named]) -> Named:
    """A chain from the distribution of its initial states that the other operands of a step make."""
    initial = [n for names in chain.step.initial for n in names]
    extra = [n for n in dict.fromkeys(n for x in others for n in x.names) if n not in (*chain.step.batch, *initial)]
    sizes = [chain.step.result.inputs[n] for n in initial]
    names = [*chain.step.batch, *extra, *initial]
    start = multiply(others, names) if others else torch.zeros([1] * len(names))
    lead = start.shape[: len(names) - len(initial)]
    start = start.expand(*lead, *sizes).reshape(*lead, -1)
    found = _weights(chain, start, len(extra))
    whole = Named(found, [*chain.step.batch, *extra, chain.step.axis])
    rest = [n for n in step.variables if n not in initial]
    return sum_out([whole], rest, LOG) if rest else whole


def _from_each_state(chain: Waiting) -> Named:
    """A chain from each of its initial states: (*batch, initial states, time)."""
    step = chain.step
    initial = [n for names in step.initial for n in names]
    sizes = [step.result.inputs[n] for n in initial]
    unit = torch.eye(torch.Size(sizes).numel(), dtype=torch.float64).log()
    found = _weights(chain, unit[(None,) * len(step.batch)], 1)
    shape = [*(step.result.inputs[n] for n in step.batch), *sizes, step.length]
    return Named(found.expand([*shape[: len(step.batch)], *found.shape[-2:]]).reshape(shape),
                 [*step.batch, *initial, step.axis])  # fmt: skip


def _weights(chain: Waiting, start: Tensor, extra: int) -> Tensor:
    """Weight of the paths up to each step; ``extra`` dimensions of ``start`` after the batch are not the chain's own."""
    # numba takes a second to import.
    from symhmm.chains.filters import prefix_weights
    from symhmm.chains.staged_filters import staged_prefix_weights

    step = chain.step
    place = (slice(None),) * len(step.batch) + (None,) * extra
    if step.stages:
        f, e, now_f, now_e = (x[place] for terms in (chain.past, chain.last) for x in staged_tables(terms, step))
        return staged_prefix_weights(start, f, e, now_f, now_e, step.length, step.stages)

    def tables(terms: Mapping[int, Named]) -> tuple[Tensor, Tensor]:
        transition, emission = chain_tables(terms, step)
        if emission is None:
            emission = transition.new_zeros([1] * len(step.batch) + [1, transition.shape[-1]])
        return transition[place], emission[place]

    return prefix_weights(start, *tables(chain.past), *tables(chain.last), step.length)


def without_data(graph: FactorGraph, loop: Loop) -> FactorGraph:
    """The graph with zeros for all that is observed in a loop."""
    return replace(
        graph,
        factors=tuple(
            zeroed(f) if f.role in ("observed", "factor") and loop.position(f.name) is not None else f
            for f in graph.factors
        ),
    )


def zeroed(f: Factor) -> Factor:
    """A factor that says nothing."""
    return replace(f, term=Term(torch.zeros_like(f.term.data, requires_grad=False), OrderedDict(f.term.inputs)))


def _pair(past: Factor, last: Factor) -> Pair:
    first = Named.from_funsor(past.term, past.name)
    return first, first if past is last else Named.from_funsor(last.term, last.name)

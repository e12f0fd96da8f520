"""Traceback: a contraction run forwards with all its terms kept, then backwards, choosing what each step summed out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from symhmm.chains.stages import joined
from symhmm.compiler.lower import Named, stage_terms
from symhmm.compiler.steps import ChainContract, Contract, Plan, PlateProduct
from symhmm.errors import GraphError
from symhmm.graph import FactorGraph
from symhmm.posterior.ends import Ends
from symhmm.semiring import LOG, MAX, Semiring

if TYPE_CHECKING:
    from symhmm.chains.paths import Choices, Messages
    from symhmm.chains.staged_paths import StagedChoices, StagedMessages

    Kept = Choices | Messages | StagedChoices | StagedMessages

DRAW = "draw"
Chosen = dict[str, Named]


@dataclass(frozen=True)
class Contraction:
    """A factor graph contracted in a semiring, with every term that the contraction met.

    Args:
        terms: by index of the plan's operands.
        chains: messages or choices of all steps of each chain, by index of the operand that its step makes.
        total: nats, shape ().
    """

    graph: FactorGraph
    plan: Plan
    semiring: Semiring
    terms: Mapping[int, Named]
    chains: Mapping[int, "Kept"]
    total: Tensor


def contract(graph: FactorGraph, plan: Plan, semiring: Semiring = LOG, ends: Ends | None = None) -> Contraction:
    """Run the steps of ``plan`` and keep all terms.

    Args:
        graph: terms in nats; ``plan`` was made from it and keeps no plate.
        semiring: `LOG` to draw from the posterior, `MAX` for the most probable states.
        ends: where the loops of each member of a plate end; later steps are left out.
    """
    terms = {o.index: Named.from_funsor(f.term, f.name) for o, f in zip(plan.operands, graph.factors, strict=True)}
    chains: dict[int, Kept] = {}
    for step in plan.steps:
        parts = [terms[i] for i in step.operands]
        match step:
            case Contract():
                terms[step.result.index] = sum_out(parts, step.variables, semiring)
            case PlateProduct():
                terms[step.result.index] = plate_product(parts[0], step, step.result.frames, ends)
            case ChainContract():
                terms[step.result.index], chains[step.result.index] = _chain(terms, step, semiring, ends)
    outputs = [terms[i].data * scale for i, scale in plan.outputs]
    total = torch.stack([x.to(torch.float64) for x in outputs]).sum() if outputs else torch.zeros(())
    return Contraction(graph, plan, semiring, terms, chains, total)


def choose(found: Contraction, draws: int = 1, generator: torch.Generator | None = None) -> Chosen:
    """States of all discrete variables: the most probable ones jointly, or exact draws from their joint posterior.

    Walks the steps of the plan backwards. What a step summed out is chosen given what has been chosen already: its
    operands are sliced there, which leaves a table over its own variables; the members of a plate and the steps of a
    time axis each choose for themselves. A chain runs forwards from its initial state.

    Args:
        found: contracted in `MAX` (``draws`` is 1 then) or in `LOG`.

    Returns:
        by name of the variable: integer tensors named ``draw`` and the variable's plates and time axis.
    """
    sizes = {n: p.size for n, p in found.graph.plates.items()} | {n: c.length for n, c in found.graph.chains.items()}
    sizes[DRAW] = draws
    maximise = found.semiring == MAX
    chosen: Chosen = {}

    def pick(table: Tensor) -> Tensor:
        if maximise:
            return table.argmax(-1)
        # The largest of log-weights with standard Gumbel noise is a draw from them (Gumbel 1954).
        noise = torch.empty_like(table).exponential_(generator=generator).log_()
        return (table - noise).argmax(-1)

    for step in reversed(found.plan.steps):
        if isinstance(step, Contract) and step.variables:
            parts = [found.terms[i] for i in step.operands]
            chosen |= _choose_local(parts, step, chosen, sizes, pick)
        elif isinstance(step, ChainContract):
            chosen |= _choose_path(found, step, chosen, sizes, generator)
    return chosen


def sum_out(parts: Sequence[Named], variables: Sequence[str], semiring: Semiring) -> Named:
    """Product of ``parts``, summed over ``variables``; every other name stays."""
    names = list(dict.fromkeys(n for p in parts for n in p.names))
    left = [n for n in names if n not in variables]
    data = multiply(parts, [*left, *variables])
    if variables:
        data = semiring.reduce(data.reshape([*data.shape[: len(left)], -1]), -1)
    return Named(data, left)


def multiply(parts: Sequence[Named], names: Sequence[str]) -> Tensor:
    """Sum of log-terms with dimensions in the order of ``names``."""
    total = parts[0].aligned(names)
    for part in parts[1:]:
        total = total + part.aligned(names)
    return total


def plate_product(part: Named, step: PlateProduct, frames: frozenset[str], ends: Ends | None = None) -> Named:
    """Product over the members of plates; steps of a time axis after the end of a member count as one."""
    factor = 1.0
    for name, size, scale in step.plates:
        factor *= scale
        mask = None if ends is None else ends.running(name, frames | {p for p, _, _ in step.plates})
        if mask is not None:
            names = list(dict.fromkeys([*part.names, *mask.names]))
            part = Named(torch.where(mask.aligned(names), part.aligned(names), 0.0), names)
        if name in part.names:
            dim = part.names.index(name)
            part = Named(part.data.sum(dim), [n for n in part.names if n != name])
        else:
            factor *= size
    return part if factor == 1.0 else Named(part.data * factor, part.names)


def chain_tables(terms: Mapping[int, Named], step: ChainContract) -> tuple[Tensor, Tensor | None]:
    """Transition (*batch, T or 1, S, K) and emission (*batch, T or 1, K) of a chain, batch in the order of the step's."""
    frame = [*step.batch, step.axis]
    states = [step.result.inputs[n] for n in step.initial[-1]]
    one, everything = prod(states), prod(states) ** step.history
    before = [n for names in step.previous for n in names]

    def flat(indices: Sequence[int], names: list[str], sizes: list[int], last: list[int]) -> Tensor:
        data = multiply([terms[i] for i in indices], [*frame, *names])
        lead = list(data.shape[: len(frame)])
        return data.expand([*lead, *sizes]).reshape([*lead, *last])

    transition = flat(step.transition, [*before, *step.current], states * (step.history + 1), [everything, one])
    emission = flat(step.emission, list(step.current), states, [one]) if step.emission else None
    return transition, emission


def staged_tables(terms: Mapping[int, Named], step: ChainContract) -> tuple[Tensor, Tensor]:
    """The same of a chain whose steps go in stages: the factors of all stages (*batch, T or 1, F), and the emission."""
    factors, emission = stage_terms(terms, step)
    transition = joined(factors)
    if emission is None:
        states = prod(step.result.inputs[n] for n in step.initial[-1])
        emission = transition.new_zeros([*(1 for _ in step.batch), 1, states])
    return transition, emission


def _chain(
    terms: Mapping[int, Named], step: ChainContract, semiring: Semiring, ends: Ends | None
) -> tuple[Named, "Kept"]:
    # numba takes a second to import.
    from symhmm.chains.paths import choices, messages
    from symhmm.chains.staged_paths import staged_choices, staged_messages

    found: Kept
    count = ends.stops(step.axis, step.result.frames) if ends is not None and semiring == MAX else None
    stops = None if count is None else count.aligned(step.batch)
    if step.stages:
        tables = *staged_tables(terms, step), step.length, step.stages
        found = staged_choices(*tables, stops) if semiring == MAX else staged_messages(*tables)
    else:
        dense = *chain_tables(terms, step), step.length
        found = choices(*dense, stops) if semiring == MAX else messages(*dense)
    inputs = step.result.inputs
    initial = [n for names in step.initial for n in names]
    names = [*step.batch, *initial]
    message = found.message.expand([*(inputs[n] for n in step.batch), found.message.shape[-1]])
    return Named(message.reshape([inputs[n] for n in names]), names), found


def _choose_local(
    parts: Sequence[Named],
    step: Contract,
    chosen: Chosen,
    sizes: Mapping[str, int],
    pick: Callable[[Tensor], Tensor],
) -> Chosen:
    lead = [DRAW, *sorted(step.result.frames)]
    tables = [given(part, chosen, lead, step.variables) for part in parts]
    states = [next(p.data.shape[p.names.index(v)] for p in parts if v in p.names) for v in step.variables]
    table = tables[0]
    for x in tables[1:]:
        table = table + x
    full = [sizes[n] for n in lead]
    index = pick(table.expand([*full, *states]).reshape([*full, -1]))
    return {v: Named(x, lead) for v, x in zip(step.variables, unravelled(index, states), strict=True)}


def given(part: Named, chosen: Chosen, lead: Sequence[str], variables: Sequence[str]) -> Tensor:
    """A term at the chosen states, with dimensions ``lead`` and then ``variables`` (size 1 where it has none)."""
    order = [*lead, *variables]
    if all(n in order for n in part.names):
        return part.aligned(order)
    index = []
    for name, size in zip(part.names, part.data.shape, strict=True):
        if name in order:
            place = order.index(name)
            index.append(torch.arange(size).reshape([-1 if i == place else 1 for i in range(len(order))]))
        else:
            index.append(_chosen(chosen, name).aligned(order).long())
    return part.data[tuple(index)]


def _choose_path(
    found: Contraction,
    step: ChainContract,
    chosen: Chosen,
    sizes: Mapping[str, int],
    generator: torch.Generator | None,
) -> Chosen:
    from symhmm.chains.paths import Choices, Messages, draw, follow
    from symhmm.chains.staged_paths import StagedChoices, StagedMessages, staged_draw

    inputs = step.result.inputs
    lead = [DRAW, *sorted(step.result.frames)]
    full = [sizes[n] for n in lead]

    def joint(names: Sequence[str]) -> Tensor:
        """Row-major number of the joint value of some names at each draw and member."""
        number = torch.zeros([1] * len(lead), dtype=torch.int64)
        for name in names:
            if name in lead:
                place = lead.index(name)
                value = torch.arange(sizes[name]).reshape([-1 if i == place else 1 for i in range(len(lead))])
            else:
                value = _chosen(chosen, name).aligned(lead).long()
            number = number * inputs[name] + value
        return number.expand(full).reshape(-1).contiguous()

    initial = [n for names in step.initial for n in names]
    rows, start = joint(step.batch), joint(initial)
    match found.chains[step.result.index]:
        case Choices() | StagedChoices() as best:
            paths = follow(best, rows, start)
        case Messages() as chain:
            assert generator is not None
            paths = draw(chain, rows, start, generator)
        case StagedMessages() as staged:
            assert generator is not None
            paths = staged_draw(staged, rows, start, generator)
    states = [inputs[n] for n in step.initial[-1]]
    out: Chosen = {}
    split = unravelled(paths.reshape([*full, step.length]), states)
    read = {n for s in found.plan.steps if isinstance(s, Contract) for i in s.operands for n in found.terms[i].names}
    for member, (name, path) in enumerate(zip(step.current, split, strict=True)):
        out[name] = Named(path, [*lead, step.axis])
        for lag in range(1, step.history + 1):
            earlier = step.previous[-lag][member]
            if earlier in read:
                first = [_chosen(chosen, step.initial[-k][member]).aligned(lead) for k in range(lag, 0, -1)]
                head = torch.stack([x.expand(full).to(path.dtype) for x in first], -1)
                out[earlier] = Named(torch.cat([head, path], -1)[..., : step.length], [*lead, step.axis])
    return out


def unravelled(index: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Row-major coordinates of an index."""
    if len(sizes) == 1:
        return [index]
    out = []
    for size in reversed(sizes):
        out.append(index % size)
        index = index // size
    return out[::-1]


def _chosen(chosen: Chosen, name: str) -> Named:
    if name not in chosen:
        raise GraphError(f"{name!r} is read before it is chosen: it stands in no plate or loop of its readers.")
    return chosen[name]

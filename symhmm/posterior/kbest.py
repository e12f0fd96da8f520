"""The k best joint states: the plan walked with sorted lists of scores instead of scores, then back for each rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from symhmm.compiler.lower import Named
from symhmm.compiler.steps import ChainContract, Contract, Plan, PlateProduct
from symhmm.graph import FactorGraph
from symhmm.posterior.ends import Ends
from symhmm.posterior.traceback import DRAW, Chosen, given, unravelled

RANK = "rank"


@dataclass
class _Walk:
    """Lists of scores of each operand, [*names, rank], and what the way back has chosen so far."""

    graph: FactorGraph
    ends: Ends
    count: int
    lists: dict[int, Named] = field(default_factory=dict)
    chains: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    ranks: dict[int, Named] = field(default_factory=dict)
    chosen: Chosen = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


def best_states(graph: FactorGraph, recipe: Plan, count: int, ends: Ends) -> tuple[Tensor, Chosen]:
    """The ``count`` jointly most probable states of all discrete variables, best first.

    A term keeps for each of its states the sorted list of its best scores (Seshadri and Sundberg 1994, on plated graphs). A
    product of two lists is the best of their sums, a sum over a variable merges lists, and a plate merges those of its
    members in pairs, so that nothing grows beyond ``count``. The way back makes the same choices again for each rank.

    Returns:
        log-densities, shape (found,), nats, where found is at most ``count``: fewer where fewer joint states are possible;
        and states by name of the variable, named ``draw`` (the rank), its plates and its time axis.
    """
    sizes = {n: p.size for n, p in graph.plates.items()} | {n: c.length for n, c in graph.chains.items()}
    walk = _Walk(graph, ends, count, sizes=sizes)
    for o, f in zip(recipe.operands, graph.factors, strict=True):
        x = Named.from_funsor(f.term, f.name)
        walk.lists[o.index] = Named(x.data.detach().double().unsqueeze(-1), [*x.names, RANK])
    # Step 1: forwards.
    for step in recipe.steps:
        match step:
            case Contract():
                names = _names([walk.lists[i] for i in step.operands])
                left = [n for n in names if n not in step.variables]
                table, _ = _product(
                    [walk.lists[i].aligned([*left, *step.variables, RANK]) for i in step.operands], count
                )
                walk.lists[step.result.index] = Named(_best(table.flatten(len(left)), count)[0], [*left, RANK])
            case PlateProduct():
                table, names = _members(walk, step, walk.lists[step.operands[0]], [])
                walk.lists[step.result.index] = Named(_together(table, count)[0], [*names, RANK])
            case ChainContract():
                _chain(walk, step)
    outputs = [walk.lists[i].data * scale for i, scale in recipe.outputs]
    total, ranks = _product(outputs, count) if outputs else (torch.zeros(1), [])
    total = total[total > -torch.inf]
    # Step 2: backwards, all ranks at once.
    walk.sizes[DRAW] = len(total)
    for (i, _), r in zip(recipe.outputs, ranks, strict=True):
        walk.ranks[i] = Named(r[: len(total)], [DRAW])
    for step in reversed(recipe.steps):
        match step:
            case Contract():
                _back_contract(walk, step)
            case PlateProduct():
                _back_members(walk, step)
            case ChainContract():
                _back_chain(walk, step)
    return total, walk.chosen


def _best(lists: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # Equal scores stay in the order of their places, forwards and on the way back.
    values, where = lists.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], where[..., :count]


def _product(parts: Sequence[Tensor], count: int) -> tuple[Tensor, list[Tensor]]:
    """The best sums of lists (..., ranks), and of which entries of each part they are made."""
    total, ranks = parts[0], [torch.arange(parts[0].shape[-1]).expand(parts[0].shape)]
    for part in parts[1:]:
        sums = total.unsqueeze(-1) + part.unsqueeze(-2)
        shape, width = sums.shape[:-2], part.shape[-1]
        total, where = _best(sums.flatten(-2), count)
        first = where // width
        ranks = [r.expand([*shape, r.shape[-1]]).gather(-1, first) for r in ranks] + [where % width]
    return total, ranks


def _together(lists: Tensor, count: int) -> tuple[Tensor, list[tuple[Tensor, Tensor, int]]]:
    """Product over members (..., N, ranks) in pairs, and the choices of each level of pairs."""
    levels: list[tuple[Tensor, Tensor, int]] = []
    if lists.shape[-2] == 0:
        return lists.new_zeros([*lists.shape[:-2], 1]), levels
    while (members := lists.shape[-2]) > 1:
        if members % 2:
            one = torch.full_like(lists[..., :1, :], -torch.inf)
            one[..., 0] = 0.0
            lists = torch.cat([lists, one], -2)
        lists, (a, b) = _product([lists[..., 0::2, :], lists[..., 1::2, :]], count)
        levels.append((a, b, members))
    return lists.squeeze(-2), levels


def _members(walk: _Walk, step: PlateProduct, part: Named, lead: list[str]) -> tuple[Tensor, list[str]]:
    """The lists of all members of a step's plates: (*other names, members, ranks)."""
    plates = [name for name, _, _ in step.plates]
    frames = step.result.frames | set(plates)
    for name in plates:
        mask = walk.ends.running(name, frames)
        if mask is not None:
            names = list(dict.fromkeys([*part.names[:-1], *mask.names, RANK]))
            nothing = torch.full((part.data.shape[-1],), -torch.inf, dtype=part.data.dtype)
            nothing[0] = 0.0
            running = Named(mask.data.unsqueeze(-1), [*mask.names, RANK]).aligned(names)
            part = Named(torch.where(running, part.aligned(names), nothing), names)
    names = lead or [n for n in part.names if n not in plates and n != RANK]
    full = part.aligned([*names, *plates, RANK])
    scale = prod(s for _, _, s in step.plates)
    full = full.expand([*full.shape[: len(names)], *(size for _, size, _ in step.plates), full.shape[-1]])
    return full.flatten(len(names), -2) * scale, names


def _chain(walk: _Walk, step: ChainContract) -> None:
    # numba takes a second to import.
    from symhmm.chains.ranked import ranked_messages

    inputs = step.result.inputs
    frame = [*step.batch, step.axis]
    states = [inputs[n] for n in step.initial[-1]]
    one, before = prod(states), [n for names in step.previous for n in names]

    def flat(indices: Sequence[int], names: list[str], sizes: list[int], last: list[int]) -> Tensor:
        data, _ = _product([walk.lists[i].aligned([*frame, *names, RANK]) for i in indices], walk.count)
        lead, width = data.shape[: len(frame)], data.shape[-1]
        return data.expand([*lead, *sizes, width]).reshape([*lead, *last, width])

    transition = flat(step.transition, [*before, *step.current], states * (step.history + 1), [one**step.history, one])
    emission = flat(step.emission, list(step.current), states, [one]) if step.emission else torch.zeros(1, one, 1)
    if not step.emission:
        emission = emission.double().reshape([*(1 for _ in frame), one, 1])
    stops = walk.ends.stops(step.axis, step.result.frames)
    stop = None if stops is None else stops.aligned(step.batch)
    batch = [inputs[n] for n in step.batch]
    found = ranked_messages(transition, emission, step.length, walk.count, batch, stop)
    initial = [n for names in step.initial for n in names]
    names = [*step.batch, *initial]
    data = found[-1][:, 0].reshape([*(inputs[n] for n in names), walk.count])
    walk.lists[step.result.index] = Named(data, [*names, RANK])
    walk.chains[step.result.index] = found


def _lead(step: Contract | ChainContract | PlateProduct) -> list[str]:
    return [DRAW, *sorted(step.result.frames)]


def _rank_of(walk: _Walk, index: int, lead: Sequence[str]) -> Tensor:
    return walk.ranks[index].aligned(lead).expand([walk.sizes[n] for n in lead])


def _back_contract(walk: _Walk, step: Contract) -> None:
    lead = _lead(step)
    full = [walk.sizes[n] for n in lead]
    parts = [given(walk.lists[i], walk.chosen, lead, [*step.variables, RANK]) for i in step.operands]
    table, ranks = _product(parts, walk.count)
    states = [
        next(x.data.shape[x.names.index(v)] for x in (walk.lists[i] for i in step.operands) if v in x.names)
        for v in step.variables
    ]
    width = table.shape[-1]
    table = table.expand([*full, *states, width]).flatten(len(lead))
    where = _best(table, walk.count)[1].gather(-1, _rank_of(walk, step.result.index, lead).unsqueeze(-1)).squeeze(-1)
    for v, x in zip(step.variables, unravelled(where // width, states), strict=True):
        walk.chosen[v] = Named(x, lead)
    for i, r in zip(step.operands, ranks, strict=True):
        r = r.expand([*full, *states, width]).flatten(len(lead))
        walk.ranks[i] = Named(r.gather(-1, where.unsqueeze(-1)).squeeze(-1), lead)


def _back_members(walk: _Walk, step: PlateProduct) -> None:
    lead, plates = _lead(step), [name for name, _, _ in step.plates]
    part = Named(given(walk.lists[step.operands[0]], walk.chosen, lead, [*plates, RANK]), [*lead, *plates, RANK])
    table, _ = _members(walk, step, part, lead)
    _, levels = _together(table, walk.count)
    full = [walk.sizes[n] for n in lead]
    rank = _rank_of(walk, step.result.index, lead).unsqueeze(-1)
    for a, b, members in reversed(levels):
        both = [x.expand([*full, *x.shape[-2:]]).gather(-1, rank.unsqueeze(-1)).squeeze(-1) for x in (a, b)]
        rank = torch.stack(both, -1).flatten(-2)[..., :members]
    rank = rank.reshape([*full, *(size for _, size, _ in step.plates)])
    walk.ranks[step.operands[0]] = Named(rank, [*lead, *plates])


def _back_chain(walk: _Walk, step: ChainContract) -> None:
    from symhmm.chains.ranked import ranked_follow

    inputs, lead = step.result.inputs, _lead(step)
    full = [walk.sizes[n] for n in lead]

    def joint(names: Sequence[str]) -> Tensor:
        number = torch.zeros([1] * len(lead), dtype=torch.int64)
        for name in names:
            if name in lead:
                value = torch.arange(walk.sizes[name]).reshape([-1 if n == name else 1 for n in lead])
            else:
                value = walk.chosen[name].aligned(lead).long()
            number = number * inputs[name] + value
        return number.expand(full).reshape(-1).contiguous()

    initial = [n for names in step.initial for n in names]
    rank = _rank_of(walk, step.result.index, lead).reshape(-1).contiguous()
    found = ranked_follow(walk.chains[step.result.index], joint(step.batch), joint(initial), rank)
    paths, t_ranks, e_ranks = (x.reshape([*full, step.length]) for x in found)
    over = [*lead, step.axis]
    split = unravelled(paths, [inputs[n] for n in step.initial[-1]])
    for member, (name, path) in enumerate(zip(step.current, split, strict=True)):
        walk.chosen[name] = Named(path, over)
        for lag in range(1, step.history + 1):
            first = [walk.chosen[step.initial[-k][member]].aligned(lead).expand(full) for k in range(lag, 0, -1)]
            earlier = torch.cat([torch.stack(first, -1), path], -1)[..., : step.length]
            walk.chosen[step.previous[-lag][member]] = Named(earlier, over)
    for indices, r in ((step.transition, t_ranks), (step.emission, e_ranks)):
        if not indices:
            continue
        parts = [given(walk.lists[i], walk.chosen, over, [RANK]) for i in indices]
        table, ranks = _product(parts, walk.count)
        for i, own in zip(indices, ranks, strict=True):
            own = own.expand([*full, step.length, table.shape[-1]])
            walk.ranks[i] = Named(own.gather(-1, r.unsqueeze(-1)).squeeze(-1), over)


def _names(parts: Sequence[Named]) -> list[str]:
    return [n for n in dict.fromkeys(n for p in parts for n in p.names) if n != RANK]


def rank_dims(found: Mapping[str, Named]) -> Chosen:
    """The same with a dimension called rank instead of draw."""
    return {n: Named(x.data.long(), [RANK if d == DRAW else d for d in x.names]) for n, x in found.items()}

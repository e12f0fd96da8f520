"""Orders: by what the states of a model are numbered, and how each of its values moves with them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from symhmm.models.inputs import Block, Bound
from symhmm.models.template import corr_name, correlated, effect_name, sd_name
from symhmm.reorder import Move


def new_order(bound: Bound, values: Mapping[str, Tensor], by: str | None) -> Tensor | None:
    """States sorted by the mean of a parameter; None where they are not alike before the fit, and so have their own names.

    They are not alike where single states or moves have formulas of their own, where values are held by state, where
    some states are known, and where a start has a formula.

    Args:
        by: a parameter, or a stream for its first parameter that is fitted; None for the first stream.

    Returns:
        shape (K,), int64: entry k is the state that becomes number k.
    """
    spec = bound.spec
    own = any(len(p.formulas) > 1 for p in spec.predictors) or any(len(v) > 1 for v in spec.fixed.values())
    if own or bound.inputs.states is not None or spec.initial == "formula" or len(spec.states) == 1:
        return None
    by = by or next(iter(spec.emissions))
    known = {p.name: p for p in spec.parameters}
    first = [n for n in known if n == by or (by in spec.emissions and n.rpartition(".")[0] == by and n != f"{by}.zero")]
    if not first:
        return None
    b = bound.blocks[first[0]][0]
    return _level(bound, b, values).argsort(stable=True)


def _level(bound: Bound, b: Block, values: Mapping[str, Tensor]) -> Tensor:
    """One number per state: the value, or the linear predictor at the mean of the covariates."""
    if b.name not in values:
        return torch.zeros(b.shape)
    value = values[b.name].detach()
    if b.design is not None and not b.design.fixed.constant:
        x = bound.inputs.x[b.design.fixed.expr]
        mean = bound.data.gather(
            x if x.dim() == bound.data.mask.dim() + 1 else x.expand(bound.data.num_steps, *x.shape)
        ).mean(0)
        value = value @ mean
    # A categorical stream: its last level's share.
    return value if value.dim() == 1 else value[..., -1]


def moves(bound: Bound, order: Tensor) -> dict[str, Move]:
    """How each value moves when state ``order[k]`` becomes number k, by name."""
    k = len(bound.spec.states)
    out: dict[str, Move] = {}
    if bound.spec.initial == "free":
        out["initial"] = lambda x: x[order] if len(x) == k else x
    for p in bound.spec.predictors:
        for b in bound.blocks[p.name]:
            pairs = p.name == "transitions"
            for name, lead in _names(bound, b):
                out[name] = _pairs(order, lead) if pairs else _rows(order, lead)
    return out


def _names(bound: Bound, b: Block) -> list[tuple[str, int]]:
    """Values of a block, with the number of dimensions before those of its cells."""
    out = [(b.name, 0)]
    for g in b.design.groups if b.design is not None else ():
        lead = 2 if bound.kinds[g.group.name] == "session" else 1
        out += [(sd_name(b, g), 0), (effect_name(b, g), lead)]
        out += [(corr_name(b, g), 0)] if correlated(g) else []
    return out


def _rows(order: Tensor, lead: int) -> Move:
    return lambda x: x.index_select(lead, order)


def _pairs(order: Tensor, lead: int) -> Move:
    """Moves of cells (from, to without staying)."""
    k = len(order)
    place = torch.full((k, k), -1)
    off = ~torch.eye(k, dtype=torch.bool)
    place[off] = torch.arange(k * (k - 1))
    chosen = place[order][:, order][off]

    def move(x: Tensor) -> Tensor:
        return x.flatten(lead, lead + 1).index_select(lead, chosen).reshape(x.shape)

    return move

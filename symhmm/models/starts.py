"""Starting values and priors: streams clustered by k-means on ranks, and moments within the clusters."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from symhmm.models.clusters import Labels, kmeans, means, numbered, ranks
from symhmm.models.emissions import Array
from symhmm.models.inputs import Block, Bound
from symhmm.models.template import corr_name, correlated, sd_name

LEAVE = -2.0  # logit of leaving a state for another, where a fit begins
SPREAD = 0.3  # standard deviation of random effects there, on the scale of a link
OUTCOMES = 0.5  # weight of outcomes beside streams of numbers
TIES = 1e-3  # of the range of ranks


def starting_values(bound: Bound, seed: int = 0, order_by: str | None = None) -> dict[str, Tensor]:
    """Where a fit begins: by parameter, on the scale and in the shape of the program.

    Rows are clustered by k-means on the ranks of all streams (a missing value counts as a middling one, an angle by its
    distance from 0), clusters are put in the order of the means of ``order_by`` (the first stream by default), and each
    family turns a cluster's values into parameters.
    """
    values, spec = _natural(bound, seed, order_by), bound.spec
    out: dict[str, Tensor] = {}
    for p in spec.predictors:
        if p.name == "transitions" and len(spec.states) == 1:
            continue
        for b in bound.blocks[p.name]:
            cells = values[p.name].reshape(-1) if b.shape else values[p.name].reshape(-1)[p.cells.index(b.cells[0])]
            cells = cells.reshape(b.shape)
            if b.design is None:
                out[b.name] = cells
            else:
                out |= _coefficients(bound, b, _linked(cells, b.link))
    if spec.initial == "free":
        out["initial"] = torch.full((len(spec.states),), 1 / len(spec.states), dtype=bound.data.dtype)
    for name, held in spec.fixed.items():
        if len(held) > 1:
            out[name] = torch.tensor(held, dtype=bound.data.dtype)
    return out


def prior_arguments(bound: Bound, start: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Arguments of the default prior of each parameter, weakly informative on the scale of the data.

    Plain positive values: log-normal around the overall value with log-sd 1.5; plain probabilities: Beta(1.5, 1.5), or
    Dirichlet(1); means: normal, three standard deviations wide. Logits and log-scale intercepts: normal with sd 2; slopes:
    sd 2 for one standard deviation of the covariate. Standard deviations of random effects: half-normal of scale 1
    (times the stream's own, on an identity link); correlations: LKJ(2).
    """
    out: dict[str, tuple[Tensor, ...]] = {}
    whole = _overall(bound)
    for p in bound.spec.predictors:
        for b in bound.blocks[p.name]:
            like, unit = start.get(b.name), whole[p.name][1]
            if b.design is None:
                if like is None:
                    continue
                centre = torch.full_like(like, whole[p.name][0])
                one = torch.ones_like(like)
                if p.name == "transitions":
                    out[b.name] = (LEAVE * one, 2 * one)
                elif b.link == "identity":
                    out[b.name] = (centre, 3 * unit * one)
                elif b.link == "log":
                    out[b.name] = (centre.log(), 1.5 * one)
                elif b.link == "logit":
                    out[b.name] = (1.5 * one, 1.5 * one)
                else:
                    out[b.name] = (one,)
                continue
            d = b.design
            if like is not None:
                centre = torch.tensor(LEAVE if p.name == "transitions" else whole[p.name][0], dtype=like.dtype)
                centre = centre if p.link == "softmax" else _linked(centre, b.link)
                loc, scale = torch.zeros_like(like), torch.full_like(like, 2.0 * unit)
                if d.fixed.constant:
                    loc = loc + centre
                else:
                    for i, name in enumerate(d.columns):
                        x = bound.data.gather(_full(bound.inputs.x[d.fixed.expr], bound))[:, i]
                        if name == "Intercept":
                            loc[..., i] = centre
                        else:
                            scale[..., i] = 2.0 * unit / max(float(x.std()), 1e-6)
                out[b.name] = (loc, scale)
            for g in d.groups:
                sd = start[sd_name(b, g)]
                out[sd_name(b, g)] = (torch.full_like(sd, unit),)
                if correlated(g):
                    out[corr_name(b, g)] = (sd.shape[-1], torch.full_like(sd[..., 0], 2.0))  # type: ignore[assignment]
    if "initial" in start and bound.spec.initial == "free":
        out["initial"] = (torch.ones_like(start["initial"]),)
    return out


def _overall(bound: Bound) -> dict[str, tuple[float, float]]:
    """Value of each parameter for all rows together, and the unit of its effects: the stream's sd on an identity link."""
    out = {"transitions": (LEAVE, 1.0), "initial": (0.0, 1.0)}
    for stream, family in bound.spec.emissions.items():
        y = _observed(bound, stream)
        for p, value in zip(family.parameters, family.start(y), strict=False):
            unit = max(float(y.std()), 1e-6) if p.link == "identity" and len(y) > 1 else 1.0
            out[f"{stream}.{p.name}"] = (0.0 if p.link == "softmax" else value, unit)
    return out


def _observed(bound: Bound, stream: str) -> Array:
    y: Array = bound.data.streams[stream][bound.data.observed[stream]].double().numpy()
    return y


def _natural(bound: Bound, seed: int, order_by: str | None) -> dict[str, Tensor]:
    """Natural values of all parameters by state, shape of their cells."""
    spec, data = bound.spec, bound.data
    k = len(spec.states)
    label, rows = _clusters(bound, seed)
    streams = list(spec.emissions)
    first = rows[streams.index(order_by if order_by in streams else (order_by or f"{streams[0]}.").rpartition(".")[0])]
    label = numbered(label, means(first, label, k))
    if bound.inputs.states is not None:
        known = data.gather(bound.inputs.states).numpy()
        label = np.where(known >= 0, known, label)
    out = {"transitions": torch.full((k, k - 1), LEAVE), "initial": torch.zeros(max(k - 1, 1))[: k - 1]}
    for (stream, family), y in zip(spec.emissions.items(), rows, strict=True):
        groups = [y[(label == j) & np.isfinite(y)] for j in range(k)]
        groups = [g if len(g) > 2 else y[np.isfinite(y)] for g in groups]
        if family.linked and bound.blocks[f"{stream}.prob"][0].design is not None:
            # Outcomes say little of their state by themselves where inputs explain them.
            groups = [y[np.isfinite(y)]] * k
        if family.name == "categorical":
            shape = bound.blocks[f"{stream}.prob"][0].shape
            levels = shape[-1] + (bound.blocks[f"{stream}.prob"][0].design is not None)
            share = np.stack([np.bincount(g.astype(int), minlength=levels) + 1.0 for g in groups])
            probs = torch.from_numpy(share / share.sum(-1, keepdims=True))
            out[f"{stream}.prob"] = probs if levels == shape[-1] else (probs / probs[:, :1]).log()[:, 1:]
            continue
        found = np.array([family.start(g) for g in groups])
        for i, p in enumerate(family.parameters):
            out[f"{stream}.{p.name}"] = torch.from_numpy(found[:, i].copy())
    return {n: x.to(data.dtype) for n, x in out.items()}


def _clusters(bound: Bound, seed: int) -> tuple[Labels, list[Array]]:
    """Cluster of each row, and the streams' values by row with NaN where missing."""
    data, k = bound.data, len(bound.spec.states)
    rows, features = [], []
    for stream, family in bound.spec.emissions.items():
        y = data.gather(data.streams[stream].double()).numpy().copy()
        y[~data.gather(data.observed[stream]).numpy()] = np.nan
        rows.append(y)
        # Two values fall into two clusters by themselves, whatever the state: they may only second the other streams.
        features.append(ranks(y, family.name) * (OUTCOMES if family.linked else 1.0))
    table = np.stack(features, 1)
    if k == 1:
        return np.zeros(len(table), dtype=np.int64), rows
    # Ties, of a stream with two values say, would leave clusters empty.
    return kmeans(table + TIES * np.random.default_rng(seed).standard_normal(table.shape), k, seed), rows


def _linked(x: Tensor, link: str) -> Tensor:
    """On the scale of a link; softmax cells are logits already."""
    return x.log() if link == "log" else x.logit() if link == "logit" else x


def _coefficients(bound: Bound, b: Block, eta: Tensor) -> dict[str, Tensor]:
    """Coefficients that give ``eta`` in all rows as nearly as they can, and small random effects."""
    d, out = b.design, {}
    assert d is not None
    if d.fixed.constant:
        out[b.name] = eta.clone()
    elif d.columns:
        x = bound.data.gather(_full(bound.inputs.x[d.fixed.expr], bound)).double()
        flat = torch.linalg.lstsq(x, torch.ones(len(x), 1, dtype=x.dtype)).solution[:, 0]
        flat = torch.where(flat.abs() < 1e-9, 0.0, flat)
        out[b.name] = eta[..., None] * flat.to(eta.dtype)
    unit = _overall(bound)[b.name.partition("[")[0]][1]
    for g in d.groups:
        q = len(g.coding.columns)
        shape = b.shape if g.coding.constant else (*b.shape, q)
        out[sd_name(b, g)] = torch.full(shape, SPREAD * unit, dtype=eta.dtype)
        if correlated(g):
            out[corr_name(b, g)] = torch.eye(q, dtype=eta.dtype).expand(*b.shape, q, q).clone()
    return out


def _full(x: Tensor, bound: Bound) -> Tensor:
    """A design with its time axis."""
    shape = bound.data.mask.shape
    return x if x.dim() == len(shape) + 1 else x.expand(shape[0], *x.shape)

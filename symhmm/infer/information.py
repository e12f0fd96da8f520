"""Information: how many observations there are, how sharply they determine the parameters, what lies at an edge."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp, isnan, log, nan, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from symhmm.compiler.density import Density
from symhmm.infer.target import Array, Target
from symhmm.tables.results import label

FLAT = 1e-6  # eigenvalue of the scaled information, relative to the largest, below which a direction counts as flat
RISING = 0.1  # nats that a scale under the edge gains when it falls to a third: less than one observation's worth
Z95 = 1.959963984540054
AT_ZERO = 20.0  # reach on the log scale, e^20 times as much or as little, beyond which an interval says nothing
EDGE = 1e-4  # distance from zero (or a probability from one) that counts as lying at the edge of the support


@dataclass(frozen=True, eq=False)
class Information:
    """Observed information at a point of the unconstrained space.

    Args:
        matrix: shape (n, n), minus the Hessian over the driver's coordinates, by central differences of the exact gradient.
        covariance: shape (m, m), of the free coordinates: its inverse over the directions that are not flat, where tied
            ones move together (m = n where nothing is tied).
        flat: shape (m,), True for coordinates in a flat or rising direction; they have no standard error.
        rank: number of directions that the data determine.
    """

    matrix: Tensor
    covariance: Tensor
    flat: Tensor
    rank: int


def information(goal: Target, vector: Tensor) -> Information:
    """Observed information of the driver's coordinates at ``vector``; costs two gradients for each of them."""
    x = goal.coordinates(vector).double().numpy().copy()
    n = x.size
    # The third root of the rounding error balances it against the curvature of the gradient.
    step = float(torch.finfo(goal.start.dtype).eps) ** (1 / 3)
    matrix = np.empty((n, n))
    for i in range(n):
        h = step * max(1.0, abs(x[i]))
        ahead, behind = x.copy(), x.copy()
        ahead[i], behind[i] = x[i] + h, x[i] - h
        matrix[i] = (goal.evaluate(behind)[1] - goal.evaluate(ahead)[1]) / (ahead[i] - behind[i])
    matrix = (matrix + matrix.T) / 2
    if not np.isfinite(matrix).all():
        m = goal.free.numel()
        return Information(torch.from_numpy(matrix), torch.full((m, m), torch.nan).double(), torch.ones(m).bool(), 0)
    # Scaled to unit diagonal, so that flat means undetermined and not merely measured in small units; a coordinate that
    # gains nothing even when it moves by ten times its own size is not scaled up.
    size = np.sqrt(np.maximum(np.abs(np.diag(matrix)), 1e-2 / np.maximum(1.0, np.abs(x)) ** 2))
    held = _held_at_edge(goal, np.diag(matrix))
    # What lies at an edge stays there: the others have the errors of the model without it.
    inner = np.where(held[:, None] | held, 0.0, matrix / np.outer(size, size))
    roots, directions = np.linalg.eigh(inner)
    good = roots > FLAT * max(roots.max(initial=0.0), FLAT)
    lost = held | (np.abs(directions[:, ~good]) > 0.05).any(axis=1)
    half = directions[:, good] / np.sqrt(roots[good]) / size[:, None]
    spread, flat = torch.from_numpy(half), torch.from_numpy(lost)
    if goal.restriction is not None:
        slopes = torch.func.jacrev(goal.restriction)(torch.from_numpy(x))
        spread, flat = slopes @ spread, ((slopes != 0) & flat).any(-1)
    return Information(torch.from_numpy(matrix), spread @ spread.T, flat, int(good.sum()))


def _held_at_edge(goal: Target, curvature: Array) -> NDArray[np.bool_]:
    """Shape (n,): positive values and probabilities that could as well be at the edge of their support.

    On the logarithm or logit, on which they move, the density is flat there: a standard error is more than `AT_ZERO` of these
    units. This does not depend on the units of the value, and errors of differences along it would only blur the others.
    """
    kinds = {i for e in goal.entries if support(e.constraint) != "other" for i in range(e.start, e.stop)}
    edged = np.array([i in kinds for i in goal.moved.tolist()], dtype=bool)
    for chain in () if goal.restriction is None else goal.restriction.chains:
        edged[chain.numpy()] = False
    return edged & (np.abs(curvature) < (Z95 / AT_ZERO) ** 2)


def standard_errors(goal: Target, vector: Tensor, found: Information) -> dict[str, Tensor]:
    """Standard errors of the constrained values by the delta method, by name; NaN where the information is flat."""
    place = {int(i): k for k, i in enumerate(goal.free)}
    out = {}
    for e in goal.entries:
        where = [place[i] for i in range(e.start, e.stop)]
        free = vector[e.start : e.stop].double()
        jacobian = torch.func.jacrev(lambda u, e=e: e.transform(u.reshape(e.free_shape)).reshape(-1))(free)
        variance = (jacobian @ found.covariance[where][:, where] * jacobian).sum(-1)
        touched = ((jacobian != 0) & found.flat[where]).any(-1)
        se = torch.where(touched, torch.nan, variance.clamp(min=0).sqrt())
        out[e.name] = se.reshape(e.shape)
    return out


def delta(goal: Target, vector: Tensor, found: Information, f: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
    """Standard errors of a function of the constrained values by the delta method; NaN where it meets flat directions."""
    with torch.enable_grad():
        # Tied coordinates are moved one by one here: the covariance knows that they move together.
        x = vector.detach().requires_grad_()
        value = f(goal.values(x))
        rows = [
            torch.autograd.grad(v, x, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            if v.requires_grad
            else torch.zeros_like(x)
            for v in value.reshape(-1)
        ]
    jacobian = torch.stack(rows)[:, goal.free].double()
    variance = (jacobian @ found.covariance * jacobian).sum(-1).clamp(min=0)
    touched = ((jacobian != 0) & found.flat).any(-1)
    return torch.where(touched, torch.nan, variance.sqrt()).reshape(value.shape)


def at_edge(goal: Target, vector: Tensor) -> tuple[str, ...]:
    """Elements that have run to the edge of their support, such as a variance at zero, in words."""
    found = []
    for e in goal.entries:
        kind = support(e.constraint)
        if kind == "other" or e.start == e.stop:
            continue
        value = e.transform(vector[e.start : e.stop].reshape(e.free_shape)).reshape(-1)
        near = (value < EDGE) | (value > 1 - EDGE) if kind == "probability" else value < EDGE
        names = label(e.name, e.shape)
        found += [f"{names[i]} = {value[i].item():.2g}" for i in near.nonzero()[:, 0].tolist()]
    return tuple(found)


def endless(goal: Target, x: Array, gradient: Array, below: float = EDGE**2) -> tuple[str, ...]:
    """Positive elements under ``below`` towards whose zero the log-density still rises, as it does when a state collapses onto
    observations that are all alike. At a variance that is zero in earnest, nothing rises any more.

    Args:
        x, gradient: shape (n,), the driver's coordinates and the gradient there.
    """
    vector = goal.embed(torch.from_numpy(x).to(goal.start.dtype))
    rising = {i for i, g in zip(goal.moved.tolist(), gradient.tolist(), strict=True) if g < -RISING}
    found = []
    for e in goal.entries:
        if support(e.constraint) == "positive" and e.free_shape == e.shape:
            value = e.transform(vector[e.start : e.stop].reshape(e.free_shape)).reshape(-1).tolist()
            names = label(e.name, e.shape)
            found += [names[k] for k, v in enumerate(value) if v < below and e.start + k in rising]
    return tuple(found)


def interval(value: float, se: float, constraint: Constraint) -> tuple[float, float]:
    """95 percent interval that stays inside the support: on the log scale for positive values, logit for probabilities.

    A positive value whose error is many times itself lies at zero: nothing bounds it from above but its profile. The same holds
    without an error for one that `EDGE` counts as zero.

    >>> interval(0.5, 0.1, constraints.unit_interval)
    (0.31..., 0.68...)
    >>> interval(1e-6, 0.1, constraints.positive)
    (0.0, nan)
    """
    kind = support(constraint)
    if kind == "positive" and value > 0:
        reach = Z95 * se / value
        return (
            (0.0, nan) if reach > AT_ZERO or (isnan(se) and value < EDGE) else (value * exp(-reach), value * exp(reach))
        )
    if kind == "probability" and 0 < value < 1:
        middle, reach = log(value / (1 - value)), min(Z95 * se / (value * (1 - value)), 600.0)
        return 1 / (1 + exp(reach - middle)), 1 / (1 + exp(-reach - middle))
    return value - Z95 * se, value + Z95 * se


def support(constraint: Constraint) -> str:
    """``positive``, ``probability`` (between 0 and 1, alone or in a simplex) or ``other``.

    >>> support(constraints.independent(constraints.positive, 1))
    'positive'
    """
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    low, high = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    if constraint is constraints.simplex or (low == 0 and high == 1):
        return "probability"
    return "positive" if low == 0 and high is None else "other"


def count_observations(density: Density) -> int:
    """Number of observed values: elements of the observed sites over plates and time, masked ones left out.

    A masked element is recognised by a log-density of exactly zero in every state.
    """
    total = 0
    graph = density.factors_at(density.initial())
    sizes = {n: p.size for n, p in graph.plates.items()} | {n: c.length for n, c in graph.chains.items()}
    for f in graph.factors:
        if f.role != "observed":
            continue
        names = tuple(f.inputs)
        data = f.term.data if isinstance(f.term.data, Tensor) else torch.as_tensor(f.term.data)
        states = [i for i, n in enumerate(names) if n in graph.variables]
        seen = (data != 0).any(dim=tuple(states)) if states else data != 0
        total += int(seen.sum()) * prod(sizes[p] for p in f.frames if p not in names)
    return total

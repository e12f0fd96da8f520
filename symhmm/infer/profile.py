"""Profile: how far one value can move before the data object, with everything else refitted at each step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from symhmm.compiler.layout import Entry
from symhmm.errors import FitError
from symhmm.infer.information import information, support
from symhmm.infer.lbfgs import ascend
from symhmm.infer.restrict import elementwise, positions
from symhmm.infer.target import Array, Target
from symhmm.tables.results import Table, label

STEP = 0.5  # of the root of twice the fall, between two points of the curve
FAR = 40.0  # logarithm or logit at which a value counts as at the edge of its support; for others, standard errors
LONGEST = 8.0  # step, in the same units
CLOSE = 1e-4  # of the root of twice the fall, within which an end of the interval is found
TOLERANCE = 1e-7  # nats, of each refit
HIGHER = 1e-2  # nats by which a refit may exceed the fit before it is said


@dataclass(frozen=True)
class Profile:
    """The likelihood of one value with all others at their best, and the interval that it gives.

    Args:
        name: of the value, with its element.
        estimate: at the maximum, natural scale.
        low, high: ends of the interval, natural scale; the edge of the support where the likelihood does not fall enough.
        level: of confidence.
        curve: ``value`` and ``fall``, nats below the maximum, in the order of the values.
        zero: for a value with zero at its edge, the probability of as large a fall there if it were zero: half that of
            chi-squared with one degree of freedom (Self and Liang 1987); None where the likelihood is nil at the edge.
        remark: what is wrong with the fit or the interval, empty if nothing.

    >>> Profile("sd", 1.0, 0.8, 1.3, 0.95, Table(("value", "fall"), ()))
    sd = 1, 95% interval 0.8 to 1.3 by profile likelihood
    """

    name: str
    estimate: float
    low: float
    high: float
    level: float
    curve: Table
    zero: float | None = None
    remark: str = ""

    def __repr__(self) -> str:
        zero = "" if self.zero is None else f"; zero has p = {self.zero:.2g}"
        remark = f" ({self.remark})" if self.remark else ""
        interval = f"{self.level:.0%} interval {self.low:.4g} to {self.high:.4g}"
        return f"{self.name} = {self.estimate:.4g}, {interval} by profile likelihood{zero}{remark}"


def profile(goal: Target, name: str, *, level: float = 0.95) -> Profile:
    """Profile likelihood of one value at the maximum where ``goal`` starts (Venzon and Moolgavkar 1988).

    The value is moved on the scale on which it is free (the logarithm of a positive value, the logit of a probability), away
    from the estimate in both directions, and the others follow, in the metric of the information at the maximum. An end of
    the interval is where the log-density has fallen by half the chi-squared quantile, 1.92 nats at 95 percent. The interval
    does not depend on the scale, and stays inside the support.

    Args:
        goal: started at a maximum; fixed, tied and ordered values stay so.
        name: of one value: ``"sd"``, ``"loc[0]"``, ``"rows[0, 1]"`` (an element of a simplex is one, too).

    Raises:
        FitError: no such value, several, one that is fixed or ordered, or a level outside of (0, 1).
    """
    if not 0 < level < 1:
        raise FitError(f"level={level} is no probability.", suggestion="level=0.95")
    path = _path(goal, name)
    wanted = NormalDist().inv_cdf((1 + level) / 2)
    top = goal.evaluate(goal.x)[0]
    if not math.isfinite(top):
        raise FitError(
            "the log-density is not finite at the estimate: there is no profile.",
            suggestion="fit.status, and another start",
        )
    refit = _refits(goal, path, top)
    best = path.start[-1]
    points, ends = [(best, 0.0)], []
    for sign in (-1.0, 1.0):
        end, found = _walk(refit, best, sign, wanted, path)
        points += found
        ends.append(path.natural(end) if math.isfinite(end) else _edge(end, path.kind))
    higher = -min(fall for _, fall in points)
    remark = f"a refit is {higher:.2g} nats higher: the fit is not at its maximum" if higher > HIGHER else ""
    curve = sorted((path.natural(v), max(fall, 0.0)) for v, fall in points)
    zero = None
    if path.kind == "positive" and ends[0] == 0.0:
        zero = 0.5 * math.erfc(math.sqrt(max(min(points)[1], 0.0)))
    return Profile(
        path.name, path.natural(best), ends[0], ends[1], level, Table(("value", "fall"), tuple(curve)), zero, remark
    )


@dataclass(frozen=True, eq=False)
class _Path:
    """One value as the last of the coordinates y, and the target's coordinates u as a function of them.

    Args:
        place: from y, shape (n,), to u, shape (n,); differentiable.
        start: shape (n,), y at the estimate.
        natural: from the last coordinate to the value.
        error: standard error of the last coordinate, 1 where it is not known.
    """

    name: str
    kind: str
    place: Callable[[Tensor], Tensor]
    start: Array
    natural: Callable[[float], float]
    error: float
    curvature: Array


def _path(goal: Target, name: str) -> _Path:
    known = {e.name: e for e in goal.entries}
    entry, found = positions(known, name, "profile()", event=True)
    if found.numel() != 1:
        names = label(entry.name, entry.shape)
        raise FitError(
            f"{name!r} is {found.numel()} values, and a profile is of one.",
            details=[f"its elements: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"],
            suggestion=f"profile({names[0]!r})",
        )
    u = torch.from_numpy(goal.x)
    kind = support(entry.constraint)
    if elementwise(entry):
        here = _coordinates(goal, [int(found)], name)[0]
        rest = [i for i in range(goal.size) if i != here]
        order = torch.tensor([*rest, here]).argsort()

        def natural(v: float) -> float:
            return float(entry.transform(torch.tensor(v, dtype=torch.float64)))

        return _measured(goal, name, kind, lambda y: y[order], torch.cat([u[rest], u[here : here + 1]]), natural)
    if (
        entry.constraint is not constraints.simplex
        and getattr(entry.constraint, "base_constraint", 0) is not constraints.simplex
    ):
        raise FitError(
            f"there is no profile of {name!r}, whose support is {entry.constraint}.",
            suggestion="real and positive values, probabilities, elements of a simplex",
        )
    return _simplex_path(goal, entry, int(found), name, u)


def _simplex_path(goal: Target, entry: Entry, element: int, name: str, u: Tensor) -> _Path:
    """An element of a simplex as the logit of its own probability, the others sharing the rest."""
    size = entry.shape[-1]
    row, k = divmod(element, size)
    first = entry.start + row * (size - 1)
    here = _coordinates(goal, list(range(first, first + size - 1)), name)
    rest = [i for i in range(goal.size) if i not in here]
    back = torch.tensor([*rest, *here]).argsort()
    sticks = torch.distributions.StickBreakingTransform()

    def place(y: Tensor) -> Tensor:
        p, share = y[-1].sigmoid(), y[len(rest) : -1]
        others = (1 - p) * (sticks(share) if size > 2 else torch.ones_like(y[:1]))
        whole = torch.cat([others[:k], p[None], others[k:]])
        return torch.cat([y[: len(rest)], sticks.inv(whole)])[back]

    probabilities = sticks(u[here])
    others = torch.cat([probabilities[:k], probabilities[k + 1 :]])
    share = sticks.inv(others / others.sum()) if size > 2 else u[:0]
    start = torch.cat([u[rest], share, probabilities[k : k + 1].logit()])
    return _measured(goal, name, "probability", place, start, lambda v: float(torch.tensor(v).double().sigmoid()))


def _coordinates(goal: Target, where: list[int], name: str) -> list[int]:
    """The target's coordinates that stand for positions in the whole vector."""
    place = {int(p): k for k, p in enumerate(goal.free)}
    found = [place[p] for p in where]
    if goal.restriction is not None:
        found = [int(goal.restriction.source[k]) for k in found]
        if any(k in c.tolist() for c in goal.restriction.chains for k in found):
            raise FitError(f"{name!r} is ordered: it cannot move by itself.", suggestion="a fit without order=")
    return found


def _edge(v: float, kind: str) -> float:
    """The end of the support in the direction of an infinite coordinate."""
    low, high = {"positive": (0.0, math.inf), "probability": (0.0, 1.0)}.get(kind, (-math.inf, math.inf))
    return low if v < 0 else high


def _measured(
    goal: Target,
    name: str,
    kind: str,
    place: Callable[[Tensor], Tensor],
    start: Tensor,
    natural: Callable[[float], float],
) -> _Path:
    """A path with its curvature at the start."""
    slopes = torch.func.jacrev(place)(start).numpy()
    found = information(goal, goal.start)
    matrix = slopes.T @ found.matrix.numpy() @ slopes
    if not np.isfinite(matrix).all():
        matrix = np.eye(len(start))
    # What the value has left when the others follow it.
    inner = matrix[-1, -1] - matrix[-1, :-1] @ np.linalg.pinv(matrix[:-1, :-1], rcond=1e-10) @ matrix[:-1, -1]
    error = 1 / math.sqrt(inner) if inner > 1e-12 else 1.0
    return _Path(name, kind, place, start.numpy(), natural, error, matrix)


def _refits(goal: Target, path: _Path, top: float) -> Callable[[float], float]:
    """A function that refits the others with the value held, and says how far the log-density has fallen."""
    others = len(path.start) - 1
    roots, directions = np.linalg.eigh(path.curvature[:-1, :-1])
    unit = directions / np.sqrt(np.maximum(np.abs(roots), 1e-4)) if others else np.zeros((0, 0))
    known: dict[float, Array] = {float(path.start[-1]): path.start[:-1]}

    def guess(v: float) -> Array:
        near = sorted(known, key=lambda w: abs(w - v))[:2]
        if len(near) < 2 or near[0] == near[1]:
            return known[near[0]]
        a, b = near
        return known[a] + np.clip((v - a) / (a - b), -1.0, 1.0) * (known[a] - known[b])

    def refit(v: float) -> float:
        origin = guess(v)

        def evaluate(z: Array) -> tuple[float, Array]:
            with torch.enable_grad():
                y = torch.from_numpy(np.append(origin + unit @ z, v)).requires_grad_()
                u = path.place(y)
            value, gradient = goal.evaluate(u.detach().numpy().copy())
            (back,) = torch.autograd.grad(u, y, torch.from_numpy(gradient))
            return value, unit.T @ back.numpy()[:-1]

        if not others:
            value = evaluate(np.zeros(0))[0]
            return top - value if math.isfinite(value) else math.inf
        found = ascend(evaluate, np.zeros(others), tolerance=TOLERANCE, max_evaluations=500)
        if found.interrupted:
            raise KeyboardInterrupt
        if not math.isfinite(found.value):
            return math.inf
        known[v] = origin + unit @ found.x
        return top - found.value

    return refit


def _walk(
    fall: Callable[[float], float], start: float, sign: float, wanted: float, path: _Path
) -> tuple[float, list[tuple[float, float]]]:
    """Go from ``start`` until the root of twice the fall is ``wanted``; the end, and the points on the way."""
    points: list[tuple[float, float]] = []

    def root(v: float) -> float:
        fallen = fall(v)
        points.append((v, fallen))
        return math.sqrt(2 * max(fallen, 0.0))

    inside, before = start, 0.0
    unit = path.error if path.kind == "other" else 1.0
    step = STEP * min(path.error, LONGEST * unit)
    while True:
        v = inside + sign * step
        r = root(v)
        if r >= wanted:
            break
        # From the edge itself, the way leads through the whole support.
        if abs(v - start) > FAR * unit and (path.kind == "other" or sign * v > FAR):
            return sign * math.inf, points
        if r - before < STEP / 2:
            step = min(2 * step, LONGEST * unit)
        inside, before = v, r
    outside, after = v, r
    for _ in range(40):
        if min(wanted - before, after - wanted) < CLOSE:
            break
        # The root is nearly straight; where it is not, halves.
        share = (wanted - before) / (after - before) if math.isfinite(after) else 0.5
        v = inside + min(max(share, 0.05), 0.95) * (outside - inside)
        r = root(v)
        if r < wanted:
            inside, before = v, r
        else:
            outside, after = v, r
    if not math.isfinite(after):
        return inside, points
    return inside + (wanted - before) / (after - before) * (outside - inside), points

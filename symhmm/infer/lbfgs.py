"""Climb one hill: L-BFGS on an exact gradient, with a stated criterion and no way to crash on a bad number."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from symhmm.infer.target import Array

Evaluate = Callable[[Array], tuple[float, Array]]
ROUNDS = 4
MEMORY = 20  # past steps that the inverse Hessian is made of
ENOUGH, FLATTER = (
    1e-4,
    0.9,
)  # a step must gain this share of what its slope promised, and leave at most that share of the slope
LINE, CLOSE = 30, 1e-10  # evaluations along one direction, and how near to each other two of them may lie
PATIENCE = 2  # steps in a row that gain nothing
FARTHER = 4.0  # by which a step grows while the slope goes on upwards


@dataclass(frozen=True, eq=False)
class Ascent:
    """Where one start led to.

    Args:
        x: shape (n,), the best point seen.
        value: its objective, nats; ``-inf`` if no point was finite.
        gradient: shape (n,), at ``x``.
        gain: nats that another quasi-Newton step promises, ``g' H^-1 g / 2``; the criterion of convergence.
        converged: ``gain`` is below the tolerance, or below the rounding of the objective.
        trace: objective at each evaluation, nats.
        interrupted: stopped by Ctrl-C.
    """

    x: Array
    value: float
    gradient: Array
    gain: float = np.inf
    converged: bool = False
    trace: list[float] = field(default_factory=list)
    interrupted: bool = False


def ascend(
    evaluate: Evaluate,
    start: Array,
    *,
    tolerance: float = 1e-5,
    max_evaluations: int = 2000,
    precision: float = float(np.finfo(np.float64).eps),
    unit: Array | None = None,
) -> Ascent:
    """Maximise ``evaluate`` from ``start`` by L-BFGS (Nocedal 1980) with a line search for the strong Wolfe conditions.

    Converged means that the squared gradient norm in the metric of the inverse Hessian, ``g' H^-1 g / 2``, is at most
    ``tolerance``: this is what a Newton step would still gain, in nats, and does not depend on the units of any
    parameter. Where the run ends without reaching it, it starts again from its best point with an empty memory.
    ``precision`` is the relative rounding error of the objective, below which no gain can be seen. ``unit``, shape (n,), is
    a length of each coordinate over which the objective changes alike: the first steps are taken in these units.

    >>> hill = ascend(lambda x: (-float(x @ x), -2 * x), np.ones(3))
    >>> hill.converged, bool(np.abs(hill.x).max() < 1e-6)
    (True, True)
    """
    search = _Search(evaluate, max_evaluations, np.ones_like(start) if unit is None else unit)
    gain = np.inf
    try:
        _, gradient = search(start)
        if search.best is None:
            return Ascent(start, -np.inf, gradient, trace=search.trace)
        for _ in range(ROUNDS):
            before = search.best[1]
            # Rounding of the objective bounds what any criterion can see.
            rounding = 64 * precision * max(abs(before), 1.0)
            gain = min(gain, _climb(search, max(1e-9, rounding / 64), rounding / 16))
            if gain <= max(tolerance, rounding):
                return Ascent(*search.best, gain, True, search.trace)
            if search.best[1] <= before:
                break
    except KeyboardInterrupt:
        if search.best is None:
            return Ascent(start, -np.inf, np.zeros_like(start), trace=search.trace, interrupted=True)
        return Ascent(*search.best, trace=search.trace, interrupted=True)
    except _Spent:
        pass
    assert search.best is not None
    return Ascent(*search.best, gain, False, search.trace)


def _climb(search: "_Search", still: float, noise: float) -> float:
    """Steps from the best point until some in a row gain less than ``still`` each; returns what the last metric promises, nats.

    ``noise`` is a loss that rounding may feign.
    """
    memory, slow = _Memory(), 0
    z, value, slope = search.here()
    while True:
        direction = memory.newton(slope)
        promised = float(slope @ direction)
        if not promised > 0:
            return 0.0 if not slope.any() else np.inf
        first = 1.0 if memory.steps else min(1.0, 1.0 / float(np.linalg.norm(slope)))
        found = _along(search, z, direction, value, promised, first, noise)
        if found is None:
            return 0.5 * promised
        there, its_value, its_slope = found
        memory.add(there - z, slope - its_slope)
        gained = its_value - value
        z, value, slope = there, its_value, its_slope
        slow = slow + 1 if gained <= still else 0
        if slow == PATIENCE:
            return 0.5 * float(slope @ memory.newton(slope))


def _along(
    search: "_Search", z: Array, direction: Array, value: float, slope: float, step: float, noise: float
) -> tuple[Array, float, Array] | None:
    """A higher point along ``direction``, by the strong Wolfe conditions (Nocedal and Wright 2006, algorithms 3.5 and 3.6).

    Args:
        value, slope: at ``z``, the slope along the direction.
        step: to be tried first.
    """
    low, high, best = _Seen(0.0, value, slope), None, None
    for _ in range(LINE):
        there = z + step * direction
        its_value, gradient = search.at(there)
        seen = _Seen(step, its_value, float(gradient @ direction))
        if its_value < value + ENOUGH * step * slope - noise or its_value < low.value - noise:
            high = seen
        else:
            if its_value > value and (best is None or its_value > best[1]):
                best = there, its_value, gradient
            if abs(seen.slope) <= FLATTER * slope:
                return there, its_value, gradient
            if high is None and seen.slope > 0:
                low, step = seen, FARTHER * step
                continue
            if high is None or seen.slope * (high.step - low.step) < 0:
                high = low
            low = seen
        if abs(high.step - low.step) <= CLOSE * max(high.step, low.step):
            break
        step = _between(low, high)
    return best


@dataclass(frozen=True)
class _Seen:
    """A point on a line."""

    step: float
    value: float
    slope: float


def _between(low: _Seen, high: _Seen) -> float:
    """Where the cubic through two points has its maximum (Nocedal and Wright 2006, eq. 3.59), kept away from both."""
    width = high.step - low.step
    if not np.isfinite(high.value):
        return low.step + 0.1 * width
    middle = low.slope + high.slope - 3 * (high.value - low.value) / width
    root = np.sign(width) * np.sqrt(max(middle * middle - low.slope * high.slope, 0.0))
    below = high.slope - low.slope - 2 * root
    share = 1 - (high.slope - root - middle) / below if below else 0.5
    return low.step + width * float(np.clip(share, 0.1, 0.9))


class _Memory:
    """The inverse of minus the Hessian, from the last steps and the slopes that they took away."""

    def __init__(self) -> None:
        self.steps: list[tuple[Array, Array, float]] = []

    def add(self, step: Array, lost: Array) -> None:
        curvature = float(step @ lost)
        if curvature > 1e-10 * float(np.linalg.norm(step) * np.linalg.norm(lost)):
            self.steps = [*self.steps[-MEMORY + 1 :], (step, lost, curvature)]

    def newton(self, slope: Array) -> Array:
        """The step to the maximum of the parabola, by the recursion over two loops (Nocedal 1980)."""
        out, shares = slope.copy(), []
        for step, lost, curvature in reversed(self.steps):
            shares.append(float(step @ out) / curvature)
            out -= shares[-1] * lost
        if self.steps:
            _, lost, curvature = self.steps[-1]
            out *= curvature / float(lost @ lost)
        for (step, lost, curvature), share in zip(self.steps, reversed(shares), strict=True):
            out += (share - float(lost @ out) / curvature) * step
        return out


class _Spent(Exception):
    """The number of evaluations is used up."""


class _Search:
    """Counts evaluations and keeps the best point; what is not finite lies infinitely low."""

    def __init__(self, evaluate: Evaluate, max_evaluations: int, unit: Array) -> None:
        self.evaluate, self.max_evaluations, self.unit = evaluate, max_evaluations, unit
        self.best: tuple[Array, float, Array] | None = None
        self.trace: list[float] = []

    def __call__(self, x: Array) -> tuple[float, Array]:
        if len(self.trace) >= self.max_evaluations and self.best is not None:
            raise _Spent
        value, gradient = self.evaluate(x)
        self.trace.append(value)
        if np.isfinite(value) and np.isfinite(gradient).all() and (self.best is None or value > self.best[1]):
            self.best = (x.copy(), value, gradient.copy())
        return value, gradient

    def at(self, z: Array) -> tuple[float, Array]:
        """Value and slope in units."""
        value, gradient = self(z * self.unit)
        if np.isfinite(value) and np.isfinite(gradient).all():
            return value, gradient * self.unit
        return -np.inf, np.zeros_like(z)

    def here(self) -> tuple[Array, float, Array]:
        """The best point, its value and slope in units."""
        x, value, gradient = self.best  # type: ignore[misc]
        return x / self.unit, value, gradient * self.unit

"""Climb one hill: L-BFGS on an exact gradient, with a stated criterion and no way to crash on a bad number."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from symhmm.infer.target import Array

Evaluate = Callable[[Array], tuple[float, Array]]
ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Ascent:
    """Where one start led to.

    Args:
        x: shape (n,), the best point seen.
        value: its objective, nats; ``-inf`` if no point was finite.
        gradient: shape (n,), at ``x``.
        gain: nats that another quasi-Newton step promises, ``g' H^-1 g / 2``; the criterion of convergence. Infinite where
            that is not known, such as when the evaluations were used up on the way.
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
    """Maximise ``evaluate`` from ``start`` by L-BFGS (Nocedal 1980) with the line search of More and Thuente (1994).

    Converged means that the squared gradient norm in the metric of the inverse Hessian, ``g' H^-1 g / 2``, is at most
    ``tolerance``: this is what a Newton step would still gain, in nats, and does not depend on the units of any
    parameter. Where the run ends without reaching it, it starts again from its best point with an empty memory.
    ``precision`` is the relative rounding error of the objective, below which no gain can be seen. ``unit``, shape (n,), is
    a length of each coordinate over which the objective changes alike: the first steps are taken in these units.

    >>> hill = ascend(lambda x: (-float(x @ x), -2 * x), np.ones(3))
    >>> hill.converged, bool(np.abs(hill.x).max() < 1e-6)
    (True, True)
    """
    from scipy.optimize import minimize

    search = _Search(evaluate, max_evaluations)
    unit = np.ones_like(start) if unit is None else unit
    gain = np.inf
    try:
        value, gradient = search(start)
        if search.best is None:
            return Ascent(start, -np.inf, gradient, trace=search.trace)
        for _ in range(ROUNDS):
            before = search.best[1]
            # Rounding of the objective bounds what any criterion can see.
            rounding = 64 * precision * max(abs(before), 1.0)
            stop = max(1e-9, rounding / 64) / max(abs(before), 1.0)
            options = {
                "maxiter": max_evaluations,
                "maxfun": 10**9,
                "maxcor": 20,
                "ftol": stop,
                "gtol": 0.0,
                "maxls": 30,
            }

            def downhill(z: Array) -> tuple[float, Array]:
                value, gradient = search.negative(z * unit)
                return value, gradient * unit

            result = minimize(downhill, search.best[0] / unit, jac=True, method="L-BFGS-B", options=options)
            x, value, gradient = search.best
            slope = gradient * unit
            gain = 0.5 * float(slope @ result.hess_inv.dot(slope))
            if gain <= max(tolerance, rounding):
                return Ascent(x, value, gradient, gain, True, search.trace)
            if len(search.trace) >= max_evaluations or value <= before:
                break
    except KeyboardInterrupt:
        if search.best is None:
            return Ascent(start, -np.inf, np.zeros_like(start), trace=search.trace, interrupted=True)
        return Ascent(*search.best, trace=search.trace, interrupted=True)
    except _Spent:
        x, value, gradient = search.best  # type: ignore[misc]
        gain = np.inf  # of a step from here nothing is known
    return Ascent(x, value, gradient, gain, False, search.trace)


class _Spent(Exception):
    """The number of evaluations is used up."""


class _Search:
    """Counts evaluations, keeps the best point, turns non-finite values into hills to walk back from."""

    def __init__(self, evaluate: Evaluate, max_evaluations: int) -> None:
        self.evaluate = evaluate
        self.max_evaluations = max_evaluations
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

    def negative(self, x: Array) -> tuple[float, Array]:
        value, gradient = self(x)
        if np.isfinite(value) and np.isfinite(gradient).all():
            return -value, -gradient
        # A level that makes the line search's interpolation step back to about a fifteenth of the way, rather than to
        # nothing as infinity would: twice the rise that the slope at the best point promises, downwards.
        base_x, base, slope = self.best  # type: ignore[misc]
        return -base + 2 * abs(float(slope @ (x - base_x))) + 1e-3, np.zeros_like(x)

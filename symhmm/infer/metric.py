"""Metric: climb in coordinates in which the hill is round, for objectives whose gradients are dear."""

from dataclasses import replace

import numpy as np

from symhmm.infer.lbfgs import Ascent, Evaluate, ascend
from symhmm.infer.target import Array

LARGEST = 150  # coordinates beyond which a curvature costs more gradients than it saves
WIDEST = 2.0  # longest unit of a coordinate, in units of its own size


def climb(
    evaluate: Evaluate, start: Array, *, tolerance: float = 1e-5, max_evaluations: int = 2000, noise: float = 0.0
) -> Ascent:
    """Maximise by L-BFGS in the metric of the curvature at the start, which is renewed where progress ends.

    The curvature costs one gradient for each coordinate, by differences; L-BFGS alone takes several times as many to learn
    it when parameters are correlated. Arguments and result are those of `symhmm.infer.lbfgs.ascend`; ``noise`` is the error of
    the objective, nats, below which no gain can be seen.

    >>> valley = np.array([[1.0, 0.999], [0.999, 1.0]]) * 1e3
    >>> climb(lambda x: (-0.5 * float(x @ valley @ x), -valley @ x), np.array([3.0, -1.0])).converged
    True
    """
    best, trace, stalled = Ascent(start, -np.inf, np.zeros_like(start)), list[float](), False
    seen = best  # the same point with its value, once that is known
    try:
        if start.size > LARGEST:
            precision = _relative(noise, evaluate(start)[0])
            return ascend(evaluate, start, tolerance=tolerance, max_evaluations=max_evaluations, precision=precision)
        while True:
            origin = best.x
            value, gradient = evaluate(origin)
            trace.append(value)
            if np.isfinite(value):
                seen = replace(best, value=value, gradient=gradient)
            unit = _unit(evaluate, origin, gradient, trace)
            # A valley without end, such as that of a spread that goes to zero, is left by this door.
            gain = 0.5 * float(np.square(unit.T @ gradient).sum())
            if np.isfinite(best.value) and (stalled or gain <= tolerance):
                return replace(best, gain=gain, converged=gain <= tolerance)
            allowed = min(max_evaluations - len(trace), 20 + 2 * start.size)

            def rounder(z: Array, origin: Array = origin, unit: Array = unit) -> tuple[float, Array]:
                value, gradient = evaluate(origin + unit @ z)
                return value, unit.T @ gradient

            found = ascend(
                rounder,
                np.zeros_like(start),
                tolerance=tolerance,
                max_evaluations=max(allowed, 1),
                precision=_relative(noise, value),
            )
            trace += found.trace
            if found.interrupted and not found.value > seen.value:
                raise KeyboardInterrupt
            back: Array = np.asarray(np.linalg.solve(unit.T, found.gradient), dtype=np.float64)
            risen = found.value - best.value
            best = seen = replace(found, x=origin + unit @ found.x, gradient=back, trace=trace)
            stalled = not risen > tolerance
            if found.converged or found.interrupted or len(trace) >= max_evaluations or not np.isfinite(best.value):
                return best
    except KeyboardInterrupt:
        return replace(seen, trace=trace, converged=False, interrupted=True)


def _relative(noise: float, value: float) -> float:
    return max(1e-15, noise / max(abs(value), 1.0)) if np.isfinite(value) else 1e-15


def _unit(evaluate: Evaluate, x: Array, gradient: Array, trace: list[float]) -> Array:
    """Root of the inverse curvature at ``x``, shape (n, n), with every direction bounded by the size of its coordinates."""
    n = x.size
    size = np.maximum(1.0, np.abs(x))
    if not np.isfinite(gradient).all():
        return np.eye(n)
    matrix = np.empty((n, n))
    for i in range(n):
        moved = x.copy()
        moved[i] += 1e-5 * size[i]
        value, ahead = evaluate(moved)
        trace.append(value)
        matrix[i] = (gradient - ahead) / (moved[i] - x[i])
    if not np.isfinite(matrix).all():
        return np.eye(n)
    matrix = (matrix + matrix.T) / 2 * np.outer(size, size)
    values, vectors = np.linalg.eigh(matrix)
    length = np.minimum(1 / np.sqrt(np.maximum(np.abs(values), 1e-300)), WIDEST)
    return size[:, None] * (vectors * length)

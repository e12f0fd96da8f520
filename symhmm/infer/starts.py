"""Starts: seeded jitter in the unconstrained space on the scale of the data, screened by the density itself."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch.distributions import constraints

from symhmm.errors import FitError
from symhmm.infer.lbfgs import Evaluate
from symhmm.infer.target import Array, Target

CURVATURES = 200  # coordinates beyond which measuring each one's curvature costs more than it saves
LARGEST_JITTER = 3.0
OWN = 0.01
SIZES = (0.5, 1.0, 0.25)


def scales(evaluate: Evaluate, x: Array, n_observations: int) -> Array:
    """Standard error that a single observation would leave on each coordinate, shape (n,).

    This is the size of a jitter that makes states different from each other without leaving the data: a location gets
    the spread of the data, a log scale or a logit about one. It is ``sqrt(N / -H_ii)``, with the diagonal of the
    Hessian from differences of the gradient; a coordinate that the data say nothing about gets 1.
    """
    if x.size > CURVATURES:
        return np.maximum(1.0, 0.1 * np.abs(x))
    _, here = evaluate(x)
    out = np.ones_like(x)
    for i in range(x.size):
        moved = x.copy()
        moved[i] += 1e-4 * max(1.0, abs(x[i]))
        curvature = abs(evaluate(moved)[1][i] - here[i]) / (moved[i] - x[i])
        if np.isfinite(curvature) and curvature > 0:
            out[i] = np.sqrt(n_observations / curvature)
    return _bounded(out, x)


def bounded_scales(curvature: Array, x: Array, n_observations: int) -> Array:
    """`scales` where the curvature of each coordinate is known: shape (n,), positive."""
    with np.errstate(divide="ignore"):
        out = np.where(curvature > 0, np.sqrt(n_observations / curvature), 1.0)
    return _bounded(out, x)


def _bounded(scale: Array, x: Array) -> Array:
    largest = LARGEST_JITTER * np.maximum(1.0, np.abs(x))
    out: Array = np.where((scale > largest) | ~np.isfinite(scale), 1.0, np.maximum(scale, 0.05))
    return out


def jitter_sizes(goal: Target, jitter: float | Mapping[str, float]) -> Array:
    """Factor of each free coordinate, shape (n,): one for all, or by name and zero where none is given.

    Raises:
        FitError: a name is not one of the free values.
    """
    if not isinstance(jitter, Mapping):
        return np.full(goal.size, float(jitter))
    known = {e.name for e in goal.entries}
    if unknown := sorted(set(jitter) - known):
        raise FitError(
            f"jitter= names {unknown[0]!r}, which is not fitted.", details=[f"fitted: {', '.join(sorted(known))}"]
        )
    place = {i: jitter.get(e.name, 0.0) for e in goal.entries for i in range(e.start, e.stop)}
    return np.array([place[i] for i in goal.moved.tolist()])


def unrestricted(goal: Target) -> tuple[Target, Callable[[Array], Array]]:
    """The target without what is tied or ordered, and from each of its points the coordinates of ``goal`` nearby.

    Starts are drawn there: the steps between ordered values say nothing of how far apart the data are, and values that are
    drawn and then put in order are as good a start as without an order.
    """
    limits = goal.restriction
    if limits is None:
        return goal, lambda x: x
    return replace(goal, restriction=None), lambda x: limits.inverse(torch.from_numpy(x)).numpy()


def units(goal: Target, scale: Array) -> Array:
    """Lengths in which a climb takes its first steps: the scale, at most one where a logarithm or a logit is moved.

    A weakly determined logarithm has a large scale at the start and none of it later.
    """
    real = {i for e in goal.entries if e.constraint is constraints.real for i in range(e.start, e.stop)}
    steps = set() if goal.restriction is None else {int(k) for c in goal.restriction.chains for k in c[1:]}
    wide = [i in real and k not in steps for k, i in enumerate(goal.moved.tolist())]
    return np.where(wide, scale, np.minimum(scale, 1.0))


def draw_starts(
    value: Callable[[Array], float],
    x: Array,
    scale: Array,
    number: int,
    *,
    seed: int,
    screen: int = 10,
    own: bool = True,
) -> list[Array]:
    """``number`` starting points: the program's own, then for each other start the best of ``screen`` jittered ones.

    The own start is moved by a hundredth of the scale. Where all states start equal the gradient keeps them equal, and
    this is what breaks the symmetry. The others take turns in the size of their jitter, since a good start deserves a
    small one and a bad start a large one. Points where the density is not finite are passed over. Without ``own``, all are
    jittered: ``x`` is not the program's own start.

    >>> flat = lambda x: 0.0
    >>> len(draw_starts(flat, np.zeros(2), np.ones(2), 3, seed=0))
    3
    """
    generator = np.random.default_rng(seed)

    def best(size: float, tries: int) -> list[Array]:
        points = [x + size * scale * generator.standard_normal(x.size) for _ in range(tries)]
        valued = [(height, p) for p in points if np.isfinite(height := value(p))]
        return [max(valued, key=lambda pair: pair[0])[1]] if valued else []

    first = (best(OWN, 1) or ([x] if np.isfinite(value(x)) else [])) if own else []
    # A program whose own start cannot be used gets one jittered start more.
    others = (best(SIZES[k % len(SIZES)], screen) for k in range(number - len(first)))
    return [*first, *(start for found in others for start in found)] or [x]

"""Closed forms: which coordinates have an M-step in closed form, found from the curvature of the expected log-density.

The expected complete log-density of a program falls apart into blocks of coordinates that do not touch each other: the row
of a transition matrix, the location and scale of one state. Where a block belongs to a standard exponential family, its
curvature says so, whatever the program calls its parameters, and the maximum follows from one gradient and one curvature:

- *probabilities*: rows of a softmax with a reference, a simplex in Pyro's coordinates, the probability of a Bernoulli. With
  probabilities p and total weight n the gradient is ``n (p* - p)`` and the curvature ``-n (diag(p) - p p')``.
- *scale*: ``a s - exp(c s) B(b)`` with B quadratic in locations b. Normal (c = -2 on the log scale), with or without
  regression; Poisson rate and exponential rate (c = 1), exponential mean (c = -1), gamma rate, Weibull scale of known shape.
- *quadratic*: locations alone.
- *newton*: anything else, one safeguarded Newton step (the EM gradient algorithm of Lange 1995).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from symhmm.infer.target import Array

STEP = 0.1  # by which coordinates are moved to see how their curvature changes
ALIKE = 1e-6  # relative difference of two numbers that the form says are equal
SEPARATE = 1e-10  # relative curvature below which two coordinates do not touch
LARGEST = 40  # coordinates of a block beyond which a curvature costs more than it saves
LONGEST = 1.0  # Newton step of a coordinate, in units of max(1, its own size)
SHRINK = 1e-4  # factor by which a probability or a scale may fall in one step

Index = NDArray[np.intp]
Along = Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class Block:
    """Coordinates that are maximised together.

    Args:
        index: shape (m,), their positions; in a block with a scale it is the last.
        kind: ``probabilities``, ``scale``, ``quadratic`` or ``newton``.
        offset: shape (m,), for probabilities: ``softmax([u - offset, 0])``.
        power: c, for a scale.
    """

    index: Index
    kind: str
    offset: Array | None = None
    power: float = 0.0

    @property
    def directions(self) -> int:
        """Curvatures along so many directions are needed."""
        m = len(self.index)
        return {"probabilities": 1, "scale": max(m - 1, 1)}.get(self.kind, m)


@dataclass(frozen=True, eq=False)
class Forms:
    """The blocks of a program, and ``rest``, coordinates in blocks too large for a curvature.

    >>> find(lambda u: (-2 * u, lambda d: -2 * d), np.array([1.0, 2.0]))     # -u^2
    2 quadratic
    """

    size: int
    blocks: tuple[Block, ...]
    rest: Index

    def directions(self) -> Array:
        """Directions, shape (C, n), along which `update` wants the curvature."""
        count = max((b.directions for b in self.blocks), default=0)
        out = np.zeros((count, self.size))
        for b in self.blocks:
            if b.kind == "probabilities":
                out[0, b.index] = 1.0
                continue
            for j in range(b.directions):
                out[j, b.index[j]] = 1.0
            if b.kind == "scale":
                out[0, b.index[-1]] = 1.0
        return out

    def update(self, u: Array, gradient: Array, curvature: Array) -> tuple[Array, Array]:
        """The M-step at ``u`` and the size of the curvature of each coordinate, both of shape (n,).

        Args:
            gradient: shape (n,), of the expected log-density.
            curvature: shape (C, n), its Hessian times each of `directions`.
        """
        new, size = u.copy(), np.ones_like(u)
        for b in self.blocks:
            i = b.index
            step = {"probabilities": _probabilities, "scale": _scale}.get(b.kind, _newton)
            # What has run to the edge of its support divides by zero, and stays where it is.
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                moved, size[i] = step(b, u[i], gradient[i], curvature[: b.directions, i])
            new[i] = np.where(np.isfinite(moved), moved, u[i])
        return new, size

    def __repr__(self) -> str:
        kinds = [b.kind for b in self.blocks] + ["left to L-BFGS"] * len(self.rest)
        return ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds)) or "nothing"


def find(derivatives: Callable[[Array], tuple[Array, Along]], u: Array) -> Forms:
    """The forms of an expected log-density, from its curvature at ``u`` and around.

    Args:
        derivatives: gradient at a point, and a function that multiplies a direction by the Hessian there.
    """
    _, along = derivatives(u)
    n = u.size
    whole = np.stack([along(row) for row in np.eye(n)]) if n else np.zeros((0, 0))
    groups = _groups(whole)
    small = [i for i in groups if len(i) <= LARGEST]
    rest = np.array([k for i in groups if len(i) > LARGEST for k in i], dtype=np.intp)

    def curvature(sign: float, j: int, wanted: list[Index]) -> dict[int, Array]:
        """Hessian of each block in ``wanted`` with its j-th coordinate moved, by the block's first coordinate."""
        there = u.copy()
        there[[i[j] for i in wanted]] += sign * STEP
        _, along = derivatives(there)
        columns = []
        for k in range(max(map(len, wanted))):
            direction = np.zeros(n)
            direction[[i[k] for i in wanted if len(i) > k]] = 1.0
            columns.append(along(direction))
        return {int(i[0]): np.stack([columns[k][i] for k in range(len(i))]) for i in wanted}

    single = [i for i in small if len(i) == 1]
    behind = curvature(-1.0, 0, single) if single else {}
    ahead = [curvature(1.0, 0, small)] if small else []
    # What the first move has shown to be of no known form is not looked at any longer.
    live = [i for i in small if _open(u[i], whole[np.ix_(i, i)], ahead[0][int(i[0])])]
    while wanted := [i for i in live if len(i) > len(ahead)]:
        ahead.append(curvature(1.0, len(ahead), wanted))
    known = {int(i[0]) for i in live}
    blocks = []
    for i in small:
        first = int(i[0])
        if first not in known:
            blocks.append(Block(i, "newton"))
            continue
        moved = [ahead[j][first] for j in range(len(i))]
        blocks.append(_recognised(i, u[i], whole[np.ix_(i, i)], moved, behind.get(first)))
    return Forms(n, tuple(blocks), rest)


def _groups(matrix: Array) -> list[Index]:
    """Connected components of coordinates."""
    size = np.sqrt(np.abs(np.diag(matrix)))
    touch = np.abs(matrix) > SEPARATE * np.outer(size, size) + 1e-300
    left, out = set(range(len(matrix))), []
    while left:
        group, front = set[int](), {min(left)}
        while front:
            group |= front
            front = {int(k) for i in front for k in np.flatnonzero(touch[i])} - group
        left -= group
        out.append(np.array(sorted(group), dtype=np.intp))
    return out


def _open(u: Array, h: Array, first: Array) -> bool:
    """Whether a block may have a form, by its Hessians at ``u`` and with its first coordinate moved ahead."""
    if not (np.isfinite(h).all() and np.isfinite(first).all() and (np.diag(h) < 0).all()):
        return False
    ratio = first[0, 0] / h[0, 0]
    if len(u) == 1 or _alike(first, h) or (ratio > 0 and _alike(first, h * ratio)):
        return True
    others = [np.flatnonzero(np.arange(len(u)) != s) for s in range(1, len(u))]
    if any(_alike(first[np.ix_(k, k)], h[np.ix_(k, k)]) for k in others):
        return True
    return _softmax_offset(u, h, [first], None) is not None


def _recognised(index: Index, u: Array, h: Array, moved: list[Array], behind: Array | None) -> Block:
    """The form that explains a block's Hessians at ``u``, with each coordinate moved ahead, and a single one moved back."""
    newton = Block(index, "newton")
    if not (np.isfinite(h).all() and all(np.isfinite(x).all() for x in moved) and (np.diag(h) < 0).all()):
        return newton
    if all(_alike(x, h) for x in moved):
        return Block(index, "quadratic")
    for s in range(len(index)):
        if moved[s][s, s] >= 0:
            continue  # a curvature that changes its sign is no multiple of what it was
        # Moving the scale multiplies all curvatures alike; moving a location changes nothing among the locations.
        power = float(np.log(moved[s][s, s] / h[s, s])) / STEP
        others = [k for k in range(len(index)) if k != s]
        still = all(_alike(moved[k][np.ix_(others, others)], h[np.ix_(others, others)]) for k in others)
        still = still and (behind is None or _alike(behind, h * np.exp(-power * STEP)))
        if still and abs(power) > 1e-3 and _alike(moved[s], h * np.exp(power * STEP)):
            return Block(index[[*others, s]], "scale", power=power)
    offset = _softmax_offset(u, h, moved, behind)
    return newton if offset is None else Block(index, "probabilities", offset)


def _softmax_offset(u: Array, h: Array, moved: list[Array], behind: Array | None) -> Array | None:
    """Offsets with which a block is a softmax, if it is one."""
    if behind is not None:
        # The curvature is n p (1 - p) with p a logistic function of u - offset; three of them tell where u stands.
        ratio = np.sqrt(behind[0, 0] / moved[0][0, 0])
        tanh = (ratio - 1) / (ratio + 1) / np.tanh(STEP / 2)
        if not abs(tanh) < 1:
            return None
        p = np.array([1 / (1 + np.exp(-2 * np.arctanh(tanh)))])
        if not 1e-12 < p[0] < 1 - 1e-12:
            return None
    else:
        inverse = np.linalg.pinv(-h)
        shared = inverse[~np.eye(len(u), dtype=bool)].mean()  # 1 / (n p_ref)
        own = np.diag(inverse) - shared  # 1 / (n p_i)
        if shared <= 0 or (own <= 0).any():
            return None
        weights = 1 / own
        p = weights / (weights.sum() + 1 / shared)
    offset: Array = u - np.log(p / (1 - p.sum()))
    n = -np.trace(h) / (p * (1 - p)).sum()
    for j, x in enumerate(moved):
        q = _softmax(u + STEP * (np.arange(len(u)) == j) - offset)
        if not _alike(x, -n * (np.diag(q) - np.outer(q, q))):
            return None
    return offset


def _alike(a: Array, b: Array) -> bool:
    size = np.sqrt(np.abs(np.diag(b))) if b.size else np.zeros(0)
    return bool((np.abs(a - b) <= ALIKE * np.outer(size, size)).all())


def _softmax(u: Array) -> Array:
    """Probabilities of all but the reference, whose logit is zero."""
    top = max(float(u.max()), 0.0)
    e = np.exp(u - top)
    out: Array = e / (e.sum() + np.exp(-top))
    return out


def _probabilities(b: Block, u: Array, g: Array, h: Array) -> tuple[Array, Array]:
    p = _softmax(u - (0.0 if b.offset is None else b.offset))
    rest = 1 - p.sum()
    # Along (1, .., 1) the Hessian is -n p p_ref, of which the sum is safest.
    n = -h[0].sum() / max(p.sum() * rest, 1e-300)
    size = n * p * (1 - p)
    if not n > 0:
        return u, np.ones_like(u)
    new = np.maximum(p + g / n, SHRINK * p)
    new_rest = max(rest - g.sum() / n, SHRINK * rest)
    return u + np.log(new / p) - np.log(new_rest / rest), size


def _scale(b: Block, u: Array, g: Array, h: Array) -> tuple[Array, Array]:
    c, locations = b.power, len(u) - 1
    new, size = u.copy(), np.empty_like(u)
    gain = 0.0
    own = h[0, -1]
    if locations:
        # The first direction moves the scale as well; the mixed curvature is c times the gradient of the locations.
        matrix = h[:, :-1].copy()
        matrix[0] -= c * g[:-1]
        own = own - c * g[0]
        step = _solved(-matrix, g[:-1])
        new[:-1] += step
        gain = 0.5 * float(g[:-1] @ step)
        size[:-1] = -np.diag(matrix)
    size[-1] = -own
    energy = -own / c**2
    wanted, left = (g[-1] + c * energy) / c, energy - gain
    reach = -np.log(SHRINK)
    if left > 0 and wanted > 0:
        new[-1] += np.clip(np.log(wanted / left) / c, -reach, reach)
    elif wanted > 0:
        new[-1] += reach * np.sign(c)
    return new, size


def _newton(b: Block, u: Array, g: Array, h: Array) -> tuple[Array, Array]:
    step = _solved(-(h + h.T) / 2, g)
    if b.kind == "newton":
        step = step / max(1.0, float((np.abs(step) / (LONGEST * np.maximum(1.0, np.abs(u)))).max(initial=0.0)))
    return u + step, np.abs(np.diag(h))


def _solved(matrix: Array, g: Array) -> Array:
    """Ascent step ``matrix^-1 g``, directions of negative curvature turned round and flat ones left alone."""
    size = np.sqrt(np.abs(np.diag(matrix)))
    size[~(size > 0)] = 1.0
    if not np.isfinite(matrix).all():
        return np.zeros_like(g)
    roots, directions = np.linalg.eigh(matrix / np.outer(size, size))
    inverse = np.where(np.abs(roots) > 1e-10, 1 / np.maximum(np.abs(roots), 1e-10), 0.0)
    out: Array = directions @ (inverse * (directions.T @ (g / size))) / size
    return out

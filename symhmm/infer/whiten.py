"""Whiten: coordinates in which a posterior is about round, from the curvature of its log-density.

The curvature comes from differences of the exact gradient. Members of a plate do not look at each other, so that all of them
are moved together, and a curvature costs as many gradients as there are population values and effects of one member.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from symhmm.infer.target import Array

Slope = Callable[[Array], Array]
Index = NDArray[np.intp]

STEP = 1e-4  # of a difference, in units of the coordinate
LARGEST = 1000  # coordinates beyond which a matrix costs more than it saves
WHOLE = 250  # coordinates up to which each may be moved by itself
LEAST = 1e-3  # curvature of a direction, relative to what its coordinates have, below which it is made up


@dataclass(frozen=True, eq=False)
class Whitening:
    """Coordinates ``x = centre + root @ z``.

    Args:
        centre: shape (n,).
        root: shape (n, n) with ``root @ root.T`` about the posterior covariance, or (n,) for its diagonal alone.
    """

    centre: Array
    root: Array

    def point(self, z: Array) -> Array:
        """The point of ``z``."""
        x: Array = self.centre + (self.root @ z if self.root.ndim == 2 else self.root * z)
        return x

    def slope(self, gradient: Array) -> Array:
        """A gradient in z, of one in x."""
        g: Array = gradient @ self.root if self.root.ndim == 2 else self.root * gradient
        return g


def curvature(slope: Slope, x: Array, unit: Array, blocks: Sequence[Index]) -> tuple[Array, int]:
    """Minus the Hessian at ``x`` by central differences, shape (n, n), and the number of gradients it took.

    Args:
        unit: shape (n,), about one posterior standard deviation of each coordinate.
        blocks: positions of the effects of each plate, shape (members, D); members are moved together. If a random
            direction shows that they do look at each other, up to 250 coordinates are moved one by one instead.

    >>> curvature(lambda x: -np.array([[2.0, 1.0], [1.0, 3.0]]) @ x, np.zeros(2), np.ones(2), [])[0].round(6)
    array([[2., 1.],
           [1., 3.]])
    """
    used = 0

    def along(direction: Array) -> Array:
        nonlocal used
        used += 2
        d: Array = (slope(x - STEP * direction) - slope(x + STEP * direction)) / (2 * STEP)
        return d

    n = x.size
    matrix = np.zeros((n, n))
    inside = np.concatenate([b.reshape(-1) for b in blocks]) if blocks else np.zeros(0, dtype=np.intp)
    outside = np.setdiff1d(np.arange(n), inside)

    def column(i: int) -> None:
        direction = np.zeros(n)
        direction[i] = unit[i]
        matrix[:, i] = matrix[i, :] = along(direction) / unit[i]

    for index in blocks:
        for d in range(index.shape[1]):
            direction = np.zeros(n)
            direction[index[:, d]] = unit[index[:, d]]
            matrix[index, index[:, d : d + 1]] = along(direction)[index] / unit[index[:, d : d + 1]]
    for i in outside:
        column(int(i))
    if blocks and n <= WHOLE:
        probe = unit * np.random.default_rng(0).normal(size=n)
        seen = along(probe)
        if np.linalg.norm((matrix @ probe - seen) * unit) > 0.02 * np.linalg.norm(seen * unit):
            for i in inside:
                column(int(i))
    return (matrix + matrix.T) / 2, used


def whitening(centre: Array, matrix: Array) -> Whitening:
    """Coordinates along the main axes of a curvature, in units of ``1 / sqrt(curvature)``.

    Directions in which the log-density curves upwards, as it may away from its mode, get the unit of their size.
    """
    size = np.sqrt(np.maximum(np.abs(np.diag(matrix)), 1e-300))
    values, vectors = np.linalg.eigh(matrix / np.outer(size, size))
    root = vectors / np.sqrt(np.maximum(np.abs(values), LEAST)) / size[:, None]
    return Whitening(centre, root)

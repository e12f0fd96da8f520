"""Curvature by differences and the coordinates made of it."""

import numpy as np
import pytest

from symhmm.infer.whiten import Whitening, curvature, whitening


def arrow(members=6, effects=2, outside=3, coupled=False, seed=0):
    """A precision matrix in which members of a plate do not look at each other, unless ``coupled``."""
    generator = np.random.default_rng(seed)
    n = outside + members * effects
    index = outside + np.arange(members * effects).reshape(members, effects)
    root = np.zeros((n, n))
    root[:outside] = 0.3 * generator.normal(size=(outside, n))
    for row in index:
        root[np.ix_(row, row)] = generator.normal(size=(effects, effects))
    matrix = np.zeros((n, n))
    matrix[:outside, :] = root[:outside]
    matrix[:, :outside] = root[:outside].T
    matrix[:outside, :outside] += matrix[:outside, :outside].T
    for row in index:
        own = root[np.ix_(row, row)]
        matrix[np.ix_(row, row)] = own @ own.T
    if coupled:
        matrix[index[0, 0], index[1, 1]] = matrix[index[1, 1], index[0, 0]] = 2.0
    return matrix + 5 * np.eye(n), index


@pytest.mark.parametrize("coupled", [False, True])
def test_curvature_is_the_matrix(coupled):
    matrix, index = arrow(coupled=coupled)
    calls = 0

    def slope(x):
        nonlocal calls
        calls += 1
        return -matrix @ (x - 1.0)

    n = len(matrix)
    found, used = curvature(slope, np.linspace(-1, 1, n), np.full(n, 0.5), [index])
    assert np.allclose(found, matrix, rtol=1e-8, atol=1e-8)
    assert used == calls
    moved = 3 + 2 + 1  # outside, effects of a member, the probe
    assert used == 2 * (moved + (12 if coupled else 0))


def test_a_whitened_normal_is_round():
    matrix, _ = arrow()
    where = whitening(np.arange(len(matrix)), matrix)
    assert np.allclose(where.root.T @ matrix @ where.root, np.eye(len(matrix)), atol=1e-10)
    z = np.linspace(-1, 1, len(matrix))
    gradient = -matrix @ (where.point(z) - where.centre)
    assert np.allclose(where.slope(gradient), -z, atol=1e-10)


def test_directions_that_curve_upwards_keep_their_size():
    where = whitening(np.zeros(2), np.diag([4.0, -9.0]))
    assert np.allclose(np.sort(np.abs(where.root).max(0)), [1 / 3, 1 / 2])


def test_a_diagonal_is_enough():
    where = Whitening(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
    assert np.allclose(where.point(np.ones(2)), [3.0, 5.0])
    assert np.allclose(where.slope(np.ones(2)), [2.0, 3.0])

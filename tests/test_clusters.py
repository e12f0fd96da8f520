"""Clusters: rows that lie apart are told apart, in no units, whatever is missing, tied or too few."""

import warnings

import numpy as np
import pytest

from symhmm.models.clusters import MOST_ROWS, kmeans, means, numbered, ranks


def lumps(rows, seed=0):
    """Three lumps in two dimensions, and which row lies in which."""
    generator = np.random.default_rng(seed)
    z = generator.integers(0, 3, rows)
    return np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 5.0]])[z] + 0.3 * generator.standard_normal((rows, 2)), z


def same_groups(a, b):
    return len({*zip(a.tolist(), b.tolist(), strict=True)}) == len(set(a.tolist())) == len(set(b.tolist()))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [60, MOST_ROWS + 500])
def test_lumps_are_found_from_any_seed(rows, seed):
    x, z = lumps(rows)
    label = kmeans(x, 3, seed)
    assert same_groups(label, z)
    assert np.array_equal(label, kmeans(x, 3, seed))


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_few_distinct_rows_leave_clusters_empty(number):
    x = np.repeat([[0.1], [0.9]], 20, axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        label = kmeans(x, number, 0)
    assert len(set(label.tolist())) == min(number, 2)
    assert len(set(label[:20].tolist())) == len(set(label[20:].tolist())) == 1


def test_many_ties_do_not_warn():
    x = np.repeat([[0.1], [0.5], [0.9], [0.95]], [30, 1, 30, 2], axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):
            assert len(set(kmeans(x, 3, seed).tolist())) == 3


def test_ranks_have_no_units_and_what_is_missing_is_in_the_middle():
    y = np.array([3.0, -1.0, np.nan, 10.0])
    assert ranks(y, "gaussian").tolist() == [2 / 3, 1 / 3, 0.5, 1.0]
    assert np.array_equal(ranks(np.exp(5 * y), "gamma"), ranks(y, "gaussian"))
    angles = np.array([0.1, -0.1, 3.0, -3.0, 0.1 + 2 * np.pi])
    assert ranks(angles, "vonmises").tolist() == pytest.approx([0.8, 0.8, 0.3, 0.3, 0.8], abs=0.21)
    assert ranks(np.full(2, np.nan), "gaussian").tolist() == [0.5, 0.5]


def test_numbers_follow_the_means_and_empty_clusters_come_last():
    y = np.array([5.0, 5.0, 1.0, np.nan, 3.0])
    label = np.array([0, 0, 2, 2, 3])
    assert means(y, label, 4) == [5.0, np.inf, 1.0, 3.0]
    assert numbered(label, means(y, label, 4)).tolist() == [2, 2, 0, 0, 1]

"""Clusters: rows of several streams told apart by k-means on their ranks, which is where starting values come from."""

import warnings
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from symhmm.models.emissions import Array

CIRCULAR = ("vonmises", "wrapped_cauchy")
MOST_ROWS = 20_000  # from which centres are found
TRIES = 4  # of which the tightest clusters are kept
ROUNDS = 50

Labels = NDArray[np.int64]


def ranks(y: Array, family: str) -> Array:
    """Ranks of a stream's values, between 0 and 1 and so in no units; a missing value (NaN) counts as a middling one.

    Angles count by their cosine, the distance from 0.

    >>> ranks(np.array([30.0, np.nan, 10.0]), "gaussian").tolist()
    [1.0, 0.5, 0.5]
    """
    from scipy.stats import rankdata

    seen = np.isfinite(y)
    out = np.full(len(y), 0.5)
    out[seen] = rankdata(np.cos(y[seen]) if family in CIRCULAR else y[seen]) / max(seen.sum(), 1)
    return out


def kmeans(x: Array, number: int, seed: int) -> Labels:
    """Labels of rows by k-means (Lloyd 1982; first centres as in Arthur and Vassilvitskii 2007), the best of some tries.

    Data with fewer distinct rows than clusters leave some of them empty.

    >>> a, b, c = kmeans(np.array([[0.0], [0.1], [5.0]]), 2, seed=0)
    >>> bool(a == b != c)
    True
    """
    from scipy.cluster.vq import kmeans2

    generator = np.random.default_rng(seed)
    some = x if len(x) <= MOST_ROWS else x[generator.choice(len(x), MOST_ROWS, replace=False)]
    distinct = np.unique(some, axis=0)
    if len(distinct) <= number:
        return _nearest(x, distinct)[0]
    found = []
    for _ in range(TRIES):
        with warnings.catch_warnings():
            # A cluster that loses its rows on the way keeps its centre: the try is judged like the others.
            warnings.filterwarnings("ignore", message="One of the clusters is empty")
            found.append(kmeans2(some, number, iter=ROUNDS, minit="++", seed=generator)[0])
    return _nearest(x, min(found, key=lambda centres: _nearest(some, centres)[1]))[0]


def numbered(label: Labels, means: Iterable[float]) -> Labels:
    """Labels in the order of the clusters' ``means``; empty clusters, whose mean is not finite, come last.

    >>> numbered(np.array([0, 1, 1]), [5.0, 2.0]).tolist()
    [1, 0, 0]
    """
    order: Labels = np.argsort([m if np.isfinite(m) else np.inf for m in means], kind="stable")
    return np.argsort(order, kind="stable")[label]


def means(y: Array, label: Labels, number: int) -> list[float]:
    """Mean of a stream in each cluster, NaN left out; infinite where there is none."""
    groups = [y[(label == k) & np.isfinite(y)] for k in range(number)]
    return [float(g.mean()) if len(g) else np.inf for g in groups]


def _nearest(x: Array, centres: Array) -> tuple[Labels, float]:
    """Nearest centre of each row, and the sum of squared distances to it."""
    squares = ((x[:, None] - centres) ** 2).sum(-1)
    return squares.argmin(-1), float(squares.min(-1).sum())

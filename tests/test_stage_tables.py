"""Tables of the stages of a step: strides and lists name the same products, and lists leave out what is impossible."""

import numpy as np
import pytest
from test_staged import CASES

from symhmm.chains.stage_tables import (
    COLUMNS,
    ENTRIES,
    FIRST,
    HEAD,
    IN_READ,
    INNER,
    INNERS,
    INPUTS,
    LAST,
    LISTED,
    NEW,
    OUT_NEW,
    OUTER,
    OUTERS,
    READ,
    ROWS,
    SPARSE,
    SUMS,
    WEIGHT_NEW,
    WEIGHT_READ,
    tables,
)
from symhmm.chains.stages import Stage, Stages, arranged


def pairs(t, begin, groups):
    """(group, first, second) of a list."""
    return [(o, t[k], t[k + 1]) for o in range(groups) for k in range(t[begin + o], t[begin + o + 1], 2)]


def strided(t, h):
    """(result, read, weight) of every product, by strides."""
    count, inners = h[OUTERS], h[INNERS]
    return [
        (
            t[u] + t[i] + n * h[OUT_NEW],
            t[u + count] + t[i + inners] + r * h[IN_READ],
            t[u + 2 * count] + n * h[WEIGHT_NEW] + r * h[WEIGHT_READ],
        )
        for u in range(h[OUTER], h[OUTER] + count)
        for i in range(h[INNER], h[INNER] + inners)
        for n in range(h[NEW])
        for r in range(h[READ])
    ]


@pytest.mark.parametrize("name", CASES)
def test_strides_and_lists_name_the_same_products(name):
    stages, _ = arranged(*CASES[name])
    found = tables(stages)
    t, written = found.numbers, 0
    for k in range(found.stages):
        h = t[k * HEAD : (k + 1) * HEAD]
        rows = pairs(t, h[ROWS], h[SUMS])
        assert not h[LISTED] and sorted(rows) == sorted(strided(t, h))
        # The first block that reads a place writes its gradient, later ones add to it.
        first = set()
        for u in range(h[OUTER], h[OUTER] + h[OUTERS]):
            place = t[u + h[OUTERS]]
            assert bool(t[u + 3 * h[OUTERS]]) == (place not in first)
            first.add(place)
        written += len(rows)
    assert found.products == written == stages.cost and found.place.tolist() == list(range(sum(stages.entries)))


def test_a_list_leaves_out_what_is_impossible():
    stages = Stages((4, 6), (Stage(2, (0, 2)), Stage(3, (1, 3))))
    possible = np.zeros(16 + 36, np.bool_)
    possible[[1, 4, 16 + 7, 16 + 14, 16 + 35]] = True
    found = tables(stages, possible.tobytes())
    t = found.numbers
    assert found.place.tolist() == [1, 4, 23, 30, 51] and SPARSE >= 2 / 16
    for k, (entries, inner) in enumerate(((2, 6), (3, 4))):
        h = t[k * HEAD : (k + 1) * HEAD]
        rows = pairs(t, h[ROWS], h[SUMS])
        assert h[LISTED] and len(rows) == entries * inner
        columns = [(o, r, w) for r, o, w in pairs(t, h[COLUMNS], h[INPUTS])]
        by_weight = [(o, r, w + h[FIRST]) for w, o, r in pairs(t, h[ENTRIES], h[LAST] - h[FIRST])]
        assert sorted(rows) == sorted(columns) == sorted(by_weight)


def test_too_many_possible_moves_are_no_list():
    stages = Stages((8,), (Stage(1, (0, 1)),))
    possible = np.zeros(64, np.bool_)
    possible[: int(64 * SPARSE) + 1] = True
    found = tables(stages, possible.tobytes())
    assert not found.numbers[LISTED] and found.place.size == 64

"""Kernels of the k best hidden paths (numba): sorted lists of scores of every step backwards, then states forwards."""

# numba infers the types of kernels.
# mypy: allow-untyped-defs, no-check-untyped-defs

import numpy as np

from symhmm.chains.jit import kernel


@kernel
def _arrivals(e, after, to, size, arrival):
    """The best sums of an emission's scores and of what follows, for each state that can be next: (size, k), sorted."""
    count, ranks = arrival.shape[1], e.shape[1]
    heads = np.zeros(ranks, np.int64)
    for j in range(size):
        heads[:] = 0
        for m in range(count):
            best, choice = -np.inf, -1
            for q in range(ranks):
                if heads[q] < count:
                    x = e[j, q] + after[to + j, heads[q]]
                    if x > best:
                        best, choice = x, q
            arrival[j, m] = best
            if choice >= 0:
                heads[choice] += 1


@kernel
def ranked_recursion(first, last, transition, t_rows, emission, e_rows, stops, values):
    """The k best log-weights of all that follows each state of each step [chains, steps + 1, S, k], best first."""
    length, states, count = values.shape[1] - 1, values.shape[2], values.shape[3]
    size, ranks = transition.shape[3], transition.shape[4]
    rest = states // size
    moving, varying = transition.shape[1] > 1, emission.shape[1] > 1
    arrival = np.empty((size, count))
    heads = np.zeros((size, ranks), np.int64)
    for r in range(first, last):
        a, e = transition[t_rows[r]], emission[e_rows[r]]
        values[r] = -np.inf
        for t in range(stops[r], length + 1):
            values[r, t, :, 0] = 0.0
        for t in range(stops[r] - 1, -1, -1):
            at, et = t if moving else 0, t if varying else 0
            for s in range(states):
                _arrivals(e[et], values[r, t + 1], (s % rest) * size, size, arrival)
                heads[:] = 0
                for m in range(count):
                    best, where, which = -np.inf, -1, 0
                    for j in range(size):
                        for p in range(ranks):
                            if heads[j, p] < count:
                                x = a[at, s, j, p] + arrival[j, heads[j, p]]
                                if x > best:
                                    best, where, which = x, j, p
                    if where < 0:
                        break
                    values[r, t, s, m] = best
                    heads[where, which] += 1


@kernel
def ranked_follow(
    first, last, rows, state, rank, transition, t_rows, emission, e_rows, stops, values, paths, t_ranks, e_ranks
):
    """The path of each given rank [paths, steps], with the ranks of the transition's and the emission's own scores."""
    states, count = values.shape[2], values.shape[3]
    size, ranks, e_count = transition.shape[3], transition.shape[4], emission.shape[3]
    rest = states // size
    moving, varying = transition.shape[1] > 1, emission.shape[1] > 1
    arrival = np.empty((size, count))
    heads = np.zeros((size, ranks), np.int64)
    inner_heads = np.zeros(e_count, np.int64)
    for i in range(first, last):
        r, s, m = rows[i], state[i], rank[i]
        a, e = transition[t_rows[r]], emission[e_rows[r]]
        for t in range(stops[r]):
            at, et = t if moving else 0, t if varying else 0
            to = (s % rest) * size
            # The same choices in the same order as in the recursion, so that equal scores stay apart.
            _arrivals(e[et], values[r, t + 1], to, size, arrival)
            heads[:] = 0
            where, which = 0, 0
            for n in range(m + 1):
                best = -np.inf
                for j in range(size):
                    for p in range(ranks):
                        if heads[j, p] < count:
                            x = a[at, s, j, p] + arrival[j, heads[j, p]]
                            if x > best:
                                best, where, which = x, j, p
                if n < m:
                    heads[where, which] += 1
            wanted = heads[where, which]
            inner_heads[:] = 0
            choice = 0
            for n in range(wanted + 1):
                best = -np.inf
                for q in range(e_count):
                    if inner_heads[q] < count:
                        x = e[et, where, q] + values[r, t + 1, to + where, inner_heads[q]]
                        if x > best:
                            best, choice = x, q
                if n < wanted:
                    inner_heads[choice] += 1
            paths[i, t], t_ranks[i, t], e_ranks[i, t] = where, which, choice
            s, m = to + where, inner_heads[choice]

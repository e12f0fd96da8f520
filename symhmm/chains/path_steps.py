"""Kernels of hidden paths (numba): messages of every step backwards, then states forwards."""

import numpy as np
from numba import njit

from symhmm.chains.jit import kernel


@kernel
def recursion(first, last, maximise, transition, t_rows, emission, e_rows, stops, values):
    """Log-weight of all that follows each state of each step [chains, steps + 1, S], in double precision."""
    length, states = values.shape[1] - 1, values.shape[2]
    size = transition.shape[3]
    rest = states // size
    moving, varying = transition.shape[1] > 1, emission.shape[1] > 1
    arrival = np.empty(states)
    for r in range(first, last):
        a, e = transition[t_rows[r]], emission[e_rows[r]]
        for t in range(length, stops[r] - 1, -1):
            values[r, t] = 0.0
        for t in range(stops[r] - 1, -1, -1):
            at, et = t if moving else 0, t if varying else 0
            for s in range(states):
                arrival[s] = e[et, s % size] + values[r, t + 1, s]
            for s in range(states):
                to = (s % rest) * size
                best = -np.inf
                for j in range(size):
                    best = max(best, a[at, s, j] + arrival[to + j])
                if not maximise and best > -np.inf:
                    total = 0.0
                    for j in range(size):
                        total += np.exp(a[at, s, j] + arrival[to + j] - best)
                    best += np.log(total)
                values[r, t, s] = best


@njit(nogil=True, inline="always")
def _uniform(key, t):
    """Number t of the stream ``key``, in [0, 1): splitmix64 (Steele, Lea and Flood 2014)."""
    x = key + np.uint64(t + 1) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * 1.1102230246251565e-16


@kernel
def draw(
    first, last, chains, starts, order, state, keys,
    transition, t_rows, emission, e_rows, stops, values, block, paths,
):  # fmt: skip
    """Draw paths [paths, steps]; those of one chain share tables of cumulative probabilities, some steps at a time."""
    length, states = values.shape[1] - 1, values.shape[2]
    size = transition.shape[3]
    rest = states // size
    moving, varying = transition.shape[1] > 1, emission.shape[1] > 1
    below = np.empty((min(block, length), states, size))
    for g in range(first, last):
        r = chains[g]
        a, e = transition[t_rows[r]], emission[e_rows[r]]
        for begin in range(0, length, block):
            end = min(begin + block, length)
            for t in range(begin, end):
                at, et = t if moving else 0, t if varying else 0
                for s in range(states):
                    to = (s % rest) * size
                    # Weights relative to the largest one: the message of s itself is their sum up to rounding.
                    peak = -np.inf
                    for j in range(size):
                        peak = max(peak, a[at, s, j] + e[et, j] + values[r, t + 1, to + j])
                    total, possible = 0.0, 0
                    for j in range(size):
                        weight = 0.0
                        if peak > -np.inf:
                            weight = np.exp(a[at, s, j] + e[et, j] + values[r, t + 1, to + j] - peak)
                        if weight > 0.0:
                            possible = j
                        total += weight
                        below[t - begin, s, j] = total
                    for j in range(size):
                        # Rounding must not let a number fall behind the last state that is possible.
                        below[t - begin, s, j] = 2.0 if j >= possible else below[t - begin, s, j] / total
            for i in range(starts[g], starts[g + 1]):
                p = order[i]
                s, key = state[p], keys[p]
                for t in range(begin, end):
                    u = _uniform(key, t)
                    j = 0
                    if size <= 8:  # without a branch that cannot be foreseen
                        for k in range(size - 1):
                            j += u >= below[t - begin, s, k]
                    else:
                        while u >= below[t - begin, s, j]:
                            j += 1
                    paths[p, t] = j
                    s = (s % rest) * size + j
                state[p] = s


@kernel
def follow(first, last, rows, state, transition, t_rows, emission, e_rows, stops, values, paths):
    """The best state after the one before, step by step [paths, steps]."""
    length, states = values.shape[1] - 1, values.shape[2]
    size = transition.shape[3]
    rest = states // size
    moving, varying = transition.shape[1] > 1, emission.shape[1] > 1
    for p in range(first, last):
        r, s = rows[p], state[p]
        a, e = transition[t_rows[r]], emission[e_rows[r]]
        for t in range(length):
            at, et = t if moving else 0, t if varying else 0
            to = (s % rest) * size
            best, choice = -np.inf, 0
            for j in range(size):
                x = a[at, s, j] + e[et, j] + values[r, t + 1, to + j]
                if x > best:
                    best, choice = x, j
            paths[p, t] = choice
            s = to + choice

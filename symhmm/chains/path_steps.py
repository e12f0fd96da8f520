"""Drawing hidden paths forwards from stored messages (numba)."""

# numba infers the types of kernels.
# mypy: allow-untyped-defs, no-check-untyped-defs

import numpy as np

from symhmm.chains.jit import inner, kernel


@inner
def uniform(key, t):
    """Number t of the stream ``key``, in [0, 1): splitmix64 (Steele, Lea and Flood 2014)."""
    x = key + np.uint64(t + 1) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * 1.1102230246251565e-16


@inner
def _cumulate(
    below, s, to, size, ready, moves, arrival, logs,
    transition, f, t_from, t_to, emission, e, e_to, messages, m, lanes,
):  # fmt: skip
    """Cumulative probabilities of the next state from joint state s, the last possible one at 2: no number is beyond it.

    ``arrival`` is the weight of each next joint state and what follows, in some unit; ``moves`` that of each move if
    ``ready``. Where their products vanish, and in chains whose messages are logarithms, logarithms are added instead.
    """
    total = 0.0
    if not logs:
        for j in range(size):
            w = moves[s, j] if ready else np.exp(transition[f + s * t_from + j * t_to])
            total += w * arrival[to + j]
            below[j] = total
    if not total > 1e-280 or total == np.inf:
        # Weights relative to the largest one.
        peak = -np.inf
        for j in range(size):
            follows = np.float64(messages[m + (to + j) * lanes])
            if not logs:
                follows = np.log(follows) if follows > 0.0 else -np.inf
            below[j] = np.float64(transition[f + s * t_from + j * t_to]) + emission[e + j * e_to] + follows
            peak = max(peak, below[j])
        total = 0.0
        for j in range(size):
            total += np.exp(below[j] - peak) if peak > -np.inf else 0.0
            below[j] = total
    possible, before = 0, 0.0
    for j in range(size):
        if below[j] > before:
            possible = j
        before = below[j]
    for j in range(size):
        # Rounding must not let a number fall behind the last state that is possible.
        below[j] = 2.0 if j >= possible else below[j] / total


@kernel
def draw(
    first, last, chains, starts, order, state, keys, size, rest, length, block,
    transition, t_row, t_time, t_from, t_to,
    emission, e_row, e_time, e_to,
    messages, cuts, lanes, careful, paths,
):  # fmt: skip
    """Draw paths [paths, steps].

    Many paths of one chain share tables of cumulative probabilities, ``block`` steps at a time; few make their own rows.

    Args:
        chains, starts, order: the chains, where each one's paths begin in ``order``, and the paths sorted by chain.
        messages: of every step, [steps + 1, S, lanes]; each chain is cut into blocks that are lanes of their own.
        cuts: first step of each block, and the end.
        careful: chains whose messages are logarithms.
    """
    states, blocks = size * rest, cuts.size - 1
    below = np.empty((min(block, length), states, size))
    moves, arrival, row = np.empty((states, size)), np.empty(states), np.empty(size)
    for g in range(first, last):
        r, logs = chains[g], careful[chains[g]]
        ready, few = t_time == 0, starts[g + 1] - starts[g] < states
        if ready:
            for s in range(states):
                for j in range(size):
                    moves[s, j] = np.exp(np.float64(transition[t_row[r] + s * t_from + j * t_to]))
        part = 0
        for begin in range(0, length, block):
            end = min(begin + block, length)
            for t in range(begin, end):
                f, e = t_row[r] + t * t_time, e_row[r] + t * e_time
                while t >= cuts[part + 1]:
                    part += 1
                # The message after step t: at place t + 1 of its block.
                m = (t + 1 - cuts[part]) * states * lanes + r * blocks + part
                if not logs:
                    peak = -np.inf
                    for j in range(size):
                        peak = max(peak, np.float64(emission[e + j * e_to]))
                    peak = peak if peak > -np.inf else 0.0
                    for j in range(size):
                        weight = np.exp(emission[e + j * e_to] - peak)
                        for s in range(j, states, size):
                            arrival[s] = weight * messages[m + s * lanes]
                if few:
                    for i in range(starts[g], starts[g + 1]):
                        p = order[i]
                        s = state[p]
                        _cumulate(
                            row, s, (s % rest) * size, size, ready, moves, arrival, logs,
                            transition, f, t_from, t_to, emission, e, e_to, messages, m, lanes,
                        )  # fmt: skip
                        u, j = uniform(keys[p], t), 0
                        while u >= row[j]:
                            j += 1
                        paths[p, t] = j
                        state[p] = (s % rest) * size + j
                    continue
                for s in range(states):
                    _cumulate(
                        below[t - begin, s], s, (s % rest) * size, size, ready, moves, arrival, logs,
                        transition, f, t_from, t_to, emission, e, e_to, messages, m, lanes,
                    )  # fmt: skip
            if few:
                continue
            for i in range(starts[g], starts[g + 1]):
                p = order[i]
                s, key = state[p], keys[p]
                for t in range(begin, end):
                    u = uniform(key, t)
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

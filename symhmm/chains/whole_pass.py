"""Value and gradient of chains in one call (numba): both recursions over a few lanes before the next ones are begun.

Messages are read again while they are still in the cache, and threads do not wait for each other between the recursions.
"""

import numpy as np

from symhmm.chains.jit import inner, kernel
from symhmm.chains.lanes_backward import lanes_backward
from symhmm.chains.lanes_forward import lanes_forward
from symhmm.chains.simd import lanes_of, numbers_at


@inner
def _begin(a, chains, lanes, states, terms, rows, stride, weights, weight_rows, starts, evidence, first):
    """Log-probabilities of the chains from ``a`` on, and of their initial states given all that was seen, times a weight.

    ``starts`` [S, lanes] holds the messages, and receives the same as ``first`` [chains, S].
    """
    for lane in range(chains):
        b, peak, possible = a + lane, -np.inf, False
        for m in range(lane, states * lanes, lanes):
            starts[m] += terms[rows[b] + m // lanes * stride]
            possible |= starts[m] != -np.inf
            if peak < starts[m] < np.inf:
                peak = starts[m]
        if peak == -np.inf:  # what is possible is no finite number
            peak = 0.0
        total = 0.0
        for m in range(lane, states * lanes, lanes):
            starts[m] = np.exp(starts[m] - peak)
            total += starts[m]
        evidence[b] = peak + np.log(total) if possible else -np.inf
        for m in range(lane, states * lanes, lanes):
            starts[m] = weights[weight_rows[b]] * (starts[m] / total) if possible else 0.0
            first[b * states + m // lanes] = starts[m]


@kernel
def whole_pass(
    first_group, last_group, shape, like, transition_at, f, emission_at, e, terminal_at, z, initial_at, i, weight_at, w, lost,
    scratch_at, results_at, gradients_at, gf, ge,
):  # fmt: skip
    """Log-probabilities of the chains of some groups of lanes, and their gradients.

    Args:
        shape: states K, joint states S / K, steps, chains, groups of lanes that are done together.
        f, e: where the transition and emission terms lie, see `symhmm.chains.places.Places`: lanes, strides, and for the
            transition whether all lanes share it.
        z, i, w: where the terminal and initial terms and the weights of the results lie: chains and, but for the weights,
            stride.
        lost: receives which lanes have lost a message; they are left out of the gradients.
        scratch_at: address of messages [steps + 1, S, lanes] and scales [steps, lanes].
        results_at: addresses of the log-probabilities [chains], and of the probabilities [chains, S] of the states before the
            first and after the last step, times the weights.
        gradients_at: addresses of the gradients of transition and emission terms.
        gf, ge: as in `symhmm.chains.passes.backward_pass`, without the bytes.
    """
    size, rest, steps, chains, tile = shape
    states = size * rest
    terminal, initial = numbers_at(terminal_at, like), numbers_at(initial_at, like)
    weights, evidence = numbers_at(weight_at, like), numbers_at(results_at[0], like)
    first, last = numbers_at(results_at[1], like), numbers_at(results_at[2], like)
    messages = numbers_at(scratch_at, like)
    width = lanes_of(messages)
    most = states * tile * width
    idle, ending, starts = np.zeros(tile * width, np.bool_), np.empty(most), np.empty(most)
    starting, finishing = np.empty(most, messages.dtype), np.empty(most, messages.dtype)
    for low in range(first_group, last_group, tile):
        count = min(tile, last_group - low)
        a, lanes = low * width, count * width
        inside = min(lanes, chains - a)
        scales_at = scratch_at + (steps + 1) * states * lanes * messages.itemsize
        for lane in range(lanes):
            for s in range(states):
                ending[s * lanes + lane] = terminal[z[0][min(a + lane, chains - 1)] + s * z[1]]
        lanes_forward(
            0, count, size, rest, steps, lanes, idle,
            like, transition_at, f[0][a : a + lanes], f[1], f[2], f[3], f[4],
            emission_at, e[0][a : a + lanes], e[1], e[2],
            ending, True, scratch_at, scales_at, starts, lost[a : a + lanes],
        )  # fmt: skip
        _begin(a, inside, lanes, states, initial, i[0], i[1], weights, w, starts, evidence, first)
        for m in range(states * lanes):
            use = m % lanes < inside and not lost[a + m % lanes] and messages[m] > 0.0
            starting[m] = starts[m] / messages[m] if use else 0.0
        lanes_backward(
            0, count, size, rest, steps, lanes, inside, idle,
            like, transition_at, f[0][a : a + lanes], f[1], f[2], f[3], f[4],
            emission_at, e[0][a : a + lanes], e[1], e[2],
            starting, scratch_at, scales_at, gradients_at[0], gf[0][a : a + lanes], gf[1],
            gradients_at[1], ge[0][a : a + lanes], ge[1], ge[2], ge[3], finishing,
        )  # fmt: skip
        for lane in range(inside):
            for s in range(states):
                last[(a + lane) * states + s] = finishing[s * lanes + lane]

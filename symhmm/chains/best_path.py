"""Chain kernels in the max-plus semiring (numba): the best hidden path of every chain (Viterbi 1967)."""

# numba infers the types of kernels.
# mypy: allow-untyped-defs, no-check-untyped-defs

import numpy as np

from symhmm.chains.jit import kernel


@kernel
def best_forward(
    first_chain, last_chain, size, rest, length,
    transition, t_row, t_time, t_from, t_to,
    emission, e_row, e_time, e_to,
    terminal, z_row, z_from,
    message, choices,
):  # fmt: skip
    """Best log-weight from every initial state [chains, S], and from every step and state the first best next state."""
    states = size * rest
    after, before, arrival = np.empty(states), np.empty(states), np.empty(states)
    for b in range(first_chain, last_chain):
        norm = 0.0
        for s in range(states):
            after[s] = terminal[z_row[b] + s * z_from]
        for t in range(length - 1, -1, -1):
            e, f = e_row[b] + t * e_time, t_row[b] + t * t_time
            # Only differences matter for the choice; small numbers keep them exact.
            peak = after.max()
            if peak > -np.inf:
                norm += peak
                after -= peak
            for s in range(states):
                arrival[s] = after[s] + emission[e + (s % size) * e_to]
            for s in range(states):
                first, k = (s % rest) * size, f + s * t_from
                best, choice = -np.inf, -1
                for j in range(size):
                    x = transition[k + j * t_to] + arrival[first + j]
                    if x > best or np.isnan(x):
                        best, choice = x, j
                before[s] = best
                choices[(b * length + t) * states + s] = choice
            after, before = before, after
        for s in range(states):
            message[b * states + s] = after[s] + norm


@kernel
def best_backward(
    chains, size, rest, length, weight, choices,
    g_transition, gt_row, gt_time,
    g_emission, ge_row, ge_time,
    g_terminal, gz_row,
):  # fmt: skip
    """Add the weight of every initial state along its best path; where no path is possible there is none."""
    states = size * rest
    here, there = np.empty(states), np.empty(states)
    for b in range(chains):
        for s in range(states):
            here[s] = weight[b * states + s]
        for t in range(length):
            there[:] = 0.0
            for s in range(states):
                j = choices[(b * length + t) * states + s]
                if here[s] == 0.0 or j < 0:
                    continue
                there[(s % rest) * size + j] += here[s]
                g_transition[gt_row[b] + t * gt_time + s * size + j] += here[s]
                g_emission[ge_row[b] + t * ge_time + j] += here[s]
            here, there = there, here
        for s in range(states):
            g_terminal[gz_row[b] + s] += here[s]

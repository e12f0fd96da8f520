"""Chain kernels in log space (numba): slow, and right whatever the range of the numbers. The fast kernels end here when
a message spans more orders of magnitude than their dtype has."""

import numpy as np

from symhmm.chains.jit import kernel


@kernel
def careful_forward(
    chains, size, rest, starts,
    transition, t_row, t_time, t_from, t_to,
    emission, e_row, e_time, e_to,
    terminal, z_row, z_from,
    messages, scales, lanes, message,
):  # fmt: skip
    """Backward recursion of some chains; messages are stored as logarithms with maximum 0 and marked by a scale of -1."""
    states, blocks = size * rest, starts.size - 1
    after, before, arrival = np.empty(states), np.empty(states), np.empty(states)
    for b in chains:
        norm = 0.0
        for s in range(states):
            after[s] = terminal[z_row[b] + s * z_from]
        for block in range(blocks - 1, -1, -1):
            lane = b * blocks + block
            for t in range(starts[block + 1], starts[block] - 1, -1):
                peak = after.max()
                if peak > -np.inf:
                    norm += peak
                    after -= peak
                at = t - starts[block]
                for s in range(states):
                    messages[(at * states + s) * lanes + lane] = after[s]
                if at == 0:
                    break
                scales[(at - 1) * lanes + lane] = -1.0
                e, f = e_row[b] + (t - 1) * e_time, t_row[b] + (t - 1) * t_time
                for s in range(states):
                    arrival[s] = after[s] + emission[e + (s % size) * e_to]
                for s in range(states):
                    first, k = (s % rest) * size, f + s * t_from
                    best = -np.inf
                    for j in range(size):
                        best = max(best, transition[k + j * t_to] + arrival[first + j])
                    before[s] = best
                    if best > -np.inf:
                        total = 0.0
                        for j in range(size):
                            total += np.exp(transition[k + j * t_to] + arrival[first + j] - best)
                        before[s] += np.log(total)
                after, before = before, after
        for s in range(states):
            message[b * states + s] = after[s] + norm


@kernel
def careful_backward(
    chains, size, rest, starts, weight,
    transition, t_row, t_time, t_from, t_to,
    emission, e_row, e_time, e_to,
    messages, lanes,
    g_transition, gt_row, gt_time,
    g_emission, ge_row, ge_time, ge_to,
    g_terminal, gz_row,
):  # fmt: skip
    """Forward recursion of the occupancies of some chains; gradients are added."""
    states, blocks = size * rest, starts.size - 1
    here, there, move, counts = np.empty(states), np.empty(states), np.empty(size), np.zeros(states * size)
    for b in chains:
        for s in range(states):
            here[s] = weight[b * states + s]
        for block in range(blocks):
            lane = b * blocks + block
            for t in range(starts[block], starts[block + 1]):
                there[:] = 0.0
                message = (t + 1 - starts[block]) * states
                f, e = t_row[b] + t * t_time, e_row[b] + t * e_time
                for s in range(states):
                    first = (s % rest) * size
                    best = -np.inf
                    for j in range(size):
                        move[j] = (
                            transition[f + s * t_from + j * t_to]
                            + emission[e + j * e_to]
                            + messages[(message + first + j) * lanes + lane]
                        )
                        best = max(best, move[j])
                    if here[s] == 0.0 or best == -np.inf:
                        continue
                    norm = 0.0
                    for j in range(size):
                        move[j] = np.exp(move[j] - best)
                        norm += move[j]
                    for j in range(size):
                        flow = here[s] * move[j] / norm
                        there[first + j] += flow
                        counts[s * size + j] += flow
                        g_emission[ge_row[b] + t * ge_time + j * ge_to] += flow
                if gt_time > 0:
                    for k in range(states * size):
                        g_transition[gt_row[b] + t * gt_time + k] += counts[k]
                    counts[:] = 0.0
                here, there = there, here
        if gt_time == 0:
            for k in range(states * size):
                g_transition[gt_row[b] + k] += counts[k]
            counts[:] = 0.0
        for s in range(states):
            g_terminal[gz_row[b] + s] += here[s]

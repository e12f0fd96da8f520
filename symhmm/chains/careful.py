"""Chain kernels in log space (numba): slow, and right whatever the range of the numbers. The fast kernels end here when
a message spans more orders of magnitude than their dtype has."""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def careful_forward(
    rows, size, rest, length,
    transition, t_row, t_time, t_from, t_to,
    emission, e_row, e_time, e_to,
    terminal, z_row, z_from,
    messages, lanes, scales, message,
):  # fmt: skip
    """Backward recursion for ``rows``; messages are stored as logarithms with maximum 0 and marked by a scale of -1."""
    states = size * rest
    after, before, arrival = np.empty(states), np.empty(states), np.empty(states)
    for b in rows:
        total = 0.0
        for s in range(states):
            before[s] = terminal[z_row[b] + s * z_from]
        for t in range(length, -1, -1):
            peak = before.max()
            if peak > -np.inf:
                total += peak
            else:
                peak = 0.0
            for s in range(states):
                after[s] = before[s] - peak
                messages[(t * states + s) * lanes + b] = after[s]
            if t == 0:
                break
            scales[(t - 1) * lanes + b] = -1.0
            e = e_row[b] + (t - 1) * e_time
            for s in range(states):
                arrival[s] = after[s] + emission[e + (s % size) * e_to]
            f = t_row[b] + (t - 1) * t_time
            for s in range(states):
                first = (s % rest) * size
                best = -np.inf
                for j in range(size):
                    best = max(best, transition[f + s * t_from + j * t_to] + arrival[first + j])
                before[s] = -np.inf
                if best > -np.inf:
                    norm = 0.0
                    for j in range(size):
                        norm += np.exp(transition[f + s * t_from + j * t_to] + arrival[first + j] - best)
                    before[s] = best + np.log(norm)
        for s in range(states):
            message[b * states + s] = after[s] + total


@njit(nogil=True, cache=True)
def careful_backward(
    rows, size, rest, length, weight,
    transition, t_row, t_time, t_from, t_to,
    emission, e_row, e_time, e_to,
    messages, lanes,
    g_transition, gt_row, gt_time,
    g_emission, ge_row, ge_time,
    g_terminal, gz_row,
):  # fmt: skip
    """Forward recursion of the occupancies of ``rows``; gradients are added to contiguous arrays."""
    states = size * rest
    here, there, move, counts = np.empty(states), np.empty(states), np.empty(size), np.zeros(states * size)
    for b in rows:
        for s in range(states):
            here[s] = weight[b * states + s]
        for t in range(length):
            there[:] = 0.0
            f, e = t_row[b] + t * t_time, e_row[b] + t * e_time
            for s in range(states):
                first = (s % rest) * size
                best = -np.inf
                for j in range(size):
                    move[j] = (
                        transition[f + s * t_from + j * t_to]
                        + emission[e + j * e_to]
                        + messages[((t + 1) * states + first + j) * lanes + b]
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
                    g_emission[ge_row[b] + t * ge_time + j] += flow
            if gt_time > 0 or t == length - 1:
                for k in range(states * size):
                    g_transition[gt_row[b] + t * gt_time + k] += counts[k]
                counts[:] = 0.0
            here, there = there, here
        for s in range(states):
            if messages[(length * states + s) * lanes + b] > -np.inf:
                g_terminal[gz_row[b] + s] += here[s]

"""Chains whose steps go in stages, in log space (numba): slow, and right whatever the range of the numbers."""

# numba infers the types of kernels.
# mypy: allow-untyped-defs, no-check-untyped-defs

import numpy as np

from symhmm.chains.jit import inner, kernel
from symhmm.chains.stage_tables import HEAD, INPUTS, ROWS, SUMS


@inner
def log_stage(out, source, transition, at, place, t, h):
    """The sums of a stage, of logarithms."""
    for o in range(t[h + SUMS]):
        first, last = t[t[h + ROWS] + o], t[t[h + ROWS] + o + 1]
        best = -np.inf
        for k in range(first, last, 2):
            best = max(best, transition[at + place[t[k + 1]]] + source[t[k]])
        out[o] = best
        if best > -np.inf:
            total = 0.0
            for k in range(first, last, 2):
                total += np.exp(transition[at + place[t[k + 1]]] + source[t[k]] - best)
            out[o] = best + np.log(total)


@kernel
def careful_stages_forward(
    chains, states, steps, stages, t, place, largest,
    transition, t_row, t_time, emission, e_row, e_time, e_to, terminal, z_row, z_from,
    messages, scales, lanes, message,
):  # fmt: skip
    """Backward recursion of some chains; messages are stored as logarithms with maximum 0 and marked by a scale of -1."""
    after, one, two = np.empty(states), np.empty(largest), np.empty(largest)
    for b in chains:
        norm = 0.0
        for s in range(states):
            after[s] = terminal[z_row[b] + s * z_from]
        for step in range(steps, -1, -1):
            peak = after.max()
            if peak > -np.inf:
                norm += peak
                after -= peak
            for s in range(states):
                messages[(step * states + s) * lanes + b] = after[s]
            if step == 0:
                break
            scales[(step - 1) * lanes + b] = -1.0
            e, f = e_row[b] + (step - 1) * e_time, t_row[b] + (step - 1) * t_time
            for s in range(states):
                one[s] = after[s] + emission[e + s * e_to]
            for h in range(0, stages * HEAD, HEAD):
                log_stage(two, one, transition, f, place, t, h)
                one, two = two, one
            after[:] = one[:states]
        for s in range(states):
            message[b * states + s] = after[s] + norm


@kernel
def careful_stages_backward(
    chains, states, steps, stages, t, place, largest, weight,
    transition, t_row, t_time, emission, e_row, e_time, e_to,
    messages, lanes, g_transition, gt_row, gt_time, g_emission, finishing,
):  # fmt: skip
    """Occupancies of some chains, and gradients, which are added; `finishing` [S, lanes] is written."""
    here, there = np.empty(largest), np.empty(largest)
    found = np.empty((stages + 1, largest))
    for b in chains:
        for s in range(states):
            here[s] = weight[b * states + s]
        for step in range(steps):
            e, f = e_row[b] + step * e_time, t_row[b] + step * t_time
            for s in range(states):
                found[0, s] = messages[((step + 1) * states + s) * lanes + b] + emission[e + s * e_to]
            for k in range(stages):
                log_stage(found[k + 1], found[k], transition, f, place, t, k * HEAD)
            for k in range(stages - 1, -1, -1):
                h = k * HEAD
                there[: t[h + INPUTS]] = 0.0
                for o in range(t[h + SUMS]):
                    if here[o] == 0.0 or found[k + 1, o] == -np.inf:
                        continue
                    for i in range(t[t[h + ROWS] + o], t[t[h + ROWS] + o + 1], 2):
                        w = t[i + 1]
                        flow = here[o] * np.exp(transition[f + place[w]] + found[k, t[i]] - found[k + 1, o])
                        there[t[i]] += flow
                        g_transition[gt_row[b] + step * gt_time + w] += flow
                here, there = there, here
            for s in range(states):
                g_emission[(b * steps + step) * states + s] += here[s]
        for s in range(states):
            finishing[s * lanes + b] = here[s]

"""Forward filters of chains whose steps go in stages (numba): the stages of a step from the last to the first."""

# numba infers the types of kernels.
# mypy: allow-untyped-defs, no-check-untyped-defs

import numpy as np

from symhmm.chains.filter_steps import LOST, begin
from symhmm.chains.jit import inner, kernel
from symhmm.chains.stage_tables import HEAD, INPUTS, ROWS, SUMS


@inner
def _onwards(flow, weights, stages, t, logs):
    """From the states before a step, in ``flow[stages]``, to those after it, in ``flow[0]``; perhaps as logarithms."""
    none = -np.inf if logs else 0.0
    for k in range(stages - 1, -1, -1):
        h = k * HEAD
        rows = t[h + ROWS]
        flow[k, : t[h + INPUTS]] = none
        for o in range(t[h + SUMS]):
            x = flow[k + 1, o]
            if x == none:
                continue
            for i in range(t[rows + o], t[rows + o + 1], 2):
                if logs:
                    y, z = x + weights[t[i + 1]], flow[k, t[i]]
                    high, low = max(y, z), min(y, z)
                    flow[k, t[i]] = high + np.log1p(np.exp(low - high)) if high > -np.inf else high
                else:
                    flow[k, t[i]] += x * weights[t[i + 1]]


@inner
def _arrive(flow, emission, e, e_to, states, logs):
    """Times the emission terms of a step; returns the sum and its unit."""
    out = flow[0]
    peak = -np.inf
    for s in range(states):
        x = np.float64(emission[e + s * e_to])
        if logs:
            out[s] += x
            x = out[s]
        peak = max(peak, x)
    peak = peak if peak > -np.inf else 0.0
    total = 0.0
    for s in range(states):
        if logs:
            out[s] -= peak
            total += np.exp(out[s])
        else:
            out[s] *= np.exp(emission[e + s * e_to] - peak)
            total += out[s]
    return total, peak


@inner
def _lost(flow, a, states, total, transition, at, place, emission, e, e_to, stages, t, reached, further):
    """Whether a state that some path reaches has a probability too small to trust."""
    least = LOST * total if total > LOST else np.inf
    doubtful = False
    for s in range(states):
        doubtful |= not flow[0, s] >= least
        reached[s] = a[s] > 0.0
    if not doubtful:
        return False
    for k in range(stages - 1, -1, -1):
        h = k * HEAD
        rows = t[h + ROWS]
        for i in range(t[h + INPUTS]):
            further[i] = False
        for o in range(t[h + SUMS]):
            if reached[o]:
                for i in range(t[rows + o], t[rows + o + 1], 2):
                    further[t[i]] |= transition[at + place[t[i + 1]]] > -np.inf
        for i in range(t[h + INPUTS]):
            reached[i] = further[i]
    doubtful = False
    for s in range(states):
        doubtful |= reached[s] and emission[e + s * e_to] > -np.inf and not flow[0, s] >= least
    return doubtful


@kernel
def filter_stages(
    first, last, states, steps, stages, t, largest, start, careful, same,
    transition, t_row, t_time, place, emission, e_row, e_time, e_to,
    now_transition, nt_row, nt_time, now_place, now_emission, ne_row, ne_time, ne_to,
    totals, probabilities,
):  # fmt: skip
    """Log-weight of all paths up to each step, with other terms at the step itself: ``totals`` [chains, steps].

    Args:
        start: [chains, S], logarithms.
        careful: chains to run in logarithms; marks those that need it, whose results then are not to be used.
        same: the terms at the step itself are those of the recursion.
        probabilities: of the states after each step [chains, steps, S]; not written where this has no entries.
    """
    flow, other = np.empty((stages + 1, largest)), np.empty((stages + 1, largest))
    weights, now = np.empty(place.size), np.empty(place.size)
    reached, further = np.empty(largest, np.bool_), np.empty(largest, np.bool_)
    a = np.empty(states)
    for r in range(first, last):
        logs = careful[r]
        norm = begin(a, start, r, states, careful)
        for step in range(steps):
            if careful[r] and not logs:
                break
            f, e = t_row[r] + step * t_time, e_row[r] + step * e_time
            nf, ne = nt_row[r] + step * nt_time, ne_row[r] + step * ne_time
            for k in range(place.size):
                if step == 0 or t_time != 0:
                    x = np.float64(transition[f + place[k]])
                    weights[k] = x if logs else np.exp(x)
                if not same and (step == 0 or nt_time != 0):
                    x = np.float64(now_transition[nf + now_place[k]])
                    now[k] = x if logs else np.exp(x)
            flow[stages, :states] = a
            _onwards(flow, weights, stages, t, logs)
            total, unit = _arrive(flow, emission, e, e_to, states, logs)
            if not logs:
                careful[r] = _lost(
                    flow, a, states, total, transition, f, place, emission, e, e_to, stages, t, reached, further
                )
            shown, shown_unit, seen = total, unit, flow[0]
            if not same:
                other[stages, :states] = a
                _onwards(other, now, stages, t, logs)
                shown, shown_unit = _arrive(other, now_emission, ne, ne_to, states, logs)
                seen = other[0]
                if not logs:
                    careful[r] |= _lost(
                        other, a, states, shown, now_transition, nf, now_place, now_emission, ne, ne_to, stages, t,
                        reached, further,
                    )  # fmt: skip
            totals[r, step] = norm + shown_unit + np.log(shown) if shown != 0.0 else -np.inf
            if probabilities.size > 0:
                share = 1.0 / shown if shown > 0.0 else 0.0
                for s in range(states):
                    probabilities[r, step, s] = share * (np.exp(seen[s]) if logs else seen[s])
            norm += unit
            if total > 0.0:
                norm += 0.0 if logs else np.log(total)
                factor = 1.0 if logs else 1.0 / total
                for s in range(states):
                    a[s] = flow[0, s] * factor
            else:
                for s in range(states):
                    a[s] = flow[0, s]

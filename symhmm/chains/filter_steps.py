"""Forward recursions of chains (numba): the weight of the data up to every step, and its gradient at the step itself."""

# numba infers the types of kernels.
# mypy: allow-untyped-defs, no-check-untyped-defs

import numpy as np

from symhmm.chains.jit import inner, kernel

LOST = 1e-200  # probabilities below this are not trusted: what they were made of may have been flushed to zero


@inner
def begin(a, start, r, states, careful):
    """Initial states of chain ``r`` relative to the likeliest, whose logarithm is returned; marks a chain for logarithms."""
    norm, logs = -np.inf, careful[r]
    for s in range(states):
        norm = max(norm, start[r, s])
    norm = norm if norm > -np.inf else 0.0
    for s in range(states):
        a[s] = start[r, s] - norm
        if not logs:
            careful[r] = careful[r] or (a[s] > -np.inf and a[s] < -400.0)
            a[s] = np.exp(a[s])
    return norm


@inner
def _weigh(x, e, e_to, size):
    """The largest of a step's emission terms, to which their exponentials are relative."""
    peak = -np.inf
    for j in range(size):
        peak = max(peak, np.float64(x[e + j * e_to]))
    return peak if peak > -np.inf else 0.0


@inner
def _linear(
    a, out, flows, moves, ready, size, rest, transition, f, t_from, t_to, emission, e, e_to, weights, keep,
):  # fmt: skip
    """One step of probabilities: sums of flows in ``out``, flows in ``flows`` if kept; returns their sum and its unit."""
    peak = _weigh(emission, e, e_to, size)
    for j in range(size):
        weights[j] = np.exp(emission[e + j * e_to] - peak)
    out[:] = 0.0
    for s in range(size * rest):
        to = 0 if rest == 1 else (s % rest) * size
        for j in range(size):
            w = moves[s, j] if ready else np.exp(np.float64(transition[f + s * t_from + j * t_to]))
            x = a[s] * w * weights[j]
            out[to + j] += x
            if keep:
                flows[s, j] = x
    total = 0.0
    for s in range(size * rest):
        total += out[s]
    return total, peak


@inner
def _lost(a, out, total, size, rest, transition, f, t_from, t_to, emission, e, e_to):
    """Whether a state that some path reaches has a probability too small to trust."""
    for s in range(size * rest):
        if out[s] >= LOST * total and total > LOST:
            continue
        if out[s] > 0.0:
            return True
        j = s % size
        if emission[e + j * e_to] == -np.inf:
            continue
        for i in range(size):
            before = i * rest + s // size
            if a[before] > 0.0 and transition[f + before * t_from + j * t_to] > -np.inf:
                return True
    return False


@inner
def _logarithmic(
    a, out, flows, size, rest, transition, f, t_from, t_to, emission, e, e_to, keep,
):  # fmt: skip
    """The same step with logarithms; ``out`` is relative to its largest entry, ``flows`` are not logarithms."""
    top = -np.inf
    for s in range(size * rest):
        to = s - s % size
        best = -np.inf
        for i in range(size):
            before = i * rest + to // size
            best = max(best, a[before] + transition[f + before * t_from + (s % size) * t_to])
        out[s] = best
        if best > -np.inf:
            x = 0.0
            for i in range(size):
                before = i * rest + to // size
                x += np.exp(a[before] + transition[f + before * t_from + (s % size) * t_to] - best)
            out[s] = best + np.log(x) + emission[e + (s % size) * e_to]
        top = max(top, out[s])
    if top == -np.inf or np.isnan(top):
        return 0.0 if top == -np.inf else np.nan, 0.0
    total = 0.0
    for s in range(size * rest):
        out[s] -= top
        total += np.exp(out[s])
    if keep:
        for s in range(size * rest):
            for j in range(size):
                flows[s, j] = np.exp(a[s] + transition[f + s * t_from + j * t_to] + emission[e + j * e_to] - top)
    return total, top


@kernel
def filter_rows(
    first, last, again, size, rest, length, start, careful, same,
    transition, t_row, t_time, t_from, t_to,
    emission, e_row, e_time, e_to,
    now_transition, nt_row, nt_time, nt_from, nt_to,
    now_emission, ne_row, ne_time, ne_to,
    totals, weight, want_transition, g_transition, gt_row, gt_time, want_emission, g_emission, ge_row, ge_time,
):  # fmt: skip
    """Log-weight of all paths up to each step, with other terms at the step itself: ``totals`` [chains, steps].

    Args:
        again: only the chains in ``careful``.
        start: [chains, S], logarithms.
        careful: chains to run in logarithms; marks those that need it, whose results then are not to be used.
        same: the terms at the step itself are those of the recursion.
        totals: left as they are where this has no entries.
        weight: [chains, steps], 1 where this has no entries; gradients of ``(weight * totals).sum()`` are added to
            ``g_transition`` and ``g_emission``.
    """
    states = size * rest
    a, out, other = np.empty(states), np.empty(states), np.empty(states)
    moves, now_moves = np.empty((states, size)), np.empty((states, size))
    flows, weights = np.empty((states, size)), np.empty(size)
    want = want_transition or want_emission
    for r in range(first, last):
        if again and not careful[r]:
            continue
        logs, shown, at = careful[r], 0.0, 0.0
        norm = begin(a, start, r, states, careful)
        for s in range(states):
            for j in range(size):
                if t_time == 0:
                    moves[s, j] = np.exp(np.float64(transition[t_row[r] + s * t_from + j * t_to]))
                if nt_time == 0:
                    now_moves[s, j] = np.exp(np.float64(now_transition[nt_row[r] + s * nt_from + j * nt_to]))
        for t in range(length):
            if careful[r] and not logs:
                break
            f, e = t_row[r] + t * t_time, e_row[r] + t * e_time
            nf, ne = nt_row[r] + t * nt_time, ne_row[r] + t * ne_time
            if not same:
                if logs:
                    total, unit = _logarithmic(
                        a,
                        other,
                        flows,
                        size,
                        rest,
                        now_transition,
                        nf,
                        nt_from,
                        nt_to,
                        now_emission,
                        ne,
                        ne_to,
                        want_transition,
                    )
                else:
                    total, unit = _linear(
                        a, other, flows, now_moves, nt_time == 0, size, rest,
                        now_transition, nf, nt_from, nt_to, now_emission, ne, ne_to, weights, want_transition,
                    )  # fmt: skip
                    if not total > LOST:
                        careful[r] = _lost(
                            a, other, total, size, rest, now_transition, nf, nt_from, nt_to, now_emission, ne, ne_to
                        )
                shown, at = total, unit
            if logs:
                total, unit = _logarithmic(
                    a, out, flows, size, rest, transition, f, t_from, t_to, emission, e, e_to, want_transition and same
                )
            else:
                total, unit = _linear(
                    a, out, flows, moves, t_time == 0, size, rest,
                    transition, f, t_from, t_to, emission, e, e_to, weights, want_transition and same,
                )  # fmt: skip
                smallest = total
                for s in range(states):
                    smallest = min(smallest, out[s])
                if not smallest >= LOST * total or not total > LOST:
                    careful[r] = careful[r] or _lost(
                        a, out, total, size, rest, transition, f, t_from, t_to, emission, e, e_to
                    )
            if same:
                shown, at = total, unit
            if want:
                share = 1.0 / shown if shown > 0.0 else 0.0
                if weight.size > 0:
                    share *= weight[r, t]
                if want_transition:
                    for s in range(states):
                        for j in range(size):
                            g_transition[gt_row[r] + t * gt_time + s * size + j] += share * flows[s, j]
                if want_emission:
                    reached = out if same else other
                    for before in range(0, states, size):
                        for j in range(size):
                            x = np.exp(reached[before + j]) if logs else reached[before + j]
                            g_emission[ge_row[r] + t * ge_time + j] += share * x
            scale = np.log(total) if total != 0.0 else -np.inf
            if totals.size > 0:
                if not same:
                    totals[r, t] = norm + at + np.log(shown) if shown != 0.0 else -np.inf
                else:
                    totals[r, t] = norm + unit + scale
            norm += unit
            if logs or not total > 0.0:
                for s in range(states):
                    a[s] = out[s]
            else:
                norm += scale
                factor = 1.0 / total
                for s in range(states):
                    a[s] = out[s] * factor

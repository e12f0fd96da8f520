"""Best hidden paths of chains whose steps go in stages, and draws from their posterior (numba).

A stage leaves for each of its sums the number of the best term. The term says where the sum before it stands, so that a path
is followed from stage to stage as from step to step.
"""

# numba infers the types of kernels.
# mypy: allow-untyped-defs, no-check-untyped-defs

import numpy as np

from symhmm.chains.best_lanes import RESCALE, store_integers, where_larger
from symhmm.chains.jit import inner, kernel
from symhmm.chains.lane_steps import read_emission
from symhmm.chains.path_steps import uniform
from symhmm.chains.simd import accumulate, fill, finite_or_zero, lanes_of, larger, load, numbers_at, splat, store
from symhmm.chains.stage_careful import log_stage
from symhmm.chains.stage_steps import TILE, read_listed
from symhmm.chains.stage_tables import HEAD, ROWS, SUMS


def best_work_size(states: int, weights: int, largest: int, width: int) -> int:
    """Numbers of memory that each thread of `best_stages` needs."""
    return (weights + TILE * states + 3 * largest) * width


@kernel
def _best_terms(out, source, weights, shared, t, h, number, choices, place, chains, live, some):
    """The largest term of each sum of a stage, and its number [sums, chains]."""
    width, rows = lanes_of(out), t[h + ROWS]
    least, zero = fill(out, -np.inf), fill(out, 0.0)
    for o in range(t[h + SUMS]):
        best, choice, first = least, zero, t[rows + o]
        for k in range(first, t[rows + o + 1], 2):
            weight = splat(weights, t[k + 1]) if shared else load(weights, t[k + 1] * width)
            x = weight + load(source, t[k] * width)
            choice = where_larger(x, best, splat(number, (k - first) // 2), choice)
            best = larger(x, best)
        store(out, o * width, best)
        if live == width:
            store_integers(choices, place + o * chains, choice)
        else:
            store_integers(some, 0, choice)
            for lane in range(live):
                choices[place + o * chains + lane] = some[lane]


@kernel
def best_stages(
    first_group, last_group, states, steps, lanes, chains, stages, table_at, place, largest, rows,
    like, transition_at, t_row, t_time, shared, emission_at, e_row, e_time, e_to,
    ending, stops, result, choices, work_at,
):  # fmt: skip
    """Best log-weight from every initial state [S, lanes], and the best term of every sum [steps, rows, chains].

    Of equally good terms the first is taken. ``stops`` says how many steps of each lane count: later ones weigh nothing, and
    their choices are not to be read. ``ending`` [S, lanes] is the weight at the end.
    """
    transition, emission = numbers_at(transition_at, like), numbers_at(emission_at, like)
    t = numbers_at(table_at, np.int64(0))
    width, size = lanes_of(emission), emission.itemsize
    weights = numbers_at(work_at, like)
    work_at += place.size * width * size
    tile = numbers_at(work_at, like)
    work_at += TILE * states * width * size
    after = numbers_at(work_at, like)
    one = numbers_at(work_at + largest * width * size, like)
    two = numbers_at(work_at + 2 * largest * width * size, like)
    norm, some = np.empty(width), np.empty(width, choices.dtype)
    most = 0
    for k in range(stages):
        begin = t[k * HEAD + ROWS]
        for o in range(t[k * HEAD + SUMS]):
            most = max(most, (t[begin + o + 1] - t[begin + o]) // 2)
    number = np.arange(most).astype(emission.dtype)
    ready = False
    for group in range(first_group, last_group):
        base = group * width
        live = min(width, chains - base)
        if t_time == 0 and not (ready and shared):
            read_listed(weights, shared, base, 0, 0, place.size, place, transition, t_row, t_time)
            ready = True
        top, low_stop = 0, steps
        for lane in range(width):
            norm[lane] = 0.0
            top, low_stop = max(top, stops[base + lane]), min(low_stop, stops[base + lane])
            for s in range(states):
                after[s * width + lane] = ending[s * lanes + base + lane]
        while top > 0:
            low = max(0, top - TILE)
            read_emission(tile, base, low, top, states, emission, e_row, e_time, e_to)
            for step in range(top - 1, low - 1, -1):
                if t_time != 0:
                    read_listed(weights, shared, base, step, 0, place.size, place, transition, t_row, t_time)
                at, to = (step - low) * states * width, step * rows * chains + base
                for s in range(0, states * width, width):
                    store(one, s, load(tile, at + s) + load(after, s))
                for h in range(0, stages * HEAD, HEAD):
                    _best_terms(two, one, weights, shared, t, h, number, choices, to, chains, live, some)
                    to += t[h + SUMS] * chains
                    one, two = two, one
                if step >= low_stop:
                    # Sequences that have ended: nothing follows, whatever the state.
                    for lane in range(width):
                        if step >= stops[base + lane]:
                            norm[lane] = 0.0
                            for s in range(states):
                                one[s * width + lane] = ending[s * lanes + base + lane]
                peak = fill(emission, 0.0)
                if step % RESCALE == 0:
                    # Only differences matter for the choice; small numbers keep them exact.
                    peak = load(one, 0)
                    for s in range(width, states * width, width):
                        peak = larger(load(one, s), peak)
                    peak = finite_or_zero(peak)
                    accumulate(norm, 0, peak)
                for s in range(0, states * width, width):
                    store(after, s, load(one, s) - peak)
            top = low
        for s in range(states):
            for lane in range(width):
                result[s * lanes + base + lane] = np.float64(after[s * width + lane]) + norm[lane]


@inner
def _term(t, h, o, number):
    """Where term ``number`` of a sum stands; 0 where a sum has no terms."""
    first, last = t[t[h + ROWS] + o], t[t[h + ROWS] + o + 1]
    return first + 2 * number if first < last else 0


@kernel
def follow_stages(first, last, row, state, stops, steps, chains, stages, t, rows, choices, paths):
    """States along the best path from ``state`` of each path's chain [paths, steps]; 0 after its end."""
    for p in range(first, last):
        o, chain = state[p], row[p]
        for step in range(stops[chain]):
            to = (step + 1) * rows * chains + chain
            for h in range((stages - 1) * HEAD, -1, -HEAD):
                to -= t[h + SUMS] * chains
                k = _term(t, h, o, choices[to + o * chains])
                o = t[k] if k > 0 else 0
            paths[p, step] = o
        for step in range(stops[chain], steps):
            paths[p, step] = 0


@kernel
def best_stages_backward(
    chains, states, steps, stages, t, place, largest, rows, weight, choices,
    g_transition, gt_row, gt_time, g_emission, ge_row, ge_time, g_terminal, gz_row,
):  # fmt: skip
    """Add the weight of every initial state along its best path; ``choices`` [chains, steps, rows], -1 where there is none."""
    here, there = np.empty(largest), np.empty(largest)
    for b in range(chains):
        for s in range(states):
            here[s] = weight[b * states + s]
        for step in range(steps):
            to = (b * steps + step + 1) * rows
            for h in range((stages - 1) * HEAD, -1, -HEAD):
                to -= t[h + SUMS]
                there[:] = 0.0
                for o in range(t[h + SUMS]):
                    if here[o] != 0.0 and choices[to + o] >= 0:
                        k = _term(t, h, o, choices[to + o])
                        there[t[k]] += here[o]
                        g_transition[gt_row[b] + step * gt_time + place[t[k + 1]]] += here[o]
                here, there = there, here
            for s in range(states):
                g_emission[ge_row[b] + step * ge_time + s] += here[s]
        for s in range(states):
            g_terminal[gz_row[b] + s] += here[s]


@inner
def _choose(u, source, weights, o, t, h):
    """The place that number u in [0, 1) chooses among the terms of a sum, by their sizes; -1 where all vanish."""
    first, last = t[t[h + ROWS] + o], t[t[h + ROWS] + o + 1]
    total = 0.0
    for k in range(first, last, 2):
        total += weights[t[k + 1]] * source[t[k]]
    if not total > 1e-280 or total == np.inf:
        return -1
    chosen, rest = -1, u * total
    for k in range(first, last, 2):
        x = weights[t[k + 1]] * source[t[k]]
        if x > 0.0:
            # Rounding must not let a number fall behind the last term that is possible.
            chosen = t[k]
            if rest < x:
                break
            rest -= x
    return chosen


@inner
def _choose_by_logs(u, source, transition, at, place, o, t, h):
    """The same with logarithms; 0 where all terms are impossible."""
    first, last = t[t[h + ROWS] + o], t[t[h + ROWS] + o + 1]
    peak, total = -np.inf, 0.0
    for k in range(first, last, 2):
        peak = max(peak, transition[at + place[t[k + 1]]] + source[t[k]])
    if peak == -np.inf:
        return 0
    chosen = 0
    for k in range(first, last, 2):
        total += np.exp(transition[at + place[t[k + 1]]] + source[t[k]] - peak)
    rest = u * total
    for k in range(first, last, 2):
        x = np.exp(transition[at + place[t[k + 1]]] + source[t[k]] - peak)
        if x > 0.0:
            chosen = t[k]
            if rest < x:
                break
            rest -= x
    return chosen


@kernel
def draw_stages(
    first, last, chains, starts, order, state, keys, states, steps, stages, t, place, largest,
    transition, t_row, t_time, emission, e_row, e_time, e_to, messages, scales, lanes, paths,
):  # fmt: skip
    """Draw paths of some chains forwards, each from its state; all paths of a chain share the sums of a step.

    Args:
        chains, starts, order: the chains, where each one's paths begin in ``order``, and the paths sorted by chain.
        messages: of every step, [steps + 1, S, lanes]; logarithms where the scale [steps, lanes] is negative.
    """
    found, logs = np.empty((stages + 1, largest)), np.empty((stages + 1, largest))
    weights = np.empty(place.size)
    for g in range(first, last):
        r = chains[g]
        for step in range(steps):
            f, e, m = t_row[r] + step * t_time, e_row[r] + step * e_time, (step + 1) * states * lanes + r
            careful, have_logs = scales[step * lanes + r] < 0.0, False
            if step == 0 or t_time != 0:
                for k in range(place.size):
                    weights[k] = np.exp(np.float64(transition[f + place[k]]))
            if not careful:
                peak = -np.inf
                for s in range(states):
                    peak = max(peak, np.float64(emission[e + s * e_to]))
                peak = peak if peak > -np.inf else 0.0
                for s in range(states):
                    found[0, s] = np.exp(emission[e + s * e_to] - peak) * messages[m + s * lanes]
                for k in range(stages - 1):
                    rows = t[k * HEAD + ROWS]
                    for o in range(t[k * HEAD + SUMS]):
                        x = 0.0
                        for i in range(t[rows + o], t[rows + o + 1], 2):
                            x += weights[t[i + 1]] * found[k, t[i]]
                        found[k + 1, o] = x
            for i in range(starts[g], starts[g + 1]):
                p = order[i]
                o = state[p]
                if not careful:
                    for k in range(stages - 1, -1, -1):
                        if o >= 0:
                            o = _choose(uniform(keys[p], step * stages + k), found[k], weights, o, t, k * HEAD)
                if careful or o < 0:
                    if not have_logs:
                        have_logs = True
                        for s in range(states):
                            x = np.float64(messages[m + s * lanes])
                            if not careful:
                                x = np.log(x) if x > 0.0 else -np.inf
                            logs[0, s] = x + emission[e + s * e_to]
                        for k in range(stages - 1):
                            log_stage(logs[k + 1], logs[k], transition, f, place, t, k * HEAD)
                    o = state[p]
                    for k in range(stages - 1, -1, -1):
                        u = uniform(keys[p], step * stages + k)
                        o = _choose_by_logs(u, logs[k], transition, f, place, o, t, k * HEAD)
                state[p] = o
                paths[p, step] = o

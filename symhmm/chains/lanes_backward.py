"""Forward recursion of chains in vector lanes (numba): occupancies from the start to the end, and all gradients."""

import numpy as np
from numba import njit

from symhmm.chains.lane_steps import CHUNK, read_emission, read_matrix, towards_end
from symhmm.chains.simd import (
    accumulate,
    exp,
    fill,
    finite_or_zero,
    fma,
    larger,
    load,
    splat,
    store,
    total,
    where_positive,
)

FLUSH = 32  # chunks after which expected counts move from the dtype of the data to float64


@njit(nogil=True, cache=True)
def lanes_backward(
    first_group, last_group, size, rest, steps, lanes, used, idle,
    transition, t_row, t_time, t_from, t_to, shared,
    emission, e_row, e_time, e_to,
    starting, messages, scales,
    g_transition, gt_row, gt_time,
    g_emission, ge_row, ge_time, ge_add,
    finishing,
):  # fmt: skip
    """Forward recursion of the occupancies over the steps of every lane in some groups of lanes.

    ``starting`` [S, lanes] holds, for the state before the first step, occupancy divided by message; ``finishing``
    receives the occupancies after the last step. Transition gradients are added, emission gradients are added or, where
    no two lanes share them, written.
    """
    width = 64 // emission.itemsize
    states = size * rest
    dtype = emission.dtype
    matrix = np.empty((states * size + width) * (1 if shared else width), dtype)
    t_peaks = np.zeros(width, dtype)
    tile = np.empty(CHUNK * size * width, dtype)
    weights = np.empty(size * width, dtype)
    here, there = np.empty(states * width, dtype), np.empty(states * width, dtype)
    departures, arrivals = np.empty(CHUNK * states * width, dtype), np.empty(CHUNK * states * width, dtype)
    counts, sums = np.empty(states * size * width, dtype), np.empty(states * size * width)
    flows = np.empty(width, dtype)
    zero = fill(emission, 0.0)
    ready = False
    for group in range(first_group, last_group):
        base = group * width
        constant = t_time == 0
        if constant and not (ready and shared):
            read_matrix(matrix, t_peaks, shared, base, 0, states, size, transition, t_row, t_time, t_from, t_to)
            ready = True
        any_idle = False
        for lane in range(width):
            any_idle |= idle[base + lane]
        for s in range(states):
            store(here, s * width, load(starting, s * lanes + base))
        counts[:] = 0.0
        sums[:] = 0.0
        chunks = 0
        for low in range(0, steps, CHUNK):
            top = min(steps, low + CHUNK)
            read_emission(tile, base, low, top, size, emission, e_row, e_time, e_to, width)
            for step in range(low, top):
                if not constant:
                    read_matrix(
                        matrix, t_peaks, shared, base, step, states, size, transition, t_row, t_time, t_from, t_to
                    )
                at = (step - low) * size * width
                pair = (step - low) * states * width
                peak = load(tile, at)
                for k in range(1, size):
                    peak = larger(peak, load(tile, at + k * width))
                peak, scale = finite_or_zero(peak), load(scales, step * lanes + base)
                for k in range(0, size * width, width):
                    store(weights, k, exp(load(tile, at + k) - peak) * scale)
                    store(tile, at + k, zero)
                towards_end(there, matrix, shared, here, size, rest, width)
                message = ((step + 1) * states) * lanes + base
                for r in range(rest):
                    for k in range(size):
                        s = r * size + k
                        # A chain left to the careful kernel has logarithms here, at most 0: they become 0.
                        beta, weight = larger(load(messages, message + s * lanes), zero), load(weights, k * width)
                        store(departures, pair + s * width, load(here, s * width))
                        store(arrivals, pair + s * width, weight * beta)
                        u = where_positive(beta, weight * load(there, s * width))
                        store(there, s * width, u)
                        store(tile, at + k * width, fma(u, beta, load(tile, at + k * width)))
                if any_idle and step == steps - 1:
                    for lane in range(width):
                        if idle[base + lane]:
                            for s in range(states):
                                arrivals[pair + s * width + lane] = 0.0
                                there[s * width + lane] = here[s * width + lane]
                            for k in range(size):
                                tile[at + k * width + lane] = 0.0
                here, there = there, here
                if not constant:
                    _add_step(
                        g_transition, gt_row, base, used, step * gt_time, matrix, shared,
                        departures, arrivals, pair, size, rest, flows, width, idle, step == steps - 1,
                    )  # fmt: skip
            if constant:
                _count(counts, departures, arrivals, top - low, size, rest, width)
                chunks += 1
                if chunks % FLUSH == 0:
                    _flush(sums, counts, width)
            _write_emission(g_emission, ge_row, ge_time, ge_add, tile, base, low, top, used, idle, steps, size, width)
        if constant:
            _flush(sums, counts, width)
            _add_counts(g_transition, gt_row, base, used, sums, matrix, shared, states * size, width)
        for s in range(states):
            beta = larger(load(messages, (steps * states + s) * lanes + base), zero)
            store(finishing, s * lanes + base, beta * load(here, s * width))


@njit(nogil=True, cache=True)
def _count(counts, departures, arrivals, steps, size, rest, width):
    """counts[i, r, j] += sum over steps of departures[i, r] arrivals[r, j], four i at a time."""
    states = size * rest
    gap, row = rest * width, rest * size * width
    for r in range(rest):
        i = 0
        while i < size:
            four = i + 4 <= size
            for j in range(size):
                u, v = (i * rest + r) * width, (r * size + j) * width
                k = ((i * rest + r) * size + j) * width
                if four:
                    a, b = load(counts, k), load(counts, k + row)
                    c, d = load(counts, k + 2 * row), load(counts, k + 3 * row)
                    for _ in range(steps):
                        x = load(arrivals, v)
                        a, b = fma(load(departures, u), x, a), fma(load(departures, u + gap), x, b)
                        c, d = fma(load(departures, u + 2 * gap), x, c), fma(load(departures, u + 3 * gap), x, d)
                        u += states * width
                        v += states * width
                    store(counts, k, a)
                    store(counts, k + row, b)
                    store(counts, k + 2 * row, c)
                    store(counts, k + 3 * row, d)
                else:
                    a = load(counts, k)
                    for _ in range(steps):
                        a = fma(load(departures, u), load(arrivals, v), a)
                        u += states * width
                        v += states * width
                    store(counts, k, a)
            i += 4 if four else 1


@njit(nogil=True, cache=True)
def _flush(sums, counts, width):
    for k in range(0, sums.size, width):
        accumulate(sums, k, load(counts, k))
    counts[:] = 0.0


@njit(nogil=True, cache=True)
def _same(rows, base, width):
    """Whether all lanes of a group write to one place."""
    for lane in range(1, width):
        if rows[base + lane] != rows[base]:
            return False
    return True


@njit(nogil=True, cache=True)
def _add_counts(g_transition, gt_row, base, used, sums, matrix, shared, entries, width):
    for k in range(entries):
        for lane in range(min(width, used - base)):
            probability = matrix[k] if shared else matrix[k * width + lane]
            g_transition[gt_row[base + lane] + k] += sums[k * width + lane] * probability


@njit(nogil=True, cache=True)
def _add_step(
    g_transition, gt_row, base, used, offset, matrix, shared,
    departures, arrivals, pair, size, rest, flows, width, idle, last,
):  # fmt: skip
    """Gradient of one step's own transition terms."""
    same = _same(gt_row, base, width)
    for s in range(size * rest):
        for j in range(size):
            k = s * size + j
            arrival = load(arrivals, pair + ((s % rest) * size + j) * width)
            probability = splat(matrix, k) if shared else load(matrix, k * width)
            flow = load(departures, pair + s * width) * (arrival * probability)
            if same:
                g_transition[gt_row[base] + offset + k] += total(flow)
            else:
                store(flows, 0, flow)
                for lane in range(min(width, used - base)):
                    # Where an idle lane would write, another thread may be at work.
                    if not (last and idle[base + lane]):
                        g_transition[gt_row[base + lane] + offset + k] += flows[lane]


@njit(nogil=True, cache=True)
def _write_emission(g_emission, ge_row, ge_time, ge_add, tile, base, low, top, used, idle, steps, size, width):
    """Transpose the gradients of some steps back from lanes to rows."""
    if ge_add and _same(ge_row, base, width):
        for t in range(low, top):
            for k in range(size):
                g_emission[ge_row[base] + t * ge_time + k] += total(load(tile, ((t - low) * size + k) * width))
        return
    for lane in range(min(width, used - base)):
        row = ge_row[base + lane]
        end = top - 1 if idle[base + lane] and top == steps else top
        for t in range(low, end):
            for k in range(size):
                value = tile[((t - low) * size + k) * width + lane]
                if ge_add:
                    g_emission[row + t * ge_time + k] += value
                else:
                    g_emission[row + t * ge_time + k] = value

"""Forward recursion of chains in vector lanes (numba): occupancies from the start to the end, and all gradients."""

import numpy as np

from symhmm.chains.jit import inner, kernel
from symhmm.chains.lane_steps import CHUNK, SIZE, read_emission, read_matrix, towards_end
from symhmm.chains.masked import load_first, store_first
from symhmm.chains.simd import (
    accumulate,
    exp,
    fill,
    finite_or_zero,
    fma,
    lanes_of,
    larger,
    load,
    numbers_at,
    splat,
    store,
    total,
    vectors,
    where_positive,
)
from symhmm.chains.transpose import lanes_to_rows

FLUSH = 32  # chunks after which expected counts move from the dtype of the data to float64


@kernel
def lanes_backward(
    first_group, last_group, size, rest, steps, lanes, used, idle,
    like, transition_at, t_row, t_time, t_from, t_to, shared,
    emission_at, e_row, e_time, e_to,
    starting, messages_at, scales_at,
    g_transition_at, gt_row, gt_time,
    g_emission_at, ge_row, ge_time, ge_to, ge_add,
    finishing,
):  # fmt: skip
    """Forward recursion of the occupancies over the steps of every lane in some groups of lanes.

    ``starting`` [S, lanes] holds, for the state before the first step, occupancy divided by message; ``finishing``
    receives the occupancies after the last step. Transition gradients are added, emission gradients are added or, where
    no two lanes share them, written.
    """
    transition, emission = numbers_at(transition_at, like), numbers_at(emission_at, like)
    messages, scales = numbers_at(messages_at, like), numbers_at(scales_at, like)
    g_transition, g_emission = numbers_at(g_transition_at, like), numbers_at(g_emission_at, like)
    size, rest = SIZE or size, 1 if SIZE else rest
    width, states = lanes_of(emission), size * rest
    matrix, t_peaks = vectors(states * size // (width if shared else 1) + 1, emission), vectors(1, emission)
    tile, there = vectors(CHUNK * size, emission), vectors(states, emission)
    # One vector more than steps: states lie apart by an odd number of vectors, or a cache would hold few of them at once.
    column = (CHUNK + 1) * width
    departures, arrivals = vectors((CHUNK + 1) * states, emission), vectors((CHUNK + 1) * states, emission)
    counts, sums = vectors(states * size, emission), np.empty(states * size * width)
    flows = np.empty(width, emission.dtype)
    zero = fill(emission, 0.0)
    ready = False
    for group in range(first_group, last_group):
        base = group * width
        constant = t_time == 0 and gt_time == 0
        if constant and not (ready and shared):
            read_matrix(matrix, t_peaks, shared, base, 0, states, size, transition, t_row, t_time, t_from, t_to)
            ready = True
        any_idle = False
        for lane in range(width):
            any_idle |= idle[base + lane]
        for s in range(states):
            store(departures, s * column, load(starting, s * lanes + base))
        counts[:] = 0.0
        sums[:] = 0.0
        chunks = 0
        for low in range(0, steps, CHUNK):
            top = min(steps, low + CHUNK)
            read_emission(tile, base, low, top, size, emission, e_row, e_time, e_to)
            for step in range(low, top):
                if not constant:
                    read_matrix(
                        matrix, t_peaks, shared, base, step, states, size, transition, t_row, t_time, t_from, t_to
                    )
                at = (step - low) * size * width
                pair = (step - low) * width
                peak = load(tile, at)
                for k in range(1, size):
                    peak = larger(peak, load(tile, at + k * width))
                peak, scale = finite_or_zero(peak), load(scales, step * lanes + base)
                towards_end(there, matrix, shared, departures, pair, column, size, rest)
                message = ((step + 1) * states) * lanes + base
                for k in range(size):
                    weight = exp(load(tile, at + k * width) - peak) * scale
                    gradient = zero
                    for r in range(rest):
                        s = r * size + k
                        # A chain left to the careful kernel has logarithms here, at most 0: they become 0.
                        beta = larger(load(messages, message + s * lanes), zero)
                        store(arrivals, pair + s * column, weight * beta)
                        u = where_positive(beta, weight * load(there, s * width))
                        store(departures, pair + s * column + width, u)
                        gradient = fma(u, beta, gradient)
                    store(tile, at + k * width, gradient)
                if any_idle and step == steps - 1:
                    for lane in range(width):
                        if idle[base + lane]:
                            for m in range(pair + lane, states * column, column):
                                arrivals[m] = 0.0
                                departures[m + width] = departures[m]
                            for k in range(size):
                                tile[at + k * width + lane] = 0.0
                if not constant:
                    _add_step(
                        g_transition, gt_row, base, used, step * gt_time, matrix, shared,
                        departures, arrivals, pair, size, rest, flows, width, idle, step == steps - 1,
                    )  # fmt: skip
            if constant:
                _count(counts, departures, arrivals, top - low, size, rest)
                chunks += 1
                if chunks % FLUSH == 0:
                    _flush(sums, counts, width)
            for m in range(0, states * column, column):
                store(departures, m, load(departures, m + (top - low) * width))
            _write_emission(g_emission, ge_row, ge_time, ge_to, ge_add, tile, base, low, top, used, idle, steps, size)
        if constant:
            _flush(sums, counts, width)
            _add_counts(g_transition, gt_row, base, used, sums, matrix, shared, states * size, width)
        for s in range(states):
            beta = larger(load(messages, (steps * states + s) * lanes + base), zero)
            store(finishing, s * lanes + base, beta * load(departures, s * column))


@inner
def _count(counts, departures, arrivals, steps, size, rest):
    """counts[i, r, j] += sum over steps of departures[i, r] arrivals[r, j], in squares of four i and four j."""
    width = lanes_of(counts)
    size, rest = SIZE or size, 1 if SIZE else rest
    column = (CHUNK + 1) * width
    gap, row = rest * column, rest * size * width
    for r in range(rest):
        i = 0
        while i < size:
            four_i = i + 4 <= size
            j = 0
            while j < size:
                u, v = (i * rest + r) * column, (r * size + j) * column
                k = ((i * rest + r) * size + j) * width
                if four_i and j + 4 <= size:
                    _count_square(counts, departures, arrivals, steps, k, row, u, gap, v, column)
                    j += 4
                    continue
                for di in range(4 if four_i else 1):
                    a = load(counts, k + di * row)
                    for step in range(0, steps * width, width):
                        a = fma(load(departures, u + di * gap + step), load(arrivals, v + step), a)
                    store(counts, k + di * row, a)
                j += 1
            i += 4 if four_i else 1


@inner
def _count_square(counts, departures, arrivals, steps, k, row, u, gap, v, column):
    width = lanes_of(counts)
    zero = fill(counts, 0.0)
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = zero
    for step in range(0, steps * width, width):
        a, b = load(departures, u + step), load(departures, u + gap + step)
        c, d = load(departures, u + 2 * gap + step), load(departures, u + 3 * gap + step)
        x = load(arrivals, v + step)
        a0, b0, c0, d0 = fma(a, x, a0), fma(b, x, b0), fma(c, x, c0), fma(d, x, d0)
        x = load(arrivals, v + column + step)
        a1, b1, c1, d1 = fma(a, x, a1), fma(b, x, b1), fma(c, x, c1), fma(d, x, d1)
        x = load(arrivals, v + 2 * column + step)
        a2, b2, c2, d2 = fma(a, x, a2), fma(b, x, b2), fma(c, x, c2), fma(d, x, d2)
        x = load(arrivals, v + 3 * column + step)
        a3, b3, c3, d3 = fma(a, x, a3), fma(b, x, b3), fma(c, x, c3), fma(d, x, d3)
    for w0, w1, w2, w3 in ((a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3)):
        store(counts, k, load(counts, k) + w0)
        store(counts, k + width, load(counts, k + width) + w1)
        store(counts, k + 2 * width, load(counts, k + 2 * width) + w2)
        store(counts, k + 3 * width, load(counts, k + 3 * width) + w3)
        k += row


@inner
def _flush(sums, counts, width):
    for k in range(0, sums.size, width):
        accumulate(sums, k, load(counts, k))
    counts[:] = 0.0


@inner
def _same(rows, base, width):
    """Whether all lanes of a group write to one place."""
    same = True
    for lane in range(1, width):
        same &= rows[base + lane] == rows[base]
    return same


@inner
def _add_counts(g_transition, gt_row, base, used, sums, matrix, shared, entries, width):
    for k in range(entries):
        for lane in range(min(width, used - base)):
            probability = matrix[k] if shared else matrix[k * width + lane]
            g_transition[gt_row[base + lane] + k] += sums[k * width + lane] * probability


@inner
def _add_step(
    g_transition, gt_row, base, used, offset, matrix, shared,
    departures, arrivals, pair, size, rest, flows, width, idle, last,
):  # fmt: skip
    """Gradient of one step's own transition terms."""
    column = (CHUNK + 1) * width
    same = _same(gt_row, base, width)
    for s in range(size * rest):
        for j in range(size):
            k = s * size + j
            arrival = load(arrivals, pair + ((s % rest) * size + j) * column)
            probability = splat(matrix, k) if shared else load(matrix, k * width)
            flow = load(departures, pair + s * column) * (arrival * probability)
            if same:
                g_transition[gt_row[base] + offset + k] += total(flow)
            else:
                store(flows, 0, flow)
                for lane in range(min(width, used - base)):
                    # Where an idle lane would write, another thread may be at work.
                    if not (last and idle[base + lane]):
                        g_transition[gt_row[base + lane] + offset + k] += flows[lane]


@inner
def _write_emission(g_emission, ge_row, ge_time, ge_to, ge_add, tile, base, low, top, used, idle, steps, size):
    """Transpose the gradients of some steps back from lanes to where they belong; see `read_emission`."""
    width = lanes_of(tile)
    size = SIZE or size
    if ge_add and _same(ge_row, base, width):
        for t in range(low, top):
            for k in range(size):
                g_emission[ge_row[base] + t * ge_time + k * ge_to] += total(load(tile, ((t - low) * size + k) * width))
        return
    inside = min(width, used - base)
    any_idle, side_by_side = False, True
    for lane in range(inside):
        any_idle |= idle[base + lane] and top == steps
        side_by_side &= ge_row[base + lane] == ge_row[base] + lane
    count, done = top - low, 0
    if side_by_side and not any_idle:
        for t in range(count):
            for k in range(size):
                at = ge_row[base] + (low + t) * ge_time + k * ge_to
                new = load(tile, (t * size + k) * width)
                if ge_add:
                    new = new + load_first(g_emission, at, inside)
                if inside == width:
                    store(g_emission, at, new)
                else:
                    store_first(g_emission, at, inside, new)
        return
    # A lane that fills up the last vector repeats the row of the lane before it, which is written after it.
    if ge_to == 1 and ge_time == size and not any_idle:
        done = count * size - count * size % width
        for m in range(0, done, width):
            lanes_to_rows(tile, m * width, width, g_emission, ge_row, base, low * size + m, ge_add)
    elif ge_time == 1 and not any_idle:
        done = (count - count % width) * size
        for k in range(size):
            for t in range(0, count - count % width, width):
                at = (t * size + k) * width
                lanes_to_rows(tile, at, size * width, g_emission, ge_row, base, low + t + k * ge_to, ge_add)
    for lane in range(inside):
        row = ge_row[base + lane]
        end = top - 1 if idle[base + lane] and top == steps else top
        for m in range(done, (end - low) * size):
            at = row + (low + m // size) * ge_time + m % size * ge_to
            value = tile[m * width + lane]
            if ge_add:
                g_emission[at] += value
            else:
                g_emission[at] = value

"""Recursions of chains whose steps go in stages, in vector lanes (numba); see `symhmm.chains.stages`.

As in `symhmm.chains.lanes_forward` and `lanes_backward`, probabilities are scaled by powers of two, and lanes in which a
state is too small to trust are marked; the caller repeats those chains in log space.
"""

# numba infers the types of kernels.
# mypy: allow-untyped-defs, no-check-untyped-defs

import numpy as np

from symhmm.chains.jit import inner, kernel
from symhmm.chains.lane_steps import read_emission
from symhmm.chains.simd import (
    accumulate,
    any_below,
    exp,
    exponent,
    fill,
    finite_or_zero,
    lanes_of,
    larger,
    load,
    numbers_at,
    reciprocal_power,
    smaller,
    store,
    total,
    where_positive,
)
from symhmm.chains.stage_products import stage, stage_inputs, stage_weights
from symhmm.chains.stage_tables import FIRST, HEAD, LAST, ROWS, SUMS
from symhmm.chains.transpose import lanes_to_rows

TILE = 8  # steps whose emissions are transposed into lanes at a time


def work_size(states: int, weights: int, largest: int, stages: int, width: int) -> tuple[int, int]:
    """Numbers of memory that each thread of the forward and of the backward recursion needs."""
    tile, padded = TILE * states * width, (weights + stages + 1) * width
    return (
        padded + tile + (states + 2 * largest) * width,
        2 * padded + tile + (2 * states + (stages + 2) * largest) * width,
    )


@inner
def read_listed(weights, shared, base, step, first, last, place, transition, t_row, t_time):
    """Some transition terms of a step: one number for each weight if all lanes share them, else one vector."""
    width = lanes_of(transition)
    for k in range(first, last):
        offset = place[k] + step * t_time
        if shared:
            weights[k] = transition[t_row[base] + offset]
        else:
            for lane in range(width):
                weights[k * width + lane] = transition[t_row[base + lane] + offset]


@inner
def _read_weights(weights, peaks, shared, base, step, place, transition, t_row, t_time, t, stages):
    """Exponentials of the weights relative to the largest one of each stage; ``peaks`` are the sums of these."""
    width = lanes_of(peaks)
    one = 1 if shared else width
    store(peaks, 0, fill(peaks, 0.0))
    for h in range(0, stages * HEAD, HEAD):
        read_listed(weights, shared, base, step, t[h + FIRST], t[h + LAST], place, transition, t_row, t_time)
        high = fill(peaks, -np.inf)
        if shared:
            peak = -np.inf
            for k in range(t[h + FIRST], t[h + LAST]):
                peak = max(peak, weights[k])
            high = fill(peaks, peak)
        else:
            for k in range(t[h + FIRST], t[h + LAST]):
                high = larger(load(weights, k * width), high)
        high = finite_or_zero(high)
        store(peaks, 0, load(peaks, 0) + high)
        # The last vector may reach into the weights of the next stage, which are written afterwards.
        for k in range(t[h + FIRST] * one, t[h + LAST] * one, width):
            store(weights, k, exp(load(weights, k) - high))


@inner
def _highest(tile, at, states):
    """The largest emission term of a step, in each lane."""
    width = lanes_of(tile)
    a = b = load(tile, at)
    for s in range(1, states - 1, 2):
        a, b = larger(a, load(tile, at + s * width)), larger(b, load(tile, at + (s + 1) * width))
    return finite_or_zero(larger(larger(a, b), load(tile, at + (states - 1) * width)))


@kernel
def _mark_lost(flags, base, out, after, tile, at, states, lost, transition, t_row, offset, place, t, stages, width):
    """Mark the lanes in which a state is too small to trust, unless no path leads from it at all."""
    for lane in range(width):
        small = False
        for s in range(states):
            small |= out[s * width + lane] < lost
        if flags[base + lane] or not small:
            continue
        possible = np.empty(states, np.bool_)
        for s in range(states):
            possible[s] = after[s * width + lane] > 0.0 and tile[at + s * width + lane] > -np.inf
        for h in range(0, stages * HEAD, HEAD):
            found = np.zeros(t[h + SUMS], np.bool_)
            for o in range(t[h + SUMS]):
                for k in range(t[t[h + ROWS] + o], t[t[h + ROWS] + o + 1], 2):
                    found[o] |= possible[t[k]] and transition[t_row[base + lane] + offset + place[t[k + 1]]] > -np.inf
            possible = found
        for s in range(states):
            if possible[s] and out[s * width + lane] < lost:
                flags[base + lane] = 1


@kernel
def stages_forward(
    first_group, last_group, states, steps, lanes, stages, table_at, place, largest,
    like, transition_at, t_row, t_time, shared, emission_at, e_row, e_time, e_to,
    ending, messages_at, scales_at, result, flags, work_at,
):  # fmt: skip
    """Messages from the end of some groups of lanes to their start, all of them kept.

    ``ending`` and ``result`` [S, lanes] are logarithms in float64. Tensors come as addresses of numbers of the type of
    ``like``, and so does memory to work in.
    """
    transition, emission = numbers_at(transition_at, like), numbers_at(emission_at, like)
    messages, scales = numbers_at(messages_at, like), numbers_at(scales_at, like)
    t = numbers_at(table_at, np.int64(0))
    width, size, weight_count = lanes_of(emission), emission.itemsize, place.size
    weights = numbers_at(work_at, like)
    work_at += (weight_count + stages) * width * size
    t_peaks = numbers_at(work_at, like)
    work_at += width * size
    tile = numbers_at(work_at, like)
    work_at += TILE * states * width * size
    after = numbers_at(work_at, like)
    work_at += states * width * size
    one = numbers_at(work_at, like)
    two = numbers_at(work_at + largest * width * size, like)
    powers, peaks = np.empty(width), np.empty(width)
    limit = 1e-25 if emission.itemsize == 4 else 1e-200
    lost = fill(emission, limit)
    ready = False
    for group in range(first_group, last_group):
        base = group * width
        if t_time == 0 and not (ready and shared):
            _read_weights(weights, t_peaks, shared, base, 0, place, transition, t_row, t_time, t, stages)
            ready = True
        for lane in range(width):
            powers[lane] = 0.0
            peak = -np.inf
            for s in range(states):
                peak = max(peak, ending[s * lanes + base + lane])
            peak = peak if peak > -np.inf else 0.0
            peaks[lane] = peak
            for s in range(states):
                x = ending[s * lanes + base + lane]
                value = np.exp(x - peak)
                after[s * width + lane] = value
                if value < limit and x > -np.inf:
                    flags[base + lane] = 1
        top = steps
        while top > 0:
            low = max(0, top - TILE)
            read_emission(tile, base, low, top, states, emission, e_row, e_time, e_to)
            for step in range(top - 1, low - 1, -1):
                if t_time != 0:
                    _read_weights(weights, t_peaks, shared, base, step, place, transition, t_row, t_time, t, stages)
                at, to = (step - low) * states * width, (step + 1) * states * lanes + base
                peak = _highest(tile, at, states)
                for s in range(states):
                    message = load(after, s * width)
                    store(messages, to + s * lanes, message)
                    store(one, s * width, exp(load(tile, at + s * width) - peak) * message)
                for h in range(0, stages * HEAD, HEAD):
                    stage(two, one, weights, shared, t, h)
                    one, two = two, one
                smallest = high = load(one, 0)
                for s in range(width, states * width, width):
                    x = load(one, s)
                    smallest, high = smaller(smallest, x), larger(high, x)
                if any_below(smallest, lost):
                    _mark_lost(
                        flags, base, one, after, tile, at, states, limit, transition, t_row, step * t_time, place,
                        t, stages, width,
                    )  # fmt: skip
                accumulate(peaks, 0, peak + load(t_peaks, 0))
                scale = reciprocal_power(high)
                accumulate(powers, 0, exponent(high))
                store(scales, step * lanes + base, scale)
                for s in range(0, states * width, width):
                    store(after, s, load(one, s) * scale)
            top = low
        for s in range(states):
            store(messages, s * lanes + base, load(after, s * width))
            for lane in range(width):
                x = np.float64(after[s * width + lane])
                log = np.log(x) if x != 0.0 else -np.inf
                result[s * lanes + base + lane] = log + powers[lane] * np.log(2.0) + peaks[lane]


@kernel
def stages_backward(
    first_group, last_group, states, steps, lanes, used, stages, table_at, place, largest,
    like, transition_at, t_row, t_time, shared, emission_at, e_row, e_time, e_to,
    starting, messages_at, scales_at, g_transition_at, g_emission_at, ge_row, finishing, work_at,
):  # fmt: skip
    """Occupancies from the start to the end, and gradients.

    ``g_transition`` has one row of weights for each lane, or one for all of them where they are shared; and for each step,
    where they vary over time. ``g_emission`` is [lanes, steps, S].
    """
    transition, emission = numbers_at(transition_at, like), numbers_at(emission_at, like)
    messages, scales = numbers_at(messages_at, like), numbers_at(scales_at, like)
    g_transition, g_emission = numbers_at(g_transition_at, like), numbers_at(g_emission_at, like)
    t = numbers_at(table_at, np.int64(0))
    width, size, count = lanes_of(emission), emission.itemsize, place.size
    weights = numbers_at(work_at, like)
    work_at += (count + stages) * width * size
    g_weights = numbers_at(work_at, like)
    work_at += (count + stages) * width * size
    t_peaks = numbers_at(work_at, like)
    work_at += width * size
    tile = numbers_at(work_at, like)
    work_at += TILE * states * width * size
    arrival = numbers_at(work_at, like)
    work_at += states * width * size
    here = numbers_at(work_at, like)
    work_at += states * width * size
    # What the stages read, and the gradients of two of them.
    row = largest * width * size
    found_at, g_found_at = work_at, work_at + stages * row
    sums = np.zeros(count * width)
    zero = fill(emission, 0.0)
    ready = False
    for group in range(first_group, last_group):
        base = group * width
        live = min(width, used - base)
        if t_time == 0 and not (ready and shared):
            _read_weights(weights, t_peaks, shared, base, 0, place, transition, t_row, t_time, t, stages)
            ready = True
        for s in range(states):
            store(here, s * width, load(starting, s * lanes + base))
        for k in range(0, count * width, width):
            store(g_weights, k, zero)
        for low in range(0, steps, TILE):
            top = min(steps, low + TILE)
            read_emission(tile, base, low, top, states, emission, e_row, e_time, e_to)
            for step in range(low, top):
                if t_time != 0:
                    _read_weights(weights, t_peaks, shared, base, step, place, transition, t_row, t_time, t, stages)
                at = (step - low) * states * width
                peak, scale = _highest(tile, at, states), load(scales, step * lanes + base)
                found = numbers_at(found_at, like)
                for s in range(states):
                    w = exp(load(tile, at + s * width) - peak) * scale
                    beta = larger(load(messages, ((step + 1) * states + s) * lanes + base), zero)
                    store(arrival, s * width, w)
                    store(found, s * width, w * beta)
                for k in range(stages - 1):
                    stage(
                        numbers_at(found_at + (k + 1) * row, like), numbers_at(found_at + k * row, like), weights, shared,
                        t, k * HEAD,
                    )  # fmt: skip
                g_out = here
                for k in range(stages - 1, -1, -1):
                    g_source = numbers_at(g_found_at + k % 2 * row, like)
                    stage_inputs(g_source, g_out, weights, shared, t, k * HEAD)
                    stage_weights(g_weights, numbers_at(found_at + k * row, like), g_out, t, k * HEAD)
                    g_out = g_source
                for s in range(0, states * width, width):
                    x, g = load(found, s), load(g_out, s)
                    store(tile, at + s, x * g)
                    store(here, s, where_positive(x, load(arrival, s) * g))
                if t_time != 0:
                    _write_step(g_transition, base, step, steps, count, weights, shared, g_weights, live)
                    for k in range(0, count * width, width):
                        store(g_weights, k, zero)
            _write_emission(g_emission, ge_row, tile, base, low * states, (top - low) * states, live)
            if t_time == 0:
                for k in range(0, count * width, width):
                    accumulate(sums, k, load(g_weights, k))
                    store(g_weights, k, zero)
        if t_time == 0 and not shared:
            for lane in range(live):
                for k in range(count):
                    g_transition[(base + lane) * count + k] = sums[k * width + lane] * weights[k * width + lane]
            sums[:] = 0.0
        for s in range(states):
            beta = larger(load(messages, (steps * states + s) * lanes + base), zero)
            store(finishing, s * lanes + base, beta * load(here, s * width))
    if t_time == 0 and shared and ready:
        for k in range(count):
            x = 0.0
            for lane in range(width):
                x += sums[k * width + lane]
            g_transition[k] = x * weights[k]


@inner
def _write_step(g_transition, base, step, steps, count, weights, shared, g_weights, live):
    """The gradient of the weights of one step."""
    width = lanes_of(g_weights)
    if shared:
        for k in range(count):
            g_transition[step * count + k] += total(load(g_weights, k * width)) * weights[k]
        return
    for lane in range(live):
        to = ((base + lane) * steps + step) * count
        for k in range(count):
            g_transition[to + k] = g_weights[k * width + lane] * weights[k * width + lane]


@inner
def _write_emission(g_emission, ge_row, tile, base, offset, count, live):
    """The gradient of the emission terms of some steps, from lanes to rows."""
    width = lanes_of(tile)
    done = count - count % width
    for m in range(0, done, width):
        # A lane that fills up the last vector repeats the row of the lane before it, which is written after it.
        lanes_to_rows(tile, m * width, width, g_emission, ge_row, base, offset + m, False)
    for lane in range(live):
        for m in range(done, count):
            g_emission[ge_row[base + lane] + offset + m] = tile[m * width + lane]

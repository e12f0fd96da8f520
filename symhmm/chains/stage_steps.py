"""Recursions of chains that move one at a time, in vector lanes (numba); see `symhmm.chains.stages`.

As in `symhmm.chains.lanes_forward` and `lanes_backward`, probabilities are scaled by powers of two, and lanes in which a
state is too small to trust are marked; the caller then carries out the step with one dense matrix.
"""

import numpy as np

from symhmm.chains.jit import inner, kernel
from symhmm.chains.lane_steps import read_emission, read_matrix
from symhmm.chains.simd import (
    accumulate,
    any_below,
    exp,
    exponent,
    fill,
    finite_or_zero,
    fma,
    lanes_of,
    larger,
    load,
    numbers_at,
    reciprocal_power,
    smaller,
    splat,
    store,
    where_positive,
)

TILE = 8  # steps whose emissions are transposed into lanes at a time


@inner
def _stage(out, before, weights, shared, sums, count, start, read, factor):
    """out[o] = sum_r weights[factor[o, r]] before[read[o, r]]."""
    width = lanes_of(out)
    for o in range(sums):
        k, a = start + o * count, fill(out, 0.0)
        for r in range(count):
            w = splat(weights, factor[k + r]) if shared else load(weights, factor[k + r] * width)
            a = fma(w, load(before, read[k + r] * width), a)
        store(out, o * width, a)


@inner
def _stage_back(g_before, g_out, before, weights, g_weights, shared, sums, count, start, read, factor):
    """The gradient of `_stage` added to ``g_before`` and ``g_weights``, which has lanes of its own."""
    width = lanes_of(g_out)
    for o in range(sums):
        k, g = start + o * count, load(g_out, o * width)
        for r in range(count):
            f, b = factor[k + r], read[k + r] * width
            w = splat(weights, f) if shared else load(weights, f * width)
            store(g_before, b, fma(w, g, load(g_before, b)))
            store(g_weights, f * width, fma(load(before, b), g, load(g_weights, f * width)))


@kernel
def _mark_lost(flags, base, out, after, tile, at, states, lost, transition, t_row, offset, shape, read, factor, width):
    """Mark the lanes in which a state is too small to trust, unless no path leads from it at all."""
    for lane in range(width):
        if flags[base + lane]:
            continue
        small = False
        for s in range(states):
            small |= out[s * width + lane] < lost
        if not small:
            continue
        possible = np.empty(states, np.bool_)
        for s in range(states):
            possible[s] = after[s * width + lane] > 0.0 and tile[at + s * width + lane] > -np.inf
        for k in range(shape.shape[0]):
            found = np.zeros(shape[k, 0], np.bool_)
            for o in range(shape[k, 0]):
                for r in range(shape[k, 1]):
                    i = shape[k, 2] + o * shape[k, 1] + r
                    found[o] |= possible[read[i]] and transition[t_row[base + lane] + offset + factor[i]] > -np.inf
            possible = found
        for s in range(states):
            if possible[s] and out[s * width + lane] < lost:
                flags[base + lane] = 1


@kernel
def stages_forward(
    first_group, last_group, states, entries, steps, lanes,
    like, transition_at, t_row, t_time, t_entry, shared, emission_at, e_row, e_time, e_to,
    shape, read, factor, largest,
    ending, messages_at, scales_at, result, flags,
):  # fmt: skip
    """Messages from the end of some groups of lanes to their start, all of them kept."""
    transition, emission = numbers_at(transition_at, like), numbers_at(emission_at, like)
    messages, scales = numbers_at(messages_at, like), numbers_at(scales_at, like)
    width, dtype, stages = lanes_of(emission), emission.dtype, shape.shape[0]
    weights = np.empty((entries + width) * (1 if shared else width), dtype)
    t_peaks = np.zeros(width, dtype)
    tile = np.empty(TILE * states * width, dtype)
    after = np.empty(states * width, dtype)
    one, two = np.empty(largest * width, dtype), np.empty(largest * width, dtype)
    powers, peaks = np.empty(width), np.empty(width)
    limit = 1e-25 if emission.itemsize == 4 else 1e-200
    lost = fill(emission, limit)
    ready = False
    for group in range(first_group, last_group):
        base = group * width
        if t_time == 0 and not (ready and shared):
            read_matrix(weights, t_peaks, shared, base, 0, entries, 1, transition, t_row, t_time, t_entry, 0)
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
                for s in range(states):
                    store(messages, ((step + 1) * states + s) * lanes + base, load(after, s * width))
                if t_time != 0:
                    read_matrix(weights, t_peaks, shared, base, step, entries, 1, transition, t_row, t_time, t_entry, 0)
                at = (step - low) * states * width
                peak = load(tile, at)
                for s in range(1, states):
                    peak = larger(peak, load(tile, at + s * width))
                peak = finite_or_zero(peak)
                for s in range(0, states * width, width):
                    store(one, s, exp(load(tile, at + s) - peak) * load(after, s))
                for k in range(stages):
                    _stage(two, one, weights, shared, shape[k, 0], shape[k, 1], shape[k, 2], read, factor)
                    one, two = two, one
                smallest = high = load(one, 0)
                for s in range(width, states * width, width):
                    x = load(one, s)
                    smallest, high = smaller(smallest, x), larger(high, x)
                if any_below(smallest, lost):
                    _mark_lost(
                        flags, base, one, after, tile, at, states, limit, transition, t_row, step * t_time,
                        shape, read, factor, width,
                    )  # fmt: skip
                # Each stage multiplies one weight: the peak of all weights counts once for each of them.
                shift = peak
                for _ in range(stages):
                    shift = shift + load(t_peaks, 0)
                accumulate(peaks, 0, shift)
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
    first_group, last_group, states, entries, steps, lanes, used,
    like, transition_at, t_row, t_time, t_entry, shared, emission_at, e_row, e_time, e_to,
    shape, read, factor, largest,
    starting, messages_at, scales_at, g_transition_at, g_emission_at, finishing,
):  # fmt: skip
    """Occupancies from the start to the end, and gradients: one row for each lane (and step, where terms vary).

    ``g_transition`` is [lanes, entries] where the factors are constant, else [lanes, steps, entries]; ``g_emission`` is
    [lanes, steps, S].
    """
    transition, emission = numbers_at(transition_at, like), numbers_at(emission_at, like)
    messages, scales = numbers_at(messages_at, like), numbers_at(scales_at, like)
    g_transition, g_emission = numbers_at(g_transition_at, like), numbers_at(g_emission_at, like)
    width, dtype, stages = lanes_of(emission), emission.dtype, shape.shape[0]
    weights = np.empty((entries + width) * (1 if shared else width), dtype)
    t_peaks = np.zeros(width, dtype)
    tile, arrival = np.empty(TILE * states * width, dtype), np.empty(states * width, dtype)
    here = np.empty(states * width, dtype)
    results, g_results = (
        np.empty((stages + 1) * largest * width, dtype),
        np.empty((stages + 1) * largest * width, dtype),
    )
    g_weights, sums = np.empty(entries * width, dtype), np.empty(entries * width)
    zero, row = fill(emission, 0.0), largest * width
    ready = False
    for group in range(first_group, last_group):
        base = group * width
        live = min(width, used - base)
        if t_time == 0 and not (ready and shared):
            read_matrix(weights, t_peaks, shared, base, 0, entries, 1, transition, t_row, t_time, t_entry, 0)
            ready = True
        for s in range(states):
            store(here, s * width, load(starting, s * lanes + base))
        g_weights[:] = 0.0
        sums[:] = 0.0
        for low in range(0, steps, TILE):
            top = min(steps, low + TILE)
            read_emission(tile, base, low, top, states, emission, e_row, e_time, e_to)
            for step in range(low, top):
                if t_time != 0:
                    read_matrix(weights, t_peaks, shared, base, step, entries, 1, transition, t_row, t_time, t_entry, 0)
                at = (step - low) * states * width
                peak = load(tile, at)
                for s in range(1, states):
                    peak = larger(peak, load(tile, at + s * width))
                peak, scale = finite_or_zero(peak), load(scales, step * lanes + base)
                for s in range(states):
                    w = exp(load(tile, at + s * width) - peak) * scale
                    beta = larger(load(messages, ((step + 1) * states + s) * lanes + base), zero)
                    store(arrival, s * width, w)
                    store(results, s * width, w * beta)
                for k in range(stages):
                    _stage(
                        results[(k + 1) * row :], results[k * row :], weights, shared,
                        shape[k, 0], shape[k, 1], shape[k, 2], read, factor,
                    )  # fmt: skip
                g_results[: stages * row] = 0.0
                for s in range(0, states * width, width):
                    store(g_results, stages * row + s, load(here, s))
                for k in range(stages - 1, -1, -1):
                    _stage_back(
                        g_results[k * row :], g_results[(k + 1) * row :], results[k * row :], weights, g_weights, shared,
                        shape[k, 0], shape[k, 1], shape[k, 2], read, factor,
                    )  # fmt: skip
                for s in range(0, states * width, width):
                    store(here, s, where_positive(load(results, s), load(arrival, s) * load(g_results, s)))
                for s in range(states):
                    occupancy = load(results, s * width) * load(g_results, s * width)
                    store(tile, at + s * width, occupancy)
                for lane in range(live):
                    to = ((base + lane) * steps + step) * states
                    for s in range(states):
                        g_emission[to + s] = tile[at + s * width + lane]
                if t_time != 0:
                    for lane in range(live):
                        to = ((base + lane) * steps + step) * entries
                        for f in range(entries):
                            w = weights[f] if shared else weights[f * width + lane]
                            g_transition[to + f] = g_weights[f * width + lane] * w
                    g_weights[:] = 0.0
            if t_time == 0:
                for f in range(0, entries * width, width):
                    accumulate(sums, f, load(g_weights, f))
                g_weights[:] = 0.0
        if t_time == 0:
            for lane in range(live):
                for f in range(entries):
                    w = weights[f] if shared else weights[f * width + lane]
                    g_transition[(base + lane) * entries + f] = sums[f * width + lane] * w
        for s in range(states):
            beta = larger(load(messages, (steps * states + s) * lanes + base), zero)
            store(finishing, s * lanes + base, beta * load(here, s * width))

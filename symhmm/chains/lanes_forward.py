"""Backward recursion of chains in vector lanes (numba): messages from the end to the start, stored for the gradient.

Probabilities are scaled by powers of two, which is exact. A state whose message falls below what is still resolved,
without being impossible, marks its lane; the caller repeats such chains in log space.
"""

import numpy as np

from symhmm.chains.jit import inner, kernel
from symhmm.chains.lane_steps import CHUNK, SIZE, read_emission, read_matrix, towards_start
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
    vectors,
)


@inner
def lost_below(itemsize):
    """Messages below this are not trusted: their summands may have been flushed to zero."""
    return 1e-25 if itemsize == 4 else 1e-200


@inner
def _mark_lost(
    flags, base, before, after, tile, at, step, size, rest,
    transition, t_row, t_time, t_from, t_to, width, idle, last,
):  # fmt: skip
    """Mark the lanes in which a state is too small to trust, unless no path leads from it at all."""
    lost = lost_below(before.itemsize)
    for lane in range(width):
        if flags[base + lane] or (last and idle[base + lane]):
            continue
        for s in range(size * rest):
            x = before[s * width + lane]
            if not x < lost:  # what is no number stays one
                continue
            doubtful = x > 0.0
            first = (s % rest) * size
            for j in range(size):
                doubtful |= (
                    after[(first + j) * width + lane] > 0.0
                    and tile[at + j * width + lane] > -np.inf
                    and transition[t_row[base + lane] + step * t_time + s * t_from + j * t_to] > -np.inf
                )
            if doubtful:
                flags[base + lane] = 1
                break


@kernel
def lanes_forward(
    first_group, last_group, size, rest, steps, lanes, idle,
    like, transition_at, t_row, t_time, t_from, t_to, shared,
    emission_at, e_row, e_time, e_to,
    ending, keep, messages_at, scales_at, result, flags,
):  # fmt: skip
    """Backward recursion over the steps of every lane in some groups of lanes.

    Tensors come as addresses of numbers of the type of ``like``.

    ``ending`` and ``result`` are logarithms [S, lanes] in float64: the message at the end and at the start of each lane.
    ``idle`` marks lanes that have one step less; they skip the last. ``keep`` says whether to store the messages
    [steps + 1, S, lanes], largest between 1 and 2, and their scales [steps, lanes].
    """
    transition, emission = numbers_at(transition_at, like), numbers_at(emission_at, like)
    messages, scales = numbers_at(messages_at, like), numbers_at(scales_at, like)
    size, rest = SIZE or size, 1 if SIZE else rest
    width, states = lanes_of(emission), size * rest
    matrix, t_peaks = vectors(states * size // (width if shared else 1) + 1, emission), vectors(1, emission)
    tile, arrival = vectors(CHUNK * size, emission), vectors(states, emission)
    after, before = vectors(states, emission), vectors(states, emission)
    powers, peaks, ended = np.empty(width), np.empty(width), np.empty(width)
    lost = fill(emission, lost_below(emission.itemsize))
    ready = False
    for group in range(first_group, last_group):
        base = group * width
        if t_time == 0 and not (ready and shared):
            read_matrix(matrix, t_peaks, shared, base, 0, states, size, transition, t_row, t_time, t_from, t_to)
            ready = True
        # Step 1: the message at the end.
        any_idle = False
        for lane in range(width):
            powers[lane] = 0.0
            any_idle |= idle[base + lane]
            peak = -np.inf
            for s in range(states):
                peak = max(peak, ending[s * lanes + base + lane])
            peak = peak if peak > -np.inf else 0.0
            peaks[lane] = ended[lane] = peak
            for s in range(states):
                x = ending[s * lanes + base + lane]
                value = np.exp(x - peak)
                after[s * width + lane] = value
                if value < lost_below(emission.itemsize) and x > -np.inf:
                    flags[base + lane] = 1
        # Step 2: the recursion, from the last step to the first.
        top = steps
        while top > 0:
            low = max(0, top - CHUNK)
            read_emission(tile, base, low, top, size, emission, e_row, e_time, e_to)
            power = fill(emission, 0.0)  # whole numbers, of which the sum over a chunk is exact
            for step in range(top - 1, low - 1, -1):
                if keep:
                    for s in range(states):
                        store(messages, ((step + 1) * states + s) * lanes + base, load(after, s * width))
                if t_time != 0:
                    read_matrix(
                        matrix, t_peaks, shared, base, step, states, size, transition, t_row, t_time, t_from, t_to
                    )
                at = (step - low) * size * width
                peak = load(tile, at)
                for k in range(1, size):
                    peak = larger(peak, load(tile, at + k * width))
                peak = finite_or_zero(peak)
                for k in range(size):
                    e = exp(load(tile, at + k * width) - peak)
                    for r in range(rest):
                        s = (r * size + k) * width
                        store(arrival, s, e * load(after, s))
                towards_start(before, matrix, shared, arrival, size, rest)
                smallest = load(before, 0)
                for s in range(width, states * width, width):
                    smallest = smaller(smallest, load(before, s))
                if any_below(smallest, lost):
                    _mark_lost(
                        flags, base, before, after, tile, at, step, size, rest,
                        transition, t_row, t_time, t_from, t_to, width, idle, step == steps - 1,
                    )  # fmt: skip
                accumulate(peaks, 0, peak + load(t_peaks, 0))
                if any_idle and step == steps - 1:
                    # An idle lane keeps its message, whose scale is already 1.
                    for lane in range(width):
                        if idle[base + lane]:
                            peaks[lane] = ended[lane]
                            for s in range(lane, states * width, width):
                                before[s] = after[s]
                high = load(before, 0)
                for s in range(width, states * width, width):
                    high = larger(high, load(before, s))
                scale = reciprocal_power(high)
                power = power + exponent(high)
                if keep:
                    store(scales, step * lanes + base, scale)
                for s in range(0, states * width, width):
                    store(after, s, load(before, s) * scale)
            accumulate(powers, 0, power)
            top = low
        # Step 3: the message at the start.
        for s in range(states):
            if keep:
                store(messages, s * lanes + base, load(after, s * width))
            for lane in range(width):
                x = np.float64(after[s * width + lane])
                log = np.log(x) if x != 0.0 else -np.inf
                result[s * lanes + base + lane] = log + powers[lane] * np.log(2.0) + peaks[lane]

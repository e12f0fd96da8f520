"""One step of many chains side by side (numba): what the forward and the backward lane kernels share.

A group of lanes is as many chains as fit a vector. Arrays "[.., lanes]" hold one vector per entry.
"""

import numpy as np

from symhmm.chains.jit import inner
from symhmm.chains.masked import load_first
from symhmm.chains.simd import (
    exp,
    fill,
    finite_or_zero,
    fma,
    lanes_of,
    larger,
    load,
    splat,
    store,
)
from symhmm.chains.sums import eight_sums
from symhmm.chains.transpose import rows_to_lanes

CHUNK = 32  # steps whose emissions are transposed into lanes at a time: small enough for the first-level cache
SIZE = 0  # the number of states, in the copies of these functions that are made for one; see `symhmm.chains.sizes`


@inner
def read_terms(matrix, shared, base, step, states, size, transition, t_row, t_time, t_from, t_to):
    """The transition terms of a step: [S, K] if all lanes share them, else [S, K, lanes]."""
    width = lanes_of(matrix)
    for s in range(states):
        for j in range(size):
            offset = s * t_from + j * t_to + step * t_time
            k = s * size + j
            if shared:
                matrix[k] = transition[t_row[base] + offset]
            else:
                for lane in range(width):
                    matrix[k * width + lane] = transition[t_row[base + lane] + offset]


@inner
def read_matrix(matrix, peaks, shared, base, step, states, size, transition, t_row, t_time, t_from, t_to):
    """Exponentials of the transition terms relative to their largest one: [S, K] if all lanes share, else [S, K, lanes]."""
    size, states = SIZE or size, SIZE or states
    width = lanes_of(peaks)
    count = states * size * (1 if shared else width)
    read_terms(matrix, shared, base, step, states, size, transition, t_row, t_time, t_from, t_to)
    if shared:
        peak = matrix[0]
        for k in range(1, count):
            peak = max(peak, matrix[k])
        peaks[:] = peak if peak > -np.inf else 0.0
    else:
        high = load(matrix, 0)
        for k in range(width, count, width):
            high = larger(high, load(matrix, k))
        store(peaks, 0, finite_or_zero(high))
    high = load(peaks, 0)
    for k in range(0, count, width):
        store(matrix, k, exp(load(matrix, k) - high))


@inner
def read_emission(tile, base, first, last, size, emission, e_row, e_time, e_to):
    """Transpose the emission terms of some steps into [step, K, lanes]."""
    width = lanes_of(tile)
    size = SIZE or size
    # Lanes next to each other in memory, of which the last may be read several times: it fills up the last vector.
    beside = 1
    while beside < width and e_row[base + beside] == e_row[base] + beside:
        beside += 1
    side_by_side = True
    for lane in range(beside, width):
        side_by_side &= e_row[base + lane] == e_row[base + beside - 1]
    if side_by_side:
        for t in range(first, last):
            for k in range(size):
                at, to = e_row[base] + t * e_time + k * e_to, ((t - first) * size + k) * width
                if beside == width:
                    store(tile, to, load(emission, at))
                else:
                    store(tile, to, load_first(emission, at, beside))
        return
    # Squares of width x width numbers are transposed in registers, along whatever is contiguous in memory.
    count, done = last - first, 0
    if e_to == 1 and e_time == size:
        done = count * size - count * size % width
        for m in range(0, done, width):
            rows_to_lanes(emission, e_row, base, first * size + m, tile, m * width, width)
    elif e_time == 1:
        done = (count - count % width) * size
        for k in range(size):
            for t in range(0, count - count % width, width):
                rows_to_lanes(emission, e_row, base, first + t + k * e_to, tile, (t * size + k) * width, size * width)
    elif e_to == 1 and size >= width:
        whole = size - size % width
        for t in range(count):
            for k in range(0, whole, width):
                rows_to_lanes(emission, e_row, base, (first + t) * e_time + k, tile, (t * size + k) * width, width)
            for k in range(whole, size):
                for lane in range(width):
                    tile[(t * size + k) * width + lane] = emission[e_row[base + lane] + (first + t) * e_time + k]
        return
    for lane in range(width):
        row = e_row[base + lane]
        for m in range(done, count * size):
            tile[m * width + lane] = emission[row + (first + m // size) * e_time + m % size * e_to]


@inner
def towards_start(out, matrix, shared, arrival, size, rest):
    """out[i, r] = sum_j matrix[i, r, j] arrival[r, j]."""
    width = lanes_of(out)
    size, rest = SIZE or size, 1 if SIZE else rest
    one = 1 if shared else width
    row = rest * size * one
    for r in range(rest):
        v, i = r * size * width, 0
        while i + 8 <= size:
            eight_sums(
                out, (i * rest + r) * width, rest * width,
                matrix, (i * rest + r) * size * one, row, one, shared, arrival, v, width, size,
            )  # fmt: skip
            i += 8
        while i < size:
            k, a = (i * rest + r) * size * one, fill(arrival, 0.0)
            for j in range(size):
                w = splat(matrix, k + j) if shared else load(matrix, k + j * width)
                a = fma(w, load(arrival, v + j * width), a)
            store(out, (i * rest + r) * width, a)
            i += 1


@inner
def towards_end(out, matrix, shared, departure, at, gap, size, rest):
    """out[r, j] = sum_i departure[i, r] matrix[i, r, j]; states depart from ``at`` on, ``gap`` numbers apart."""
    width = lanes_of(out)
    size, rest = SIZE or size, 1 if SIZE else rest
    one = 1 if shared else width
    row = rest * size * one
    for r in range(rest):
        j = 0
        while j + 8 <= size:
            eight_sums(
                out, (r * size + j) * width, width,
                matrix, (r * size + j) * one, one, row, shared, departure, at + r * gap, rest * gap, size,
            )  # fmt: skip
            j += 8
        while j < size:
            k, a = (r * size + j) * one, fill(departure, 0.0)
            for i in range(size):
                w = splat(matrix, k + i * row) if shared else load(matrix, k + i * row)
                a = fma(w, load(departure, at + (i * rest + r) * gap), a)
            store(out, (r * size + j) * width, a)
            j += 1

"""One step of many chains side by side (numba): what the forward and the backward lane kernels share.

A group of lanes is as many chains as fit a vector. Arrays "[.., lanes]" hold one vector per entry.
"""

import numpy as np
from numba import njit

from symhmm.chains.simd import (
    exp,
    fill,
    finite_or_zero,
    fma,
    larger,
    load,
    rows_to_lanes,
    splat,
    store,
)

CHUNK = 32  # steps whose emissions are transposed into lanes at a time: small enough for the first-level cache


@njit(nogil=True, cache=True)
def read_matrix(matrix, peaks, shared, base, step, states, size, transition, t_row, t_time, t_from, t_to):
    """Exponentials of the transition terms relative to their largest one: [S, K] if all lanes share, else [S, K, lanes]."""
    width = peaks.size
    count = states * size * (1 if shared else width)
    for s in range(states):
        for j in range(size):
            offset = s * t_from + j * t_to + step * t_time
            k = s * size + j
            if shared:
                matrix[k] = transition[t_row[base] + offset]
            else:
                for lane in range(width):
                    matrix[k * width + lane] = transition[t_row[base + lane] + offset]
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


@njit(nogil=True, cache=True)
def read_emission(tile, base, first, last, size, emission, e_row, e_time, e_to, width):
    """Transpose the emission terms of some steps into [step, K, lanes]."""
    side_by_side = True
    for lane in range(1, width):
        side_by_side &= e_row[base + lane] == e_row[base] + lane
    if side_by_side:
        for t in range(first, last):
            for k in range(size):
                store(tile, ((t - first) * size + k) * width, load(emission, e_row[base] + t * e_time + k * e_to))
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


@njit(nogil=True, cache=True)
def towards_start(out, matrix, shared, arrival, size, rest, width):
    """out[i, r] = sum_j matrix[i, r, j] arrival[r, j], four i at a time, which share what they load."""
    one = 1 if shared else width
    row = rest * size * one
    for r in range(rest):
        i = 0
        while i + 4 <= size:
            k = (i * rest + r) * size * one
            v = r * size * width
            a = b = c = d = fill(arrival, 0.0)
            if shared:
                for j in range(size):
                    x = load(arrival, v + j * width)
                    a, b = fma(splat(matrix, k + j), x, a), fma(splat(matrix, k + row + j), x, b)
                    c, d = fma(splat(matrix, k + 2 * row + j), x, c), fma(splat(matrix, k + 3 * row + j), x, d)
            else:
                for j in range(0, size * width, width):
                    x = load(arrival, v + j)
                    a, b = fma(load(matrix, k + j), x, a), fma(load(matrix, k + row + j), x, b)
                    c, d = fma(load(matrix, k + 2 * row + j), x, c), fma(load(matrix, k + 3 * row + j), x, d)
            o, gap = (i * rest + r) * width, rest * width
            store(out, o, a)
            store(out, o + gap, b)
            store(out, o + 2 * gap, c)
            store(out, o + 3 * gap, d)
            i += 4
        while i < size:
            k, v = (i * rest + r) * size * one, r * size * width
            a = fill(arrival, 0.0)
            if shared:
                for j in range(size):
                    a = fma(splat(matrix, k + j), load(arrival, v + j * width), a)
            else:
                for j in range(0, size * width, width):
                    a = fma(load(matrix, k + j), load(arrival, v + j), a)
            store(out, (i * rest + r) * width, a)
            i += 1


@njit(nogil=True, cache=True)
def towards_end(out, matrix, shared, departure, size, rest, width):
    """out[r, j] = sum_i departure[i, r] matrix[i, r, j], four j at a time."""
    one = 1 if shared else width
    row = rest * size * one
    for r in range(rest):
        j = 0
        while j + 4 <= size:
            k = (r * size + j) * one
            a = b = c = d = fill(departure, 0.0)
            for i in range(size):
                x = load(departure, (i * rest + r) * width)
                if shared:
                    a, b = fma(splat(matrix, k), x, a), fma(splat(matrix, k + 1), x, b)
                    c, d = fma(splat(matrix, k + 2), x, c), fma(splat(matrix, k + 3), x, d)
                else:
                    a, b = fma(load(matrix, k), x, a), fma(load(matrix, k + width), x, b)
                    c, d = fma(load(matrix, k + 2 * width), x, c), fma(load(matrix, k + 3 * width), x, d)
                k += row
            o = (r * size + j) * width
            store(out, o, a)
            store(out, o + width, b)
            store(out, o + 2 * width, c)
            store(out, o + 3 * width, d)
            j += 4
        while j < size:
            k = (r * size + j) * one
            a = fill(departure, 0.0)
            for i in range(size):
                x = load(departure, (i * rest + r) * width)
                if shared:
                    a = fma(splat(matrix, k), x, a)
                else:
                    a = fma(load(matrix, k), x, a)
                k += row
            store(out, (r * size + j) * width, a)
            j += 1

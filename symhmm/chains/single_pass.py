"""Value and gradient of one chain after the other (numba), its states side by side in vectors: where chains are too few to fill
the lanes of a vector, and states are many. One transition matrix for all steps.

The algorithm is that of `symhmm.chains.lanes_forward` and `symhmm.chains.lanes_backward`. Rows of states are filled up with
states that are never reached.
"""

import numpy as np

from symhmm.chains.jit import inner, kernel
from symhmm.chains.lane_steps import CHUNK
from symhmm.chains.lanes_backward import FLUSH
from symhmm.chains.lanes_forward import lost_below
from symhmm.chains.simd import (
    accumulate,
    any_below,
    exp,
    exponent,
    fill,
    finite_or_zero,
    fma,
    highest,
    lanes_of,
    larger,
    load,
    numbers_at,
    reciprocal_power,
    smaller,
    splat,
    store,
    vectors,
    where_positive,
)
from symhmm.chains.sums import eight_sums


@inner
def _product(out, o, matrix, row, vector, v):
    """out[i] = sum over j of matrix[j, i] vector[j]; rows and columns are whole vectors."""
    width = lanes_of(matrix)
    zero = fill(matrix, 0.0)
    i = 0
    while i + 2 * width <= row:
        a = b = c = d = e = f = g = h = zero
        for j in range(0, row, 4):
            k = j * row + i
            x, y = splat(vector, v + j), splat(vector, v + j + 1)
            a, b = fma(x, load(matrix, k), a), fma(x, load(matrix, k + width), b)
            c, d = fma(y, load(matrix, k + row), c), fma(y, load(matrix, k + row + width), d)
            x, y = splat(vector, v + j + 2), splat(vector, v + j + 3)
            e, f = fma(x, load(matrix, k + 2 * row), e), fma(x, load(matrix, k + 2 * row + width), f)
            g, h = fma(y, load(matrix, k + 3 * row), g), fma(y, load(matrix, k + 3 * row + width), h)
        store(out, o + i, (a + c) + (e + g))
        store(out, o + i + width, (b + d) + (f + h))
        i += 2 * width
    while i < row:
        a = c = e = g = zero
        for j in range(0, row, 4):
            k = j * row + i
            a, c = (
                fma(splat(vector, v + j), load(matrix, k), a),
                fma(splat(vector, v + j + 1), load(matrix, k + row), c),
            )
            e = fma(splat(vector, v + j + 2), load(matrix, k + 2 * row), e)
            g = fma(splat(vector, v + j + 3), load(matrix, k + 3 * row), g)
        store(out, o + i, (a + c) + (e + g))
        i += width


@inner
def _doubtful(size, before, after, emission, e, e_to, transition, f_row, t_from, t_to, lost):
    """Whether a state is too small to trust, though a path leads from it."""
    for s in range(size):
        if not before[s] < lost:  # what is no number stays one
            continue
        if before[s] > 0.0:
            return True
        for j in range(size):
            # Their exponentials may be zero though the terms are finite.
            possible = emission[e + j * e_to] > -np.inf and transition[f_row + s * t_from + j * t_to] > -np.inf
            if after[j] > 0.0 and possible:
                return True
    return False


@kernel
def single_pass(
    first, last, shape, like, transition_at, f, emission_at, e, terminal_at, z, initial_at, i, weight_at, w_row, lost,
    scratch_at, results_at, gradients_at, gf, ge,
):  # fmt: skip
    """Log-probabilities of some chains, and their gradients; arguments as in `symhmm.chains.whole_pass.whole_pass`.

    ``scratch_at`` is the address of messages and exponentials of the emission terms [steps + 1, row], and of scales [steps],
    where a row has the states and what fills up its last vector.
    """
    transition, emission = numbers_at(transition_at, like), numbers_at(emission_at, like)
    terminal, initial, weight = numbers_at(terminal_at, like), numbers_at(initial_at, like), numbers_at(weight_at, like)
    evidence, initials, finals = (
        numbers_at(results_at[0], like), numbers_at(results_at[1], like), numbers_at(results_at[2], like),
    )  # fmt: skip
    g_transition, g_emission = numbers_at(gradients_at[0], like), numbers_at(gradients_at[1], like)
    size, _, steps, _, _ = shape
    (f_row, _, t_from, t_to, _), (e_row, e_time, e_to), (z_row, z_from), (i_row, i_from) = f, e, z, i
    (gt_row, _), (ge_row, ge_time, ge_to, ge_add) = gf, ge
    width, bytes_each = lanes_of(emission), emission.itemsize
    wide = -(-size // width)
    row = wide * width
    messages = numbers_at(scratch_at, like)
    weights = numbers_at(scratch_at + (steps + 1) * row * bytes_each, like)
    scales = numbers_at(scratch_at + 2 * (steps + 1) * row * bytes_each, like)
    forwards, backwards = vectors(row * wide, emission), vectors(row * wide, emission)  # [from, to], [to, from]
    after, before, arrival, filler = (
        vectors(wide, emission),
        vectors(wide, emission),
        vectors(wide, emission),
        vectors(wide, emission),
    )
    there, counts, some = vectors(wide, emission), vectors(row * wide, emission), vectors(row * wide, emission)
    departures, arrivals = vectors((CHUNK + 1) * wide, emission), vectors(CHUNK * wide, emission)
    sums, start = np.empty(row * row), np.empty(size)
    lowest = fill(emission, lost_below(bytes_each))
    for s in range(row):
        filler[s] = 0.0 if s < size else 1.0
        after[s] = 0.0
    matrix_of = -1
    t_peak = 0.0
    for b in range(first, last):
        # Step 1: the matrix, unless it is that of the chain before, and the message at the end.
        if matrix_of != f_row[b]:
            matrix_of = f_row[b]
            t_peak = -np.inf
            for s in range(size):
                for j in range(size):
                    t_peak = max(t_peak, transition[matrix_of + s * t_from + j * t_to])
            t_peak = t_peak if t_peak > -np.inf else 0.0
            forwards[:] = -np.inf
            for s in range(size):
                for j in range(size):
                    forwards[s * row + j] = transition[matrix_of + s * t_from + j * t_to] - t_peak
            for k in range(0, row * row, width):
                store(forwards, k, exp(load(forwards, k)))
            for s in range(row):
                for j in range(row):
                    backwards[j * row + s] = forwards[s * row + j]
        peak = -np.inf
        for s in range(size):
            peak = max(peak, terminal[z_row[b] + s * z_from])
        peak = peak if peak > -np.inf else 0.0
        height, power = np.float64(peak) + steps * np.float64(t_peak), 0.0
        for s in range(size):
            x = terminal[z_row[b] + s * z_from]
            after[s] = np.exp(x - peak)
            if after[s] < lost_below(bytes_each) and x > -np.inf:
                lost[b] = 1
        # Step 2: messages, from the last step to the first.
        for step in range(steps - 1, -1, -1):
            at = step * row
            for k in range(0, row, width):
                store(messages, at + row + k, load(after, k))
            if e_to == 1:
                for k in range(size):
                    arrival[k] = emission[e_row[b] + step * e_time + k]
            else:
                for k in range(size):
                    arrival[k] = emission[e_row[b] + step * e_time + k * e_to]
            for k in range(size, row):
                arrival[k] = -np.inf
            high = load(arrival, 0)
            for k in range(width, row, width):
                high = larger(high, load(arrival, k))
            high = finite_or_zero(highest(high))
            store(there, 0, high)
            height += there[0]
            for k in range(0, row, width):
                x = exp(load(arrival, k) - high)
                store(weights, at + k, x)
                store(arrival, k, x * load(after, k))
            _product(before, 0, backwards, row, arrival, 0)
            high, low = load(before, 0), load(before, 0) + load(filler, 0)
            for k in range(width, row, width):
                high, low = larger(high, load(before, k)), smaller(low, load(before, k) + load(filler, k))
            if any_below(low, lowest) and not lost[b]:
                lost[b] = _doubtful(
                    size, before, after, emission, e_row[b] + step * e_time, e_to,
                    transition, f_row[b], t_from, t_to, lost_below(bytes_each),
                )  # fmt: skip
            high = highest(high)
            scale = reciprocal_power(high)
            store(there, 0, exponent(high))
            power += there[0]
            store(there, 0, scale)
            scales[step] = there[0]
            for k in range(0, row, width):
                store(after, k, load(before, k) * scale)
        for k in range(0, row, width):
            store(messages, k, load(after, k))
        # Step 3: the sum over the initial states.
        peak, possible = -np.inf, False
        for s in range(size):
            x = np.float64(after[s])
            start[s] = (np.log(x) if x != 0.0 else -np.inf) + power * np.log(2.0) + height
            start[s] += initial[i_row[b] + s * i_from]
            possible |= start[s] != -np.inf
            if peak < start[s] < np.inf:
                peak = start[s]
        if peak == -np.inf:  # what is possible is no finite number
            peak = 0.0
        total = 0.0
        for s in range(size):
            start[s] = np.exp(start[s] - peak)
            total += start[s]
        evidence[b] = peak + np.log(total) if possible else -np.inf
        for s in range(row):
            departures[s] = 0.0
        for s in range(size):
            share = weight[w_row[b]] * (start[s] / total) if possible else 0.0
            initials[b * size + s] = share
            if not lost[b] and after[s] > 0.0:
                departures[s] = share / after[s]
        # Step 4: occupancies, from the first step to the last.
        counts[:] = 0.0
        sums[:] = 0.0
        for begin in range(0, steps, CHUNK):
            end = min(steps, begin + CHUNK)
            for step in range(begin, end):
                at, pair = step * row, (step - begin) * row
                _product(there, 0, forwards, row, departures, pair)
                scale = splat(scales, step)
                for k in range(0, row, width):
                    x, beta = load(weights, at + k) * scale, load(messages, at + row + k)
                    store(arrivals, pair + k, x * beta)
                    u = where_positive(beta, x * load(there, k))
                    store(departures, pair + row + k, u)
                    store(there, k, u * beta)
                to = ge_row[b] + step * ge_time
                for k in range(size):
                    if ge_add:
                        g_emission[to + k * ge_to] += there[k]
                    else:
                        g_emission[to + k * ge_to] = there[k]
            for m in range(0, row, 8):
                for k in range(0, row, width):
                    eight_sums(some, m * row + k, row, departures, m, 1, row, True, arrivals, k, row, end - begin)
            for k in range(0, row * row, width):
                store(counts, k, load(counts, k) + load(some, k))
            if end % (CHUNK * FLUSH) == 0 or end == steps:
                for k in range(0, row * row, width):
                    accumulate(sums, k, load(counts, k))
                counts[:] = 0.0
            for k in range(0, row, width):
                store(departures, k, load(departures, (end - begin) * row + k))
        for s in range(size):
            finals[b * size + s] = departures[s] * messages[steps * row + s]
            for j in range(size):
                g_transition[gt_row[b] + s * size + j] += sums[s * row + j] * forwards[s * row + j]

"""Best next states of many chains side by side (numba): the max-plus recursion of Viterbi (1967) in vector lanes.

One pass from the end to the start. What it leaves is one byte per step and state, the best next state, so that a path is
read off without looking at a number again.
"""

# numba infers the types of kernels.
# mypy: allow-untyped-defs, no-check-untyped-defs

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from symhmm.chains.jit import kernel
from symhmm.chains.lane_steps import CHUNK, SIZE, read_emission, read_terms
from symhmm.chains.simd import (
    accumulate,
    element_pointer,
    fill,
    finite_or_zero,
    lanes_of,
    larger,
    load,
    numbers_at,
    splat,
    store,
)

SIDE = 16  # paths that are followed side by side
RESCALE = 8  # steps after which the largest weight is taken off


@intrinsic
def where_larger(typing: Any, x: Any, y: Any, a: Any, b: Any) -> Any:
    """``a`` in the lanes where ``x > y``, else ``b``."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[2], args[3])

    return a(x, y, a, a), code


@intrinsic
def store_integers(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write the lanes, which hold whole numbers, to ``array[index : index + width]``, an array of integers."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        narrow = ir.VectorType(ir.IntType(array.dtype.bitwidth), vector.width)
        pointer = builder.bitcast(element_pointer(context, builder, array, *args[:2]), narrow.as_pointer())
        out = builder.store(builder.fptosi(args[2], narrow), pointer)
        out.align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@kernel
def best_lanes(
    first_group, last_group, size, rest, length, lanes, chains,
    like, transition_at, t_row, t_time, t_from, t_to, shared,
    emission_at, e_row, e_time, e_to,
    stops, result, choices,
):  # fmt: skip
    """Best log-weight from every initial state [S, lanes], and the best next state [steps, S, chains] of every state.

    Of equally good states the first is taken. ``stops`` says how many steps of each lane count: later ones weigh nothing,
    and their choices stay as they are.
    """
    transition, emission = numbers_at(transition_at, like), numbers_at(emission_at, like)
    size, rest = SIZE or size, 1 if SIZE else rest
    width, states = lanes_of(emission), size * rest
    dtype = emission.dtype
    matrix = np.empty(states * size * (1 if shared else width), dtype)
    tile = np.empty(CHUNK * size * width, dtype)
    after, arrival = np.empty(states * width, dtype), np.empty(states * width, dtype)
    norm, some = np.empty(width), np.empty(width, choices.dtype)
    number = np.empty(size, dtype)
    for j in range(size):
        number[j] = j
    least, zero = fill(emission, -np.inf), fill(emission, 0.0)
    ready = False
    for group in range(first_group, last_group):
        base = group * width
        if t_time == 0 and not (ready and shared):
            read_terms(matrix, shared, base, 0, states, size, transition, t_row, t_time, t_from, t_to)
            ready = True
        top, low_stop = 0, length
        for lane in range(width):
            norm[lane] = 0.0
            top, low_stop = max(top, stops[base + lane]), min(low_stop, stops[base + lane])
        after[:] = 0.0
        while top > 0:
            low = max(0, top - CHUNK)
            read_emission(tile, base, low, top, size, emission, e_row, e_time, e_to)
            for step in range(top - 1, low - 1, -1):
                if t_time != 0:
                    read_terms(matrix, shared, base, step, states, size, transition, t_row, t_time, t_from, t_to)
                at = (step - low) * size * width
                for k in range(size):
                    e = load(tile, at + k * width)
                    for r in range(rest):
                        s = (r * size + k) * width
                        store(arrival, s, e + load(after, s))
                for s in range(states):
                    to = (s % rest) * size * width
                    best, choice = least, zero
                    for j in range(size):
                        k = s * size + j
                        weight = splat(matrix, k) if shared else load(matrix, k * width)
                        x = weight + load(arrival, to + j * width)
                        choice = where_larger(x, best, splat(number, j), choice)
                        best = larger(x, best)
                    store(after, s * width, best)
                    place = (step * states + s) * chains + base
                    if base + width <= chains:
                        store_integers(choices, place, choice)
                    else:
                        store_integers(some, 0, choice)
                        for lane in range(chains - base):
                            choices[place + lane] = some[lane]
                if step >= low_stop:
                    # Sequences that have ended: nothing follows, whatever the state.
                    for lane in range(width):
                        if step >= stops[base + lane]:
                            for s in range(lane, states * width, width):
                                after[s] = 0.0
                if step % RESCALE == 0:
                    # Only differences matter for the choice; small numbers keep them exact.
                    peak = least
                    for s in range(0, states * width, width):
                        peak = larger(load(after, s), peak)
                    peak = finite_or_zero(peak)
                    accumulate(norm, 0, peak)
                    for s in range(0, states * width, width):
                        store(after, s, load(after, s) - peak)
            top = low
        for s in range(states):
            for lane in range(width):
                result[s * lanes + base + lane] = np.float64(after[s * width + lane]) + norm[lane]


@kernel
def follow_choices(first, last, rows, state, stops, size, rest, length, chains, choices, paths):
    """States along the best path from the joint state ``state`` of each path's chain [paths, steps]; 0 after its end.

    A path waits for each of its reads, so some go side by side: ``SIDE`` of them as long as all run, then one by one.
    """
    states = size * rest
    now, at = np.empty(SIDE, np.int64), np.empty(SIDE, np.int64)
    for begin in range(first, last, SIDE):
        count, together = min(SIDE, last - begin), length
        for i in range(count):
            now[i], at[i] = state[begin + i], rows[begin + i]
            together = min(together, stops[at[i]])
        for t in range(together):
            for i in range(count):
                j = choices[(t * states + now[i]) * chains + at[i]]
                paths[begin + i, t] = j
                now[i] = j if rest == 1 else (now[i] % rest) * size + j
        for i in range(count):
            s, stop = now[i], stops[at[i]]
            for t in range(together, stop):
                j = choices[(t * states + s) * chains + at[i]]
                paths[begin + i, t] = j
                s = j if rest == 1 else (s % rest) * size + j
            for t in range(stop, length):
                paths[begin + i, t] = 0

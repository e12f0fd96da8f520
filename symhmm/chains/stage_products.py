"""One stage of a step in vector lanes (numba): its sums, and the gradients of what it reads and of its weights.

``t`` are the numbers of `symhmm.chains.stage_tables.Tables`, ``h`` is where the head of the stage begins in them. Arrays hold
one vector of lanes per entry; weights one number per entry where all lanes share them.
"""

# numba infers the types of kernels.
# mypy: allow-untyped-defs, no-check-untyped-defs

from symhmm.chains.jit import inner, kernel
from symhmm.chains.simd import fill, fma, lanes_of, load, splat, store
from symhmm.chains.stage_blocks import MOST, correlate, multiply
from symhmm.chains.stage_tables import (
    COLUMNS,
    ENTRIES,
    FIRST,
    IN_READ,
    INNER,
    INNERS,
    INPUTS,
    LAST,
    LISTED,
    NEW,
    OUT_NEW,
    OUTER,
    OUTERS,
    READ,
    ROWS,
    SUMS,
    WEIGHT_NEW,
    WEIGHT_READ,
)


@kernel
def _listed(out, source, weights, shared, t, begin, count):
    """out[o] = sum of weights[w] source[s] over the pairs (s, w) of each o."""
    width = lanes_of(out)
    for o in range(count):
        a = fill(out, 0.0)
        for k in range(t[begin + o], t[begin + o + 1], 2):
            w = splat(weights, t[k + 1]) if shared else load(weights, t[k + 1] * width)
            a = fma(w, load(source, t[k] * width), a)
        store(out, o * width, a)


@inner
def _block(count):
    """Size of nearly equal blocks of at most ``MOST``."""
    return -(-count // -(-count // MOST))


@kernel
def stage(out, source, weights, shared, t, h):
    """The sums of a stage."""
    if t[h + LISTED]:
        _listed(out, source, weights, shared, t, t[h + ROWS], t[h + SUMS])
        return
    new, read, count = t[h + NEW], t[h + READ], t[h + OUTERS]
    n_step, r_step = _block(new), _block(read)
    for u in range(t[h + OUTER], t[h + OUTER] + count):
        for n in range(0, new, n_step):
            for r in range(0, read, r_step):
                multiply(
                    min(n_step, new - n), min(r_step, read - r),
                    out, t[u] + n * t[h + OUT_NEW], t[h + OUT_NEW],
                    source, t[u + count] + r * t[h + IN_READ], t[h + IN_READ],
                    weights, t[u + 2 * count] + n * t[h + WEIGHT_NEW] + r * t[h + WEIGHT_READ],
                    t[h + WEIGHT_NEW], t[h + WEIGHT_READ], shared, r > 0,
                    t, t[h + INNER], t[h + INNER] + t[h + INNERS], t[h + INNERS],
                )  # fmt: skip


@kernel
def stage_inputs(g_source, g_out, weights, shared, t, h):
    """The gradient of what a stage reads."""
    if t[h + LISTED]:
        _listed(g_source, g_out, weights, shared, t, t[h + COLUMNS], t[h + INPUTS])
        return
    new, read, count = t[h + NEW], t[h + READ], t[h + OUTERS]
    n_step, r_step = _block(new), _block(read)
    for u in range(t[h + OUTER], t[h + OUTER] + count):
        again = t[u + 3 * count] == 0
        for r in range(0, read, r_step):
            for n in range(0, new, n_step):
                multiply(
                    min(r_step, read - r), min(n_step, new - n),
                    g_source, t[u + count] + r * t[h + IN_READ], t[h + IN_READ],
                    g_out, t[u] + n * t[h + OUT_NEW], t[h + OUT_NEW],
                    weights, t[u + 2 * count] + n * t[h + WEIGHT_NEW] + r * t[h + WEIGHT_READ],
                    t[h + WEIGHT_READ], t[h + WEIGHT_NEW], shared, again or n > 0,
                    t, t[h + INNER] + t[h + INNERS], t[h + INNER], t[h + INNERS],
                )  # fmt: skip


@kernel
def stage_weights(g_weights, source, g_out, t, h):
    """The gradient of the weights of a stage, which has lanes of its own, added to ``g_weights``."""
    width = lanes_of(source)
    if t[h + LISTED]:
        for w in range(t[h + FIRST], t[h + LAST]):
            begin = t[h + ENTRIES] + w - t[h + FIRST]
            a = load(g_weights, w * width)
            for k in range(t[begin], t[begin + 1], 2):
                a = fma(load(g_out, t[k] * width), load(source, t[k + 1] * width), a)
            store(g_weights, w * width, a)
        return
    new, read, count = t[h + NEW], t[h + READ], t[h + OUTERS]
    n_step, r_step = _block(new), _block(read)
    for u in range(t[h + OUTER], t[h + OUTER] + count):
        for n in range(0, new, n_step):
            for r in range(0, read, r_step):
                correlate(
                    min(n_step, new - n), min(r_step, read - r),
                    g_out, t[u] + n * t[h + OUT_NEW], t[h + OUT_NEW],
                    source, t[u + count] + r * t[h + IN_READ], t[h + IN_READ],
                    g_weights, t[u + 2 * count] + n * t[h + WEIGHT_NEW] + r * t[h + WEIGHT_READ],
                    t[h + WEIGHT_NEW], t[h + WEIGHT_READ],
                    t, t[h + INNER], t[h + INNER] + t[h + INNERS], t[h + INNERS],
                )  # fmt: skip

"""Weighted squares of sums that are linear in data, and their gradients (numba): vectors of columns side by side.

Each result is written once and nothing is kept between; the sums are made again for the gradient. Rows are finite; a weight or
a scale may be infinite, and counts nothing where what it multiplies is zero.
"""

from symhmm.chains.jit import inner, kernel
from symhmm.chains.simd import accumulate, fill, fma, lanes_of, load, numbers_at, splat, store, vectors, where_nonzero

BLOCK = 1024  # columns of which the rows stay in the first-level cache while all states are worked out


@inner
def _root(weights, w, w_next, rows, at, columns, terms):
    """The sum of a state in some columns; a row of zeros counts nothing, whatever its weight."""
    total = fill(rows, 0.0)
    for _ in range(terms):
        row = load(rows, at)
        total = total + where_nonzero(row, splat(weights, w) * row)
        w, at = w + w_next, at + columns
    return total


@inner
def _root_at(weights, w, w_next, rows, at, columns, terms):
    """The sum of a state in one column."""
    total = rows[at] * 0
    for _ in range(terms):
        if rows[at] != 0:
            total += weights[w] * rows[at]
        w, at = w + w_next, at + columns
    return total


@kernel
def add_squares(first, last, sizes, like, before_at, b_next, scale_at, weights_at, rows_at, out_at):
    """Columns ``first`` to ``last`` of the result.

    Args:
        sizes: B, J, K, R.
        b_next: 1, or 0 where ``before`` has one column.
    """
    groups, terms, size, columns = sizes
    before, scale = numbers_at(before_at, like), numbers_at(scale_at, like)
    weights, rows, out = numbers_at(weights_at, like), numbers_at(rows_at, like), numbers_at(out_at, like)
    width = lanes_of(rows)
    for b in range(groups):
        for low in range(first, last, BLOCK):
            top = min(last, low + BLOCK)
            for k in range(size):
                state, w, data = b * size + k, b * terms * size + k, b * terms * columns
                start = state * columns if b_next else state
                factor = splat(scale, state)
                for r in range(low, top - width + 1, width):
                    root = _root(weights, w, size, rows, data + r, columns, terms)
                    there = load(before, start + r) if b_next else splat(before, start)
                    store(out, state * columns + r, there + where_nonzero(root, root * factor * root))
                for r in range(top - (top - low) % width, top):
                    root = _root_at(weights, w, size, rows, data + r, columns, terms)
                    square = scale[state] * root * root if root != 0 else root
                    out[state * columns + r] = before[start + r * b_next] + square


@kernel
def sum_gradients(first, last, sizes, like, gradient_at, weights_at, rows_at, sums):
    """Add up over columns ``first`` to ``last``, to ``sums`` [B, K, J + 2, lanes] in float64, of each state: its gradients,
    those times the square, and those times the root times each row."""
    groups, terms, size, columns = sizes
    gradient, weights, rows = numbers_at(gradient_at, like), numbers_at(weights_at, like), numbers_at(rows_at, like)
    width = lanes_of(rows)
    slopes = vectors(terms, rows)
    for b in range(groups):
        for low in range(first, last, BLOCK):
            top = min(last, low + BLOCK)
            for k in range(size):
                state, w, data = b * size + k, b * terms * size + k, b * terms * columns
                plain = squares = fill(rows, 0.0)
                for j in range(terms):
                    store(slopes, j * width, plain)
                for r in range(low, top - width + 1, width):
                    g = load(gradient, state * columns + r)
                    root = _root(weights, w, size, rows, data + r, columns, terms)
                    both = g * root
                    plain, squares = plain + g, fma(both, root, squares)
                    for j in range(terms):
                        slope = fma(both, load(rows, data + j * columns + r), load(slopes, j * width))
                        store(slopes, j * width, slope)
                at = state * (terms + 2) * width
                accumulate(sums, at, plain)
                accumulate(sums, at + width, squares)
                for j in range(terms):
                    accumulate(sums, at + (j + 2) * width, load(slopes, j * width))
                for r in range(top - (top - low) % width, top):
                    g = gradient[state * columns + r]
                    root = _root_at(weights, w, size, rows, data + r, columns, terms)
                    sums[at] += g
                    sums[at + width] += g * root * root
                    for j in range(terms):
                        sums[at + (j + 2) * width] += g * root * rows[data + j * columns + r]

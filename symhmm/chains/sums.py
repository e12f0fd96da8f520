"""Eight sums of products at once inside numba kernels: so many independent chains of additions hide their latency."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from symhmm.chains.jit import inner
from symhmm.chains.simd import VECTORS, fill, fused, splat_at, store, vector_at

ROWS, COLUMNS = 8, 4


def _add_columns(columns: int, shared: bool) -> Any:
    """Add some columns times their entries of a vector to the sums of eight rows."""
    weight_at = splat_at if shared else vector_at

    @intrinsic
    def add(
        typing: Any, sums: Any, matrix: Any, k: Any, k_row: Any, k_next: Any, vector: Any, v: Any, v_next: Any
    ) -> Any:
        kind, index = VECTORS[matrix.dtype], types.intp

        def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            values = cgutils.unpack_tuple(builder, args[0], ROWS)
            _, entries, k, k_row, k_next, numbers, v, v_next = args
            for _ in range(columns):
                x, at = vector_at(context, builder, vector, numbers, v), k
                for row in range(ROWS):
                    weight = weight_at(context, builder, matrix, entries, at)
                    values[row] = fused(builder, weight, x, values[row])
                    at = builder.add(at, k_row)
                k, v = builder.add(k, k_next), builder.add(v, v_next)
            return context.make_tuple(builder, signature.return_type, values)

        return types.UniTuple(kind, ROWS)(sums, matrix, index, index, index, vector, index, index), code

    return add


_add_one, _add_one_shared = _add_columns(1, False), _add_columns(1, True)
_add_some, _add_some_shared = _add_columns(COLUMNS, False), _add_columns(COLUMNS, True)


@inner
def eight_sums(out, o, o_gap, matrix, k, k_row, k_next, shared, vector, v, v_next, count):
    """out[o + i o_gap] = sum over j < count of matrix[k + i k_row + j k_next] vector[v + j v_next] for eight rows i.

    Entries of the matrix are numbers where all lanes share them, and vectors elsewhere.
    """
    zero = fill(vector, 0.0)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero)
    whole = count // COLUMNS
    if shared:
        for _ in range(whole):
            sums = _add_some_shared(sums, matrix, k, k_row, k_next, vector, v, v_next)
            k, v = k + COLUMNS * k_next, v + COLUMNS * v_next
        for _ in range(count - whole * COLUMNS):
            sums = _add_one_shared(sums, matrix, k, k_row, k_next, vector, v, v_next)
            k, v = k + k_next, v + v_next
    else:
        for _ in range(whole):
            sums = _add_some(sums, matrix, k, k_row, k_next, vector, v, v_next)
            k, v = k + COLUMNS * k_next, v + COLUMNS * v_next
        for _ in range(count - whole * COLUMNS):
            sums = _add_one(sums, matrix, k, k_row, k_next, vector, v, v_next)
            k, v = k + k_next, v + v_next
    for n, total in enumerate(sums):
        store(out, o + n * o_gap, total)

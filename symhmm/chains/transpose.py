"""Squares of numbers transposed in registers: between rows, one per chain, and vectors, one lane per chain."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from symhmm.chains.simd import VECTORS, element_pointer


def _transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """A square of vectors with rows and columns exchanged, by halves, quarters and so on (Eklundh 1972)."""
    width = len(rows)
    indices = ir.VectorType(ir.IntType(32), width)
    half = width // 2
    while half:
        # Exchange the upper right and the lower left quarter of every block of 2 * half rows and columns.
        above = [i if not i & half else width + (i ^ half) for i in range(width)]
        below = [i | half if not i & half else width + i for i in range(width)]
        for r in range(width):
            if not r & half:
                a, b = rows[r], rows[r | half]
                rows[r] = builder.shuffle_vector(a, b, ir.Constant(indices, above))
                rows[r | half] = builder.shuffle_vector(a, b, ir.Constant(indices, below))
        half //= 2
    return rows


def _row_pointers(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> list[ir.Value]:
    """Addresses of vectors in the rows of the lanes; the arguments are flat, rows, base and offset."""
    (flat, rows), (flat_value, rows_value, base, offset) = signature, args
    kind = VECTORS[flat.dtype]
    data = context.make_array(flat)(context, builder, flat_value).data
    starts = context.make_array(rows)(context, builder, rows_value).data
    vector = context.get_value_type(kind).as_pointer()
    pointers = []
    for lane in range(kind.width):
        start = builder.load(builder.gep(starts, [builder.add(base, ir.Constant(base.type, lane))]))
        pointers.append(builder.bitcast(builder.gep(data, [builder.add(start, offset)]), vector))
    return pointers


@intrinsic
def rows_to_lanes(typing: Any, flat: Any, rows: Any, base: Any, offset: Any, out: Any, at: Any, gap: Any) -> Any:
    """out[at + m * gap + lane] = flat[rows[base + lane] + offset + m] for all m and lanes below the width."""
    kind = VECTORS[flat.dtype]

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        vectors = []
        for pointer in _row_pointers(context, builder, (flat, rows), args[:4]):
            vectors.append(builder.load(pointer))
            vectors[-1].align = kind.dtype.bitwidth // 8
        for m, vector in enumerate(_transposed(builder, vectors)):
            index = builder.add(args[5], builder.mul(args[6], ir.Constant(args[6].type, m)))
            pointer = element_pointer(context, builder, out, args[4], index)
            builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer())).align = kind.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(flat, rows, types.intp, types.intp, out, types.intp, types.intp), code


@intrinsic
def lanes_to_rows(
    typing: Any, tile: Any, at: Any, gap: Any, flat: Any, rows: Any, base: Any, offset: Any, add: Any
) -> Any:
    """flat[rows[base + lane] + offset + m] = (or +=, with ``add``) tile[at + m * gap + lane] for all m and lanes.

    Where lanes have the same row the first of them is written last.
    """
    kind = VECTORS[flat.dtype]

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        vectors = []
        for m in range(kind.width):
            index = builder.add(args[1], builder.mul(args[2], ir.Constant(args[2].type, m)))
            pointer = element_pointer(context, builder, tile, args[0], index)
            vectors.append(builder.load(builder.bitcast(pointer, context.get_value_type(kind).as_pointer())))
            vectors[-1].align = kind.dtype.bitwidth // 8
        pointers = _row_pointers(context, builder, (flat, rows), args[3:7])
        for pointer, vector in reversed(list(zip(pointers, _transposed(builder, vectors), strict=True))):
            before = builder.load(pointer)
            before.align = kind.dtype.bitwidth // 8
            vector = builder.select(args[7], builder.fadd(before, vector), vector)
            builder.store(vector, pointer).align = kind.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(tile, types.intp, types.intp, flat, rows, types.intp, types.intp, types.boolean), code

"""The first lanes of vectors inside numba kernels: where fewer numbers are left in memory than a vector holds."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from symhmm.chains.simd import VECTORS, element_pointer, spread


def _masked(
    builder: ir.IRBuilder, verb: str, kind: ir.VectorType, result: ir.Type, args: Sequence[ir.Value]
) -> ir.Value:
    """Call LLVM's masked load or store of vectors of a kind."""
    letter = "f32" if isinstance(kind.element, ir.FloatType) else "f64"
    name = f"llvm.masked.{verb}.v{kind.count}{letter}.p0"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [x.type for x in args]), name)
    return builder.call(function, args)


def _first(builder: ir.IRBuilder, count: ir.Value, width: int) -> ir.Value:
    """Which lanes come before the ``count``-th."""
    numbers = ir.Constant(ir.VectorType(count.type, width), list(range(width)))
    return builder.icmp_signed("<", numbers, spread(builder, count, width))


@intrinsic
def load_first(typing: Any, array: Any, index: Any, count: Any) -> Any:
    """The vector at ``array[index : index + count]``, its last number repeated in the lanes that are left; count > 0."""
    kind = VECTORS[array.dtype]

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        target, one = context.get_value_type(kind), ir.Constant(args[2].type, 1)
        pointer = element_pointer(context, builder, array, *args[:2])
        last = builder.load(builder.gep(pointer, [builder.sub(args[2], one)]))
        align = ir.Constant(ir.IntType(32), kind.dtype.bitwidth // 8)
        mask, rest = _first(builder, args[2], kind.width), spread(builder, last, kind.width)
        vectors = builder.bitcast(pointer, target.as_pointer())
        return _masked(builder, "load", target, target, [vectors, align, mask, rest])

    return kind(array, types.intp, types.intp), code


@intrinsic
def store_first(typing: Any, array: Any, index: Any, count: Any, vector: Any) -> Any:
    """Write the first lanes of a vector to ``array[index : index + count]``."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        target = args[3].type
        pointer = builder.bitcast(element_pointer(context, builder, array, *args[:2]), target.as_pointer())
        align = ir.Constant(ir.IntType(32), vector.dtype.bitwidth // 8)
        mask = _first(builder, args[2], vector.width)
        _masked(builder, "store", target, ir.VoidType(), [args[3], pointer, align, mask])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, vector), code

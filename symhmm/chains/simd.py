"""Vectors of 64 bytes inside numba kernels: explicit lanes, so that speed does not hang on what a compiler recognises.

A `Vector` holds 16 float32 or 8 float64. LLVM splits it into what the processor has. Sums of products use
``fmuladd``, so results may differ in the last bit between processors with and without a fused multiply-add.
"""

import operator
from collections.abc import Callable, Sequence
from math import factorial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, models, overload, register_model

from symhmm.chains.jit import kernel

BYTES = 64


class Vector(types.Type):
    """Numba type of 64 bytes of one float type."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        self.width = BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Vector({dtype}, {self.width})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """In memory a `Vector` is an LLVM vector."""

    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(_scalar(kind), kind.width))


FLOAT32, FLOAT64 = Vector(types.float32), Vector(types.float64)
VECTORS = {types.float32: FLOAT32, types.float64: FLOAT64}


def _scalar(kind: Vector) -> ir.Type:
    return ir.FloatType() if kind.dtype == types.float32 else ir.DoubleType()


def _integers(kind: Vector) -> ir.VectorType:
    return ir.VectorType(ir.IntType(kind.dtype.bitwidth), kind.width)


def _constant(value: float | int, like: ir.VectorType) -> ir.Constant:
    return ir.Constant(like, [value] * like.count)


def element_pointer(
    context: Any, builder: ir.IRBuilder, array: types.Array, value: ir.Value, index: ir.Value
) -> ir.Value:
    """Code for the address of an element of an array."""
    data = context.make_array(array)(context, builder, value).data
    return builder.gep(data, [index])


def vector_at(context: Any, builder: ir.IRBuilder, array: types.Array, value: ir.Value, index: ir.Value) -> ir.Value:
    """Code for the vector that starts at an element of an array."""
    kind = VECTORS[array.dtype]
    pointer = element_pointer(context, builder, array, value, index)
    vector = builder.load(builder.bitcast(pointer, context.get_value_type(kind).as_pointer()))
    vector.align = kind.dtype.bitwidth // 8
    return vector


def splat_at(context: Any, builder: ir.IRBuilder, array: types.Array, value: ir.Value, index: ir.Value) -> ir.Value:
    """Code for an element of an array in every lane of a vector."""
    return spread(
        builder, builder.load(element_pointer(context, builder, array, value, index)), VECTORS[array.dtype].width
    )


def fused(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Code for ``a * b + c`` of vectors."""
    letter = "f32" if isinstance(a.type.element, ir.FloatType) else "f64"
    name = f"llvm.fmuladd.v{a.type.count}{letter}"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


@intrinsic
def _address(typing: Any, address: Any, like: Any) -> Any:
    pointer = types.CPointer(like)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.int64, like), code


@kernel
def numbers_at(address, like):  # type: ignore[no-untyped-def]
    """The memory at an address as an array of numbers of the type of ``like``; its length is not known here.

    An address costs a tenth of what it takes to hand an array over, and a short chain takes no longer than that.
    """
    return carray(_address(address, like), 1 << 48)


@kernel
def vectors(count, like):  # type: ignore[no-untyped-def]
    """Empty memory for vectors of the type of an array; none of them lies across two cache lines, which takes twice as long."""
    width = lanes_of(like)
    memory = np.empty((count + 1) * width, like.dtype)
    first = -memory.ctypes.data // memory.itemsize % width
    return memory[first : first + count * width]


@intrinsic
def lanes_of(typing: Any, array: Any) -> Any:
    """How many numbers of the array's type a vector holds, known to the compiler."""
    width = VECTORS[array.dtype].width

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return context.get_constant(types.intp, width)

    return types.intp(array), code


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """The vector at ``array[index : index + width]``."""
    kind = VECTORS[array.dtype]

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return vector_at(context, builder, array, *args)

    return kind(array, types.intp), code


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write a vector to ``array[index : index + width]``."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        pointer = element_pointer(context, builder, array, *args[:2])
        out = builder.store(args[2], builder.bitcast(pointer, args[2].type.as_pointer()))
        out.align = vector.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def splat(typing: Any, array: Any, index: Any) -> Any:
    """The number ``array[index]`` in every lane."""
    kind = VECTORS[array.dtype]

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return splat_at(context, builder, array, *args)

    return kind(array, types.intp), code


@intrinsic
def fill(typing: Any, array: Any, value: Any) -> Any:
    """A number in every lane of a vector of the array's dtype."""
    kind = VECTORS[array.dtype]

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return spread(builder, context.cast(builder, args[1], value, kind.dtype), kind.width)

    return kind(array, value), code


def spread(builder: ir.IRBuilder, number: ir.Value, width: int) -> ir.Value:
    """Code for a number in every lane."""
    undefined = ir.Constant(ir.VectorType(number.type, width), ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width))


def _binary(emit: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Any:
    @intrinsic
    def operation(typing: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            return emit(builder, *args)

        return a(a, b), code

    return operation


def _select(comparison: str) -> Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]:
    return lambda builder, a, b: builder.select(builder.fcmp_ordered(comparison, a, b), a, b)


_add, _sub = _binary(lambda b, x, y: b.fadd(x, y)), _binary(lambda b, x, y: b.fsub(x, y))
_mul, _div = _binary(lambda b, x, y: b.fmul(x, y)), _binary(lambda b, x, y: b.fdiv(x, y))
larger, smaller = _binary(_select(">")), _binary(_select("<"))


def _overload(symbol: Callable[[Any, Any], Any], operation: Any) -> None:
    @overload(symbol, inline="always")
    def choose(a, b):  # type: ignore[no-untyped-def]  # numba wants this signature to equal that of the lambda
        if isinstance(a, Vector) and a == b:
            return lambda a, b: operation(a, b)
        return None


for _symbol, _operation in (
    (operator.add, _add),
    (operator.sub, _sub),
    (operator.mul, _mul),
    (operator.truediv, _div),
):
    _overload(_symbol, _operation)


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` in each lane."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return fused(builder, *args)

    return a(a, b, c), code


@intrinsic
def any_below(typing: Any, a: Any, b: Any) -> Any:
    """Whether ``a < b`` in some lane."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        mask = builder.bitcast(builder.fcmp_ordered("<", *args), ir.IntType(a.width))
        return builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))

    return types.boolean(a, b), code


def _where(emit: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Any:
    @intrinsic
    def kept(typing: Any, condition: Any, a: Any) -> Any:
        def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            zero = _constant(0.0, args[0].type)
            return builder.select(emit(builder, args[0], zero), args[1], zero)

        return a(condition, a), code

    return kept


# ``a`` in the lanes where a condition is positive, or is not 0 (also NaN), and 0 elsewhere.
where_positive = _where(lambda builder, x, zero: builder.fcmp_ordered(">", x, zero))
where_nonzero = _where(lambda builder, x, zero: builder.fcmp_unordered("!=", x, zero))


@intrinsic
def finite_or_zero(typing: Any, a: Any) -> Any:
    """``a``, with 0 in the lanes that hold ``-inf``."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        impossible = builder.fcmp_ordered("==", args[0], _constant(float("-inf"), args[0].type))
        return builder.select(impossible, _constant(0.0, args[0].type), args[0])

    return a(a), code


@intrinsic
def exponent(typing: Any, a: Any) -> Any:
    """The binary exponent of each positive lane as a float: ``floor(log2(a))`` where ``a`` is normal."""
    mantissa, bias = (23, 127) if a.dtype == types.float32 else (52, 1023)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        integers = _integers(a)
        bits = builder.lshr(builder.bitcast(args[0], integers), _constant(mantissa, integers))
        return builder.sitofp(builder.sub(bits, _constant(bias, integers)), args[0].type)

    return a(a), code


@intrinsic
def reciprocal_power(typing: Any, a: Any) -> Any:
    """``2.0 ** -exponent(a)`` in each lane: a scale that is exact, and finite also at 0."""
    mantissa, bias = (23, 127) if a.dtype == types.float32 else (52, 1023)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        integers = _integers(a)
        bits = builder.lshr(builder.bitcast(args[0], integers), _constant(mantissa, integers))
        power = builder.shl(builder.sub(_constant(2 * bias, integers), bits), _constant(mantissa, integers))
        return builder.bitcast(power, args[0].type)

    return a(a), code


@intrinsic
def total(typing: Any, a: Any) -> Any:
    """Sum of the lanes."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        value, width = args[0], a.width
        while width > 1:
            width //= 2
            indices = ir.VectorType(ir.IntType(32), width)
            low = builder.shuffle_vector(value, value, ir.Constant(indices, list(range(width))))
            high = builder.shuffle_vector(value, value, ir.Constant(indices, list(range(width, 2 * width))))
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return a.dtype(a), code


@intrinsic
def highest(typing: Any, a: Any) -> Any:
    """The largest lane, in every lane."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        (x,), step = args, a.width // 2
        while step:
            turned = ir.Constant(ir.VectorType(ir.IntType(32), a.width), [(k + step) % a.width for k in range(a.width)])
            x, step = _select(">")(builder, x, builder.shuffle_vector(x, x, turned)), step // 2
        return x

    return a(a), code


@intrinsic
def accumulate(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Add the lanes to ``array[index : index + width]``, which is float64."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        wide = ir.VectorType(ir.DoubleType(), vector.width)
        pointer = builder.bitcast(element_pointer(context, builder, array, *args[:2]), wide.as_pointer())
        before = builder.load(pointer)
        before.align = 8
        value = args[2] if vector.dtype == types.float64 else builder.fpext(args[2], wide)
        out = builder.store(builder.fadd(before, value), pointer)
        out.align = 8
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


def _exp_coefficients(degree: int) -> list[float]:
    """Coefficients of a polynomial that is exp on [-log(2) / 2, log(2) / 2] but for an error below a unit in the last place:
    1 + r + r^2 g(r), where g interpolates its power series in Chebyshev's points."""
    half = np.log(2) / 2
    series = np.polynomial.Polynomial([1 / factorial(k + 2) for k in range(20)])
    fitted = np.polynomial.Chebyshev.interpolate(series, degree - 2, domain=[-half, half])
    return [1.0, 1.0, *fitted.convert(kind=np.polynomial.Polynomial).coef]


# Of each width in bits: mantissa bits, exponent bias, 1.5 * 2**mantissa, log 2 in two parts, the smallest argument,
# and the degree of the polynomial.
_EXP = {
    32: (23, 127, 12582912.0, 0.693359375, -2.12194440e-4, -87.0, 6),
    64: (52, 1023, 6755399441055744.0, 6.93145751953125e-1, 1.42860682030941723212e-6, -708.0, 11),
}


@intrinsic
def exp(typing: Any, a: Any) -> Any:
    """Exponential of each lane, for arguments up to about 80; what would be subnormal is 0. NaN stays NaN.

    exp(x) = 2^n exp(r) with n = round(x / log 2): adding 1.5 * 2^mantissa plus the exponent's bias rounds, and leaves in the
    low bits what shifted up is 2^n; the remainder r uses log 2 in two parts (Cody and Waite 1980).
    """
    mantissa, bias, shift, high, low, bottom, degree = _EXP[a.dtype.bitwidth]
    coefficients = _exp_coefficients(degree)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        (x,), integers = args, _integers(a)
        kind = x.type
        under = builder.fcmp_ordered("<", x, _constant(bottom, kind))  # whose garbage is replaced at the end
        shifted = fused(builder, x, _constant(1.4426950408889634, kind), _constant(shift + bias, kind))
        n = builder.fsub(shifted, _constant(shift + bias, kind))
        r = fused(builder, n, _constant(-high, kind), x)
        r = fused(builder, n, _constant(-low, kind), r)
        value = _constant(coefficients[-1], kind)
        for c in reversed(coefficients[:-1]):
            value = fused(builder, value, r, _constant(c, kind))
        power = builder.shl(builder.bitcast(shifted, integers), _constant(mantissa, integers))
        return builder.select(under, _constant(0.0, kind), builder.fmul(value, builder.bitcast(power, kind)))

    return a(a), code

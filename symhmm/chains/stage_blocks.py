"""Small matrices times long rows of vectors inside numba kernels: the weights of a block stay in registers.

Places count vectors, not numbers. A row of places are ``count`` numbers of a table for the result, and as many for what is read.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from symhmm.chains.simd import VECTORS

MOST = 4  # rows and columns of a block: 16 weights, 4 sums and what they read are fewer than 32 registers
Values = Sequence[ir.Value]


class _Code:
    """Code about vectors in arrays of one type of numbers."""

    def __init__(self, context: Any, builder: ir.IRBuilder, array: types.Array) -> None:
        self.context, self.builder, self.array = context, builder, array
        self.width, bits = VECTORS[array.dtype].width, array.dtype.bitwidth
        self.align, self.product = bits // 8, f"llvm.fmuladd.v{self.width}f{bits}"
        self.vector = ir.VectorType(context.get_value_type(array.dtype), self.width)
        self.zero = ir.Constant(self.vector, [0.0] * self.width)
        self.index = context.get_value_type(types.intp)

    def data(self, value: ir.Value, array: types.Array | None = None) -> ir.Value:
        return self.context.make_array(array or self.array)(self.context, self.builder, value).data

    def step(self, first: ir.Value, count: int, gap: ir.Value) -> ir.Value:
        return self.builder.add(first, self.builder.mul(gap, ir.Constant(self.index, count)))

    def at(self, array: ir.Value, place: ir.Value) -> ir.Value:
        return self.builder.gep(self.builder.bitcast(self.data(array), self.vector.as_pointer()), [place])

    def load(self, pointer: ir.Value) -> ir.Value:
        value = self.builder.load(pointer)
        value.align = self.align
        return value

    def store(self, value: ir.Value, pointer: ir.Value) -> None:
        self.builder.store(value, pointer).align = self.align

    def variables(self, rows: int, columns: int) -> list[list[ir.Value]]:
        return [[cgutils.alloca_once(self.builder, self.vector) for _ in range(columns)] for _ in range(rows)]

    def number(self, table: ir.Value, kind: types.Array, index: ir.Value) -> ir.Value:
        return self.builder.load(self.builder.gep(self.data(table, kind), [index]))

    def everywhere(self, number: ir.Value) -> ir.Value:
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), self.width), [0] * self.width)
        return self.builder.shuffle_vector(first, undefined, lanes)

    def fmuladd(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        module, kind = self.builder.module, ir.FunctionType(self.vector, [self.vector] * 3)
        function = module.globals.get(self.product) or ir.Function(module, kind, self.product)
        return self.builder.call(function, [a, b, c])

    def of_each_size(self, rows: ir.Value, columns: ir.Value, emit: Callable[[int, int], None]) -> ir.Value:
        """One piece of code for every size of a block, and a jump to the right one."""
        builder = self.builder
        end = builder.append_basic_block("sized")
        case = builder.add(builder.mul(rows, ir.Constant(self.index, MOST + 1)), columns)
        switch = builder.switch(case, end)
        for n, r in product(range(1, MOST + 1), repeat=2):
            block = builder.append_basic_block(f"block{n}x{r}")
            switch.add_case(ir.Constant(self.index, n * (MOST + 1) + r), block)
            builder.position_at_end(block)
            emit(n, r)
            builder.branch(end)
        builder.position_at_end(end)
        return self.context.get_dummy_value()


@intrinsic
def multiply(
    typing: Any, rows: Any, columns: Any, out: Any, o: Any, o_gap: Any, source: Any, s: Any, s_gap: Any,
    weights: Any, w: Any, w_row: Any, w_column: Any, shared: Any, more: Any, table: Any, first: Any, second: Any, count: Any,
) -> Any:  # fmt: skip
    """out[o + row] = sum over columns of weights[row, column] source[s + column], along a row of places.

    ``rows`` and ``columns`` are 1 to `MOST`. With ``more`` the sum is added to what is there; with ``shared`` a weight is one
    number for all lanes.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Values) -> ir.Value:
        rows, columns, out_, o, o_gap, source, s, s_gap, weights, w, w_row, w_column, shared, more, *row = args
        code = _Code(context, builder, out)

        def emit(n: int, r: int) -> None:
            held = code.variables(n, r)
            with builder.if_else(shared) as branches:
                for own, branch in enumerate(branches):
                    with branch:
                        for i, j in product(range(n), range(r)):
                            place = code.step(code.step(w, i, w_row), j, w_column)
                            if own:
                                value = code.load(code.at(weights, place))
                            else:
                                value = code.everywhere(builder.load(builder.gep(code.data(weights), [place])))
                            builder.store(value, held[i][j])
            matrix = [[builder.load(x) for x in row] for row in held]
            starts = ((o, row[1]), (s, row[2]))
            with cgutils.for_range(builder, row[3], intp=code.index) as loop:
                to, at = (builder.add(x, code.number(row[0], table, builder.add(y, loop.index))) for x, y in starts)
                outs = [code.at(out_, code.step(to, i, o_gap)) for i in range(n)]
                sums = [builder.select(more, code.load(p), code.zero) for p in outs]
                for j in range(r):
                    x = code.load(code.at(source, code.step(at, j, s_gap)))
                    sums = [code.fmuladd(matrix[i][j], x, sums[i]) for i in range(n)]
                for value, p in zip(sums, outs, strict=True):
                    code.store(value, p)

        return code.of_each_size(rows, columns, emit)

    integer, boolean = types.intp, types.boolean
    return types.void(
        integer, integer, out, integer, integer, source, integer, integer, weights, integer, integer, integer,
        boolean, boolean, table, integer, integer, integer,
    ), build  # fmt: skip


@intrinsic
def correlate(
    typing: Any, rows: Any, columns: Any, out: Any, o: Any, o_gap: Any, source: Any, s: Any, s_gap: Any,
    weights: Any, w: Any, w_row: Any, w_column: Any, table: Any, first: Any, second: Any, count: Any,
) -> Any:  # fmt: skip
    """weights[row, column] += the sum of out[o + row] source[s + column] along a row of places."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Values) -> ir.Value:
        rows, columns, out_, o, o_gap, source, s, s_gap, weights, w, w_row, w_column, *row = args
        code = _Code(context, builder, out)

        def emit(n: int, r: int) -> None:
            sums = code.variables(n, r)
            for i, j in product(range(n), range(r)):
                builder.store(code.zero, sums[i][j])
            starts = ((o, row[1]), (s, row[2]))
            with cgutils.for_range(builder, row[3], intp=code.index) as loop:
                to, at = (builder.add(x, code.number(row[0], table, builder.add(y, loop.index))) for x, y in starts)
                values = [code.load(code.at(out_, code.step(to, i, o_gap))) for i in range(n)]
                for j in range(r):
                    x = code.load(code.at(source, code.step(at, j, s_gap)))
                    for i in range(n):
                        builder.store(code.fmuladd(values[i], x, builder.load(sums[i][j])), sums[i][j])
            for i, j in product(range(n), range(r)):
                # Rows that the factor does not tell apart are added to one place, one after the other.
                p = code.at(weights, code.step(code.step(w, i, w_row), j, w_column))
                code.store(builder.fadd(code.load(p), builder.load(sums[i][j])), p)

        return code.of_each_size(rows, columns, emit)

    integer = types.intp
    return types.void(
        integer, integer, out, integer, integer, source, integer, integer, weights, integer, integer, integer,
        table, integer, integer, integer,
    ), build  # fmt: skip

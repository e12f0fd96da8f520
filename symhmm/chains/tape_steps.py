"""Tapes: lists of small operations carried out one after the other by one kernel (numba).

An operation of torch takes one or two microseconds, whatever it does; here the few numbers of a small tensor take some
nanoseconds. Numbers of tensors lie in one memory and conditions are ones and zeros. What stands for a sum of many numbers is
added up in double precision.
"""

import math

import numpy as np

from symhmm.chains.jit import inner, kernel
from symhmm.chains.simd import numbers_at

# fmt: off
NAMES = (
    "input", "gather", "add", "sub", "mul", "div", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "and", "or",
    "not", "where", "neg", "abs", "sign", "exp", "expm1", "log", "log1p", "sqrt", "sin", "cos", "tanh", "sigmoid", "softplus",
    "softplus_backward", "pow", "xlogy", "erf", "lgamma", "digamma", "isfinite", "sum", "amax", "logsumexp", "dot", "cumsum",
    "cumprod",
)
(
    INPUT, GATHER, ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, EQ, NE, LT, LE, GT, GE, AND, OR,
    NOT, WHERE, NEG, ABS, SIGN, EXP, EXPM1, LOG, LOG1P, SQRT, SIN, COS, TANH, SIGMOID, SOFTPLUS,
    SOFTPLUS_BACKWARD, POW, XLOGY, ERF, LGAMMA, DIGAMMA, ISFINITE, SUM, AMAX, LOGSUMEXP, DOT, CUMSUM,
    CUMPROD,
) = range(len(NAMES))
# fmt: on


@kernel
def replay(rows, code_at, places_at, inputs, memory_at, like):  # type: ignore[no-untyped-def]
    """Carry out ``rows`` operations in a memory of numbers.

    Args:
        code_at: seven integers for each operation: which, where its result begins, how many numbers that has, how many are
            reduced to one of them, and where three operands begin (of ``gather``, the first of its ``places``; of ``input``,
            which).
        inputs: addresses of numbers to be copied.
    """
    code, places, w = numbers_at(code_at, np.int32(0)), numbers_at(places_at, np.int32(0)), numbers_at(memory_at, like)
    for row in range(rows):
        at = 7 * row
        op, d, n, m = code[at], np.uint64(code[at + 1]), np.uint64(code[at + 2]), np.uint64(code[at + 3])
        a, b, c = np.uint64(code[at + 4]), np.uint64(code[at + 5]), np.uint64(code[at + 6])
        if op == INPUT:
            source = numbers_at(inputs[a], like)
            for i in range(n):
                w[d + i] = source[i]
        elif op == GATHER:
            for i in range(n):
                w[d + i] = w[places[a + i]]
        elif op == ADD:
            for i in range(n):
                w[d + i] = w[a + i] + w[b + i]
        elif op == SUB:
            for i in range(n):
                w[d + i] = w[a + i] - w[b + i]
        elif op == MUL:
            for i in range(n):
                w[d + i] = w[a + i] * w[b + i]
        elif op == DIV:
            for i in range(n):
                w[d + i] = np.divide(w[a + i], w[b + i])
        elif op == MAXIMUM:
            for i in range(n):
                x, y = w[a + i], w[b + i]
                w[d + i] = x if x > y or x != x else y
        elif op == MINIMUM:
            for i in range(n):
                x, y = w[a + i], w[b + i]
                w[d + i] = x if x < y or x != x else y
        elif op == EQ:
            for i in range(n):
                w[d + i] = w[a + i] == w[b + i]
        elif op == NE:
            for i in range(n):
                w[d + i] = w[a + i] != w[b + i]
        elif op == LT:
            for i in range(n):
                w[d + i] = w[a + i] < w[b + i]
        elif op == LE:
            for i in range(n):
                w[d + i] = w[a + i] <= w[b + i]
        elif op == GT:
            for i in range(n):
                w[d + i] = w[a + i] > w[b + i]
        elif op == GE:
            for i in range(n):
                w[d + i] = w[a + i] >= w[b + i]
        elif op == AND:
            for i in range(n):
                w[d + i] = (w[a + i] != 0) & (w[b + i] != 0)
        elif op == OR:
            for i in range(n):
                w[d + i] = (w[a + i] != 0) | (w[b + i] != 0)
        elif op == NOT:
            for i in range(n):
                w[d + i] = w[a + i] == 0
        elif op == WHERE:
            for i in range(n):
                w[d + i] = w[b + i] if w[a + i] != 0 else w[c + i]
        elif op == NEG:
            for i in range(n):
                w[d + i] = -w[a + i]
        elif op == ABS:
            for i in range(n):
                w[d + i] = abs(w[a + i])
        elif op == SIGN:
            for i in range(n):
                x = w[a + i]
                w[d + i] = (x > 0) * 1 - (x < 0) * 1
        elif op == EXP:
            for i in range(n):
                w[d + i] = math.exp(w[a + i])
        elif op == EXPM1:
            for i in range(n):
                w[d + i] = math.expm1(w[a + i])
        elif op == LOG:
            for i in range(n):
                w[d + i] = math.log(w[a + i])
        elif op == LOG1P:
            for i in range(n):
                w[d + i] = math.log1p(w[a + i])
        elif op == SQRT:
            for i in range(n):
                w[d + i] = math.sqrt(w[a + i])
        elif op == SIN:
            for i in range(n):
                w[d + i] = math.sin(w[a + i])
        elif op == COS:
            for i in range(n):
                w[d + i] = math.cos(w[a + i])
        elif op == TANH:
            for i in range(n):
                w[d + i] = math.tanh(w[a + i])
        elif op == SIGMOID:
            for i in range(n):
                w[d + i] = np.divide(1.0, 1 + math.exp(-np.float64(w[a + i])))
        elif op == SOFTPLUS:
            for i in range(n):
                x = w[a + i]
                w[d + i] = x if x > w[b + i] else math.log1p(math.exp(np.float64(x)))
        elif op == SOFTPLUS_BACKWARD:
            for i in range(n):
                x, g = w[b + i], w[a + i]
                w[d + i] = g if x > w[c + i] else np.divide(g, 1 + math.exp(-np.float64(x)))
        elif op == POW:
            for i in range(n):
                w[d + i] = math.pow(w[a + i], w[b + i])
        elif op == XLOGY:
            for i in range(n):
                x, y = w[a + i], w[b + i]
                w[d + i] = y if y != y else (x if x == 0 else x * math.log(y))
        elif op == ERF:
            for i in range(n):
                w[d + i] = math.erf(w[a + i])
        elif op == LGAMMA:
            for i in range(n):
                w[d + i] = math.lgamma(np.float64(w[a + i]))
        elif op == DIGAMMA:
            for i in range(n):
                w[d + i] = _digamma(np.float64(w[a + i]))
        elif op == ISFINITE:
            for i in range(n):
                w[d + i] = w[a + i] - w[a + i] == 0
        elif op == SUM:
            for i in range(n):
                total = 0.0
                for j in range(m):
                    total += w[a + i * m + j]
                w[d + i] = total
        elif op == AMAX:
            for i in range(n):
                w[d + i] = _largest(w, a + i * m, m)
        elif op == LOGSUMEXP:
            for i in range(n):
                first = a + i * m
                most = np.float64(_largest(w, first, m))
                shift = 0.0 if math.isinf(most) else most
                total = 0.0
                for j in range(m):
                    total += math.exp(w[first + j] - shift)
                w[d + i] = math.log(total) + shift
        elif op == DOT:
            for i in range(n):
                total = 0.0
                for j in range(m):
                    total += np.float64(w[a + i * m + j]) * w[b + i * m + j]
                w[d + i] = total
        elif op == CUMSUM:
            for i in range(n):
                total = 0.0
                for j in range(m):
                    total += w[a + i * m + j]
                    w[d + i * m + j] = total
        elif op == CUMPROD:
            for i in range(n):
                total = 1.0
                for j in range(m):
                    total *= w[a + i * m + j]
                    w[d + i * m + j] = total


@inner
def _largest(w, first, count):  # type: ignore[no-untyped-def]
    """The largest of some numbers, NaN if one of them is."""
    most = w[first]
    for j in range(count):
        x = w[first + j]
        if x > most or x != x:
            most = x
    return most


@inner
def _digamma(x):  # type: ignore[no-untyped-def]
    """The derivative of log gamma: recurrence up to ten, and the asymptotic series from there (Abramowitz and Stegun 6.3.18)."""
    if x == 0:
        return -math.copysign(np.inf, x)
    total = 0.0
    if x < 0:
        # Of numpy: what is rounded by numba's `math` is an integer of 64 bits, which holds no large numbers.
        beside = x - np.rint(x)
        if beside == 0 or x == -np.inf:
            return np.nan
        # psi(1 - x) - psi(x) = pi / tan(pi x), the argument of the tangent reduced to the period around zero, which is exact.
        total = np.divide(-math.pi, math.tan(math.pi * beside))
        x = 1 - x
    while x < 10:
        total -= np.divide(1.0, x)
        x += 1
    if x < 1e17:
        z = np.divide(1.0, x * x)
        series = 1 / 12 - z * (1 / 120 - z * (1 / 252 - z * (1 / 240 - z * (1 / 132 - z * (691 / 32760 - z / 12)))))
        total -= z * series
    return total + math.log(x) - np.divide(0.5, x)

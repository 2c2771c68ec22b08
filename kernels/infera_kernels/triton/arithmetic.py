"""Scalar functions of two or three values that kernels apply, and what is made of them.

Floats are float32 or float64; which take integers too says `elementwise`. NaN in gives NaN out, as in NumPy.
"""

import triton
import triton.language as tl


@triton.jit
def add(x, y):
    return x + y


@triton.jit
def sub(x, y):
    return x - y


@triton.jit
def mul(x, y):
    return x * y


@triton.jit
def div(x, y):
    """x / y of floats; of integers the quotient without its fraction, and 0 where y is 0."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    elif x.dtype == tl.float64:
        return x / y
    else:
        return tl.where(y == 0, 0, x // tl.where(y == 0, 1, y)).to(x.dtype)


@triton.jit
def fmod(x, y):
    """What remains of x after whole multiples of y, with the sign of x; integers, and float32 by float64."""
    if x.dtype == tl.float32:
        wide, by = x.to(tl.float64), y.to(tl.float64)
        quotient = wide / by
        whole = tl.where(quotient < 0, tl.ceil(quotient), tl.floor(quotient))
        rest = (wide - whole * by).to(tl.float32)
        return tl.where((tl.abs(y) == float("inf")) & (tl.abs(x) != float("inf")), x, rest)
    else:
        return tl.where(y == 0, 0, x % tl.where(y == 0, 1, y)).to(x.dtype)


@triton.jit
def modulo(x, y):
    """What remains of x after whole multiples of y, with the sign of y."""
    rest = fmod(x, y)
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@triton.jit
def pow(x, y):
    """x ** y by logarithms in float64, so that the result is good to float32; signs and zeros as in IEEE 754."""
    magnitude = tl.exp(y.to(tl.float64) * tl.log(tl.abs(x).to(tl.float64))).to(x.dtype)
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    negative = x.to(tl.float64).to(tl.int64, bitcast=True) < 0  # -0.0 too
    signed = tl.where(negative & odd, -magnitude, magnitude)
    undefined = (x < 0) & (whole == 0) & (x != float("-inf"))
    power = tl.where(undefined, float("nan"), signed)
    return tl.where((y == 0) | (x == 1) | ((x == -1) & (tl.abs(y) == float("inf"))), 1.0, power)


@triton.jit
def minimum(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def equal(x, y):
    return x == y


@triton.jit
def not_equal(x, y):
    return x != y


@triton.jit
def less(x, y):
    return x < y


@triton.jit
def less_equal(x, y):
    return x <= y


@triton.jit
def greater(x, y):
    return x > y


@triton.jit
def greater_equal(x, y):
    return x >= y


@triton.jit
def logical_and(x, y):
    return x & y


@triton.jit
def logical_or(x, y):
    return x | y


@triton.jit
def logical_xor(x, y):
    return x ^ y


@triton.jit
def shift_left(x, y):
    """x * 2 ** y; 0 where y is not below the bits of x."""
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    return tl.where(y < BITS, x << tl.minimum(y, BITS - 1), 0).to(x.dtype)


@triton.jit
def shift_right(x, y):
    """x / 2 ** y without its fraction; 0 where y is not below the bits of x."""
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    return tl.where(y < BITS, x >> tl.minimum(y, BITS - 1), 0).to(x.dtype)


@triton.jit
def prelu(x, y):
    return tl.where(x < 0, y * x, x)


@triton.jit
def select(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def clamp(x, low, high):
    """min(max(x, low), high)"""
    return minimum(maximum(x, low), high)


@triton.jit
def over(x, alpha, beta):
    """x / alpha"""
    return div(x, tl.full(x.shape, alpha, x.dtype))

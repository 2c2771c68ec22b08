"""Scalar functions that kernels apply to float32 values: f(x, alpha, beta), f(x, y) or f(x, y, z).

NaN in gives NaN out, as in NumPy: `tl.maximum` drops NaN unless told otherwise.
"""

import triton
import triton.language as tl


@triton.jit
def identity(x, alpha, beta):
    return x


@triton.jit
def relu(x, alpha, beta):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoid(x, alpha, beta):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x, alpha, beta):
    """Cephes tanhf: a polynomial below 0.625, where 1 - 2 / (exp(2x) + 1) would cancel."""
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.625, p * z * x + x, tl.where(x < 0, -large, large))


@triton.jit
def silu(x, alpha, beta):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x, alpha, beta):
    """x * Phi(x), Phi by erf."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x, alpha, beta):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x), alpha, beta))


@triton.jit
def leaky_relu(x, alpha, beta):
    return tl.where(x < 0, alpha * x, x)


@triton.jit
def elu(x, alpha, beta):
    return tl.where(x < 0, alpha * (tl.exp(x) - 1.0), x)


@triton.jit
def clip(x, alpha, beta):
    """min(max(x, alpha), beta)"""
    low = tl.maximum(x, alpha, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, beta, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def hard_sigmoid(x, alpha, beta):
    return clip(alpha * x + beta, 0.0, 1.0)


@triton.jit
def hard_swish(x, alpha, beta):
    return x * clip(x * 0.16666666666666666 + 0.5, 0.0, 1.0)


@triton.jit
def softplus(x, alpha, beta):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def exp(x, alpha, beta):
    return tl.exp(x)


@triton.jit
def log(x, alpha, beta):
    return tl.log(x)


@triton.jit
def sqrt(x, alpha, beta):
    return tl.sqrt_rn(x)


@triton.jit
def reciprocal(x, alpha, beta):
    return 1.0 / x


@triton.jit
def erf(x, alpha, beta):
    return tl.erf(x)


@triton.jit
def floor(x, alpha, beta):
    return tl.floor(x)


@triton.jit
def ceil(x, alpha, beta):
    return tl.ceil(x)


@triton.jit
def neg(x, alpha, beta):
    return -x


@triton.jit
def abs(x, alpha, beta):
    return tl.abs(x)


@triton.jit
def logical_not(x, alpha, beta):
    return x == 0


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
    return tl.div_rn(x, y)


@triton.jit
def pow(x, y):
    """x ** y by logarithms in float64, so that the result is good to float32; signs and zeros as in IEEE 754."""
    magnitude = tl.exp(y.to(tl.float64) * tl.log(tl.abs(x).to(tl.float64))).to(tl.float32)
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    negative = x.to(tl.int32, bitcast=True) < 0  # -0.0 too
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
def select(condition, x, y):
    return tl.where(condition, x, y)

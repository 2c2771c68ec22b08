"""Scalar functions of one value and two parameters that kernels apply: f(x, alpha, beta).

Floats are float32 or float64; which take integers too says `elementwise`. Number times array, in this order, would make
a float32 of the number first. NaN in gives NaN out, as in NumPy:
`tl.maximum` drops NaN unless told otherwise.
"""

import triton
import triton.language as tl


@triton.jit
def identity(x, alpha, beta):
    return x


@triton.jit
def relu(x, alpha, beta):
    return tl.maximum(x, 0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoid(x, alpha, beta):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def expm1(x):
    """exp(x) - 1, by Kahan's correction (exp(x) - 1) x / log(exp(x)), which cancels what rounding exp(x) lost."""
    u = tl.exp(x)
    corrected = (u - 1.0) * (x / tl.log(u))
    return tl.where(u == 1.0, x, tl.where(tl.abs(x) < 1.0, corrected, u - 1.0))


@triton.jit
def tanh(x, alpha, beta):
    """float32 by Cephes tanhf: a polynomial below 0.625, where 1 - 2 / (exp(2x) + 1) would cancel."""
    if x.dtype == tl.float64:
        m = expm1(2.0 * tl.minimum(tl.abs(x), 40.0, propagate_nan=tl.PropagateNan.ALL))
        return tl.where(x < 0, -m, m) / (m + 2.0)
    else:
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
    return 0.5 * x * (1.0 + tanh((x + x * x * x * 0.044715) * 0.7978845608028654, alpha, beta))


@triton.jit
def leaky_relu(x, alpha, beta):
    return tl.where(x < 0, x * alpha, x)


@triton.jit
def elu(x, alpha, beta):
    return tl.where(x < 0, (tl.exp(x) - 1.0) * alpha, x)


@triton.jit
def selu(x, alpha, beta):
    return elu(x, alpha, beta) * beta


@triton.jit
def celu(x, alpha, beta):
    return tl.where(x < 0, (tl.exp(x / alpha) - 1.0) * alpha, x)


@triton.jit
def clip(x, alpha, beta):
    """min(max(x, alpha), beta)"""
    low = tl.maximum(x, alpha, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, beta, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def hard_sigmoid(x, alpha, beta):
    return clip(x * alpha + beta, 0.0, 1.0)


@triton.jit
def hard_swish(x, alpha, beta):
    return x * clip(x * 0.16666666666666666 + 0.5, 0.0, 1.0)


@triton.jit
def softplus(x, alpha, beta):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def softsign(x, alpha, beta):
    return x / (1.0 + tl.abs(x))


@triton.jit
def mish(x, alpha, beta):
    return x * tanh(softplus(x, alpha, beta), alpha, beta)


@triton.jit
def swish(x, alpha, beta):
    return x / (1.0 + tl.exp(-(x * alpha)))


@triton.jit
def thresholded_relu(x, alpha, beta):
    return tl.where(x > alpha, x, 0.0)


@triton.jit
def shrink(x, alpha, beta):
    """0 from -alpha to alpha; beyond that, beta nearer to it."""
    return tl.where(x < -alpha, x + beta, tl.where(x > alpha, x - beta, 0.0))


@triton.jit
def exp(x, alpha, beta):
    return tl.exp(x)


@triton.jit
def log(x, alpha, beta):
    return tl.log(x)


@triton.jit
def sqrt(x, alpha, beta):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
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
def rint(x, alpha, beta):
    """To the nearest whole number, of two to the even one; what becomes 0 keeps its sign."""
    below = tl.floor(x)
    rest = x - below
    odd = tl.floor(below * 0.5) * 2.0 != below
    nearest = tl.where((rest > 0.5) | ((rest == 0.5) & odd), below + 1.0, below)
    return tl.where(nearest == 0, x * 0.0, nearest)


@triton.jit
def sign(x, alpha, beta):
    return tl.where(x > 0, 1, tl.where(x < 0, -1, x)).to(x.dtype)


@triton.jit
def isnan(x, alpha, beta):
    return x != x


@triton.jit
def isinf(x, alpha, beta):
    """Whether x is alpha or beta: infinities, or NaN for one that does not count."""
    return (x == alpha) | (x == beta)


@triton.jit
def invert(x, alpha, beta):
    return ~x


@triton.jit
def neg(x, alpha, beta):
    # With Triton 3.6 -x is 0 - x, and so 0 where it is to be -0.
    if x.dtype.is_floating():
        return -1.0 * x
    else:
        return -x


@triton.jit
def abs(x, alpha, beta):
    return tl.abs(x)


@triton.jit
def logical_not(x, alpha, beta):
    return x == 0

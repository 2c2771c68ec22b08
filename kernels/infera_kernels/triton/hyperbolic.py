"""Hyperbolic functions, their inverses and those of trigonometric ones: f(x, alpha, beta), as in `functions`.

They are rare, and computed in float64 and rounded once, so that one way serves both types.
"""

import triton
import triton.language as tl

from infera_kernels.triton.functions import expm1


@triton.jit
def _atan(x):
    """Cephes atan, of float64: a rational function of what is left after reduction to |x| <= 0.66."""
    size = tl.abs(x)
    large = size > 2.41421356237309504880
    middle = (size > 0.66) & (large == 0)
    reduced = tl.where(large, -1.0 / size, tl.where(middle, (size - 1.0) / (size + 1.0), size))
    z = reduced * reduced
    p = z * -8.750608600031904122785e-1 - 1.615753718733365076637e1  # a float first would be a float32
    p = p * z - 7.500855792314704667340e1
    p = p * z - 1.228866684490136173410e2
    p = p * z - 6.485021904942025371773e1
    q = z + 2.485846490142306297962e1
    q = q * z + 1.650270098316988542046e2
    q = q * z + 4.328810604912902668951e2
    q = q * z + 4.853903996359136964868e2
    q = q * z + 1.945506571482613964425e2
    angle = reduced + reduced * (z * p / q)
    angle = tl.where(large, angle + 1.5707963267948966, tl.where(middle, angle + 0.7853981633974483, angle))
    return tl.where(x < 0, -angle, angle)


@triton.jit
def atan(x, alpha, beta):
    return _atan(x.to(tl.float64)).to(x.dtype)


@triton.jit
def asin(x, alpha, beta):
    wide = x.to(tl.float64)
    return _atan(wide / tl.sqrt((1.0 - wide) * (1.0 + wide))).to(x.dtype)


@triton.jit
def acos(x, alpha, beta):
    """2 atan(sqrt((1 - x) / (1 + x))), which does not cancel near 1."""
    wide = x.to(tl.float64)
    return (2.0 * _atan(tl.sqrt((1.0 - wide) / (1.0 + wide)))).to(x.dtype)


@triton.jit
def _log1p(x):
    """log(1 + x), by Kahan's correction for what rounding 1 + x lost."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.where(x > 1e15, tl.log(u), tl.log(u) * (x / (u - 1.0))))


@triton.jit
def sinh(x, alpha, beta):
    wide = x.to(tl.float64)
    m = expm1(tl.abs(wide))
    half = 0.5 * (m + m / (m + 1.0))
    size = tl.where(m == float("inf"), m, half)
    return tl.where(wide < 0, -size, size).to(x.dtype)


@triton.jit
def cosh(x, alpha, beta):
    e = tl.exp(tl.abs(x.to(tl.float64)))
    return (0.5 * (e + 1.0 / e)).to(x.dtype)


@triton.jit
def asinh(x, alpha, beta):
    wide = x.to(tl.float64)
    size = tl.abs(wide)
    near = tl.minimum(size, 1e8)
    small = _log1p(near + near * near / (1.0 + tl.sqrt(near * near + 1.0)))
    found = tl.where(size > 1e8, tl.log(size) + 0.6931471805599453, small)
    return tl.where(wide < 0, -found, tl.where(wide == wide, found, wide)).to(x.dtype)


@triton.jit
def acosh(x, alpha, beta):
    wide = x.to(tl.float64)
    t = tl.minimum(wide, 1e8) - 1.0
    found = tl.where(wide > 1e8, tl.log(wide) + 0.6931471805599453, _log1p(t + tl.sqrt(t * (t + 2.0))))
    return tl.where(wide < 1.0, float("nan"), tl.where(wide == wide, found, wide)).to(x.dtype)


@triton.jit
def atanh(x, alpha, beta):
    wide = x.to(tl.float64)
    size = tl.abs(wide)
    found = 0.5 * _log1p(2.0 * size / (1.0 - size))
    found = tl.where(size < 1.0, found, tl.where(size == 1.0, float("inf"), float("nan")))
    return tl.where(wide < 0, -found, found).to(x.dtype)

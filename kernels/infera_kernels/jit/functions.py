"""Elementary functions in float32 that LLVM turns into SIMD: polynomials and selections, no calls.

NaN goes in and comes out: a comparison with it is false, and every selection then takes the value itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_kernels.jit.compiling import inlined

F = np.float32

_MAGNITUDE = np.int32(0x7FFFFFFF)


@inlined
def ordered(bits: Any) -> Any:
    """A float's bits, an integer, as one that is the larger the larger the float, NaN beyond infinity; or those back.

    Of integers LLVM finds the largest in SIMD lanes, of floats one after the other.
    """
    return np.int32(bits ^ (_MAGNITUDE if bits < np.int32(0) else np.int32(0)))


@inlined
def clamped(x: Any, low: Any, high: Any) -> Any:
    """x between low and high."""
    x = low if x < low else x
    return high if x > high else x


@inlined
def saturated(x: Any, low: Any, high: Any) -> Any:
    """x between low and high; NaN is low."""
    x = x if x > low else low
    return x if x < high else high


@inlined
def exp(x: Any) -> Any:
    """e^x to 1.2e-7 relative; below -87.3 it is 0. Cephes' expf (S. L. Moshier): 2^n times a polynomial on the rest."""
    held = clamped(x, F(-87.3), F(88.37))
    n = np.floor(held * F(1.44269504) + F(0.5))
    r = held - n * F(0.693359375) + n * F(2.12194440e-4)
    p = F(1.9875691500e-4) * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(0.5)
    y = (p * r * r + r + F(1)) * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    y = F(0) if x < F(-87.3) else y
    return F(np.inf) if x > F(88.72) else y


@inlined
def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)"""
    return F(1) / (F(1) + exp(-x))


@inlined
def tanh(x: Any) -> Any:
    """tanh to 4 ulp: the rational function of Eigen (MathFunctionsImpl.h, generic_fast_tanh_float), held from 7.9 on;
    from 9 on, where it rounds to that, ±1."""
    t = clamped(x, F(-7.90531110763549805), F(7.90531110763549805))
    z = t * t
    p = F(-2.76076847742355e-16) * z + F(2.00018790482477e-13)
    p = p * z + F(-8.60467152213735e-11)
    p = p * z + F(5.12229709037114e-08)
    p = p * z + F(1.48572235717979e-05)
    p = p * z + F(6.37261928875436e-04)
    p = p * z + F(4.89352455891786e-03)
    q = F(1.19825839466702e-06) * z + F(1.18534705686654e-04)
    q = q * z + F(2.26843463243900e-03)
    q = q * z + F(4.89352518554385e-03)
    y = F(1) if x > F(9) else t * p / q
    return F(-1) if x < F(-9) else y


@inlined
def erf(x: Any) -> Any:
    """erf to 2 ulp: a polynomial up to 0.93, 1 - exp(polynomial) beyond (N. Juffa, "my_erff", the coefficients in
    stackoverflow.com/questions/35148198)."""
    s = x * x
    p = F(-5.96761703e-4) * s + F(4.99119423e-3)
    p = p * s + F(-2.67681349e-2)
    p = p * s + F(1.12819925e-1)
    p = p * s + F(-3.76125336e-1)
    p = p * s + F(1.28379166e-1)
    near = p * x + x
    t = -x if x < F(0) else x
    q = F(-1.72853470e-5) * t + F(3.83197126e-4)
    q = q * t + F(-3.88396438e-3)
    q = q * t + F(2.42546219e-2)
    q = q * t + F(-1.06777877e-1)
    q = q * t + F(-6.34846687e-1)
    q = q * t + F(-1.28717512e-1)
    far = F(1) - exp(clamped(q * t - t, F(-80), F(0)))
    far = -far if x < F(0) else far
    return far if t > F(0.927734375) else near


@inlined
def gelu(x: Any) -> Any:
    """x/2 (1 + erf(x/√2))"""
    return x * F(0.5) * (F(1) + erf(x * F(0.7071067811865476)))


@inlined
def gelu_tanh(x: Any) -> Any:
    """x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))"""
    return x * F(0.5) * (F(1) + tanh(x * (F(0.7978845608028654) + F(0.035677408136300125) * x * x)))

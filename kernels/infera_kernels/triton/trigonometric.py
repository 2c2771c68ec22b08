"""Sine, cosine and tangent: f(x, alpha, beta), as in `functions`.

Of float32 they are computed here: libdevice keeps the bits of 2/pi that a large angle needs in an array, which the
assemblers of Triton 3.6 to 3.8 leave in local memory. Polynomials are those of Cephes (sinf.c). Of float64 they are
libdevice's.
"""

import triton
import triton.language as tl

_CALM = tl.constexpr(12000.0)
"""Up to which angles differ from a multiple of pi/2 by what four parts of it tell."""


@triton.jit
def _near(size):
    """Quarter turns, and the angle beyond them, for 0 <= size <= _CALM.

    W. J. Cody, W. Waite, Software Manual for the Elementary Functions (1980): parts of pi/2 have 11 bits and turns 13,
    so that their products are exact.
    """
    turns = tl.floor(size * 0.6366197723675814 + 0.5)
    angle = size - turns * 1.5703125
    angle = angle - turns * 0.0004837512969970703
    angle = angle - turns * 7.549533620476723e-08
    return turns.to(tl.int32), angle - turns * 2.5633440682570896e-12


@triton.jit
def _word(index):
    """32 bits of 2/pi in float32's reach, after one word of zeros."""
    word = tl.where(index == 1, 0xA2F9836E, 0)
    word = tl.where(index == 2, 0x4E441529, word)
    word = tl.where(index == 3, 0xFC2757D1, word)
    word = tl.where(index == 4, 0xF534DDC0, word)
    word = tl.where(index == 5, 0xDB629599, word)
    word = tl.where(index == 6, 0x3C439041, word)
    word = tl.where(index == 7, 0xFE5163AB, word)
    return word.to(tl.uint64)


@triton.jit
def _joined(high, low, shift):
    """32 of the 64 bits of two words, `shift` of the higher one left out."""
    return (((high << 32) | low) << shift) >> 32


@triton.jit
def _far(size):
    """Quarter turns modulo 4, and the angle beyond them, for finite size >= 1.

    M. H. Payne, R. N. Hanek, Radian reduction for trigonometric functions (SIGNUM Newsletter 18, 1983): of 2/pi only 96
    bits matter, those before them give whole turns.
    """
    bits = size.to(tl.int32, bitcast=True)
    place = tl.maximum((bits >> 23) - 120, 0)  # of the first bit, counted from the word of zeros
    index, shift = place >> 5, (place & 31).to(tl.uint64)
    a, b, c, d = _word(index), _word(index + 1), _word(index + 2), _word(index + 3)
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.uint64)
    product = (mantissa * _joined(a, b, shift)) << 32
    product += mantissa * _joined(b, c, shift)
    product += (mantissa * _joined(c, d, shift)) >> 32  # quarter turns modulo 4, in units of 2**-62
    turns = ((product >> 61) + 1) >> 1
    rest = (product - (turns << 62)).to(tl.int64, bitcast=True)
    return turns.to(tl.int32), rest.to(tl.float32) * 3.4061215800865545e-19


@triton.jit
def _reduced(x):
    """Quarter turns, of which the last two bits count, and the angle beyond them, at most pi/4: of x without its sign.
    NaN and infinities give NaN. What large angles take is computed where the tile has one."""
    size = tl.abs(x)
    finite = size < float("inf")
    turns, angle = _near(tl.where(size <= _CALM, size, 0.0))
    if tl.max(size) > _CALM:
        far = finite & (size > _CALM)
        far_turns, far_angle = _far(tl.where(far, size, 1.0))
        turns, angle = tl.where(far, far_turns, turns), tl.where(far, far_angle, angle)
    return turns, tl.where(finite, angle, float("nan"))


@triton.jit
def _negative(x):
    """By its sign, which -0 has too."""
    return x.to(tl.int32, bitcast=True) < 0


@triton.jit
def _sine(r):
    z = r * r
    return r + r * z * ((z * -1.9515295891e-4 + 8.3321608736e-3) * z - 1.6666654611e-1)


@triton.jit
def _cosine(r):
    z = r * r
    p = (z * 2.443315711809948e-5 - 1.388731625493765e-3) * z + 4.166664568298827e-2
    return 1.0 - 0.5 * z + z * z * p


@triton.jit
def sin(x, alpha, beta):
    if x.dtype == tl.float64:
        return tl.sin(x)
    else:
        turns, angle = _reduced(x)
        value = tl.where((turns & 1) == 0, _sine(angle), _cosine(angle))
        value = tl.where((turns & 2) == 0, value, -1.0 * value)
        return tl.where(_negative(x), -1.0 * value, value)


@triton.jit
def cos(x, alpha, beta):
    if x.dtype == tl.float64:
        return tl.cos(x)
    else:
        turns, angle = _reduced(x)
        value = tl.where((turns & 1) == 0, _cosine(angle), _sine(angle))
        return tl.where(((turns + 1) & 2) == 0, value, -value)


@triton.jit
def tan(x, alpha, beta):
    if x.dtype == tl.float64:
        return tl.sin(x) / tl.cos(x)
    else:
        turns, angle = _reduced(x)
        s, c = _sine(angle), _cosine(angle)
        even = (turns & 1) == 0
        value = tl.where(even, s, -c) / tl.where(even, c, s)
        return tl.where(_negative(x), -1.0 * value, value)

"""The inner loop of products of 8-bit integers: a tile of int32 sums that stays in vector registers.

As in `microkernel`, but with every instruction each sum takes what a 32-bit word of the left-hand side holds, times as
many weights, which were packed side by side. How many depends on the processor; the type of the left-hand side says it:

- uint8: four, by AVX-512 VNNI's vpdpbusd, unsigned times signed;
- int16: two, by vpmaddwd, the weights widened in registers (vpmaddubsw, on bytes, saturates);
- int32: one, in LLVM's own terms, on any processor.

No sum is rounded or saturates: all are exact modulo 2**32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from infera_kernels.jit.microkernel import F32, I64, TILE, VECTOR, address_of, each_tile, spread, store_columns

DType = np.dtype[Any]
U8, I16, I32 = (np.dtype(t) for t in (np.uint8, np.int16, np.int32))

_WORD, _SHORT, _BYTE = (ir.IntType(bits) for bits in (32, 16, 8))
_SUMS = ir.VectorType(_WORD, TILE.lanes)
_PAIR_MADD = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}


def _left_types() -> tuple[DType, ...]:
    """Those that this processor multiplies, the fastest first."""
    features = binding.get_host_cpu_features()
    four = TILE.lanes == 16 and features.get("avx512vnni")
    two = features.get("avx512bw" if TILE.lanes == 16 else "avx2")
    return (*((U8,) if four else ()), *((I16,) if two else ()), I32)


LEFT_TYPES = _left_types()


def group(left: DType) -> int:
    """Values of the left-hand side in a word."""
    return 4 // left.itemsize


def _fours(builder: Any, sums: Any, word: Any, weights: Any) -> Any:
    kind = ir.FunctionType(_SUMS, [_SUMS] * 3)
    dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(dot, [sums, word, builder.bitcast(weights, _SUMS)])


def _pairs(builder: Any, sums: Any, word: Any, weights: Any) -> Any:
    shorts = ir.VectorType(_SHORT, 2 * TILE.lanes)
    madd = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_SUMS, [shorts] * 2), _PAIR_MADD[TILE.lanes])
    return builder.add(sums, builder.call(madd, [builder.bitcast(word, shorts), builder.sext(weights, shorts)]))


def _ones(builder: Any, sums: Any, word: Any, weights: Any) -> Any:
    return builder.add(sums, builder.mul(word, builder.sext(weights, _SUMS)))


_DOTS: Mapping[str, tuple[int, Callable[..., Any]]] = MappingProxyType(
    {"uint8": (4, _fours), "int16": (2, _pairs), "int32": (1, _ones)}
)
"""Type of the left-hand side -> the values of a word, and what adds their products to a vector of sums."""


@intrinsic
def dot_tile(
    context: Any, rows: Any, left: Any, a: Any, lda: Any, offsets: Any, taps: Any, words: Any, b: Any, given: Any,
    sums: Any, zeros: Any, scaled: Any, scale: Any, scales: Any, bias: Any, c: Any, ldc: Any, columns: Any,
) -> Any:  # fmt: skip
    """One tile of 1 to TILE.rows rows; addresses and strides in bytes:

    c[r, :columns] = sum over k of a[r, k] * b[k] + given[r, 0] * sums - given[r, 1] * zeros, in int32; or, where it is
    `scaled`, that times (scale * scales) + bias + given[r, 2], in float32.

    Row r of `a` has so many words at each of the offsets behind a + r * lda, of the type of the array `left`. `b` is
    one panel (taps * words, TILE.columns, values of a word), int8. A row of `given` has four values of 32 bits, the
    last of them unused; `sums`, `zeros`, `scales` and `bias` have TILE.columns, the latter two read where they are
    needed.
    """
    address = types.intp
    signature = types.void(address, left, *(address,) * 9, types.boolean, types.float32, *(address,) * 5)
    dot = _DOTS[left.dtype.name]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, _, *operands = args
        each_tile(builder, rows, operands[-1], lambda r, v: _tile_of(builder, dot, r, v, *operands))
        return context.get_dummy_value()

    return signature, generate


def _load(builder: Any, address: Any, nbytes: int, kind: Any) -> Any:
    return builder.load(address_of(builder, address, nbytes, kind), align=1)


def _tile_of(
    builder: Any, dot: tuple[int, Callable[..., Any]], rows: int, vectors: int, a: Any, lda: Any, offsets: Any,
    taps: Any, words: Any, b: Any, given: Any, sums: Any, zeros: Any, scaled: Any, scale: Any, scales: Any, bias: Any,
    c: Any, ldc: Any, columns: Any,
) -> None:  # fmt: skip
    """Emits `dot_tile` for one size of tiles."""
    values, add_products = dot
    width, nothing = TILE.lanes * values, ir.Constant(_SUMS, None)
    tile = [[cgutils.alloca_once(builder, _SUMS) for _ in range(vectors)] for _ in range(rows)]
    for line in tile:
        for held in line:
            builder.store(nothing, held)
    panel = cgutils.alloca_once_value(builder, b)
    with cgutils.for_range(builder, taps) as tap:
        where = builder.add(offsets, builder.mul(tap.index, ir.Constant(I64, 8)))
        start = builder.add(a, _load(builder, where, 0, I64))
        with cgutils.for_range(builder, words) as loop:
            line = builder.load(panel)
            weights = [_load(builder, line, v * width, ir.VectorType(_BYTE, width)) for v in range(vectors)]
            source = builder.add(start, builder.mul(loop.index, ir.Constant(I64, 4)))
            for r, row in enumerate(tile):
                value = _load(builder, builder.add(source, builder.mul(lda, ir.Constant(I64, r))), 0, _WORD)
                word = spread(builder, value, _SUMS)
                for held, weight in zip(row, weights, strict=True):
                    builder.store(add_products(builder, builder.load(held), word, weight), held)
            builder.store(builder.add(line, ir.Constant(I64, TILE.columns * values)), panel)

    def vectors_at(address: Any, kind: Any) -> list[Any]:
        return [_load(builder, address, v * TILE.lanes * 4, kind) for v in range(vectors)]

    columns_sums, columns_zeros = vectors_at(sums, _SUMS), vectors_at(zeros, _SUMS)
    for r, line in enumerate(tile):
        shift, total = (spread(builder, _load(builder, given, 16 * r + 4 * i, _WORD), _SUMS) for i in range(2))
        for held, column, zero in zip(line, columns_sums, columns_zeros, strict=True):
            raised = builder.add(builder.load(held), builder.mul(shift, column))
            builder.store(builder.sub(raised, builder.mul(total, zero)), held)
    with builder.if_then(scaled):
        one = spread(builder, scale)
        factors = [builder.fmul(one, s) for s in vectors_at(scales, VECTOR)]
        biases = vectors_at(bias, VECTOR)
        for r, line in enumerate(tile):
            more = spread(builder, _load(builder, given, 16 * r + 8, F32))
            for held, factor, term in zip(line, factors, biases, strict=True):
                product = builder.fmul(builder.sitofp(builder.load(held), VECTOR), factor)
                made = builder.fadd(builder.fadd(product, term), more)
                builder.store(builder.bitcast(made, _SUMS), held)
    made = [[builder.bitcast(builder.load(held), VECTOR) for held in line] for line in tile]
    store_columns(builder, made, [builder.add(c, builder.mul(ldc, ir.Constant(I64, r))) for r in range(rows)], columns)


PIXELS = 4
"""Neighbours whose channels are filtered together, which share the loads of a weight."""


@intrinsic
def filter_channels(
    context: Any, pixels: Any, left: Any, x: Any, step: Any, offsets: Any, taps: Any, w: Any, start: Any, c: Any,
    channels: Any,
) -> Any:  # fmt: skip
    """One pixel of a depthwise convolution, or PIXELS neighbours, in int32; addresses and strides in bytes:

    c[p, :channels] = start + sum over t < taps of (values of the type of the array `left` at x + p * step + offsets[t])
    * w[t]. There are `channels` int8 in a row of `w` and int32 in `start` and rows of `c`: whole vectors.
    """
    signature = types.void(types.intp, left, *(types.intp,) * 8)
    kind = ir.VectorType(ir.IntType(left.dtype.bitwidth), TILE.lanes)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pixels, _, *operands = args
        with builder.if_else(builder.icmp_signed("==", pixels, ir.Constant(I64, PIXELS))) as (several, single):
            for branch, count in ((several, PIXELS), (single, 1)):
                with branch:
                    _filter(builder, kind, left.dtype.signed, count, *operands)
        return context.get_dummy_value()

    return signature, generate


def _filter(
    builder: Any, kind: Any, signed: bool, pixels: int, x: Any, step: Any, offsets: Any, taps: Any, w: Any, start: Any,
    c: Any, channels: Any,
) -> None:  # fmt: skip
    """Emits `filter_channels` for so many pixels."""
    sums = [cgutils.alloca_once(builder, _SUMS) for _ in range(pixels)]
    widen = builder.sext if signed else builder.zext
    size, lanes = ir.Constant(I64, kind.element.width // 8), ir.Constant(I64, TILE.lanes)
    with cgutils.for_range(builder, builder.sdiv(channels, lanes)) as loop:
        first = builder.mul(loop.index, lanes)
        words = builder.mul(first, ir.Constant(I64, 4))
        for held in sums:
            builder.store(_load(builder, builder.add(start, words), 0, _SUMS), held)
        base, weights = builder.add(x, builder.mul(first, size)), builder.add(w, first)
        with cgutils.for_range(builder, taps) as tap:
            offset = _load(builder, builder.add(offsets, builder.mul(tap.index, ir.Constant(I64, 8))), 0, I64)
            row = builder.add(weights, builder.mul(tap.index, channels))
            weight = builder.sext(_load(builder, row, 0, ir.VectorType(_BYTE, TILE.lanes)), _SUMS)
            source = builder.add(base, offset)
            for p, held in enumerate(sums):
                value = _load(builder, builder.add(source, builder.mul(step, ir.Constant(I64, p))), 0, kind)
                wide = value if kind == _SUMS else widen(value, _SUMS)
                builder.store(builder.add(builder.load(held), builder.mul(wide, weight)), held)
        out = builder.add(c, words)
        for p, held in enumerate(sums):
            pixel = builder.add(out, builder.mul(builder.mul(channels, ir.Constant(I64, 4)), ir.Constant(I64, p)))
            builder.store(builder.load(held), address_of(builder, pixel, 0, _SUMS), align=1)

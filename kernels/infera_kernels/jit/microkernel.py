"""The inner loop of matrix products and convolutions: a tile of outputs that stays in vector registers.

As in GotoBLAS (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008), but the right-hand
side, a weight, was packed into panels when the model was loaded, and the left-hand side is read where it lies. BLAS
packs both in every call, which is much of a product with few rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


class Tile(NamedTuple):
    """Float32 lanes of a vector, vectors across a panel, most rows of a tile: rows x vectors accumulators, the panel's
    vectors and a broadcast value fit the registers."""

    lanes: int
    vectors: int
    rows: int

    @property
    def columns(self) -> int:
        """Of a panel."""
        return self.lanes * self.vectors


def _tile() -> Tile:
    """For this processor: 32 registers with AVX-512 and on ARM, 16 with AVX2."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return Tile(16, 2, 12)
    if features.get("avx2"):
        return Tile(8, 2, 6)
    return Tile(4, 3, 8)


TILE = _tile()

F32, I64, _I32 = ir.FloatType(), ir.IntType(64), ir.IntType(32)
VECTOR = ir.VectorType(F32, TILE.lanes)
_FIRST = ir.Constant(ir.VectorType(_I32, TILE.lanes), [0] * TILE.lanes)


def address_of(builder: Any, address: Any, nbytes: int, kind: Any) -> Any:
    """A pointer to `kind`, so many bytes behind an address."""
    return builder.inttoptr(builder.add(address, ir.Constant(I64, nbytes)), kind.as_pointer())


def each_tile(builder: Any, rows: Any, columns: Any, emit: Callable[[int, int], None]) -> None:
    """The code of a tile for 1 to TILE.rows rows, where `rows` chooses: with one vector a row for up to TILE.lanes
    `columns`. `emit(rows, vectors)` writes one of them."""
    done = builder.append_basic_block("done")
    narrow = builder.icmp_signed("<=", columns, ir.Constant(I64, TILE.lanes))
    half = builder.select(narrow, ir.Constant(I64, TILE.rows), ir.Constant(I64, 0))
    choice = builder.switch(builder.add(rows, half), done)
    for vectors, before in ((TILE.vectors, 0), (1, TILE.rows)):
        for r in range(1, TILE.rows + 1):
            block = builder.append_basic_block(f"tile{vectors}x{r}")
            choice.add_case(ir.Constant(I64, before + r), block)
            with builder.goto_block(block):
                emit(r, vectors)
                builder.branch(done)
    builder.position_at_end(done)


def load(builder: Any, address: Any, nbytes: int) -> Any:
    """The vector so many bytes behind an address."""
    return builder.load(address_of(builder, address, nbytes, VECTOR), align=4)


def _load_bytes(builder: Any, address: Any, nbytes: int) -> Any:
    """A vector of int8 so many bytes behind an address, as float32."""
    kind = ir.VectorType(ir.IntType(8), TILE.lanes)
    return builder.sitofp(builder.load(address_of(builder, address, nbytes, kind), align=1), VECTOR)


def spread(builder: Any, value: Any, kind: Any = VECTOR) -> Any:
    """A vector full of one value."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _FIRST)


def clamp(builder: Any, x: Any, low: Any, high: Any) -> Any:
    """x between low and high; a NaN compares false and stays."""
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", x, high), high, x)


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c of vectors, rounded once."""
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{TILE.lanes}f32"), [a, b, c])


@intrinsic
def multiply_tile(
    context: Any, rows: Any, packed: Any, a: Any, lda: Any, offsets: Any, taps: Any, run: Any, b: Any, bias: Any,
    c: Any, ldc: Any, columns: Any, low: Any, high: Any,
) -> Any:  # fmt: skip
    """One tile of 1 to TILE.rows rows; addresses, strides and offsets in bytes:

    c[r, :columns] = clamp(bias + sum over t < taps, k < run of a[r, offsets[t] + k] * b[t * run + k], low, high), where
    row r of `a` lies at a + r * lda, `b` is one panel (taps * run, TILE.columns) and `bias` has TILE.columns values. Up
    to TILE.lanes columns take one vector a row. The panel has the type of the array `packed`: float32, or int8 that
    becomes float32 in registers.
    """
    signature = types.void(types.intp, packed, *(types.intp,) * 10, types.float32, types.float32)
    narrow_weights = packed.dtype == types.int8

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, _, *operands = args
        each_tile(
            builder, rows, operands[8], lambda r, vectors: _tile_of(builder, r, vectors, narrow_weights, *operands)
        )
        return context.get_dummy_value()

    return signature, generate


def _tile_of(
    builder: Any, rows: int, vectors: int, narrow: bool, a: Any, lda: Any, offsets: Any, taps: Any, run: Any, b: Any,
    bias: Any, c: Any, ldc: Any, columns: Any, low: Any, high: Any,
) -> None:  # fmt: skip
    """Emits `multiply_tile` for one size of tiles."""
    width = TILE.lanes * 4
    sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(rows)]
    for v in range(vectors):
        start = load(builder, bias, v * width)
        for r in range(rows):
            builder.store(start, sums[r][v])
    panel = cgutils.alloca_once_value(builder, b)
    with cgutils.for_range(builder, taps) as tap:
        where = builder.add(offsets, builder.mul(tap.index, ir.Constant(I64, 8)))
        shift = builder.load(builder.inttoptr(where, I64.as_pointer()))
        left = cgutils.alloca_once(builder, I64)
        builder.store(builder.add(a, shift), left)
        with cgutils.for_range(builder, run):
            source, line = builder.load(left), builder.load(panel)
            read = _load_bytes if narrow else load
            weights = [read(builder, line, v * (width // 4 if narrow else width)) for v in range(vectors)]
            for r in range(rows):
                row = builder.add(source, builder.mul(lda, ir.Constant(I64, r)))
                value = spread(builder, builder.load(address_of(builder, row, 0, F32)))
                for v in range(vectors):
                    builder.store(multiply_add(builder, value, weights[v], builder.load(sums[r][v])), sums[r][v])
            builder.store(builder.add(source, ir.Constant(I64, 4)), left)
            builder.store(builder.add(line, ir.Constant(I64, TILE.columns * (1 if narrow else 4))), panel)
    least, most = spread(builder, low), spread(builder, high)
    made = [[clamp(builder, builder.load(s), least, most) for s in line] for line in sums]
    store_columns(builder, made, [builder.add(c, builder.mul(ldc, ir.Constant(I64, r))) for r in range(rows)], columns)


def store_columns(builder: Any, made: Any, lines: Any, columns: Any) -> None:
    """The first `columns` values, all where there are more, of lines of vectors, to these addresses."""
    whole = builder.icmp_signed(">=", columns, ir.Constant(I64, len(made[0]) * TILE.lanes))
    with builder.if_else(whole) as (full, partial):
        with full:
            for values, line in zip(made, lines, strict=True):
                for v, value in enumerate(values):
                    builder.store(value, address_of(builder, line, v * TILE.lanes * 4, VECTOR), align=4)
        with partial:
            _store_some(builder, made, lines, columns)


def _store_some(builder: Any, made: Any, lines: Any, columns: Any) -> None:
    """The first `columns` values of every line."""
    lanes = TILE.lanes
    mask_type, counts = ir.VectorType(ir.IntType(1), lanes), ir.VectorType(I64, lanes)
    store_type = ir.FunctionType(ir.VoidType(), [VECTOR, VECTOR.as_pointer(), _I32, mask_type])
    store = cgutils.get_or_insert_function(builder.module, store_type, f"llvm.masked.store.v{lanes}f32.p0v{lanes}f32")
    limit = spread(builder, columns, counts)
    for v in range(len(made[0])):
        mask = builder.icmp_signed("<", ir.Constant(counts, [v * lanes + i for i in range(lanes)]), limit)
        for values, line in zip(made, lines, strict=True):
            target = address_of(builder, line, v * lanes * 4, VECTOR)
            builder.call(store, [values[v], target, ir.Constant(_I32, 4), mask])

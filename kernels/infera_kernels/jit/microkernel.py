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
_MASK = ir.VectorType(ir.IntType(1), TILE.lanes)


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
    c: Any, ldc: Any, columns: Any, adds: Any, low: Any, high: Any, ahead: Any, apart: Any,
) -> Any:  # fmt: skip
    """One tile of 1 to TILE.rows rows; addresses, strides and offsets in bytes:

    c[r, :columns] = clamp(start + sum over t < taps, k < run of a[r, offsets[t] + k] * b[t * run + k], low, high),
    where row r of `a` lies at a + r * lda, `b` is one panel (taps * run, TILE.columns) and `start` is what is there
    where it `adds`, else `bias`, of TILE.columns values. Up to TILE.lanes columns take one vector a row. The panel has
    the type of the array `packed`: float32, or int8 that becomes float32 in registers.

    Meanwhile memory from `ahead` on, which need not exist, comes to the second-level cache: with each row of the panel
    the line `apart` bytes behind the last. Processors that see long runs of reads coming do not see past the many
    products with a piece of a weight to its next piece.
    """
    address = types.intp
    signature = types.void(address, packed, *(address,) * 11, types.float32, types.float32, address, address)
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
    bias: Any, c: Any, ldc: Any, columns: Any, adds: Any, low: Any, high: Any, ahead: Any, apart: Any,
) -> None:  # fmt: skip
    """Emits `multiply_tile` for one size of tiles."""
    width = TILE.lanes * 4
    sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(rows)]
    targets = _lines(builder, c, ldc, rows)
    add = builder.icmp_signed("!=", adds, ir.Constant(I64, 0))
    for v in range(vectors):
        start = builder.select(add, ir.Constant(VECTOR, None), load(builder, bias, v * width))
        for r in range(rows):
            builder.store(start, sums[r][v])
    with builder.if_then(add):
        for target in targets:
            for v in range(vectors):
                _prefetch(builder, builder.add(target, ir.Constant(I64, v * width)), FIRST_LEVEL)
    panel, asked = cgutils.alloca_once_value(builder, b), cgutils.alloca_once_value(builder, ahead)
    with cgutils.for_range(builder, taps) as tap:
        where = builder.add(offsets, builder.mul(tap.index, ir.Constant(I64, 8)))
        shift = builder.load(builder.inttoptr(where, I64.as_pointer()))
        left = cgutils.alloca_once(builder, I64)
        builder.store(builder.add(a, shift), left)
        with cgutils.for_range(builder, run):
            source, line, wanted = builder.load(left), builder.load(panel), builder.load(asked)
            _prefetch(builder, wanted, SECOND_LEVEL)
            read = _load_bytes if narrow else load
            weights = [read(builder, line, v * (width // 4 if narrow else width)) for v in range(vectors)]
            for r in range(rows):
                row = builder.add(source, builder.mul(lda, ir.Constant(I64, r)))
                value = spread(builder, builder.load(address_of(builder, row, 0, F32)))
                for v in range(vectors):
                    builder.store(multiply_add(builder, value, weights[v], builder.load(sums[r][v])), sums[r][v])
            builder.store(builder.add(source, ir.Constant(I64, 4)), left)
            builder.store(builder.add(line, ir.Constant(I64, TILE.columns * (1 if narrow else 4))), panel)
            builder.store(builder.add(wanted, apart), asked)
    with builder.if_then(add):
        add_columns(builder, sums, targets, columns)
    with builder.if_then(_bounded(builder, low, high)):
        least, most = spread(builder, low), spread(builder, high)
        for held in (s for line in sums for s in line):
            builder.store(clamp(builder, builder.load(held), least, most), held)
    store_columns(builder, [[builder.load(s) for s in line] for line in sums], targets, columns)


def _bounded(builder: Any, low: Any, high: Any) -> Any:
    """Whether there is a bound."""
    below = builder.fcmp_ordered(">", low, ir.Constant(F32, float("-inf")))
    return builder.or_(below, builder.fcmp_ordered("<", high, ir.Constant(F32, float("inf"))))


def _lines(builder: Any, address: Any, stride: Any, rows: int) -> list[Any]:
    return [builder.add(address, builder.mul(stride, ir.Constant(I64, r))) for r in range(rows)]


SECOND_LEVEL, FIRST_LEVEL = 2, 3
"""Caches, as LLVM's prefetch calls them."""


def _prefetch(builder: Any, address: Any, level: int) -> None:
    """Asks for the line at an address, which need not exist, to be in a cache."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), *(_I32,) * 3])
    reading, near, data = (ir.Constant(_I32, v) for v in (0, level, 1))
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(prefetch, [builder.inttoptr(address, ir.IntType(8).as_pointer()), reading, near, data])


def add_columns(builder: Any, held: Any, lines: Any, columns: Any) -> None:
    """To lines of allocated vectors the first `columns` values, all where there are more, at these addresses."""

    def add(place: Any, value: Any) -> None:
        builder.store(builder.fadd(builder.load(place), value), place)

    whole = builder.icmp_signed(">=", columns, ir.Constant(I64, len(held[0]) * TILE.lanes))
    with builder.if_else(whole) as (full, partial):
        with full:
            for vectors, line in zip(held, lines, strict=True):
                for v, place in enumerate(vectors):
                    add(place, load(builder, line, v * TILE.lanes * 4))
        with partial:
            kind = ir.FunctionType(VECTOR, [VECTOR.as_pointer(), _I32, _MASK, VECTOR])
            read = cgutils.get_or_insert_function(builder.module, kind, _masked("load"))
            for v, mask in enumerate(_masks(builder, len(held[0]), columns)):
                for vectors, line in zip(held, lines, strict=True):
                    source = address_of(builder, line, v * TILE.lanes * 4, VECTOR)
                    add(vectors[v], builder.call(read, [source, ir.Constant(_I32, 4), mask, ir.Constant(VECTOR, None)]))


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
    kind = ir.FunctionType(ir.VoidType(), [VECTOR, VECTOR.as_pointer(), _I32, _MASK])
    store = cgutils.get_or_insert_function(builder.module, kind, _masked("store"))
    for v, mask in enumerate(_masks(builder, len(made[0]), columns)):
        for values, line in zip(made, lines, strict=True):
            target = address_of(builder, line, v * TILE.lanes * 4, VECTOR)
            builder.call(store, [values[v], target, ir.Constant(_I32, 4), mask])


def _masks(builder: Any, vectors: int, columns: Any) -> list[Any]:
    """Of each vector of a line, which lanes lie in the first `columns`."""
    counts = ir.VectorType(I64, TILE.lanes)
    limit = spread(builder, columns, counts)
    places = (ir.Constant(counts, [v * TILE.lanes + i for i in range(TILE.lanes)]) for v in range(vectors))
    return [builder.icmp_signed("<", place, limit) for place in places]


def _masked(what: str) -> str:
    return f"llvm.masked.{what}.v{TILE.lanes}f32.p0v{TILE.lanes}f32"

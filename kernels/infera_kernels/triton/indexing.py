"""What kernels share: index arithmetic, and conversions between the types they store and compute in."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels of this process are interpreted; decided when they are imported, as by @triton.jit itself."""


@triton.jit
def offset_of(index, dims, strides, FIRST: tl.constexpr, LAST: tl.constexpr, BASE: tl.constexpr = 0):
    """The offset of linear `index` over dims[FIRST:LAST], innermost first; 0 over none.

    The stride of dims[k] is strides[BASE + k]. The outermost size is never read: the index is known to be in range.
    """
    offset = index * 0
    for k in tl.static_range(FIRST, LAST):
        if k + 1 < LAST:
            offset += (index % dims[k]) * strides[BASE + k]
            index = index // dims[k]
        else:
            offset += index * strides[BASE + k]
    return offset


@triton.jit
def tile_of(dims, rows, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """(tile, row, col, inside) of this program: its tile among those beyond the rows, which elements, which are there.

    dims[0] are the columns, and `rows` counts what the dimensions of the rows hold together.
    """
    tile = tl.program_id(0)
    if WIDE:
        tile = tile.to(tl.int64)
    col_tiles = tl.cdiv(dims[0], COLS)
    row_tiles = tl.cdiv(rows, ROWS)
    col = (tile % col_tiles) * COLS + tl.arange(0, COLS)[None, :]
    tile = tile // col_tiles
    row = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    tile = tile // row_tiles
    return tile, row, col, (row < rows) & (col < dims[0])


@triton.jit
def offset_in(tile, row, col, dims, strides, ROW_DIMS: tl.constexpr, BASE: tl.constexpr = 0):
    """The offsets of `tile_of`'s elements: dims[1:ROW_DIMS] are the rows, the rest one tile each."""
    LAST: tl.constexpr = len(dims)
    outer = offset_of(tile, dims, strides, ROW_DIMS, LAST, BASE)
    return outer + offset_of(row, dims, strides, 1, ROW_DIMS, BASE) + col * strides[BASE]


@triton.jit
def widened(x):
    """Half precision as float32, every other type as it is."""
    if x.dtype == tl.float16 or x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def rounded(value, TYPE: tl.constexpr):
    """`value` in a type, floats rounded to nearest even.

    The interpreter truncates float32 to bfloat16 (with an explicit rounding mode it drops a carry), and reads other
    types' bits as bfloat16: there the rounding is done here, on the bits.
    """
    if tl.bfloat16 == TYPE:
        value = value.to(tl.float32)
        if INTERPRETED:
            bits = value.to(tl.uint32, bitcast=True)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            return value.to(tl.bfloat16)
    else:
        return value.to(TYPE)


@triton.jit
def store_type(value, pointer):
    """`value` in the type that `pointer` points to."""
    return rounded(value, pointer.dtype.element_ty)


@triton.jit
def wide(x):
    """What products take: in the interpreter, which computes half precision wrongly, float32."""
    if INTERPRETED:
        return x.to(tl.float32)
    else:
        return x

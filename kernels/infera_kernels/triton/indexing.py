"""Index arithmetic that kernels share."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels of this process are interpreted; decided when they are imported, as by @triton.jit itself."""


@triton.jit
def offset_of(index, dims, strides, FIRST: tl.constexpr, LAST: tl.constexpr):
    """The offset of linear `index` over dims[FIRST:LAST], innermost first; 0 over none.

    The outermost size is never read: the index is known to be in range.
    """
    offset = index * 0
    for k in tl.static_range(FIRST, LAST):
        if k + 1 < LAST:
            offset += (index % dims[k]) * strides[k]
            index = index // dims[k]
        else:
            offset += index * strides[k]
    return offset


@triton.jit
def widened(x):
    """Half precision as float32, every other type as it is."""
    if x.dtype == tl.float16:
        return x.to(tl.float32)
    elif x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    else:
        return x

"""Kernels that race, each in one way, and some like them that do not. x and out have 64 elements, N is 16."""

import triton
import triton.language as tl


@triton.jit
def apart(x, out, N: tl.constexpr):
    """Each program writes what it alone reads, in place and elsewhere."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(out + i, value)
    tl.store(x + i, value)


@triton.jit
def neighbours(x, out, N: tl.constexpr):
    """Each program reads one element more than it writes."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + i + 1, mask=i + 1 < 64)
    tl.store(x + i, value)


@triton.jit
def masked(x, out, N: tl.constexpr):
    """Lanes beyond those of a program do nothing."""
    i = tl.program_id(0) * N + tl.arange(0, 2 * N)
    mine = i < (tl.program_id(0) + 1) * N
    tl.store(out + i, tl.load(x + i, mask=mine), mask=mine)


@triton.jit
def together(x, out, N: tl.constexpr, OWN: tl.constexpr):
    """All programs write the same elements: their numbers if OWN, else the same."""
    i = tl.arange(0, N)
    value = tl.zeros([N], out.dtype.element_ty)
    if OWN:
        value += tl.program_id(0).to(out.dtype.element_ty)
    tl.store(out + i, value)


@triton.jit
def counted(x, out, N: tl.constexpr, READ: tl.constexpr):
    """All programs add to one element, and one of them reads it."""
    tl.atomic_add(out, 1.0)
    if READ and tl.program_id(0) == 0:
        tl.store(x, tl.load(out))


@triton.jit
def back(x, out, N: tl.constexpr, BARRIER: tl.constexpr):
    """The program reads what its other lanes have written."""
    i = tl.arange(0, N)
    tl.store(x + i, i.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + i, tl.load(x + (N - 1 - i)))


@triton.jit
def reversed_in_place(x, out, N: tl.constexpr, BARRIER: tl.constexpr):
    """What a lane writes, another one reads."""
    i = tl.arange(0, N)
    value = tl.load(x + i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + (N - 1 - i), value)


@triton.jit
def less_the_first(x, out, N: tl.constexpr):
    """All lanes read what one of them writes."""
    i = tl.arange(0, N)
    first = tl.load(x)
    tl.store(x + i, tl.load(x + i) - first)


@triton.jit
def kept(x, out, N: tl.constexpr, BARRIER: tl.constexpr):
    """In place, and then the values elsewhere, by threads that may read them only now."""
    i = tl.arange(0, N)
    value = tl.load(x + i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + i, value + 1.0)
    tl.store(out + i, value)


@triton.jit
def twice(x, out, N: tl.constexpr, SECOND: tl.constexpr):
    """Two stores, which share half of their elements."""
    i = tl.arange(0, N)
    tl.store(out + i, tl.zeros([N], tl.float32))
    tl.store(out + i + N // 2, tl.full([N], SECOND, tl.float32))


@triton.jit
def bytes_of_others(x, out, N: tl.constexpr):
    """One program writes elements of which another reads a byte."""
    i = tl.arange(0, N)
    if tl.program_id(0) == 0:
        tl.store(x + i, tl.zeros([N], tl.float32))
    else:
        tl.store(out + i, tl.load(x.to(tl.pointer_type(tl.uint8)) + 4 * i + 1).to(tl.float32))

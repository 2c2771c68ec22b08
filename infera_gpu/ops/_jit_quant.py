"""The "jit" kernels of quantised operators: see `_jit`. Declares no operators itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from infera_gpu.op import Buffers, Call, Kernel, Site
from infera_gpu.ops._families import split_of
from infera_gpu.ops._jit import PRODUCT_NS, Kernels, product_ns, rows
from infera_gpu.ops.window import Window
from infera_gpu.spec import Array
from infera_kernels.cpu.elementwise import contiguous
from infera_kernels.cpu.parts import worth
from infera_kernels.portable.matmul import transposed

_DOT_NS = 0.006
"""What a multiply-add of 8-bit integers takes, about."""


def packs(site: Site, b: int, zero: int, *rest: int) -> bool:
    """Whether input b is a constant matrix of 8-bit integers, and its zero points and the other inputs are constants
    where they are given; and whether there is something to do."""
    known = all(site.value(i) is not None for i in (b, zero, *rest) if site.has(i))
    spec = site.spec(b)
    return known and spec.ndim == 2 and spec.dtype.name in ("int8", "uint8") and min(site.spec(0).size, spec.size) > 0


def product(
    site: Site,
    io: Buffers,
    x: Array,
    zero: Array | None,
    operands: tuple[int, int],
    out: Array,
    *,
    scale: Array | None = None,
    scales: int = 0,
    bias: int = 0,
) -> list[Call]:
    """out = (x - zero) @ (b - its zero point), exact int32, of what `packs`: `operands` are the inputs b and its zero
    point. With `scales`, an input, float32: times both scales, plus the input `bias`."""
    from infera_kernels.jit import integers

    b, b_zero = operands
    flip, point = site.attrs.get("transB", 0), site.value(b_zero)
    k, n = x.shape[-1], out.shape[-1]
    x = x.reshape(-1, k)
    left = integers.left_of(x.shape, io.scratch)
    calls = rows(io, len(x), x.size, lambda part: integers.take(x[part], zero, left.part(part)))

    def columns(i: int) -> Array | None:
        return io.pack(i, f"columns {n}", lambda v: integers.spread(v, n)) if i and site.has(i) else None

    weight = integers.Weight(
        io.pack(b, f"words {flip}", lambda w: integers.pack(transposed(w, flip))),
        io.pack(
            b,
            f"terms {flip}{'' if point is None else f' {point.tolist()}'}",
            lambda w: integers.terms(transposed(w, flip), point),
        ),
    )
    parts = worth(product_ns(_DOT_NS * out.size * k, weight.panels), split_of(io)).threads
    made = integers.product(
        left, weight, out.reshape(-1, n), scale=scale, scales=columns(scales), bias=columns(bias), parts=parts
    )
    return [*calls, *io.parallel(made)]


def scaled_product(site: Site, io: Buffers, scales: int, bias: int) -> list[Call]:
    """Input 0, any float32, @ input 1, a constant int8 matrix, times the input `scales`, plus the input `bias`."""
    from infera_kernels.jit import epilogue, gemm

    n = io.outs[0].shape[-1]
    x, y = io.ins[0].reshape(-1, io.ins[0].shape[-1]), io.outs[0].reshape(-1, n)
    factors = io.pack(scales, f"row {n}", lambda v: np.full(n, v.reshape(-1), np.float32))
    added = io.pack(bias, f"row {n}", lambda v: np.full(n, v.reshape(-1), np.float32)) if site.has(bias) else None
    terms = np.zeros(n, np.float32) if added is None else added
    weight = io.pack(1, "panels", gemm.pack)
    parts = worth(product_ns(PRODUCT_NS * y.size * x.shape[-1], weight), split_of(io)).threads
    calls = io.parallel(gemm.product(x, weight, None, y, parts=parts))
    return [*calls, *rows(io, len(y), y.size, lambda part: epilogue.scale(y[part], factors, terms))]


def of_inputs(
    site: Site,
    io: Buffers,
    operands: tuple[int, int, int, int],
    out: Array,
    *,
    scale: Array | None = None,
    scales: int = 0,
    bias: int = 0,
) -> list[Call]:
    """`product` of inputs: `operands` are a, its zero point, which is single, b, its zero point."""
    a, a_zero, b, b_zero = operands
    x, calls = contiguous(transposed(io.ins[a], site.attrs.get("transA")), io.scratch)
    zero: Array | None = None
    if site.value(a_zero) is not None:
        zero = np.array(site.value(a_zero), np.int32).reshape(())
    elif site.has(a_zero):
        zero = io.scratch((), np.int32)
        calls.append((np.copyto, (zero, io.ins[a_zero].reshape(()))))
    return [*calls, *product(site, io, x, zero, (b, b_zero), out, scale=scale, scales=scales, bias=bias)]


def takes(site: Site, a: int, zero: int) -> bool:
    """Whether input a is a matrix of 8-bit integers, or several, with one zero point at most."""
    spec = site.spec(a)
    return spec.ndim > 1 and spec.dtype.name in ("int8", "uint8") and (not site.has(zero) or site.spec(zero).size == 1)


def requantize(sums: Array, factor: Array, zero: Array, out: Array, io: Buffers) -> list[Call]:
    """out = saturate(round(sums factor) + zero): int32 sums, float32 factors, one or one a column, and `zero`, 0-d."""
    from infera_kernels.jit.quantise import requantize

    n = out.shape[-1]
    factors, (x, y) = io.scratch((n,), np.float32), (a.reshape(-1, n) for a in (sums, out))
    calls = rows(io, len(y), y.size, lambda part: requantize(x[part], factors, zero, y[part]))
    return [(np.copyto, (factors, factor)), *calls]


def convolution(
    site: Site, io: Buffers, found: Window, x: Array, y: Array, factor: Array, zero: Array, *, last: bool
) -> list[Call]:
    """QLinearConv where `convolves`: 8-bit x and y of four axes, contiguous, `factor` one or one a channel."""
    from infera_kernels.jit.integer_conv import conv2d

    w, point, w_zero, bias = (site.value(i) for i in (3, 2, 5, 8))
    assert w is not None
    assert point is not None
    assert w_zero is not None
    kernel = w.shape if w.ndim == 4 else (*w.shape[:2], 1, w.shape[2])
    factors = io.scratch(kernel[:1], np.float32)
    calls, made = conv2d(
        x, int(point.reshape(())), w_zero, bias, factors, zero, y, io.scratch, kernel=kernel, last=last,
        groups=int(site.attrs["group"]), **found.params,
        pack=lambda tag, build: io.pack(3, tag, lambda v: build(v.reshape(kernel))),
        parts=worth(_DOT_NS * y.size * w[0].size, split_of(io)).threads,
    )  # fmt: skip
    return [(np.copyto, (factors, factor)), *calls, *io.parallel(made)]


def convolves(site: Site) -> bool:
    """Whether all but the input is known, and weights less their zero points have 8 bits."""
    w, zero = site.value(3), site.value(5)
    if w is None or zero is None or any(site.value(i) is None for i in (2, 8) if site.has(i)):
        return False

    def narrow() -> bool:
        centred = np.subtract(w, zero.reshape(-1, *(1,) * (w.ndim - 1)), dtype=np.int16)
        return bool(centred.min() >= -128) and bool(centred.max() <= 127)

    return site.once("_jit_quant.convolves", narrow)


def dynamic_product(site: Site, io: Buffers, operands: tuple[int, int], scales: int, bias: int) -> list[Call]:
    """Input 0, quantised over its own range, @ what `packs`, in float32: `operands` are the inputs b and its zero
    point."""
    from infera_kernels.jit.quantise import centre, dynamic_range

    x, (centred, scale, limits) = io.ins[0], (io.scratch(shape) for shape in (io.ins[0].shape, (), (2,)))
    return [
        dynamic_range(x, scale, limits),
        *centre(x.reshape(-1), centred.reshape(-1), scale, limits),
        *product(site, io, centred, None, operands, io.outs[0], scale=scale, scales=scales, bias=bias),
    ]


def quantize(supports: Callable[[Site], bool]) -> Kernels:
    """QuantizeLinear to 8 bits with one scale and one zero point at most."""

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.jit.quantise import quantize

        x, q = io.ins[0].reshape(-1), io.outs[0].reshape(-1)
        scale, zero = io.scratch((), np.float32), io.scratch((), np.float32)
        calls = rows(io, x.size, x.size, lambda part: quantize(x[part], scale, zero, q[part]))
        point = io.ins[2].reshape(()) if site.has(2) else 0
        return [(np.copyto, (scale, io.ins[1].reshape(()))), (np.copyto, (zero, point)), *calls]

    def fits(site: Site) -> bool:
        single = site.spec(1).size == 1 and site.spec(0).size > 0
        return single and site.outs[0].dtype.name in ("int8", "uint8") and supports(site)

    return {"jit": Kernel(bind, fits)}


def dynamic_centre() -> Kernels:
    """DynamicCentre."""

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.jit.quantise import centre, dynamic_range

        (x, y), scale, limits = (io.ins[0].reshape(-1), io.outs[0].reshape(-1)), io.outs[1], io.scratch((2,))
        calls = rows(io, x.size, x.size, lambda part: centre(x[part], y[part], scale, limits))
        return [dynamic_range(x, scale, limits), *calls]

    return {"jit": Kernel(bind, lambda site: site.spec(0).size > 0)}


def centre(bounds: Callable[[Site], tuple[int, int]], supports: Callable[[Site], bool]) -> Kernels:
    """Centre between the bounds that are told."""

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.jit.quantise import centre

        x, y, scale = io.ins[0].reshape(-1), io.outs[0].reshape(-1), io.ins[1].reshape(())
        if site.value(1) is not None:
            scale = np.array(scale)  # functions are compiled for arrays that may be written to
        limits, again = np.array(bounds(site), np.float32), bool(site.attrs["dequantize"])
        return rows(io, x.size, x.size, lambda part: centre(x[part], y[part], scale, limits, dequantize=again))

    return {"jit": Kernel(bind, lambda site: site.spec(0).size > 0 and supports(site), inplace=(0,))}

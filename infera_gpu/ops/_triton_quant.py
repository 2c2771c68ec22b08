"""The "triton" kernels of linear quantisation. Declares no operators itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import quant as portable

Place = Callable[[Site], tuple[int, int]]
"""The axis that scales run along, and the length of a block along it, 0 where there are none."""


def _specs(site: Site, place: Place) -> tuple[TensorSpec, TensorSpec | None]:
    """Scale and zero point as they broadcast: what a block shares, every block has."""
    axis, block = place(site)
    made = [None if not site.has(i) else _aligned(site.spec(i), site.spec(0), axis, block) for i in (1, 2)]
    assert made[0] is not None
    return made[0], made[1]


def _aligned(parameter: TensorSpec, x: TensorSpec, axis: int, block: int) -> TensorSpec:
    if block:
        return TensorSpec(x.dims, parameter.dtype)
    if parameter.size == 1:
        return TensorSpec((), parameter.dtype)
    return TensorSpec(tuple(d if i == axis else 1 for i, d in enumerate(x.dims)), parameter.dtype)


def _pieces(site: Site, io: Buffers, place: Place) -> Iterator[tuple[Array, Array, Array | None, Array]]:
    """Input, scale, zero point, output: all of them, or with blocks the whole ones and the last."""
    axis, block = place(site)
    x, scale, zero, out = io.ins[0], io.ins[1], io.ins[2] if site.has(2) else None, io.outs[0]
    if not block:
        factor, shift = (None if p is None else portable.aligned(io.xp, p, x.shape, axis) for p in (scale, zero))
        yield x, factor, shift, out
        return
    whole = x.shape[axis] // block
    before: tuple[slice, ...] = (slice(None),) * axis

    def cut(a: Array, blocks: bool) -> Array:
        if not blocks:
            return a[(*before, slice(whole * block, None))]
        return a[(*before, slice(0, whole * block))].reshape(*a.shape[:axis], whole, block, *a.shape[axis + 1 :])

    def of_blocks(p: Array | None, blocks: bool) -> Array | None:
        if p is None or p.size == 1:
            return None if p is None else p.reshape(())
        if not blocks:
            return p[(*before, slice(whole, None))]
        return p[(*before, slice(0, whole))].reshape(*p.shape[:axis], whole, 1, *p.shape[axis + 1 :])

    for blocks in (True, False):
        if whole if blocks else x.shape[axis] % block:
            yield cut(x, blocks), of_blocks(scale, blocks), of_blocks(zero, blocks), cut(out, blocks)


def _fits(site: Site, place: Place) -> bool:
    """Whether blocks as an axis of their own leave few enough axes."""
    return not place(site)[1] or site.spec(0).ndim < 6


def quantize(place: Place) -> Kernels:
    """The kernels of QuantizeLinear."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.quantise import supports_quantise

        return _fits(site, place) and supports_quantise(site.spec(0), *_specs(site, place), site.outs[0])

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.quantise import quantise

        return [call for piece in _pieces(site, io, place) for call in quantise(*piece, io.launcher)]

    return kernels(bind, supports, inplace=(), strided=True)


def dequantize(place: Place) -> Kernels:
    """The kernels of DequantizeLinear."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.quantise import supports_dequantise

        return _fits(site, place) and supports_dequantise(site.spec(0), *_specs(site, place), site.outs[0])

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.quantise import dequantise

        return [call for piece in _pieces(site, io, place) for call in dequantise(*piece, io.launcher)]

    return kernels(bind, supports, inplace=(), strided=True)


def centre(bounds: Callable[[Site], tuple[int, int]]) -> Kernels:
    """The kernels of Centre, whose zero point is known and whose `bounds` are those of centred values."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.quantise import supports_centre

        scale, zero = (TensorSpec((), site.spec(i).dtype) for i in (1, 2))
        return site.value(2) is not None and supports_centre(site.spec(0), scale, zero, site.outs[0])

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.quantise import centre

        point = site.value(2)
        assert point is not None
        low, high = (int(b) + int(point.reshape(())) for b in bounds(site))
        x, scale, zero = io.ins
        return centre(
            *(x, scale.reshape(()), zero.reshape(()), io.outs[0], io.launcher),
            low=low,
            high=high,
            times=bool(site.attrs["dequantize"]),
        )

    return kernels(bind, supports, inplace=(0,), strided=True)


def range_bytes(site: Site) -> int:
    from infera_kernels.triton.dynamic import range_parts

    return aligned(2 * range_parts(site.spec(0).size) * 4)


def ranges(x: Array, io: Buffers) -> Array | None:
    """Scratch of `range_bytes` for the partial ranges of x, None where it takes none."""
    from infera_kernels.triton.dynamic import range_parts

    parts = range_parts(x.size)
    return io.scratch((2, parts), np.float32) if parts else None


def _supports_dynamic(site: Site) -> bool:
    from infera_kernels.triton.dynamic import supports_dynamic

    return not site.batch_invariant and supports_dynamic(site.spec(0))  # the range is that of the whole batch


def _bind_dynamic(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton.dynamic import dynamic_quantise

    x, (q, scale, zero) = io.ins[0], io.outs
    return dynamic_quantise(x, q, scale, zero, ranges(x, io), io.launcher)


DYNAMIC = kernels(_bind_dynamic, _supports_dynamic, inplace=(), strided=False, workspace=range_bytes)
"""DynamicQuantizeLinear of float32."""

OPS: tuple[Op, ...] = ()

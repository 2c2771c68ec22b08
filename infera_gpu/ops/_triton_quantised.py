"""The "triton" kernels of quantised forms of plain operators. Declares no operators itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.ops._triton_quant_matmul import Get, array_getter, spec_getter
from infera_gpu.spec import Array, TensorSpec

if TYPE_CHECKING:
    from infera_kernels.triton.quantised import Quantised


def _tensors(site: Site, get: Get, operands: int, out: object, xs: tuple[object, ...]) -> list[Quantised]:
    """The operands, three inputs each, and the output, whose scale and zero point are the last two."""
    from infera_kernels.triton.quantised import Quantised

    last = 3 * operands
    made = [Quantised(xs[i], get(3 * i + 1), get(3 * i + 2)) for i in range(operands)]
    return [*made, Quantised(out, get(last), get(last + 1))]


def _specs(site: Site, operands: int) -> list[Quantised]:
    return _tensors(site, spec_getter(site), operands, site.outs[0], tuple(site.spec(3 * i) for i in range(operands)))


def _arrays(site: Site, io: Buffers, operands: int) -> list[Quantised]:
    return _tensors(site, array_getter(site, io), operands, io.outs[0], tuple(io.ins[3 * i] for i in range(operands)))


def elementwise(function: str, operands: int) -> Kernels:
    """The kernels of a function of the quantised operands alone."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.quantised import supports_quantised

        *given, out = _specs(site, operands)
        return supports_quantised(out, *given)

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.quantised import quantised

        *given, out = _arrays(site, io, operands)
        return quantised(function, tuple(given), out, io.launcher, alpha=float(site.attrs.get("alpha", 0.0)))

    return kernels(bind, supports, inplace=(), strided=True)


def _supports_mean(site: Site) -> bool:
    from infera_kernels.triton.quantised import supports_quantised_mean

    x, out = _specs(site, 1)
    return supports_quantised_mean(out, x)


def _bind_mean(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton.quantised import quantised_mean

    x, out = _arrays(site, io, 1)
    return quantised_mean(x, out, io.launcher, last=bool(site.attrs["channels_last"]))


MEAN = kernels(_bind_mean, _supports_mean, inplace=(), strided=False)
"""QLinearGlobalAveragePool."""


def joined(axis: Callable[[Site], int]) -> Kernels:
    """The kernels of QLinearConcat: scale and zero point of the output, then three inputs for each part."""

    def pairs(site: Site, get: Get, xs: Sequence[Any], out: Any) -> Iterator[tuple[Quantised, Quantised]]:
        """The parts, and the windows of the output that each becomes; `out` gives the window of so many entries."""
        from infera_kernels.triton.quantised import Quantised

        start = 0
        for i in range(2, len(site.ins), 3):
            end = start + site.spec(i).dims[axis(site)]
            yield Quantised(xs[i], get(i + 1), get(i + 2)), Quantised(out(start, end), get(0), get(1))
            start = end

    def supports(site: Site) -> bool:
        from infera_kernels.triton.quantised import supports_quantised

        def window(start: int, end: int) -> TensorSpec:
            dims, at = site.outs[0].dims, axis(site)
            return TensorSpec((*dims[:at], end - start, *dims[at + 1 :]), site.outs[0].dtype)

        return all(supports_quantised(out, part) for part, out in pairs(site, spec_getter(site), site.ins, window))

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.quantised import quantised

        def window(start: int, end: int) -> Array:
            return io.outs[0][(*(slice(None),) * axis(site), slice(start, end))]

        return [
            call
            for part, out in pairs(site, array_getter(site, io), io.ins, window)
            for call in quantised("again", (part,), out, io.launcher)
        ]

    return kernels(bind, supports, inplace=(), strided=True)


def softmax(shape: Callable[[Site], tuple[int, int, int]]) -> Kernels:
    """The kernels of QLinearSoftmax along the middle of `shape(site)`, computed in float32."""

    def wide(site: Site) -> TensorSpec:
        return TensorSpec(shape(site), np.dtype(np.float32))

    def supports(site: Site) -> bool:
        from infera_kernels.triton.norm import supports_rows
        from infera_kernels.triton.quantised import supports_quantised

        x, out = _specs(site, 1)
        return supports_quantised(out, x) and supports_rows("softmax", wide(site), wide(site), axes=(1,))

    def workspace(site: Site) -> int:
        from infera_kernels.triton.normalize import scratch_of

        pieces = scratch_of("softmax", wide(site), (1,), invariant=site.batch_invariant)
        rest = (aligned(math.prod(dims) * np.dtype(name).itemsize) for dims, name in pieces)
        return aligned(wide(site).nbytes) + sum(rest)

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.normalize import normalize
        from infera_kernels.triton.quantise import dequantise, quantise

        x, out = _arrays(site, io, 1)
        y = io.scratch(shape(site))
        return [
            *dequantise(x.x.reshape(y.shape), x.scale, x.zero, y, io.launcher),
            *normalize("softmax", y, (1,), y, io.launcher, io.scratch, invariant=site.batch_invariant),
            *quantise(y, out.scale, out.zero, out.x.reshape(y.shape), io.launcher),
        ]

    return kernels(bind, supports, inplace=(), strided=False, workspace=workspace)


OPS: tuple[Op, ...] = ()

"""The "triton" kernels of QuantizedConv, channels first or last, and of QuantizedMatMul. Declares no operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.ops._triton_conv import FUNCTIONS, moved, moved_spec
from infera_gpu.ops.window import channels_first, window
from infera_gpu.spec import Array, TensorSpec

if TYPE_CHECKING:
    from infera_kernels.triton.quantized_conv import Corrections, Finish, Places

_X, _W, _BIAS, _RESIDUAL, _FACTOR, _X_ZERO, _R_SCALE, _R_ZERO, _SCALE, _ZERO = range(10)


def _finish(site: Site, get: Callable[[int], Any], residual: Any) -> Finish:
    """What follows the sums; `get` gives inputs, specs or arrays."""
    from infera_kernels.triton.quantized_conv import Finish

    def given(i: int) -> Any:
        return get(i) if site.has(i) else None

    name = str(site.attrs["activation"])
    alpha, beta = (*map(float, site.attrs["activation_params"] or ()), None, None)[:2]
    return Finish(
        get(_FACTOR),
        given(_BIAS),
        residual,
        given(_R_SCALE),
        given(_R_ZERO),
        FUNCTIONS.get(name, name) if name else None,
        alpha,
        beta,
        given(_SCALE),
        given(_ZERO),
    )


def _is_centred(site: Site) -> bool:
    """Whether the zero point is known to be 0."""
    known = site.value(_X_ZERO)
    return not site.has(_X_ZERO) or (known is not None and not known.any())


def _wide(shape: Sequence[int], channels: int) -> tuple[int, ...]:
    return (*shape[:-1], channels)


def _image(a: Array) -> Array:
    """(N, L, C) as (N, 1, L, C)."""
    return a if a.ndim == 4 else a[:, None]


def _image_spec(spec: TensorSpec) -> TensorSpec:
    dims = spec.dims
    return spec if len(dims) == 4 else TensorSpec((dims[0], 1, *dims[1:]), spec.dtype)


@dataclass(frozen=True)
class _Convolution:
    """Images have channels `last`, or second."""

    last: bool

    def kernels(self) -> Kernels:
        return kernels(self.bind, self.supports, inplace=(), strided=True, strided_out=True, workspace=self.workspace)

    def places(self, site: Site) -> Places:
        from infera_kernels.triton.quantized_conv import Places

        found = window(channels_first(site) if self.last else site, site.spec(_W).dims[2:])
        parts = (found.kernel, found.strides, found.dilations)
        if len(found.out) == 1:
            kernel, strides, dilations = ((1, part[0]) for part in parts)
            return Places(kernel, strides, dilations, ((0, 0), found.pads[0]))
        kernel, strides, dilations = ((part[0], part[1]) for part in parts)
        return Places(kernel, strides, dilations, (found.pads[0], found.pads[1]))

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """That of an image with channels last."""
        return _image_spec(moved_spec(spec, last=self.last))

    def supports(self, site: Site) -> bool:
        from infera_kernels.triton.quantized_conv import supports_quantized_conv

        if site.value(_W) is None or site.spec(_X).ndim not in (3, 4):
            return False
        w = site.spec(_W)
        weight = w if w.ndim == 4 else TensorSpec((*w.dims[:2], 1, w.dims[2]), w.dtype)
        residual = site.spec(_RESIDUAL) if site.has(_RESIDUAL) else None
        if residual is not None and residual.ndim != site.outs[0].ndim:
            return False
        finish = _finish(site, site.spec, None if residual is None else self.spec(residual))
        x, out = self.spec(site.spec(_X)), self.spec(site.outs[0])
        fits = out.dims[0] == x.dims[0] and out.dims[-1] == weight.dims[0]
        return fits and supports_quantized_conv(x, weight, out, int(site.attrs["group"]), finish)

    def padded(self, site: Site) -> int:
        """The channels that its input is copied with, so that a thread loads all at once; 0 where it is read as is."""
        from infera_kernels.triton.layout import next_power_of_two
        from infera_kernels.triton.quantized_conv import NARROW, is_flat

        channels = self.spec(site.spec(_X)).dims[-1]
        wanted = max(next_power_of_two(channels), NARROW)
        some = int(site.attrs["group"]) == 1 and is_flat(channels, self.places(site).taps)
        return wanted if some and wanted != channels else 0

    def workspace(self, site: Site) -> int:
        return aligned(math.prod(self.spec(site.spec(_X)).dims[:-1]) * self.padded(site))

    def bind(self, site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.pad_channels import pad_channels
        from infera_kernels.triton.quantized_conv import packed, quantized_conv

        def image(a: Array) -> Array:
            return _image(moved(a, last=self.last))

        x, out, where = image(io.ins[_X]), image(io.outs[0]), self.places(site)
        calls: list[Call] = []
        wide = self.padded(site)
        if wide:
            copy = io.scratch(_wide(x.shape, wide), np.int8)
            calls, x = pad_channels(x, copy, io.launcher), copy
        channels = wide or site.spec(_W).dims[1]
        weight = io.pack(_W, f"quantized {channels}", lambda w: packed(_filters(w), channels))
        residual = image(io.ins[_RESIDUAL]) if site.has(_RESIDUAL) else None
        return calls + quantized_conv(
            *(x, weight, out, io.launcher, where, _finish(site, lambda i: io.ins[i], residual)),
            groups=int(site.attrs["group"]),
            x_zero=io.ins[_X_ZERO] if site.has(_X_ZERO) else None,
            corrections=self.corrections(site, io, where),
            tuned=site.tuned,
        )

    def corrections(self, site: Site, io: Buffers, where: Places) -> Corrections | None:
        from infera_kernels.triton.quantized_conv import Corrections, border_classes, border_sums

        if _is_centred(site):
            return None
        size, out = (self.spec(s).dims[1:3] for s in (site.spec(_X), site.outs[0]))
        rows, seen_rows, columns, seen_columns = border_classes(size, out, where)
        kinds = (seen_rows.tobytes(), seen_columns.tobytes())
        sums = io.pack(
            _W, f"border sums {len(seen_rows)} {kinds}", lambda w: border_sums(_filters(w), seen_rows, seen_columns)
        )
        if len(seen_rows) == len(seen_columns) == 1:
            return Corrections(sums)
        return Corrections(sums, io.constant(rows), io.constant(columns))


def _filters(weight: HostArray) -> HostArray:
    """(M, C, length) as (M, C, 1, length)."""
    return weight if weight.ndim == 4 else weight[:, :, None]


# ---- products


def _as_filters(weight: HostArray) -> HostArray:
    """(K, N) as (N, K, 1, 1)."""
    return weight.T[:, :, None, None]


def _pixels(a: Any) -> Any:
    """(..., K) as (rows, 1, 1, K), contiguous."""
    return a.reshape(-1, 1, 1, a.shape[-1])


def _pixels_spec(spec: TensorSpec) -> TensorSpec:
    return TensorSpec((math.prod(spec.dims[:-1]), 1, 1, spec.dims[-1]), spec.dtype)


def _supports_product(site: Site) -> bool:
    from infera_kernels.triton.quantized_conv import supports_quantized_conv

    x, out = site.spec(_X), site.outs[0]
    residual = site.spec(_RESIDUAL) if site.has(_RESIDUAL) else None
    if site.value(_W) is None or (residual is not None and residual.dims != out.dims) or out.dims[:-1] != x.dims[:-1]:
        return False
    w = site.spec(_W)
    finish = _finish(site, site.spec, None if residual is None else _pixels_spec(residual))
    weight = TensorSpec((w.dims[1], w.dims[0], 1, 1), w.dtype)
    return supports_quantized_conv(_pixels_spec(x), weight, _pixels_spec(out), 1, finish)


def _bind_product(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton.quantized_conv import Corrections, Places, border_sums, packed, quantized_conv

    depth = site.spec(_W).dims[0]
    weight = io.pack(_W, "quantized", lambda w: packed(_as_filters(w), depth))
    corrections = None
    if not _is_centred(site):
        one = np.ones((1, 1), np.bool_)
        corrections = Corrections(io.pack(_W, "sums", lambda w: border_sums(_as_filters(w), one, one)))
    residual = _pixels(io.ins[_RESIDUAL]) if site.has(_RESIDUAL) else None
    return quantized_conv(
        *(_pixels(io.ins[_X]), weight, _pixels(io.outs[0]), io.launcher, Places((1, 1))),
        _finish(site, lambda i: io.ins[i], residual),
        x_zero=io.ins[_X_ZERO] if site.has(_X_ZERO) else None,
        corrections=corrections,
        tuned=site.tuned,
    )


CONV_KERNELS = _Convolution(last=False).kernels()
CONV_LAST_KERNELS = _Convolution(last=True).kernels()
MATMUL_KERNELS = kernels(_bind_product, _supports_product, inplace=(), strided=False)

OPS: tuple[Op, ...] = ()

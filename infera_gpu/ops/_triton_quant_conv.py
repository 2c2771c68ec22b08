"""The "triton" kernels of convolutions of 8-bit integers. Declares no operators itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infera_gpu.graph import HostArray
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops import _triton_quant_matmul as product
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.ops.window import Window, channels_first, window
from infera_gpu.spec import Array, TensorSpec


@dataclass(frozen=True, slots=True)
class Form:
    """An operator's inputs: image, its zero point, weights, their zero point; the scales, and the bias, if any."""

    operands: tuple[int, int, int, int]
    scales: Callable[[Site, product.Get], Any] = lambda site, get: None
    bias: int = -1


def _last(site: Site) -> bool:
    return bool(site.attrs.get("channels_last", 0))


def _dims(spec: TensorSpec, last: bool) -> tuple[int, ...]:
    """The shape with channels second."""
    return (spec.dims[0], spec.dims[-1], *spec.dims[1:-1]) if last else spec.dims


def _four(dims: tuple[int, ...]) -> tuple[int, ...]:
    """(n, c, length) as (n, c, 1, length)."""
    return dims if len(dims) == 4 else (*dims[:2], 1, *dims[2:])


def _geometry(site: Site, form: Form) -> Window:
    seen = channels_first(site) if _last(site) else site
    found = window(seen, site.spec(form.operands[2]).dims[2:])
    if len(found.out) == 2:
        return found
    one = (1,)
    return Window(
        one + found.kernel, one + found.strides, one + found.dilations, ((0, 0), *found.pads), one + found.out
    )


def integer_conv(form: Form) -> Kernels:
    """The kernels of a convolution of one or two axes whose weights are constant."""
    image, image_zero, weight, weight_zero = form.operands

    def supports(site: Site) -> bool:
        from infera_kernels.triton.integer_conv import supports_integer_conv

        get = product.spec_getter(site)
        x, w, out = site.spec(image), site.spec(weight), site.outs[0]
        if site.value(weight) is None or x.ndim not in (3, 4):
            return False
        seen = tuple(TensorSpec(_four(_dims(s, _last(site) and s is not w)), s.dtype) for s in (x, w, out))
        bias = site.spec(form.bias) if site.has(form.bias) and form.bias > 0 else None
        return supports_integer_conv(
            seen[0], seen[1], seen[2], get(image_zero), get(weight_zero), form.scales(site, get), bias
        )

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.integer_conv import Filters, filter_sums, integer_conv, packed_filters

        get, found = product.array_getter(site, io), _geometry(site, form)
        shape = _four(site.spec(weight).dims)

        def pack(tag: str, build: Callable[[HostArray], HostArray]) -> Array:
            return io.pack(weight, tag, lambda w: build(w.reshape(shape)))

        filters = Filters(
            pack("int8 filters", packed_filters),
            pack("int8 filter sums", filter_sums),
            (shape[0], shape[1], shape[2], shape[3]),
            site.spec(weight).dtype.kind == "u",
        )
        x, out = (_moved(a, _last(site)) for a in (io.ins[image], io.outs[0]))
        x, out = (a if a.ndim == 4 else a[:, :, None] for a in (x, out))
        return integer_conv(
            *(x, filters, out, io.launcher),
            **found.params,
            group=int(site.attrs["group"]),
            x_zero=get(image_zero),
            w_zero=get(weight_zero),
            signed_zeros=product.without_part(site, weight, weight_zero),
            scaling=form.scales(site, get),
            bias=io.ins[form.bias] if form.bias > 0 and site.has(form.bias) else None,
            tuned=site.tuned,
        )

    return kernels(bind, supports, inplace=(), strided=True, strided_out=True)


def _moved(a: Array, last: bool) -> Array:
    """An image with its channels second."""
    return a.transpose(0, a.ndim - 1, *range(1, a.ndim - 1)) if last else a


OPS: tuple[Op, ...] = ()

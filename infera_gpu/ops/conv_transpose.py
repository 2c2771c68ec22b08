"""ConvTranspose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infera_gpu.op import Buffers, Call, Case, Kernel, Op, Site, f32
from infera_gpu.ops._families import reads_floats
from infera_gpu.ops._triton_conv import Convolution
from infera_gpu.ops.window import ATTRS, Window, extents, pad_pairs, per_axis, split_pads
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.conv_transpose import conv_transpose
from infera_kernels.portable.conv import transposed_convolution


def transposed_window(site: Site) -> Window:
    """Geometry of the transpose: `pads` are cropped from the full output. Raises PlanError where shapes do not fit."""
    x, w, group = site.spec(0), site.spec(1), int(site.attrs["group"])
    rank = x.ndim - 2
    if rank < 1 or w.ndim != x.ndim or x.dims[1] != w.dims[0] or w.dims[0] % group:
        raise site.fail(f"weights are {w} for an input {x}, expected (channels, outputs / {group}, kernel...)")
    if site.has(2) and site.spec(2).dims != (w.dims[1] * group,):
        raise site.fail(f"bias is {site.spec(2)}, expected {w.dims[1] * group} elements")
    kernel = w.dims[2:]
    if site.attrs["kernel_shape"] is not None and per_axis(site, "kernel_shape", rank, 1) != kernel:
        raise site.fail(f"kernel_shape is {list(site.attrs['kernel_shape'])} but the weights' kernel is {list(kernel)}")
    strides, dilations = per_axis(site, "strides", rank, 1), per_axis(site, "dilations", rank, 1)
    extra = per_axis(site, "output_padding", rank, 0)
    full = tuple(
        (n - 1) * s + e + o for n, s, e, o in zip(x.dims[2:], strides, extents(kernel, dilations), extra, strict=True)
    )
    pads, out = _crop(site, full, strides)
    if min(out) < 1 and x.size:
        raise site.fail(f"the output {out} of {x} is empty")
    return Window(kernel, strides, dilations, pads, out)


def _crop(
    site: Site, full: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """(pads, output) from the full output: given, or derived from the wanted output."""
    mode, wanted = site.attrs["auto_pad"], site.attrs["output_shape"]
    if wanted is not None:
        out = tuple(map(int, wanted))[-len(full) :]
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        out = tuple(n * s for n, s in zip(site.spec(0).dims[2:], strides, strict=True))
    else:
        pads = pad_pairs(site, len(full)) if mode == "NOTSET" else ((0, 0),) * len(full)
        return pads, tuple(n - before - after for n, (before, after) in zip(full, pads, strict=True))
    totals = [max(0, n - o) for n, o in zip(full, out, strict=True)]
    return split_pads(totals, extra_after=mode == "SAME_UPPER"), out


def _infer(site: Site) -> Sequence[TensorSpec]:
    x, w = site.spec(0), site.spec(1)
    return (TensorSpec((x.dims[0], w.dims[1] * int(site.attrs["group"]), *transposed_window(site).out), x.dtype),)


def _compute(xp: Any, site: Site, x: Array, w: Array, b: Array | None = None) -> Array:
    found = transposed_window(site)
    return transposed_convolution(xp, x, w, b, found.out, group=int(site.attrs["group"]), **found.params)


def _bind(site: Site, io: Buffers) -> Sequence[Call]:
    x, w, b = (*io.ins, None)[:3]
    return conv_transpose(
        x, w, b, io.outs[0], io.scratch, group=int(site.attrs["group"]), **transposed_window(site).params
    )


_CASES = (
    Case("plain", (f32(2, 3, 4, 5), f32(3, 2, 3, 3), f32(2))),
    Case("doubling", (f32(1, 3, 5, 4), f32(3, 4, 2, 2)), {"strides": (2, 2)}),
    Case("padded", (f32(1, 2, 5, 4), f32(2, 3, 4, 3), f32(3)), {"strides": (2, 3), "pads": (1, 2, 0, 1)}),
    Case("output-padding", (f32(1, 2, 5, 4), f32(2, 3, 3, 3)), {"strides": (2, 3), "output_padding": (1, 2)}),
    Case("grouped", (f32(2, 4, 5, 4), f32(4, 3, 3, 3), f32(6)), {"group": 2, "pads": (1, 1, 1, 1)}),
    Case("depthwise", (f32(1, 3, 5, 4), f32(3, 1, 3, 2)), {"group": 3, "strides": (2, 1)}),
    Case("dilated", (f32(1, 2, 5, 4), f32(2, 3, 3, 2)), {"dilations": (2, 3), "pads": (1, 1, 1, 1)}),
    Case("gaps", (f32(1, 2, 3, 3), f32(2, 3, 1, 2)), {"strides": (3, 4)}),
    Case("same-upper", (f32(1, 2, 5, 4), f32(2, 3, 3, 4)), {"auto_pad": "SAME_UPPER", "strides": (2, 3)}),
    Case("same-lower", (f32(1, 2, 5, 4), f32(2, 3, 3, 4)), {"auto_pad": "SAME_LOWER", "strides": (2, 3)}),
    Case("output-shape", (f32(1, 2, 3, 3), f32(2, 3, 3, 3)), {"strides": (3, 2), "output_shape": (8, 6)}),
    Case("1d", (f32(2, 3, 7), f32(3, 4, 5), f32(4)), {"strides": (3,), "pads": (2, 1)}),
    Case("3d", (f32(1, 2, 3, 2, 4), f32(2, 3, 2, 3, 2)), {"strides": (2, 1, 2), "pads": (0, 1, 0, 1, 0, 1)}),
    Case("large", (f32(1, 16, 17, 19), f32(16, 9, 4, 4), f32(9)), {"strides": (2, 2), "pads": (1, 1, 1, 1)}),
)

OPS: tuple[Op, ...] = (
    Op(
        "ConvTranspose",
        1,
        _infer,
        _compute,
        _CASES,
        {**ATTRS, "group": 1, "output_padding": None, "output_shape": None},
        kernels={"cpu": Kernel(_bind, reads_floats), **Convolution(transposed_window, transposed=True).kernels()},
    ),
)

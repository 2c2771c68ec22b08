"""Conv, ConvInteger, and FusedConv: a convolution with what passes fold into it, as onnxruntime's passes do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.op import Buffers, Call, Case, Expansion, Kernel, Op, Site, f32
from infera_gpu.ops._families import split_of, u8
from infera_gpu.ops._triton_conv import Convolution
from infera_gpu.ops._triton_quant_conv import Form, integer_conv
from infera_gpu.ops.window import ATTRS, Window, window
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.calls import Pack
from infera_kernels.cpu.conv import conv2d
from infera_kernels.cpu.conv_epilogue import ACTIVATIONS, Activation
from infera_kernels.portable.activation import activation
from infera_kernels.portable.conv import convolution


def conv_window(site: Site) -> Window:
    """The window of a convolution. Raises PlanError where weights, bias or groups do not fit the input."""
    return site.once("convolution", lambda: _conv_window(site))


def _conv_window(site: Site) -> Window:
    x, w = site.spec(0), site.spec(1)
    image, weights = x.dims, w.dims
    group = int(site.attrs["group"])
    if len(image) < 3 or len(weights) != len(image):
        raise site.fail(f"weights are {w} for an input {x}, expected both (n, channels, spatial...)")
    if image[1] != weights[1] * group or weights[0] % group:
        raise site.fail(f"input {x} has {image[1]} channels, expected {weights[1]} in each of {group} groups of {w}")
    if site.has(2) and site.node.op != "ConvInteger" and site.spec(2).dims != weights[:1]:
        raise site.fail(f"bias is {site.spec(2)}, expected {weights[0]} elements")
    return window(site, weights[2:])


def conv_spec(site: Site) -> Sequence[TensorSpec]:
    """The output of Conv or ConvInteger."""
    dtype = np.dtype(np.int32) if site.node.op == "ConvInteger" else site.spec(0).dtype
    out = conv_window(site).out
    return (TensorSpec((site.spec(0).dims[0], site.spec(1).dims[0], *out), dtype),)


def compute_conv(xp: Any, site: Site, x: Array, w: Array, b: Array | None = None, *_: Array | None) -> Array:
    """Conv."""
    found = conv_window(site)
    return convolution(xp, x, w, b, found.out, group=int(site.attrs["group"]), **found.params)


def _compute_integer(
    xp: Any, site: Site, x: Array, w: Array, x_zero: Array | None = None, w_zero: Array | None = None
) -> Array:
    """Sums in float64, exact below 2**53, because integer products have no BLAS."""
    found = conv_window(site)
    wide, weights = x.astype(xp.float64), w.astype(xp.float64)
    if x_zero is not None:
        wide = wide - x_zero.astype(xp.float64).reshape(())
    if w_zero is not None:
        weights = weights - w_zero.astype(xp.float64).reshape(-1, *(1,) * (w.ndim - 1))
    y = convolution(xp, wide, weights, None, found.out, group=int(site.attrs["group"]), **found.params)
    return y.astype(xp.int32)


SPELLINGS = {
    "com.microsoft": {
        "Clip": "clip",
        "HardSigmoid": "hard_sigmoid",
        "LeakyRelu": "leaky_relu",
        "Relu": "relu",
        "Sigmoid": "sigmoid",
        "Tanh": "tanh",
    }
}
"""Domain -> how it calls the activations that its fused convolution may have."""

_OWN = {name: name for name in ACTIVATIONS}


def activation_of(site: Site) -> Activation | None:
    """The activation that a fused node names. Raises PlanError for an unknown one or for missing parameters."""
    name = str(site.attrs["activation"])
    if not name:
        return None
    params, spelled = site.attrs["activation_params"], SPELLINGS.get(site.node.domain, _OWN)
    if name not in spelled:
        raise site.fail(f"activation '{name}' is not one of {', '.join(spelled)}")
    name = spelled[name]
    if len(params) != len(ACTIVATIONS[name]):
        raise site.fail(f"activation '{name}' has parameters {params}, expected ({', '.join(ACTIVATIONS[name])})")
    return (name, *map(float, params))


def _infer_fused(site: Site) -> Sequence[TensorSpec]:
    activation_of(site)
    (y,) = conv_spec(site)
    if site.has(3) and site.spec(3) != y:
        raise site.fail(f"residual is {site.spec(3)}, expected {y}")
    return (y,)


_APART: dict[str, Node] = {
    "": Node("Identity", (), ()),
    "relu": Node("Relu", (), ()),
    "leaky_relu": Node("LeakyRelu", (), ()),
    "hard_sigmoid": Node("HardSigmoid", (), ()),
    "hard_swish": Node("HardSwish", (), (), opset=14),
    "sigmoid": Node("Sigmoid", (), ()),
    "softplus": Node("Softplus", (), ()),
    "swish": Node("Swish", (), (), opset=24),
    "tanh": Node("Tanh", (), ()),
    "mish": Node("Mish", (), (), opset=18),
    "gelu": Node("Gelu", (), (), domain="infera"),
    "gelu_tanh": Node("Gelu", (), (), {"approximate": "tanh"}, domain="infera"),
}
"""An activation -> the node that is it; its parameters are attributes."""


def _split(site: Site) -> Expansion | None:
    """The convolution, the addition and the activation apart, where the residual must be broadcast or is wider.

    What is known must be broadcast in most batches, and so counts as such in all of them where that matters.
    """
    if not site.has(3):
        return None
    (spec,) = conv_spec(site)
    if site.spec(3) == spec and not (site.batch_invariant and site.value(3) is not None):
        return None
    node, activation = site.node, str(site.attrs["activation"])
    params = [float(v) for v in site.attrs["activation_params"]]
    conv, total, capped = (made_name(node.outputs[0], part) for part in ("conv", "sum", "capped"))
    plain = {k: v for k, v in node.attrs.items() if k not in ("activation", "activation_params")}
    nodes = [
        replace(node, inputs=node.inputs[:3], outputs=(conv,), attrs=plain),
        Node("Add", (conv, node.inputs[3]), (total,), name=f"{node.name}/residual"),
    ]
    if activation == "clip":
        limits = {made_name(capped, i): np.array(v, spec.dtype) for i, v in enumerate(params)}
        low, high = limits
        nodes += [Node("Max", (total, low), (capped,)), Node("Min", (capped, high), node.outputs)]
        return Expansion(tuple(nodes), limits)
    apart = _APART[activation]
    attrs = {**apart.attrs, **dict(zip(ACTIVATIONS.get(activation, ()), params, strict=True))}
    nodes.append(replace(apart, inputs=(total,), outputs=node.outputs, attrs=attrs))
    return Expansion(tuple(nodes))


def _compute_fused(
    xp: Any, site: Site, x: Array, w: Array, b: Array | None = None, residual: Array | None = None
) -> Array:
    y = compute_conv(xp, site, x, w, b)
    return activated(xp, site, y if residual is None else y + residual)


def activated(xp: Any, site: Site, y: Array) -> Array:
    """y after the activation that a fused node names."""
    name, *params = activation_of(site) or ("",)
    if not name:
        return y
    if name == "clip":
        clipped: Array = xp.clip(y, *params)
        return clipped
    return activation(xp, str(name), y, **dict(zip(ACTIVATIONS[str(name)], map(float, params), strict=True)))


def _supports(site: Site) -> bool:
    x = site.spec(0)
    exact = x.dtype == np.float32 or site.attrs.get("activation") != "gelu"
    return x.ndim in (3, 4) and x.size > 0 and x.dtype in (np.float32, np.float64) and exact


def as_2d(a: Array | None) -> Array | None:
    """(n, c, length) as (n, c, 1, length); arrays of four axes and None as they are."""
    return a if a is None or a.ndim == 4 else a[:, :, None]


def window_2d(found: Window) -> Window:
    """A one-dimensional window as one of height 1."""
    if len(found.out) == 2:
        return found
    one = (1,)
    return replace(
        found,
        kernel=one + found.kernel,
        strides=one + found.strides,
        dilations=one + found.dilations,
        pads=((0, 0), *found.pads),
        out=one + found.out,
    )


def packer(site: Site, io: Buffers, i: int) -> Pack | None:
    """Packs input i as `as_2d` gives it, where it is constant and what is packed may round otherwise."""
    if site.value(i) is None or io.strict:
        return None
    return lambda tag, build: io.pack(i, tag, lambda w: build(as_2d(w)))


def _bind(site: Site, io: Buffers) -> Sequence[Call]:
    x, w, b, residual = (*io.ins, None, None)[:4]
    return conv2d(
        as_2d(x),
        as_2d(w),
        b,
        as_2d(io.outs[0]),
        io.scratch,
        split_of(io),
        group=int(site.attrs["group"]),
        activation=fused_activation(site),
        residual=as_2d(residual),
        pack=packer(site, io, 1),
        **window_2d(conv_window(site)).params,
    )


def fused_activation(site: Site) -> Activation | None:
    """That of a fused convolution; None of others."""
    return activation_of(site) if "activation" in site.attrs else None


_KERNELS = {"cpu": Kernel(_bind, _supports), **Convolution(conv_window, fused_activation).kernels()}


_CASES = (
    Case("3x3", (f32(2, 3, 7, 9), f32(5, 3, 3, 3), f32(5)), {"pads": (1, 1, 1, 1)}),
    Case("no-bias-or-padding", (f32(1, 4, 6, 5), f32(3, 4, 3, 2))),
    Case("one-pixel", (f32(2, 3, 1, 1), f32(4, 3, 1, 1), f32(4))),
    Case("pointwise", (f32(2, 5, 7, 3), f32(4, 5, 1, 1), f32(4))),
    Case("pointwise-strided", (f32(2, 5, 7, 6), f32(4, 5, 1, 1)), {"strides": (2, 3)}),
    Case("pointwise-padded", (f32(1, 2, 3, 3), f32(4, 2, 1, 1), f32(4)), {"pads": (1, 0, 2, 1)}),
    Case("pointwise-grouped", (f32(2, 6, 5, 5), f32(4, 3, 1, 1)), {"group": 2}),
    Case("winograd-2", (f32(2, 16, 11, 13), f32(17, 16, 3, 3), f32(17)), {"pads": (1, 1, 1, 1)}),
    Case("winograd-2-uneven-pads", (f32(1, 16, 12, 11), f32(16, 16, 3, 3)), {"pads": (0, 2, 1, 0)}),
    Case("winograd-4", (f32(1, 16, 29, 34), f32(16, 16, 3, 3), f32(16)), {"pads": (1, 1, 1, 1)}),
    Case("winograd-4-blocks", (f32(1, 64, 57, 56), f32(32, 64, 3, 3), f32(32)), {"pads": (1, 1, 1, 1)}),
    Case("stem-7x7", (f32(1, 3, 31, 33), f32(8, 3, 7, 7), f32(8)), {"strides": (2, 2), "pads": (3, 3, 3, 3)}),
    Case("blocks", (f32(1, 64, 50, 64), f32(3, 64, 3, 3), f32(3)), {"pads": (1, 1, 1, 1)}),
    Case("strided-past-padding", (f32(1, 2, 5, 5), f32(2, 2, 1, 1)), {"strides": (3, 3), "pads": (2, 2, 2, 2)}),
    Case("dilated", (f32(1, 3, 11, 10), f32(2, 3, 3, 2)), {"dilations": (2, 3), "pads": (2, 1, 0, 3)}),
    Case("dilated-strided", (f32(1, 3, 13, 14), f32(2, 3, 3, 3)), {"dilations": (3, 2), "strides": (2, 3)}),
    Case("grouped", (f32(2, 6, 9, 8), f32(9, 2, 3, 3), f32(9)), {"group": 3, "pads": (1, 1, 1, 1)}),
    Case("depthwise", (f32(2, 7, 9, 10), f32(7, 1, 3, 3), f32(7)), {"group": 7, "pads": (1, 1, 1, 1)}),
    Case("depthwise-strided", (f32(1, 6, 15, 12), f32(6, 1, 5, 3)), {"group": 6, "strides": (2, 3), "pads": (1,) * 4}),
    Case("depthwise-dilated", (f32(1, 3, 12, 12), f32(3, 1, 3, 3), f32(3)), {"group": 3, "dilations": (2, 3)}),
    Case("depthwise-blocks", (f32(1, 40, 60, 60), f32(40, 1, 3, 3), f32(40)), {"group": 40, "pads": (1, 1, 1, 1)}),
    Case("depthwise-multiplied", (f32(1, 4, 6, 6), f32(12, 1, 3, 3), f32(12)), {"group": 4}),
    Case("same-upper", (f32(1, 2, 8, 7), f32(3, 2, 4, 3)), {"auto_pad": "SAME_UPPER", "strides": (3, 2)}),
    Case("same-lower", (f32(1, 2, 8, 7), f32(3, 2, 4, 3)), {"auto_pad": "SAME_LOWER", "strides": (3, 2)}),
    Case("valid", (f32(1, 2, 8, 7), f32(3, 2, 4, 3)), {"auto_pad": "VALID"}),
    Case("1d", (f32(2, 3, 17), f32(4, 3, 5), f32(4)), {"pads": (2, 1), "strides": (2,), "dilations": (2,)}),
    Case("1d-depthwise", (f32(2, 3, 17), f32(3, 1, 4)), {"group": 3, "pads": (3, 0)}),
    Case("1d-few-pixels", (f32(37, 3, 40), f32(65, 3, 16), f32(65)), {"strides": (8,)}),
    Case("few-pixels-blocks", (f32(40, 64, 7, 7), f32(5, 64, 3, 3), f32(5)), {"dilations": (1, 2), "strides": (2, 1)}),
    Case("3d", (f32(1, 2, 5, 4, 6), f32(4, 1, 2, 3, 3), f32(4)), {"group": 2, "pads": (1, 0, 1, 0, 1, 1)}),
    Case("no-batch", (f32(0, 3, 5, 5), f32(2, 3, 3, 3))),
    Case("opset-22", (f32(1, 2, 5, 5), f32(3, 2, 3, 3)), {"kernel_shape": (3, 3)}, opset=22),
)  # fmt: skip

_FUSED = {
    "relu": (),
    "clip": (-0.5, 1.5),
    "leaky_relu": (0.1,),
    "hard_sigmoid": (0.2, 0.4),
    "sigmoid": (),
    "tanh": (),
    "swish": (),
    "hard_swish": (),
    "gelu": (),
    "gelu_tanh": (),
    "mish": (),
    "softplus": (),
}

_FUSED_CASES = (
    Case("few-pixels", (f32(3, 3, 5, 5), f32(4, 3, 3, 3), f32(4), f32(3, 4, 3, 3)), {"activation": "relu"}),
    Case("bare", (f32(1, 3, 5, 5), f32(4, 3, 3, 3))),
    Case("pointwise", (f32(2, 3, 5, 4), f32(4, 3, 1, 1), f32(4), f32(2, 4, 5, 4)), {"activation": "relu"}),
    Case("one-pixel", (f32(2, 3, 1, 1), f32(4, 3, 1, 1), f32(4), f32(2, 4, 1, 1)), {"activation": "relu"}),
    Case(
        "winograd", (f32(1, 16, 30, 29), f32(16, 16, 3, 3), None, f32(1, 16, 30, 29)),
        {"activation": "relu", "pads": (1, 1, 1, 1)},
    ),
    Case("im2col", (f32(2, 3, 6, 5), f32(4, 3, 3, 3), f32(4), f32(2, 4, 4, 3)), {"activation": "relu"}),
    Case(
        "split", (f32(1, 128, 2, 2), f32(5, 128, 3, 3), f32(5), f32(1, 5, 2, 2)),
        {"activation": "relu", "pads": (1, 1, 1, 1)},
    ),
    Case(
        "half", (*(TensorSpec(s, np.dtype(np.float16)) for s in ((1, 3, 8, 9), (5, 3, 3, 3), (5,))),),
        {"activation": "relu", "strides": (2, 2)}, tol=1e-3,
    ),
    Case("depthwise", (f32(2, 3, 6, 5), f32(3, 1, 3, 3), None, f32(2, 3, 4, 3)), {"activation": "relu", "group": 3}),
    *(
        Case(name, (f32(2, 3, 6, 5), f32(4, 3, 2, 2), f32(4)), {"activation": name, "activation_params": params})
        for name, params in _FUSED.items()
    ),
)  # fmt: skip

_FUSED_ATTRS = {**ATTRS, "group": 1, "activation": "", "activation_params": ()}
_MS_FUSED_CASES = (
    Case("residual", (f32(2, 3, 6, 5), f32(4, 3, 3, 3), f32(4), f32(2, 4, 4, 3)), {"activation": "Relu"}),
    Case("bare", (f32(1, 3, 5, 5), f32(4, 3, 3, 3)), {"pads": (1, 1, 1, 1)}),
    *(
        Case(
            name, (f32(2, 3, 6, 5), f32(4, 3, 2, 2), f32(4)),
            {"activation": name, **({"activation_params": _FUSED[own]} if _FUSED[own] else {})},
        )
        for name, own in SPELLINGS["com.microsoft"].items()
    ),
)  # fmt: skip

OPS: tuple[Op, ...] = (
    Op("Conv", 1, conv_spec, compute_conv, _CASES, {**ATTRS, "group": 1}, kernels=_KERNELS),
    Op(
        "FusedConv", 1, _infer_fused, _compute_fused, _FUSED_CASES,
        _FUSED_ATTRS, "infera", _KERNELS, expand=_split,
    ),
    Op("FusedConv", 1, _infer_fused, _compute_fused, _MS_FUSED_CASES, _FUSED_ATTRS, "com.microsoft", _KERNELS),
    Op(
        "ConvInteger", 10, conv_spec, _compute_integer,
        (
            Case("plain", (u8(1, 2, 5, 6), u8(3, 2, 3, 3)), low=0, high=255),
            Case("zero-points", (u8(2, 2, 5, 6), u8(4, 1, 3, 3), np.array(130, np.uint8), np.array([120], np.uint8)),
                 {"group": 2, "pads": (1, 1, 0, 1), "strides": (2, 1)}, low=0, high=255),
        ),
        {**ATTRS, "group": 1},
        kernels=integer_conv(Form((0, 2, 1, 3))),
    ),
)  # fmt: skip

"""Operators on images whose channels are the last axis, (N, spatial..., C): each is its ONNX operator, moved.

`passes/layout.py` puts them in the place of ONNX's, which have channels first. Weights keep ONNX's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.op import Bind, Border, Buffers, Call, Case, Cases, Expansion, Kernel, Op, Site
from infera_gpu.ops import _jit, batchnorm, conv, pool
from infera_gpu.ops._families import split_of
from infera_gpu.ops._triton_conv import Convolution
from infera_gpu.ops._triton_pool import global_pooling, pooling
from infera_gpu.ops.window import window
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.nhwc_border import border
from infera_kernels.cpu.nhwc_conv import FEW_INPUTS, border_of, conv2d, reads_strided, writes_rows, writes_slices
from infera_kernels.cpu.nhwc_pool import average_pool2d, global_average_pool, global_max_pool, max_pool2d
from infera_kernels.cpu.norm import batch_norm

SUFFIX = "NHWC"
"""What the name of ONNX's operator gets."""

Image = TypeVar("Image", TensorSpec, HostArray)


def _moved(xp: Any, a: Array, source: int, target: int) -> Array:
    return xp.ascontiguousarray(xp.moveaxis(a, source, target))


def _first(spec: TensorSpec) -> TensorSpec:
    """(N, spatial..., C) as (N, C, spatial...)."""
    batch, *spatial, channels = spec.shape
    return TensorSpec((batch, channels, *spatial), spec.dtype, spec.ranked)


def _last(spec: TensorSpec) -> TensorSpec:
    """(N, C, spatial...) as (N, spatial..., C)."""
    batch, channels, *spatial = spec.shape
    return TensorSpec((batch, *spatial, channels), spec.dtype, spec.ranked)


@dataclass(frozen=True)
class ChannelsLast:
    """The operator that does what `first` does with the channels of its inputs `images` and of its output last."""

    first: Op
    images: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        return f"{self.first.name}{SUFFIX}"

    def site(self, site: Site) -> Site:
        """The site as `first` would meet it, under its own node. Raises PlanError where an input has no channels."""
        first = self.inputs(site)
        return first.giving(tuple([_first(s) for s in site.outs])) if site.outs else first

    def inputs(self, site: Site) -> Site:
        """`site`, without outputs."""
        return site.once((self.name, "first"), lambda: self._moved(site))

    def _moved(self, site: Site) -> Site:
        ins = list(site.ins)
        for i in self.images:
            spec = ins[i] if i < len(ins) else None
            if spec is not None:
                if spec.ndim < 3:
                    raise site.fail(f"input {i} is {spec}, expected (batch, spatial..., channels)")
                ins[i] = _first(spec)
        return Site(site.node, site.attrs, tuple(ins), site.values, (), site.opset)

    def infer(self, site: Site) -> Sequence[TensorSpec]:
        (made,) = self.first.infer(self.site(site))
        assert made is not None
        return (_last(made),)

    def compute(self, xp: Any, site: Site, *ins: Array | None) -> Array:
        given = [a if a is None or i not in self.images else _moved(xp, a, -1, 1) for i, a in enumerate(ins)]
        (made,) = self.first.outputs(xp, self.site(site), given)
        return _moved(xp, made, 1, -1)

    def expand(self, site: Site) -> Expansion | None:
        """That of `first`: what it makes of the node itself is named like it, what else works element by element."""
        return self.first.expand(self.site(site)) if self.first.expand else None

    def op(self, cases: Iterable[Case], kernels: Mapping[str, Kernel]) -> Op:
        """The declaration, with those of the cases that are images."""
        return Op(
            self.name,
            1,
            self.infer,
            self.compute,
            Cases(lambda: (self._case(c) for c in cases if _is_image(c) and c.n_outs == 1)),
            self.first.attrs,
            "infera",
            kernels,
            expand=self.expand if self.first.expand else None,
        )

    def _case(self, case: Case) -> Case:
        return replace(
            case, opset=None, ins=tuple(_case_input(v) if i in self.images else v for i, v in enumerate(case.ins))
        )


def _is_image(case: Case) -> bool:
    return isinstance(case.ins[0], (TensorSpec, np.ndarray)) and case.ins[0].ndim in (3, 4, 5)


def _case_input(value: Any) -> Any:
    if isinstance(value, TensorSpec):
        return _last(value)
    return value if value is None else np.moveaxis(value, 1, -1)


def _named(ops: Iterable[Op], name: str, domain: str = "") -> Op:
    """The newest declaration of that name."""
    return max((o for o in ops if (o.domain, o.name) == (domain, name)), key=lambda o: o.since)


RESIDUAL = 3
"""The input of a convolution that is added to its sums."""

CONV = ChannelsLast(_named(conv.OPS, "FusedConv", "infera"), images=(0, RESIDUAL))
BATCH_NORM = ChannelsLast(replace(_named(batchnorm.OPS, "BatchNormalization"), attrs={"epsilon": 1e-5}, expand=None))
MAX, AVERAGE, GLOBAL_AVERAGE, GLOBAL_MAX = POOLS = tuple(
    ChannelsLast(_named(pool.OPS, name)) for name in ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
)


def _as_2d(a: Array | None) -> Array | None:
    """(n, length, c) as (n, 1, length, c); arrays of four axes and None as they are."""
    return a if a is None or a.ndim == 4 else a[:, None]


def _convolution(site: Site, io: Buffers) -> dict[str, Any]:
    """What convolutions of two-dimensional images are told."""
    x, w, b, residual = (*io.ins, None, None)[:4]
    geometry = site.once("geometry", lambda: _geometry(site))
    if x.shape != site.spec(0).dims:
        geometry = {**geometry, "pads": ((0, 0), (0, 0))}
    return {
        "x": _as_2d(x),
        "w": conv.as_2d(w),
        "b": b,
        "y": _as_2d(io.outs[0]),
        "scratch": io.scratch,
        "split": split_of(io),
        "residual": _as_2d(residual),
        **geometry,
    }


def _geometry(site: Site) -> dict[str, Any]:
    first = CONV.inputs(site)
    return {
        "group": int(site.attrs["group"]),
        "activation": conv.activation_of(first),
        **conv.window_2d(conv.conv_window(first)).params,
    }


def _within(bind: Bind) -> Bind:
    """`bind`, and before it what sets the border of input 0, if it has one."""

    def bound(site: Site, io: Buffers) -> Sequence[Call]:
        calls = bind(site, io)
        if io.ins[0].shape == site.spec(0).dims:
            return calls
        (top, _), (left, _) = conv.window_2d(conv.conv_window(CONV.inputs(site))).pads
        height, width = (1, *site.spec(0).dims[1:-1])[-2:]
        return [*border(_as_2d(io.ins[0]), (top, left), (height, width), 0), *calls]

    return bound


Geometry: TypeAlias = Callable[..., tuple[tuple[int, int], tuple[int, int]] | None]


def _border(wanted: Geometry) -> Callable[[Site], Border | None]:
    """The border of a convolution's input, as `wanted` gives it for images."""

    def found(site: Site) -> Border | None:
        if site.attrs["auto_pad"] == "NOTSET" and not any(site.attrs["pads"] or ()):
            return None
        window = conv.window_2d(conv.conv_window(CONV.inputs(site)))
        images, *size, _ = site.spec(0).dims
        outputs, inputs, *_ = site.spec(1).dims
        pads = wanted(
            (1, *size)[-2:], (outputs, inputs, *window.kernel), images, window.out, group=int(site.attrs["group"]),
            **window.params,
        )  # fmt: skip
        return pads and ((0, 0), *pads[2 - len(size) :], (0, 0))

    return found


def _rows_out(site: Site) -> bool:
    """Where an activation follows: its pass writes to other places as fast, that of a bias alone does not."""
    return bool(site.attrs["activation"]) and writes_rows(site.spec(1).dims, int(site.attrs["group"]))


def _slices_out(site: Site) -> bool:
    if site.value(1) is None:
        return False
    window = conv.window_2d(conv.conv_window(CONV.inputs(site)))
    given = {k: v for k, v in _geometry(site).items() if k != "pads"}
    (height, width), shape = window.out, (*site.spec(1).dims[:2], *window.kernel)
    return writes_slices(shape, site.spec(0).dims[0], (height, width), residual=site.has(RESIDUAL), **given)


def _strided_in(site: Site) -> bool:
    if site.spec(1).dims[1] > FEW_INPUTS or int(site.attrs["group"]) > 1:  # most: asked first, as it costs least
        return False
    window = conv.window_2d(conv.conv_window(CONV.inputs(site)))
    (outputs, inputs, *_), (height, width) = site.spec(1).dims, window.out
    given = {k: v for k, v in window.params.items() if k != "pads"}
    return reads_strided((outputs, inputs, *window.kernel), (height, width), group=int(site.attrs["group"]), **given)


def _compiled_border(*args: Any, **given: Any) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """`border_of` of the compiled kernels, which import numba."""
    from infera_kernels.jit.conv import border_of

    return border_of(*args, **given)


def _compiled_rows_out(site: Site) -> bool:
    from infera_kernels.jit.conv import writes_rows

    weight, group, activation = site.spec(1).dims, int(site.attrs["group"]), str(site.attrs["activation"])
    return writes_rows(weight, group, activation, residual=site.has(3))


def _bind_conv(site: Site, io: Buffers) -> Sequence[Call]:
    return conv2d(**_convolution(site, io), pack=conv.packer(site, io, 1))


def _max(site: Site, io: Buffers) -> dict[str, Any]:
    """What maximum pooling of two-dimensional images is told."""
    found = conv.window_2d(window(MAX.inputs(site)))
    return {"x": _as_2d(io.ins[0]), "y": _as_2d(io.outs[0]), "kernel": found.kernel, **found.params}


def _bind_max(site: Site, io: Buffers) -> Sequence[Call]:
    return max_pool2d(**_max(site, io), scratch=io.scratch, split=split_of(io))


def _bind_average(site: Site, io: Buffers) -> Sequence[Call]:
    found = conv.window_2d(window(AVERAGE.inputs(site)))
    padded = bool(site.attrs["count_include_pad"])
    return average_pool2d(
        _as_2d(io.ins[0]), _as_2d(io.outs[0]), io.scratch, split_of(io), kernel=found.kernel, include_pad=padded,
        **found.params,
    )  # fmt: skip


def _bind_global(pool: Callable[..., list[Call]]) -> Bind:
    return lambda site, io: pool(_as_2d(io.ins[0]), _as_2d(io.outs[0]), io.scratch, split_of(io))


def _bind_batch_norm(site: Site, io: Buffers) -> Sequence[Call]:
    x, scale, bias, mean, variance = io.ins
    return batch_norm(x, scale, bias, mean, variance, io.outs[0], io.scratch, epsilon=float(site.attrs["epsilon"]))


def _planar(site: Site) -> bool:
    x = site.spec(0)
    return x.ndim in (3, 4) and x.size > 0 and x.dtype in (np.float32, np.float64)


_CONV_CASES = Cases(
    lambda: (*CONV.first.cases, *(replace(c, id=f"bare-{c.id}") for c in _named(conv.OPS, "Conv").cases))
)
_POOL_KERNELS: tuple[tuple[ChannelsLast, dict[str, Kernel]], ...] = (
    (
        MAX,
        {"cpu": Kernel(_bind_max, _planar, rows_out=_planar, slices_out=_planar)}
        | _jit.max_pool(_max)
        | pooling("max", MAX.site, last=True),
    ),
    (
        AVERAGE,
        {"cpu": Kernel(_bind_average, _planar, rows_out=_planar, slices_out=_planar)}
        | pooling("average", AVERAGE.site, last=True),
    ),
    (
        GLOBAL_AVERAGE,
        {"cpu": Kernel(_bind_global(global_average_pool), _planar)} | global_pooling("average", last=True),
    ),
    (GLOBAL_MAX, {"cpu": Kernel(_bind_global(global_max_pool), _planar)} | global_pooling("max", last=True)),
)

OPS: tuple[Op, ...] = (
    CONV.op(
        _CONV_CASES,
        {
            "cpu": Kernel(
                _within(_bind_conv),
                _planar,
                inplace=(RESIDUAL,),
                border=_border(border_of),
                rows_out=_rows_out,
                slices_out=_slices_out,
                strided_in=_strided_in,
            )
        }
        | {
            kind: replace(
                kernel,
                bind=_within(kernel.bind),
                border=_border(_compiled_border),
                rows_out=_compiled_rows_out,
                slices_out=_compiled_rows_out,
            )
            for kind, kernel in _jit.convolution(_convolution).items()
        }
        | Convolution(conv.conv_window, conv.fused_activation, CONV.site, last=True).kernels(),
    ),
    BATCH_NORM.op(
        BATCH_NORM.first.cases,
        {"cpu": replace(BATCH_NORM.first.kernels["cpu"], bind=_bind_batch_norm)} | batchnorm.CHANNELS_LAST,
    ),
    *(moved.op(moved.first.cases, kernels) for moved, kernels in _POOL_KERNELS),
)

"""The "triton" kernels of convolutions and transposed convolutions, channels first or last. Declares no operators.

Kernels take images with channels last, in any strides: where an operator has channels first, they get views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.ops.window import Window
from infera_gpu.spec import Array, TensorSpec

FUNCTIONS: Mapping[str, str] = MappingProxyType({"swish": "silu"})
"""An activation that a fused convolution names -> the Triton function, where that has another name."""


def same(site: Site) -> Site:
    return site


def moved(a: Array, *, last: bool) -> Array:
    """(N, C, spatial...) as (N, spatial..., C), a view; what has channels `last` as it is."""
    return a if last else a.transpose(0, *range(2, a.ndim), 1)


def moved_spec(spec: TensorSpec, *, last: bool) -> TensorSpec:
    dims = spec.dims
    return spec if last else TensorSpec((dims[0], *dims[2:], dims[1]), spec.dtype)


def _cut(site: Site) -> dict[str, Any]:
    """What cutting sums goes by, beside shapes."""
    return {"invariant": site.batch_invariant, "tuned": site.tuned, "tf32": site.tf32}


@dataclass(frozen=True)
class Convolution:
    """A family of operators. `first` gives a site as it is with channels first, of which `window` and `activation` tell
    the rest; images themselves have channels `last`, or not."""

    window: Callable[[Site], Window]
    activation: Callable[[Site], tuple[str | float, ...] | None] = lambda site: None
    first: Callable[[Site], Site] = same
    last: bool = False
    transposed: bool = False

    def kernels(self) -> Kernels:
        return kernels(self.bind, self.supports, inplace=(), strided=True, strided_out=True, workspace=self.workspace)

    # ---- the site

    def groups(self, site: Site) -> int:
        return int(site.attrs["group"])

    def specs(self, site: Site) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
        """Input, weights (O, kernel..., C / groups) and output, channels last."""
        first = self.first(site)
        w, groups = first.spec(1).dims, self.groups(site)
        dims = (w[1] * groups, *w[2:], w[0] // groups) if self.transposed else (w[0], *w[2:], w[1])
        images = moved_spec(site.spec(0), last=self.last), moved_spec(site.outs[0], last=self.last)
        return images[0], TensorSpec(dims, site.spec(1).dtype), images[1]

    def is_depthwise(self, site: Site) -> bool:
        _, w, _ = self.specs(site)
        return not self.transposed and self.groups(site) > 1 and w.dims[-1] == 1

    def _plain(self, site: Site) -> bool:
        """Whether it is one matrix product, but for what that costs."""
        found = self.window(self.first(site))
        one = {*found.kernel, *found.strides} == {1} and not any(map(any, found.pads)) and self.groups(site) == 1
        return one and not self.transposed

    def is_product(self, site: Site) -> bool:
        """Whether it is computed as one matrix product: where its sums stay whole."""
        from infera_kernels.triton.conv import splits_of

        _, w, out = self.specs(site)
        if not self._plain(site):
            return False
        return splits_of(out, w, 1, library=self._library(site) > 0, **_cut(site)) == 1

    def way(self, site: Site) -> int:
        """Which of cuDNN's plans computes it, from 1; 0 where kernels of ours do, as where channels are first."""
        from infera_kernels.triton.dnn import way_of

        _, w, out = self.specs(site)
        if self.transposed or not self.last or self.is_depthwise(site):
            return 0
        return way_of(
            w,
            out,
            self._geometry(site),
            self.groups(site),
            terms=[name for i, name in ((3, "residual"), (2, "bias")) if site.has(i)],
            activation=self._function(site),
            parameters=self._parameters(site),
            tuned=None if site.batch_invariant else site.tuned,
        )

    def padded(self, site: Site) -> int:
        """The channels that its input is copied with, for loads of several elements; 0 where it is read as it is."""
        x, _, _ = self.specs(site)
        channels = x.dims[-1]
        some = x.dtype.itemsize == 2 and channels in (3, 5, 6, 7) and site.value(1) is not None
        whole = self.groups(site) == 1 and not self.transposed and not self.is_product(site)
        return (4 if channels < 4 else 8) if some and whole else 0

    def supports(self, site: Site) -> bool:
        from infera_kernels.triton.conv import supports_conv

        if site.spec(0).ndim not in (3, 4, 5) or len(site.outs) != 1:
            return False
        if self.transposed and self.groups(site) > 1 and site.value(1) is None:
            return False  # such weights are no view with channels last
        x, w, out = self.specs(site)
        bias = site.spec(2) if site.has(2) else None
        residual = moved_spec(site.spec(3), last=self.last) if site.has(3) else None
        return supports_conv(x, w, out, bias, residual, self._function(site))

    def _function(self, site: Site) -> str | None:
        """The Triton function of the activation."""
        found = self.activation(self.first(site))
        return FUNCTIONS.get(str(found[0]), str(found[0])) if found else None

    def _parameters(self, site: Site) -> list[float]:
        return [float(v) for v in (self.activation(self.first(site)) or ())[1:]]

    # ---- scratch

    def parts(self, site: Site) -> tuple[int, ...] | None:
        """The shape of the sums of a convolution that is split."""
        from infera_kernels.triton.conv import parts_shape

        _, w, out = self.specs(site)
        if self.transposed or self.is_depthwise(site) or self.is_product(site):
            return None
        library = self._plain(site) and self._library(site) > 0
        return parts_shape(out, w, self.groups(site), library=library, **_cut(site))

    def workspace(self, site: Site) -> int:
        parts, padded, x = self.parts(site), self.padded(site), self.specs(site)[0]
        copied = math.prod(x.dims[:-1]) * padded * x.dtype.itemsize if site.outs[0].size else 0
        rooms = 4 * math.prod(parts) if parts else 0, copied, self.library_bytes(site), self.cudnn_bytes(site)
        return sum(map(aligned, rooms))

    def library_bytes(self, site: Site) -> int:
        """Of a library that may compute a product."""
        return self._library(site) if self.specs(site)[2].size and self.is_product(site) else 0

    def _library(self, site: Site) -> int:
        """That of a convolution of one pixel, whole."""
        from infera_kernels.triton.blas import library_bytes

        x, _, out = self.specs(site)
        if self.is_depthwise(site):
            return 0
        return library_bytes(site.tuned, math.prod(out.dims[:-1]), x.dims[-1], self._function(site))

    def cudnn_bytes(self, site: Site) -> int:
        """Of cuDNN, where it is to compute it."""
        from infera_kernels.launch.cudnn import WORKSPACE

        return WORKSPACE if self.way(site) else 0

    # ---- binding

    def bind(self, site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.conv import Finish, conv
        from infera_kernels.triton.depthwise import depthwise
        from infera_kernels.triton.tiles import IEEE, TF32

        out = moved(io.outs[0], last=self.last)
        if not out.size:
            return []
        x, bias, residual = moved(io.ins[0], last=self.last), *(*io.ins[2:], None, None)[:2]
        residual = None if residual is None else moved(residual, last=self.last)
        alpha, beta = (*self._parameters(site), None, None)[:2]
        finish = Finish(bias, residual, self._function(site), alpha, beta)
        where = self._geometry(site)
        if self.is_depthwise(site):
            return depthwise(x, self.weights(site, io), out, io.launcher, where, finish=finish)
        calls: list[Call] = []
        if padded := self.padded(site):
            from infera_kernels.triton.pad_channels import pad_channels

            wide = io.scratch((*x.shape[:-1], padded), x.dtype)
            calls, x = pad_channels(x, wide, io.launcher), wide
        parts = None if (shape := self.parts(site)) is None else io.scratch(shape)
        workspace, other = (
            io.scratch((room,), np.uint8) if room else None
            for room in (self.library_bytes(site), self.cudnn_bytes(site))
        )
        if other is not None:
            from infera_kernels.triton.dnn import by_cudnn

            given = x, self.weights(site, io), out, io.launcher, where, finish
            call = by_cudnn(*given, self.way(site), other, site.tuned)
            if call is not None:
                return [*calls, call]
        if self.is_product(site) and (bias is None or bias.strides == (bias.dtype.itemsize,)):
            return _product(x, io.ins[1], out, finish, io, site, workspace)
        return calls + conv(
            x,
            self.weights(site, io),
            out,
            io.launcher,
            where,
            groups=self.groups(site),
            finish=finish,
            parts=parts,
            transposed=self.transposed,
            precision=TF32 if io.tf32 else IEEE,
            invariant=site.batch_invariant,
            tuned=site.tuned,
        )

    def _geometry(self, site: Site) -> Any:
        from infera_kernels.triton.conv import geometry

        found = self.window(self.first(site))
        return geometry(found.kernel, found.strides, found.dilations, found.pads)

    def weights(self, site: Site, io: Buffers) -> Array:
        """The weights (O, kernel..., C / groups): packed where they are constant and in another order, else a view."""
        groups, padded = self.groups(site), self.padded(site)
        one = not self.transposed and math.prod(site.spec(1).dims[2:]) == 1
        if site.value(1) is None or (one and not padded):
            return self._view(io.ins[1], groups)
        if self.is_depthwise(site):
            packed = io.pack(1, "taps", lambda w: _dense(np.moveaxis(w, 0, -1)))
            return packed.transpose(-1, *range(1, packed.ndim - 1), 0)
        return io.pack(1, f"krsc{groups}:{padded}", lambda w: _widened(self._view(w, groups), padded))

    def _view(self, w: Any, groups: int) -> Any:
        if not self.transposed:
            return w.transpose(0, *range(2, w.ndim), 1)
        apart = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
        made = apart.transpose(0, 2, *range(3, apart.ndim), 1)
        return made.reshape(-1, *made.shape[2:])


def _dense(a: HostArray) -> HostArray:
    return np.ascontiguousarray(a)


def _widened(w: HostArray, channels: int) -> HostArray:
    """The weights with so many channels, zeros behind; as they are where that is 0."""
    made = np.zeros((*w.shape[:-1], channels or w.shape[-1]), w.dtype)
    made[..., : w.shape[-1]] = w
    return made


def _product(x: Array, w: Array, out: Array, finish: Any, io: Buffers, site: Site, workspace: Array) -> list[Call]:
    from infera_kernels.triton.matmul import matmul
    from infera_kernels.triton.tiles import IEEE, TF32

    return matmul(
        x,
        w[(..., *(0,) * (w.ndim - 2))].transpose(),
        out,
        io.launcher,
        bias=finish.bias,
        residual=finish.residual,
        activation=finish.activation,
        act_alpha=finish.alpha,
        act_beta=finish.beta,
        precision=TF32 if io.tf32 else IEEE,
        workspace=workspace,
        invariant=site.batch_invariant,
        tuned=site.tuned,
    )


OPS: tuple[Op, ...] = ()

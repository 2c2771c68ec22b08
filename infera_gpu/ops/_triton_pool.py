"""The "triton" kernels of pools, channels first or last. Declares no operators itself."""

from __future__ import annotations

import math
from collections.abc import Callable

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.ops._triton_conv import moved, moved_spec, same
from infera_gpu.ops.window import window
from infera_gpu.spec import TensorSpec


def _specs(site: Site, *, last: bool) -> tuple[TensorSpec, TensorSpec]:
    """Of whole images and of what they become, (N, C)."""
    x = moved_spec(site.spec(0), last=last)
    return x, TensorSpec((x.dims[0], x.dims[-1]), site.outs[0].dtype)


def _supports_whole(site: Site, *, last: bool) -> bool:
    from infera_kernels.triton.global_pool import supports_global_pool

    return site.spec(0).ndim in (3, 4, 5) and supports_global_pool(*_specs(site, last=last))


def _parts(site: Site, *, last: bool) -> tuple[int, ...] | None:
    from infera_kernels.triton.global_pool import parts_of

    return parts_of(_specs(site, last=last)[0], invariant=site.batch_invariant)


def _whole_bytes(site: Site, *, last: bool) -> int:
    return aligned(4 * math.prod(_parts(site, last=last) or (0,)))


def _bind_whole(kind: str, site: Site, io: Buffers, *, last: bool) -> list[Call]:
    from infera_kernels.triton.global_pool import global_pool

    parts, out = _parts(site, last=last), moved(io.outs[0], last=last)
    return global_pool(
        kind,
        moved(io.ins[0], last=last),
        out[(slice(None), *(0,) * (out.ndim - 2))],
        io.launcher,
        parts=None if parts is None else io.scratch(parts),
        p=int(site.attrs.get("p", 1)),
    )


def pooling(kind: str, first: Callable[[Site], Site] = same, *, last: bool = False) -> Kernels:
    """The kernels of a pool of a kind: "max", "average" or "lp"; `first` gives a site as it is with channels first."""

    def is_whole(site: Site) -> bool:
        """Whether there is one window, and it is the image."""
        found, size = window(first(site)), _specs(site, last=last)[0].dims[1:-1]
        one = found.kernel == found.extents == size and {*found.out} == {1} and not any(map(any, found.pads))
        return one and len(site.outs) == 1 and _supports_whole(site, last=last)

    def supports(site: Site) -> bool:
        from infera_kernels.triton.pool import supports_pool

        if site.spec(0).ndim not in (3, 4, 5):
            return False
        x, *outs = (moved_spec(s, last=last) for s in (site.spec(0), *site.outs))
        return supports_pool(kind, x, *outs)

    def workspace(site: Site) -> int:
        return _whole_bytes(site, last=last) if is_whole(site) else 0

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.conv import geometry
        from infera_kernels.triton.pool import pool

        if is_whole(site):
            return _bind_whole(kind, site, io, last=last)
        found = window(first(site))
        out, index = (*(moved(y, last=last) for y in io.outs), None)[:2]
        return pool(
            kind,
            moved(io.ins[0], last=last),
            out,
            io.launcher,
            geometry(found.kernel, found.strides, found.dilations, found.pads),
            index=index,
            column_major=bool(site.attrs.get("storage_order", 0)),
            pads_after=[after for _, after in found.pads],
            include_pad=bool(site.attrs.get("count_include_pad", 0)),
            p=int(site.attrs.get("p", 1)),
        )

    return kernels(bind, supports, inplace=(), strided=True, strided_out=True, workspace=workspace)


def global_pooling(kind: str, *, last: bool = False) -> Kernels:
    """The kernels of a pool of whole images; they may be shared by several programs."""
    return kernels(
        lambda site, io: _bind_whole(kind, site, io, last=last),
        lambda site: _supports_whole(site, last=last),
        inplace=(),
        strided=True,
        strided_out=True,
        workspace=lambda site: _whole_bytes(site, last=last),
    )


OPS: tuple[Op, ...] = ()

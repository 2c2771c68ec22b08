"""More operators on images whose channels are the last axis: see `channels_last`."""

from __future__ import annotations

from collections.abc import Sequence

from infera_gpu.op import Buffers, Call, Kernel, Op, Site
from infera_gpu.ops import _triton_norm, conv_transpose, norm
from infera_gpu.ops._families import reads_floats, split_of
from infera_gpu.ops._triton_conv import Convolution
from infera_gpu.ops.channels_last import ChannelsLast
from infera_kernels.cpu import nhwc_norm, nhwc_transpose

LRN = ChannelsLast(next(o for o in norm.OPS if o.name == "LRN"))
CONV_TRANSPOSE = ChannelsLast(conv_transpose.OPS[0])


def _bind_lrn(site: Site, io: Buffers) -> Sequence[Call]:
    return nhwc_norm.local_response(io.ins[0], io.outs[0], io.scratch, split_of(io), **norm.lrn_params(site))


def _bind_transpose(site: Site, io: Buffers) -> Sequence[Call]:
    x, w, b = (*io.ins, None)[:3]
    return nhwc_transpose.conv_transpose(
        x,
        w,
        b,
        io.outs[0],
        io.scratch,
        None if site.value(1) is None else lambda tag, build: io.pack(1, tag, build),
        group=int(site.attrs["group"]),
        **conv_transpose.transposed_window(CONV_TRANSPOSE.site(site)).params,
    )


OPS: tuple[Op, ...] = (
    LRN.op(
        LRN.first.cases,
        {"cpu": Kernel(_bind_lrn, reads_floats)} | _triton_norm.local_response(norm.lrn_params, axis=-1),
    ),
    CONV_TRANSPOSE.op(
        CONV_TRANSPOSE.first.cases,
        {"cpu": Kernel(_bind_transpose, reads_floats)}
        | Convolution(
            conv_transpose.transposed_window, first=CONV_TRANSPOSE.site, last=True, transposed=True
        ).kernels(),
    ),
)

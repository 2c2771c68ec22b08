"""com.microsoft: convolutions and pools that may have channels last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site
from infera_gpu.ops._ms import ms_op
from infera_gpu.ops._triton_pool import pooling
from infera_gpu.ops.pool import compute_max, pool_attrs, pool_spec
from infera_gpu.ops.quant_conv import KERNELS, conv, conv_case, conv_spec
from infera_gpu.ops.window import ATTRS, channels_first, channels_last
from infera_gpu.spec import Array, TensorSpec


def _wanted(site: Site) -> bool:
    return bool(site.attrs.get("channels_last", 1))


def _max(xp: Any, site: Site, x: Array) -> Array:
    made: Sequence[Array] = compute_max(xp, site, x)
    return made[0]


_CONV, _MAX = channels_last(conv_spec, conv, _wanted), channels_last(pool_spec, _max, _wanted)
_U8, _S8 = np.dtype(np.uint8), np.dtype(np.int8)
_LAST: dict[str, Any] = {"channels_last": 1}


def _bytes(dtype: Any, *shape: int) -> TensorSpec:
    return TensorSpec(shape, dtype)


OPS: tuple[Op, ...] = (
    ms_op(
        "QLinearConv",
        *_CONV,
        (
            conv_case("first", _U8, (1, 2, 5, 6), (3, 2, 3, 3), pads=(1, 1, 1, 1)),
            conv_case("last", _U8, (1, 5, 6, 2), (3, 2, 3, 3), pads=(1, 1, 1, 1), **_LAST),
            conv_case("strided", _S8, (2, 5, 6, 2), (3, 2, 3, 3), per_channel=True, strides=(2, 1), **_LAST),
            conv_case("depthwise", _S8, (1, 5, 5, 4), (4, 1, 3, 3), per_channel=True, group=4, **_LAST),
            conv_case("1d", _S8, (1, 9, 4), (3, 4, 3), pads=(2, 0), dilations=(2,), **_LAST),
        ),
        kernels=KERNELS,
        **ATTRS,
        group=1,
        channels_last=0,
    ),
    ms_op(
        "NhwcMaxPool",
        *_MAX,
        (
            Case("2d", (_bytes(_U8, 2, 7, 6, 3),), {"kernel_shape": (3, 2), "strides": (2, 1)}, low=0, high=255),
            Case("padded", (_bytes(_S8, 1, 5, 6, 2),), {"kernel_shape": (3, 3), "pads": (1,) * 4}, low=-128, high=-1),
            Case(
                "ceil",
                (_bytes(_U8, 1, 8, 9, 2),),
                {"kernel_shape": (3, 3), "strides": (2, 2), "ceil_mode": 1},
                high=255,
            ),
            Case("1d", (_bytes(_U8, 2, 9, 3),), {"kernel_shape": (2,), "dilations": (3,)}, low=0, high=255),
        ),
        kernels=pooling("max", channels_first, last=True),
        **pool_attrs(ceil_mode=0),
    ),
)

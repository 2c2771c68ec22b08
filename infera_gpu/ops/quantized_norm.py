"""QuantizedLayerNormalization: (x, scale, bias, the result's scale, its zero point) -> the normalised x, and quantised.

What passes make of a LayerNormalization that one reader quantises and another adds to. The quantised result is that of
the numbers before they are rounded to x's type, times the inverse of their scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site, f32
from infera_gpu.ops import _triton_norm
from infera_gpu.ops._families import FLOAT32, plain, points, scales
from infera_gpu.ops.norm import layer_spec
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import norm as portable
from infera_kernels.portable import quant

SCALE, ZERO = 3, 4


def _infer(site: Site) -> tuple[TensorSpec, TensorSpec]:
    for i in (SCALE, ZERO):
        if site.spec(i).size != 1:
            raise site.fail(f"input {i} is {site.spec(i)}, expected one value")
    x = layer_spec(site)
    return x, TensorSpec(x.dims, site.spec(ZERO).dtype)


def _compute(
    xp: Any, site: Site, x: Array, weight: Array, bias: Array | None, scale: Array, zero: Array
) -> tuple[Array, Array]:
    axes = tuple(range(site.axis(), x.ndim))
    y, _, _ = portable.standardized(xp, x, axes, site.attrs["epsilon"], center=True)
    wide = portable.affine(y, weight, bias, FLOAT32)
    return wide.astype(x.dtype), quant.requantize(xp, wide, xp.float32(1) / scale.reshape(()), zero.reshape(()))


_S8, _U8 = np.int8, np.uint8

OPS: tuple[Op, ...] = (
    Op(
        "QuantizedLayerNormalization",
        1,
        _infer,
        plain(_compute),
        (
            Case("rows", (f32(3, 5, 33), f32(33), f32(33), scales(0.07), points(3, dtype=_S8)), n_outs=2),
            Case("no_bias", (f32(4, 16), f32(16), None, scales(0.05), points(128, dtype=_U8)), n_outs=2),
            Case(
                "half",
                (
                    *(TensorSpec(s, np.dtype(np.float16)) for s in ((3, 24), (24,), (24,))),
                    scales(0.1),
                    points(0, dtype=_S8),
                ),
                n_outs=2,
                tol=1e-3,
            ),
            Case("long", (f32(2, 9000), f32(9000), f32(9000), scales(0.5), points(-9, dtype=_S8)), n_outs=2),
        ),
        {"axis": -1, "epsilon": 1e-5},
        "infera",
        _triton_norm.QUANTIZED,
    ),
)

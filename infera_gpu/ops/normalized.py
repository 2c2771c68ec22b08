"""Products of normalised rows, which graph passes make of what decoders begin each of their halves with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.op import Case, Cases, Op, Site, f32
from infera_gpu.ops._families import plain, uniform
from infera_gpu.ops._later import Kinds
from infera_gpu.ops.matmul import matmul_spec
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import norm as portable
from infera_kernels.portable.matmul import transposed


def check_scale(site: Site, i: int) -> None:
    """Raises PlanError where input i is not one number for each element of a row of input 0."""
    x, scale = site.spec(0), site.spec(i)
    if scale.dims != x.dims[-1:] or scale.dtype != x.dtype:
        raise site.fail(f"input {i}, the scale, is {scale}, expected {TensorSpec(x.dims[-1:], x.dtype)}")


def normalized(xp: Any, x: Array, scale: Array | None, epsilon: float) -> Array:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, not rounded: in float32, or what is wider; x itself
    without a scale. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019."""
    wide = xp.promote_types(x.dtype, np.float32)
    if scale is None:
        return xp.asarray(x, wide)
    made, _, _ = portable.standardized(xp, x, (-1,), epsilon, center=False)
    return portable.affine(made, scale, None, wide)


def _spec(site: Site) -> Sequence[TensorSpec]:
    if site.spec(1).ndim != 2:
        raise site.fail(f"expected a matrix, got {site.spec(1)}")
    check_scale(site, 2)
    (made,) = matmul_spec(site)
    if site.has(3) and site.spec(3) != TensorSpec(made.dims[-1:], made.dtype):
        raise site.fail(f"the bias is {site.spec(3)}, expected {TensorSpec(made.dims[-1:], made.dtype)}")
    return (made,)


def _product(xp: Any, site: Site, x: Array, weight: Array, scale: Array, bias: Array | None = None) -> Array:
    """Two-byte floats are rounded once, at the end."""
    rows = normalized(xp, x, scale, site.attrs["epsilon"])
    made = xp.matmul(rows, transposed(xp.asarray(weight, rows.dtype), site.attrs["transB"]))
    return (made if bias is None else made + bias).astype(x.dtype)


_WEIGHT, _SCALE = uniform(0, -1, 1, 4, 3), uniform(1, 0.5, 2, 4)

# Y = N(X) @ W' + bias, where N(x) = x / sqrt(mean(x^2) + epsilon) * scale over the last axis; W' is W, a matrix, or
# with transB = 1 its transpose. Scale and bias have one axis. The product follows MatMul's rules.
_NORMALIZED = Op(
    "NormalizedMatMul",
    1,
    domain="infera",
    infer=_spec,
    compute=plain(_product),
    kernels=Kinds({}, "_triton_normalized", lambda gpu: gpu.NORMALIZED),
    attrs={"epsilon": 1e-5, "transB": 0},
    cases=Cases(
        lambda: (
            Case("matrices", (f32(3, 4), _WEIGHT, _SCALE)),
            Case("biased", (f32(3, 4), _WEIGHT, _SCALE, f32(3)), {"epsilon": 0.25}),
            Case("rows", (f32(2, 5, 300), f32(300, 70), f32(300))),
            Case("one_row", (f32(1, 1, 300), f32(300, 257), f32(300), f32(257))),
            Case("transposed", (f32(17, 40), f32(33, 40), f32(40)), {"transB": 1}),
            Case("transposed_row", (f32(1, 70), f32(33, 70), f32(70), f32(33)), {"transB": 1, "epsilon": 2.0}),
            Case("one_column", (f32(1, 70), f32(70, 1), f32(70))),
            Case("vector", (f32(4), _WEIGHT, _SCALE, f32(3))),
            Case("nothing_but_epsilon", (np.zeros((1, 4), np.float32), _WEIGHT, _SCALE, f32(3))),
            Case("empty", (f32(0, 4), _WEIGHT, _SCALE)),
            Case("no_columns", (f32(2, 4), f32(4, 0), _SCALE)),
        )
    ),
)

OPS: tuple[Op, ...] = (_NORMALIZED,)

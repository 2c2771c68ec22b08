"""Matrix products written once for NumPy and CuPy."""

from __future__ import annotations

from typing import Any

from infera_kernels.calls import Array
from infera_kernels.portable.activation import activation


def matmul(xp: Any, a: Array, b: Array) -> Array:
    """a @ b in a's dtype; two-byte floats are summed in float32."""
    if a.dtype.itemsize == 2 and a.dtype.kind not in "iu":
        return xp.matmul(a.astype(xp.float32), b.astype(xp.float32)).astype(a.dtype)
    return xp.matmul(a, b)


def gemm(xp: Any, a: Array, b: Array, c: Array | None, *, alpha: float, beta: float) -> Array:
    """alpha a @ b + beta c in a's dtype; integers are scaled in float64 unless the factor is 1."""
    y = _scaled(xp, matmul(xp, a, b), alpha)
    return y if c is None else (y + _scaled(xp, c, beta)).astype(a.dtype)


def _scaled(xp: Any, x: Array, factor: float) -> Array:
    if factor == 1:
        return x
    return (x * factor).astype(x.dtype)


def fused_matmul(
    xp: Any, a: Array, b: Array, bias: Array | None, residual: Array | None, *, alpha: float, act: str
) -> Array:
    """act(alpha a @ b + bias) + residual; `act` is "" or a name of `portable.activation.FUNCTIONS`."""
    y = gemm(xp, a, b, bias, alpha=alpha, beta=1.0)
    y = activation(xp, act, y) if act else y
    return y if residual is None else y + residual


def transposed(x: Array, flag: Any) -> Array:
    """`x` with its last two axes swapped if `flag` holds; vectors stay."""
    return x.swapaxes(-1, -2) if flag and x.ndim > 1 else x

"""Which matrix products cuBLASLt may compute: where rows or columns lie in one piece, and what follows it has too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infera_kernels.launch.cublaslt import ACTIVATIONS, Matrix, Product, lying
from infera_kernels.triton.layout import INT32_MAX, name_of
from infera_kernels.tuning import Tuned


def library_bytes(tuned: Tuned | None, rows: int, depth: int, activation: str | None = None) -> int:
    """The scratch of a product of so many rows and sums so deep, where the library may compute it; else 0."""
    if tuned is None or not _has(rows, depth, activation):
        return 0
    return tuned.target.library_bytes


def _has(rows: int, depth: int, activation: str | None) -> bool:
    return rows > 1 and depth > 0 and activation in ACTIVATIONS


def product_of(
    args: Mapping[str, Any],
    strides: Sequence[tuple[int, ...]],
    walked: Sequence[tuple[int, ...]],
    *,
    activation: str | None,
    tf32: bool,
) -> Product | None:
    """The product as a library takes it, of the matrices' own strides and those over the batch, of a, b, out and the
    residual; None for what it does not take."""
    m, n, k, batch = args["M"], args["N"], args["K"], args["batch"] or ()
    if not _has(m, k, activation) or len(batch) > 1 or max(m, n, *batch) > INT32_MAX:
        return None
    made: dict[str, Matrix] = {}
    shapes = {"a": (m, k), "b": (k, n), "out": (m, n), "residual": (m, n)}
    for (name, shape), own, over in zip(shapes.items(), strides, walked, strict=True):
        if args[name] is None:
            continue
        found = lying(*shape, (own[0], own[1]))
        if found is None or (found[1] and name in ("out", "residual")) or over[0] < 0:
            return None
        made[name] = Matrix(args[name], *found, over[0] if batch else 0)
    return Product(
        (m, n, k),
        batch[0] if batch else 1,
        name_of(args["a"]),
        **made,
        bias=args["bias"],
        alpha=1.0 if args["alpha"] is None else args["alpha"],
        beta=1.0 if args["beta"] is None else args["beta"],
        activation=activation,
        tf32=tf32 and name_of(args["a"]) == "float32",
    )

"""The "triton" kernel of matrix products: MatMul, Gemm and FusedMatMul. Declares no operators itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import kernels
from infera_gpu.ops.matmul import swapped
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable.matmul import transposed


def matrices(site: Site) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The shapes of both factors, transposed as the attributes say, and of the output: vectors as matrices."""
    a = swapped(site.spec(0).dims, site.attrs.get("transA"))
    b = swapped(site.spec(1).dims, site.attrs.get("transB"))
    left, right = (1, *a) if len(a) == 1 else a, (*b, 1) if len(b) == 1 else b
    out = site.outs[0].dims
    batch = out[: len(out) - (len(a) > 1) - (len(b) > 1)]
    return left, right, (*batch, left[-2], right[-1])


def _terms(site: Site) -> tuple[TensorSpec | None, TensorSpec | None]:
    """What is added before the activation (input 2) and after it (input 3)."""
    before, after = (site.spec(i) if site.has(i) else None for i in (2, 3))
    return before, after


def parts_of_sums(site: Site) -> int:
    """Into how many parts the sums are cut."""
    from infera_kernels.triton.parts import parts_of

    given = (TensorSpec(shape, site.outs[0].dtype) for shape in matrices(site))
    library = _library_bytes(site) > 0
    return parts_of(*given, invariant=site.batch_invariant, library=library, tf32=site.tf32, tuned=site.tuned)


def _library_bytes(site: Site) -> int:
    """The scratch of a library that may compute the product, whose sums are not cut."""
    from infera_kernels.triton.blas import library_bytes

    _, b, out = matrices(site)
    rows = math.prod(out[:-1]) if math.prod(b[:-2]) == 1 else out[-2]
    return library_bytes(site.tuned, rows, b[-2], site.attrs.get("activation") or None) if math.prod(out) else 0


def product_workspace(site: Site) -> int:
    parts = parts_of_sums(site)
    return aligned(parts * site.outs[0].size * 4 if parts > 1 else _library_bytes(site))


def _supports_product(site: Site) -> bool:
    from infera_kernels.triton.matmul import supports_matmul

    dtypes = site.spec(0).dtype, site.spec(1).dtype, site.outs[0].dtype
    a, b, out = (TensorSpec(s, d) for s, d in zip(matrices(site), dtypes, strict=True))
    terms = _terms(site)
    lifted = out.shape != site.outs[0].shape
    if lifted and any(terms):
        return False
    activation = site.attrs.get("activation") or None
    return all(supports_matmul(a, b, out, residual=term, activation=activation) for term in terms)


def _bind_product(site: Site, io: Buffers) -> list[Call]:
    """One launch; a second adds what follows an activation, or is one term too many for the first."""
    from infera_kernels.triton import elementwise

    a, out = transposed(io.ins[0], site.attrs.get("transA")), io.outs[0]
    activation, beta = site.attrs.get("activation") or None, float(site.attrs.get("beta", 1.0))
    before, after = (*io.ins[2:], None, None)[:2]
    # In a batch of one a term for every row looks like a row for all of them; those are known.
    rows = before is not None and not (site.batch_invariant and site.value(2) is None)
    row = before if rows and beta == 1.0 and is_row(before, matrices(site)[2][-1]) else None
    residual = before if row is None else None
    if residual is None and activation is None:
        residual, after = after, None
    calls = multiplied(
        site,
        io,
        a,
        bias=None if row is None else row.reshape(-1),
        residual=residual,
        alpha=float(site.attrs.get("alpha", 1.0)),
        beta=beta,
        activation=activation,
    )
    return calls if after is None else [*calls, *elementwise.binary("add", out, after, out, io.launcher)]


def multiplied(site: Site, io: Buffers, a: Array, **terms: Any) -> list[Call]:
    """The product of `a`, in the place of input 0, and input 1, with the terms that `matmul` knows."""
    from infera_kernels.triton.matmul import matmul
    from infera_kernels.triton.tiles import IEEE, TF32

    given, out = (a, right_factor(site, io), io.outs[0]), io.outs[0]
    left, right, made = (x.reshape(shape) for x, shape in zip(given, matrices(site), strict=True))
    parts = parts_of_sums(site)
    room = 0 if parts > 1 else _library_bytes(site)
    return matmul(
        left,
        right,
        made,
        io.launcher,
        precision=TF32 if io.tf32 else IEEE,
        partial=io.scratch((parts, out.size), np.float32) if parts > 1 else None,
        workspace=io.scratch((room,), np.uint8) if room else None,
        invariant=site.batch_invariant,
        tuned=site.tuned,
        **terms,
    )


def right_factor(site: Site, io: Buffers, i: int = 1) -> Array:
    """Input i as it is multiplied. Tensor cores read float32 with its sums contiguous: a constant matrix is laid out so
    once, for one row too, so that all plans share it."""
    flip, spec = site.attrs.get("transB"), site.spec(i)
    if io.tf32 and not flip and site.value(i) is not None and spec.ndim == 2 and spec.dtype == np.float32:
        return io.pack(i, "columns", lambda w: np.ascontiguousarray(w.transpose())).transpose()
    return transposed(io.ins[i], flip)


def is_row(term: Array, columns: int) -> bool:
    """Whether it is one contiguous row of so many elements, added everywhere."""
    itemsize = term.dtype.itemsize
    return bool(term.size == columns and term.shape[-1:] == (columns,) and term.strides[-1] == itemsize)


PRODUCT = kernels(_bind_product, _supports_product, inplace=(), strided=True, workspace=product_workspace)
"""MatMul, Gemm and FusedMatMul: act(alpha A' @ B' + beta input 2) + input 3, each part where there is such an input."""

OPS: tuple[Op, ...] = ()

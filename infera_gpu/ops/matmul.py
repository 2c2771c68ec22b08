"""Matrix products: MatMul, Gemm, the fused form that graph passes make, Det."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.graph import Node, made_name
from infera_gpu.op import Buffers, Call, Case, Cases, Expansion, Kernel, Op, Site, f32
from infera_gpu.ops import _jit
from infera_gpu.ops._families import floating, native, plain, split_of
from infera_gpu.ops._later import Kinds
from infera_gpu.spec import Array, TensorSpec, broadcast_shape
from infera_kernels.cpu import matmul as cpu
from infera_kernels.cpu import packed
from infera_kernels.portable import matmul as portable

_PACK_ROWS = 256
"""Up to so many rows, BLAS gains from a constant transposed weight laid out anew."""


def product_dims(site: Site, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a @ b by NumPy's rules. Raises PlanError where they do not fit."""
    if not a or not b:
        raise site.fail(f"cannot multiply {list(a)} by {list(b)}: a matrix product needs at least one dimension")
    left, right = (1, *a) if len(a) == 1 else a, (*b, 1) if len(b) == 1 else b
    try:
        batch = broadcast_shape(left[:-2], right[:-2])
    except ValueError:
        batch = None
    if batch is None or left[-1] != right[-2]:
        raise site.fail(f"cannot multiply {list(a)} by {list(b)}")
    return (*batch, *(left[-2:-1] if len(a) > 1 else ()), *(right[-1:] if len(b) > 1 else ()))


def swapped(dims: tuple[int, ...], flag: Any) -> tuple[int, ...]:
    """The shape with its last two axes swapped if `flag` holds; vectors stay."""
    return (*dims[:-2], dims[-1], dims[-2]) if flag and len(dims) > 1 else dims


def matmul_spec(site: Site) -> tuple[TensorSpec]:
    """The product of inputs 0 and 1, transposed as `transA` and `transB` say."""
    a = swapped(site.spec(0).dims, site.attrs.get("transA"))
    b = swapped(site.spec(1).dims, site.attrs.get("transB"))
    return (TensorSpec(product_dims(site, a, b), site.spec(0).dtype),)


def _operands(site: Site, io: Buffers) -> tuple[Array, Array]:
    """Both matrices with their transpositions applied as views, a constant weight packed where that pays."""
    a = portable.transposed(io.ins[0], site.attrs.get("transA"))
    if not site.attrs.get("transB") or io.ins[1].ndim < 2:
        return a, io.ins[1]
    rows = a.size // max(a.shape[-1], 1)
    large = rows <= cpu.FEW_ROWS and io.ins[1].nbytes > cpu.CACHED  # read in any layout as fast as memory gives it
    if site.value(1) is not None and rows <= _PACK_ROWS and not large:
        return a, io.pack(1, "transposed", lambda w: np.ascontiguousarray(w.swapaxes(-1, -2)))
    return a, io.ins[1].swapaxes(-1, -2)


def given(io: Buffers, i: int) -> Array | None:
    """Input i, None where it is left out at the end."""
    return io.ins[i] if i < len(io.ins) else None


def _multiply(site: Site, io: Buffers, **terms: Any) -> list[Call]:
    """`cpu.fused` of the inputs; beside up to `packed.MOST_ROWS` rows a constant matrix is laid out for BLAS, where it
    is known how. Not what is multiplied by 0: BLAS' loops look at nothing then, and NaN and infinity become 0."""
    out, flip = io.outs[0], bool(site.attrs.get("transB"))
    constant = site.value(1) is not None and site.spec(1).ndim == 2
    if constant and site.spec(0).ndim > 1 and not io.strict and terms.get("alpha") != 0:
        a = portable.transposed(io.ins[0], site.attrs.get("transA"))
        loops = packed.loops_for(out, a.shape[-1])
        if loops is not None:
            weights = io.pack(1, f"inner{flip:d}", lambda w: packed.pack(w.T if flip else w, loops))
            return packed.fused(a, weights, out, io.scratch, split_of(io), loops=loops, **terms)
    return cpu.fused(*_operands(site, io), out, io.scratch, split_of(io), **terms)


def _bind_matmul(site: Site, io: Buffers) -> list[Call]:
    return _multiply(site, io)


def bind_gemm(site: Site, io: Buffers) -> list[Call]:
    alpha, beta, c = site.attrs["alpha"], site.attrs["beta"], given(io, 2)
    if c is None or beta == 1:
        return _multiply(site, io, alpha=alpha, bias=c)
    scaled, calls = cpu.scaled(c, beta, io.scratch)
    return [*calls, *_multiply(site, io, alpha=alpha, bias=scaled)]


def gemm(xp: Any, site: Site, a: Array, b: Array, c: Array | None = None) -> Array:
    a, b = portable.transposed(a, site.attrs["transA"]), portable.transposed(b, site.attrs["transB"])
    return portable.gemm(xp, a, b, c, alpha=site.attrs["alpha"], beta=site.attrs["beta"])


def blas(site: Site) -> bool:
    """Whether every operand is float32 or float64."""
    return floating(site) and site.spec(0).dtype.itemsize >= 4


def _numeric(site: Site) -> bool:
    return native(site) and site.spec(0).dtype != np.float16


def check_matrices(site: Site) -> None:
    """Raises PlanError where inputs 0 and 1 are not matrices."""
    if site.spec(0).ndim != 2 or site.spec(1).ndim != 2:
        raise site.fail(f"expected two matrices, got {site.spec(0)} and {site.spec(1)}")


def gemm_spec(site: Site) -> tuple[TensorSpec]:
    check_matrices(site)
    (spec,) = matmul_spec(site)
    if site.has(2):
        check_term(site, "C", site.spec(2), spec)
    return (spec,)


_W = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
_LARGE = np.linspace(-1, 1, 301 * 700, dtype=np.float32).reshape(301, 700)
"""Beside five rows a product that BLAS lays operands out for."""
_MATMUL = Op(
    "MatMul",
    1,
    infer=matmul_spec,
    compute=plain(lambda xp, site, a, b: portable.matmul(xp, a, b)),
    kernels=Kinds(
        {"cpu": Kernel(bind=_bind_matmul, supports=_numeric, strided=True, strided_out=True)}
        | _jit.product(_multiply, lambda site: "", _numeric),
        "_triton_matmul",
        lambda gpu: gpu.PRODUCT,
    ),
    cases=Cases(
        lambda: (
            Case("matrices", (f32(5, 3), f32(3, 7))),
            Case("rows", (f32(2, 3, 4), _W)),
            Case("two_rows", (f32(2, 1, 40), f32(40, 33))),
            Case("few_rows", (f32(3, 11, 40), f32(40, 128))),
            Case("few_rows_deep", (f32(61, 300), f32(300, 192))),
            Case("one_deep_row", (f32(1, 1100), f32(1100, 21))),
            Case("large_constant", (f32(1, 5, 301), _LARGE)),
            Case("batch", (f32(2, 3, 5, 4), f32(2, 3, 4, 6))),
            Case("broadcast", (f32(2, 1, 5, 4), f32(3, 4, 6))),
            Case("vector", (f32(4), _W)),
            Case("matrix_vector", (f32(3, 5, 4), f32(4))),
            Case("vectors", (f32(7), f32(7))),
            Case("no_terms", (f32(2, 0), f32(0, 3))),
            Case("empty", (f32(0, 5), f32(5, 3))),
            Case(
                "int32",
                (np.arange(6, dtype=np.int32).reshape(2, 3), np.arange(6, dtype=np.int32).reshape(3, 2)),
                opset=9,
            ),
        )
    ),
)
_GEMM = Op(
    "Gemm",
    7,
    infer=gemm_spec,
    compute=plain(gemm),
    kernels=Kinds(
        {"cpu": Kernel(bind=bind_gemm, supports=blas, strided=True, strided_out=True)}
        | _jit.product(_multiply, lambda site: "", blas),
        "_triton_matmul",
        lambda gpu: gpu.PRODUCT,
    ),
    attrs={"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
    cases=Cases(
        lambda: (
            Case("bias", (f32(5, 4), _W, f32(3))),
            Case("none", (f32(5, 4), _W), opset=11),
            Case("constant_weight", (f32(2, 3), _W, f32(4)), {"transB": 1}),
            Case("one_row", (f32(1, 3), _W, f32(4)), {"transB": 1}),
            Case("many_rows", (f32(301, 3), _W, f32(4)), {"transB": 1}),
            Case("both", (f32(4, 5), f32(6, 4), f32(5, 1)), {"transA": 1, "transB": 1}),
            Case("scaled", (f32(5, 4), _W, f32(5, 3)), {"alpha": 0.5, "beta": -2.0}),
            Case(
                "large_scaled", (f32(700, 6), _LARGE, f32(6, 1)), {"alpha": 0.5, "beta": -2.0, "transA": 1, "transB": 1}
            ),
            Case("scalar_bias", (f32(5, 4), _W, f32()), {"alpha": 2.0}),
            Case("scalar_bias_alone", (f32(5, 4), f32(4, 1), f32())),
            Case("past_block", (f32(130, 5), f32(5, 601), f32(1, 601)), {"beta": 0.25}),
        )
    ),
)


ACTIVATIONS = {
    "": "",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "silu": "swish",
}
"""What may follow a product, "" for nothing -> its name in `portable.activation`."""


def check_activation(site: Site) -> None:
    """Raises PlanError where the activation is none of them."""
    if site.attrs["activation"] not in ACTIVATIONS:
        known = ", ".join(repr(a) for a in ACTIVATIONS)
        raise site.fail(f"activation is '{site.attrs['activation']}', expected one of {known}")


def _fused_spec(site: Site) -> tuple[TensorSpec]:
    check_activation(site)
    if site.attrs["matrices"]:
        check_matrices(site)
    (spec,) = matmul_spec(site)
    for i, what in ((2, "bias"), (3, "residual")):
        if site.has(i):
            check_term(site, what, site.spec(i), spec)
    return (spec,)


def _split(site: Site) -> Expansion | None:
    """The product and the addition apart, where the residual is wider than the product."""
    (spec,) = matmul_spec(site)
    if not site.has(3) or _fits(site.spec(3), spec):
        return None
    node, product = site.node, made_name(site.node.outputs[0], "product")
    return Expansion(
        (
            replace(node, inputs=node.inputs[:3], outputs=(product,)),
            Node("Add", (product, node.inputs[3]), node.outputs, name=f"{node.name}/residual"),
        )
    )


def _fits(term: TensorSpec, spec: TensorSpec) -> bool:
    """Whether a term broadcasts to the product without widening it."""
    try:
        return broadcast_shape(term.dims, spec.dims) == spec.dims
    except ValueError:
        return False


def check_term(site: Site, what: str, term: TensorSpec, spec: TensorSpec) -> None:
    """Raises PlanError where a term has another type than the product, or does not broadcast to it."""
    if term.dtype != spec.dtype:
        raise site.fail(f"{what} {term} and the product {spec} differ in type; expected one type, Cast the others")
    if not _fits(term, spec):
        raise site.fail(f"{what} {term} does not broadcast to {spec}")


def bind_fused(site: Site, io: Buffers) -> list[Call]:
    return _multiply(
        site,
        io,
        alpha=site.attrs["alpha"],
        bias=given(io, 2),
        activation=ACTIVATIONS[site.attrs.get("activation", "")],
        residual=given(io, 3),
    )


def _fused(xp: Any, site: Site, a: Array, b: Array, bias: Array | None = None, residual: Array | None = None) -> Array:
    a, b = portable.transposed(a, site.attrs["transA"]), portable.transposed(b, site.attrs["transB"])
    act = ACTIVATIONS[site.attrs["activation"]]
    return portable.fused_matmul(xp, a, b, bias, residual, alpha=site.attrs["alpha"], act=act)


def fused_supported(site: Site) -> bool:
    exact = site.spec(0).dtype == np.float32 or site.attrs.get("activation") != "gelu"
    return blas(site) and exact


# Y = act(alpha A' @ B' + bias) + residual. A' is A, or with transA = 1 A with its last two axes swapped; so is B'.
# The product follows MatMul's rules; bias and residual broadcast to it and may be left out. `activation` is "" (none),
# relu, gelu (erf), gelu_tanh, tanh, sigmoid or silu. With matrices = 1 A and B must be, as Gemm's are.
_FUSED = Op(
    "FusedMatMul",
    1,
    domain="infera",
    infer=_fused_spec,
    expand=_split,
    compute=plain(_fused),
    kernels=Kinds(
        {"cpu": Kernel(bind=bind_fused, supports=fused_supported, strided=True)}
        | _jit.product(_multiply, lambda site: ACTIVATIONS[site.attrs["activation"]], fused_supported),
        "_triton_matmul",
        lambda gpu: gpu.PRODUCT,
    ),
    attrs={"transA": 0, "transB": 0, "alpha": 1.0, "activation": "", "matrices": 0},
    cases=Cases(
        lambda: (
            Case("plain", (f32(5, 4), _W)),
            Case("bias", (f32(2, 5, 4), _W, f32(3))),
            Case("residual", (f32(2, 5, 4), _W, None, f32(2, 5, 3))),
            Case("row_residual", (f32(2, 5, 4), _W, f32(3), f32(5, 1))),
            *(Case(act, (f32(3, 4), _W, f32(3), f32(3, 3)), {"activation": act}) for act in ACTIVATIONS if act),
            Case("heads", (f32(2, 3, 5, 4), f32(2, 3, 6, 4), f32(2, 1, 1, 6)), {"transB": 1, "alpha": 0.125}),
            Case("left", (f32(2, 4, 5), f32(4, 6)), {"transA": 1}),
            Case("large_residual", (f32(2, 3, 301), _LARGE, f32(700), f32(3, 1))),
            Case("large", (f32(2, 3, 301), _LARGE, f32(700), f32(2, 3, 700)), {"activation": "gelu"}),
            Case("past_block", (f32(2, 33, 5), f32(5, 1101), f32(1101), f32(33, 1101)), {"activation": "gelu"}),
            Case("vector", (f32(4), _W, f32(3)), {"activation": "relu"}),
            Case("deep", (f32(3, 1, 1100), f32(1100, 21), f32(21), f32(3, 1, 21)), {"activation": "silu"}),
            Case("empty", (f32(0, 4), _W, f32(3)), {"activation": "relu"}),
        )
    ),
)


_DET = Op(
    "Det",
    11,
    infer=lambda site: (TensorSpec(site.spec(0).shape[:-2], site.spec(0).dtype),),
    compute=plain(lambda xp, site, x: xp.linalg.det(x.astype(xp.promote_types(x.dtype, xp.float32))).astype(x.dtype)),
    cases=Cases(
        lambda: (
            Case("matrix", (f32(3, 3),)),
            Case("batch", (f32(2, 3, 4, 4),)),
            Case("one", (f32(2, 1, 1),)),
            Case("half", (TensorSpec((3, 3), np.dtype(np.float16)),), tol=1e-3),
        )
    ),
)

OPS: tuple[Op, ...] = (_MATMUL, _GEMM, _FUSED, _DET)

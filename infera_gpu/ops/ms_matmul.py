"""com.microsoft: matrix products with what is done to them before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from infera_gpu.op import Buffers, Call, Case, Kernel, Op, Site, f32
from infera_gpu.ops._ms import ms_op
from infera_gpu.ops._triton_matmul import PRODUCT
from infera_gpu.ops.matmul import (
    bind_fused,
    bind_gemm,
    blas,
    fused_supported,
    gemm,
    gemm_spec,
    product_dims,
    swapped,
)
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.activation import activation as cpu_activation
from infera_kernels.portable.activation import activation
from infera_kernels.portable.matmul import fused_matmul, transposed

# ---- FusedMatMul, TransposeMatMul

_SIDES = ("A", "B")


def _moved(site: Site, side: str) -> bool:
    """Whether that operand's rows are its first axis: (rows, batch..., columns)."""
    return bool(site.attrs.get(f"transBatch{side}", 0))


def _infer(site: Site) -> tuple[TensorSpec]:
    dims = []
    for i, side in enumerate(_SIDES):
        given = site.spec(i).dims
        if _moved(site, side):
            if len(given) < 3 or site.spec(0).ndim != site.spec(1).ndim:
                raise site.fail(f"transBatch{side} is set for {site.spec(0)} and {site.spec(1)}, expected as many axes")
            given = (*given[1:-1], given[0], given[-1])
        dims.append(swapped(given, site.attrs[f"trans{side}"]))
    return (TensorSpec(product_dims(site, *dims), site.spec(0).dtype),)


def _product(xp: Any, site: Site, *ins: Array) -> Array:
    a, b = (
        transposed(xp.moveaxis(x, 0, -2) if _moved(site, side) else x, site.attrs[f"trans{side}"])
        for x, side in zip(ins, _SIDES, strict=True)
    )
    return fused_matmul(xp, a, b, None, None, alpha=site.attrs["alpha"], act="")


def _in_place(kernel: Kernel) -> Kernel:
    """The kernel where no operand has its rows first."""
    supports = kernel.supports
    return replace(kernel, supports=lambda site: not any(_moved(site, side) for side in _SIDES) and supports(site))


_PRODUCT = {
    kind: _in_place(kernel)
    for kind, kernel in {"cpu": Kernel(bind_fused, fused_supported, strided=True), **PRODUCT}.items()
}
_SWAPPED = Case("transposed", (f32(2, 4, 3), f32(2, 5, 4)), {"transA": 1, "transB": 1})
_PLAIN_CASES = (
    Case("scaled", (f32(2, 3, 4), f32(4, 5)), {"alpha": 0.5}),
    _SWAPPED,
    Case("past_block", (f32(70, 130), f32(90, 130)), {"transB": 1, "alpha": 0.125}),
)
_PLAIN_ATTRS: dict[str, Any] = {"alpha": 1.0, "transA": 0, "transB": 0}


# ---- FusedGemm

_ACTIVATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Celu": ("celu", "alpha"),
        "Elu": ("elu", "alpha"),
        "HardSigmoid": ("hard_sigmoid", "alpha", "beta"),
        "LeakyRelu": ("leaky_relu", "alpha"),
        "Relu": ("relu",),
        "Selu": ("selu", "alpha", "gamma"),
        "Sigmoid": ("sigmoid",),
        "Softplus": ("softplus",),
        "Softsign": ("softsign",),
        "Tanh": ("tanh",),
        "ThresholdedRelu": ("thresholded_relu", "alpha"),
    }
)
"""How FusedGemm calls an activation -> how the kernels do, and the parameters that it takes."""


def _activation(site: Site) -> tuple[str, dict[str, float]]:
    """The activation's name and its parameters. Raises PlanError for an unknown one or a missing parameter."""
    given = site.attrs["activation"]
    if given not in _ACTIVATIONS:
        raise site.fail(f"activation is '{given}', expected one of {', '.join(_ACTIVATIONS)}")
    name, *wanted = _ACTIVATIONS[given]
    found = {key: site.attrs[f"activation_{key}"] for key in wanted}
    missing = [key for key, value in found.items() if value is None]
    if missing:
        raise site.fail(f"activation '{given}' needs the attribute 'activation_{missing[0]}'")
    return name, {key: float(value) for key, value in found.items()}


def _infer_gemm(site: Site) -> tuple[TensorSpec]:
    _activation(site)
    return gemm_spec(site)


def _gemm(xp: Any, site: Site, a: Array, b: Array, c: Array | None = None) -> Array:
    name, parameters = _activation(site)
    return activation(xp, name, gemm(xp, site, a, b, c), **parameters)


def _bind_gemm(site: Site, io: Buffers) -> list[Call]:
    (name, parameters), out = _activation(site), io.outs[0]
    return [*bind_gemm(site, io), *cpu_activation(name, out, out, io.scratch, **parameters)]


def _own(site: Site) -> Site:
    """The site with its activation as the Triton product calls it."""
    return replace(site, attrs={**site.attrs, "activation": _activation(site)[0]})


def _one_launch(kernel: Kernel) -> Kernel:
    """The kernel of a product and its activation, where that has no parameters."""
    bind, supports = kernel.bind, kernel.supports
    return replace(
        kernel,
        bind=lambda site, io: bind(_own(site), io),
        supports=lambda site: not _activation(site)[1] and supports(_own(site)),
    )


_PARAMETERS = {"alpha": 0.3, "beta": 0.4, "gamma": 1.2}
OPS: tuple[Op, ...] = (
    ms_op(
        "FusedMatMul",
        _infer,
        _product,
        (
            *_PLAIN_CASES,
            Case("rows_first", (f32(3, 2, 4), f32(2, 4, 5)), {"transBatchA": 1, "alpha": 0.5}),
            Case(
                "both_rows_first",
                (f32(4, 2, 6, 3), f32(5, 2, 6, 4)),
                {"transBatchA": 1, "transA": 1, "transBatchB": 1, "transB": 1},
            ),
            Case("vector", (f32(4), f32(4, 5)), {"transA": 1}),
        ),
        kernels=_PRODUCT,
        **_PLAIN_ATTRS,
        transBatchA=0,
        transBatchB=0,
        needs=(0, 1),
    ),
    ms_op("TransposeMatMul", _infer, _product, _PLAIN_CASES, kernels=_PRODUCT, **_PLAIN_ATTRS, needs=(0, 1)),
    ms_op(
        "FusedGemm",
        _infer_gemm,
        _gemm,
        (
            *(
                Case(
                    given,
                    (f32(5, 4), f32(4, 3), f32(3)),
                    {"activation": given, **{f"activation_{key}": _PARAMETERS[key] for key in wanted}},
                )
                for given, (_, *wanted) in _ACTIVATIONS.items()
            ),
            Case(
                "scaled",
                (f32(4, 130), f32(90, 4), f32(130, 1)),
                {"activation": "Relu", "alpha": 0.5, "beta": -2.0, "transA": 1, "transB": 1},
            ),
            Case("no_bias", (f32(5, 4), f32(4, 3)), {"activation": "Tanh"}),
        ),
        kernels={"cpu": Kernel(_bind_gemm, blas, strided=True)}
        | {kind: _one_launch(kernel) for kind, kernel in PRODUCT.items()},
        **_PLAIN_ATTRS,
        beta=1.0,
        activation="",
        activation_alpha=None,
        activation_beta=None,
        activation_gamma=None,
        needs=(0, 1),
    ),
)

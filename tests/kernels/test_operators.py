"""Operators' Triton kernels compiled for every architecture: parameters against the PTX, and no spills."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from infera_gpu.op import Case, Op, f32
from infera_gpu.ops import registry
from infera_gpu.spec import TensorSpec, spec_of
from infera_kernels.launch import CompileLauncher
from tests.cases import compute, inputs_of, variants
from tests.kernels.buffers import LaunchingBuffers
from tests.kernels.support import EVERY_ARCH

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels

HALF, BRAIN = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)

# Operator, domain, a case of its own (or one given here): one or two for each family of kernels.
CHOSEN: tuple[tuple[str, str, str | Case], ...] = (
    ("Add", "", "both"),
    ("Div", "", Case("half", (TensorSpec((8, 64), HALF), TensorSpec((64,), HALF)))),
    ("Max", "", "three"),
    ("Pow", "", "float"),
    ("Pow", "", "square"),
    ("Equal", "", "int64"),
    ("And", "", "broadcast"),
    ("Not", "", "flags"),
    ("Where", "", "all"),
    ("Clip", "", "both"),
    ("Clip", "", "computed"),
    ("Mod", "", "fmod"),
    ("BitShift", "", "left"),
    ("IsNaN", "", "special"),
    ("Elementwise", "infera", "gates"),
    ("Elementwise", "infera", "types"),
    ("Gather", "", "embedding"),
    ("GatherElements", "", "middle"),
    ("GatherND", "", "batch"),
    ("Lookup", "infera", "tokens"),
    ("ScatterElements", "", "meeting"),
    (
        "ScatterElements",
        "",
        Case(
            "half",
            (*(TensorSpec(s, HALF) for s in ((9, 64),)), np.zeros((4, 64), np.int64), TensorSpec((4, 64), HALF)),
            {"reduction": "add"},
        ),
    ),
    ("ScatterND", "", "meeting"),
    ("Concat", "", "last"),
    ("Tile", "", "both"),
    ("DepthToSpace", "", "crd"),
    ("Pad", "", "wrap-every-axis"),
    ("Pad", "", "large"),
    ("Resize", "", "linear"),
    ("Resize", "", "left-out"),
    ("Cast", "", "float_float16"),
    ("CastLike", "", "bool"),
    ("Erf", "", "past_block"),
    ("Relu", "", "half"),
    ("HardSigmoid", "", "alpha0.5_beta0.6"),
    ("Gelu", "", "half"),
    ("Gelu", "infera", "tanh_past_block"),
    ("ReduceSum", "", "long"),
    ("ReduceMean", "", "planes"),
    ("ReduceMax", "", Case("half", (TensorSpec((8, 64), HALF), np.array([0])))),
    ("ReduceLogSumExp", "", Case("brain", (TensorSpec((8, 64), BRAIN), np.array([1])))),
    ("ReduceL2", "", "large"),
    ("ArgMax", "", "last_ties"),
    ("ArgMin", "", Case("int64", (np.arange(12).reshape(3, 4),))),
    ("CumSum", "", "shared"),
    ("CumProd", "", "past_tile"),
    ("TopK", "", "smallest"),
    ("TopK", "", "half"),
    ("Softmax", "", "blocks"),
    ("LogSoftmax", "", "last-axis"),
    ("Softmax", "", "channels"),
    ("Hardmax", "", "middle-axis"),
    ("LayerNormalization", "", "statistics-blocks"),
    ("LayerNormalization", "", "half"),
    ("RMSNormalization", "", "trailing-axes"),
    ("GroupNormalization", "", "images"),
    ("GroupNorm", "com.microsoft", "silu"),
    ("GroupNorm", "com.microsoft", "long"),
    ("InstanceNormalization", "", "blocks"),
    ("SkipLayerNormalization", "com.microsoft", "sum"),
    ("EmbedLayerNormalization", "com.microsoft", "mask"),
    ("LpNormalization", "", "sum"),
    ("BatchNormalization", "", "images"),
    ("LRN", "", "parameters"),
    ("LRNNHWC", "infera", "large"),
    ("MeanVarianceNormalization", "", "axes"),
    ("AxisNormalization", "infera", "tiles"),
    ("L2Normalization", "infera", "squared"),
    ("QuantizeLinear", "", "uint2_blocks"),
    ("QuantizeLinear", "", "output_dtype"),
    ("DequantizeLinear", "", "int2_axis"),
    ("DynamicQuantizeLinear", "", "past_block"),
    ("Centre", "infera", "relu"),
    ("MatMulInteger", "", "columns"),
    ("QLinearMatMul", "", "uint8"),
    ("MatMulIntegerToFloat", "com.microsoft", "columns"),
    ("DynamicQuantizeMatMul", "com.microsoft", "columns"),
    ("QGemm", "com.microsoft", "transposed"),
    ("GRU", "", "forward"),
    ("Attention", "infera", "repeated"),
    ("Attention", "com.microsoft", "mask"),
    ("GroupQueryAttention", "com.microsoft", "rotary"),
    ("Rotary", "infera", "complex"),
    ("RotaryEmbedding", "", "positions"),
    ("MatMulNBits", "com.microsoft", "zeros"),
    ("GatherBlockQuantized", "com.microsoft", "uint4_zeros"),
    ("ConvInteger", "", "zero-points"),
    ("QLinearAdd", "com.microsoft", "broadcast"),
    ("QLinearGlobalAveragePool", "com.microsoft", "last"),
    ("QLinearConcat", "com.microsoft", "two"),
    ("QLinearSoftmax", "com.microsoft", "middle"),
    ("MatMul", "", "broadcast"),
    ("MatMul", "", "vectors"),
    ("MatMul", "", Case("brain", (TensorSpec((2, 128, 64), BRAIN), TensorSpec((64, 256), BRAIN)))),
    ("Gemm", "", "scaled"),
    ("Gemm", "", "many_rows"),
    ("FusedMatMul", "infera", "gelu"),
    ("FusedMatMul", "infera", "heads"),
    ("Conv", "", "3d"),
    ("FusedConvNHWC", "infera", "depthwise"),
    ("FusedConvNHWC", "infera", "pointwise"),
    (
        "FusedConvNHWC",
        "infera",
        Case("stem", (*(TensorSpec(s, HALF) for s in ((2, 32, 32, 3), (16, 3, 3, 3))),), tol=1),
    ),
    ("ConvTransposeNHWC", "infera", "grouped"),
    ("MaxPool", "", Case("positions", (f32(2, 8, 9, 9),), {"kernel_shape": (3, 3)}, n_outs=2)),
    ("MaxPool", "", "uint8"),
    ("GlobalAveragePoolNHWC", "infera", "large"),
    ("FusedMatMul", "infera", Case("half", (*(TensorSpec(s, HALF) for s in ((128, 64), (64, 256), (256,))),), tol=1)),
)


def chosen() -> Iterator[Any]:
    for name, domain, wanted in CHOSEN:
        op = registry().find(domain, name, 28)
        assert op is not None, name
        case = next(c for c in op.cases if c.id == wanted) if isinstance(wanted, str) else wanted
        yield pytest.param(op, case, id=f"{op.qualified}-{case.id}")


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize(("op", "case"), [*chosen()])
def test_kernel_compiles(op: Op, case: Case, arch: int) -> None:
    kernel = op.kernels["triton"]
    site, ins = variants(op, case, "triton")[-1]
    launcher = CompileLauncher(arch)
    outs = [spec_of(a) for a in compute(op, site, inputs_of(op, case))[: case.n_outs]]
    buffers = LaunchingBuffers(launcher, ins, outs, site.values)
    calls = kernel.bind(site, buffers)
    buffers.check_workspace(kernel, site)
    assert len(calls) == len(launcher.compiled) >= 1
    for inspection in launcher.compiled:
        assert inspection.binary.spec.arch == arch
        assert inspection.spilled_bytes == 0


@pytest.mark.parametrize(
    ("name", "case", "launches"),
    [
        ("bias", Case("b", (f32(8, 16), f32(16, 4), f32(4)), {"activation": "relu"}), 1),
        ("wide_bias", Case("b", (f32(8, 16), f32(16, 4), f32(8, 1)), {"activation": "relu"}), 1),
        ("residual", Case("r", (f32(8, 16), f32(16, 4), f32(4), f32(8, 4))), 1),
        ("residual_after", Case("r", (f32(8, 16), f32(16, 4), f32(4), f32(8, 4)), {"activation": "relu"}), 2),
        ("two_terms", Case("t", (f32(8, 16), f32(16, 4), f32(8, 1), f32(8, 4))), 2),
    ],
)
def test_epilogues_are_fused_where_the_order_of_things_allows(name: str, case: Case, launches: int) -> None:
    op = registry().find("infera", "FusedMatMul", 1)
    assert op is not None
    launcher = CompileLauncher(80)
    site, ins = variants(op, case, "triton")[0]
    op.kernels["triton"].bind(site, LaunchingBuffers(launcher, ins, site.outs, site.values))
    assert len(launcher.launches) == launches

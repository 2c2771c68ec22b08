"""Operators' Triton kernels compiled for every architecture: parameters against the PTX, and no spills."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from infera_gpu.bind import LazyInputs
from infera_gpu.op import Case, Op, f32
from infera_gpu.ops import _triton_matmul, registry
from infera_gpu.spec import TensorSpec, spec_of
from infera_kernels.launch import CompileLauncher
from infera_kernels.launch.binary import Inspection
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
    ("TensorScatter", "", "rows"),
    ("TensorScatter", "", "circular"),
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
    ("EmbeddedNormalization", "infera", "three"),
    ("LpNormalization", "", "sum"),
    ("BatchNormalization", "", "images"),
    ("BatchNormalization", "", "half"),
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
    ("FusedMatMulNBits", "infera", "normalized_rows"),
    ("FusedMatMulNBits", "infera", "many_rows"),
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
    ("GatedMatMul", "infera", "rows"),
    ("GatedMatMul", "infera", "one_row"),
    ("GatedMatMul", "infera", "normalized_row"),
    ("NormalizedMatMul", "infera", "rows"),
    ("NormalizedMatMul", "infera", "transposed_row"),
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
    (
        "GatedMatMul",
        "infera",
        Case("half", (*(TensorSpec(s, HALF) for s in ((128, 64), (64, 256), (64, 256))),), tol=1),
    ),
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


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize(
    ("name", "domain", "case"),
    [
        ("BatchNormalization", "", "images"),
        ("BatchNormalization", "", "half_of_floats"),
        ("BatchNormalizationNHWC", "infera", "images"),
    ],
)
def test_a_batch_norm_of_computed_parameters_is_one_launch(name: str, domain: str, case: str, arch: int) -> None:
    op = registry().find(domain, name, 28)
    assert op is not None
    launcher = CompileLauncher(arch)
    site, ins = variants(op, next(c for c in op.cases if c.id == case), "triton")[0]
    assert site.value(1) is None
    op.kernels["triton"].bind(site, LaunchingBuffers(launcher, ins, site.outs, site.values))
    assert [inspection.spilled_bytes for inspection in launcher.compiled] == [0]


def product(name: str, arch: int, *, tf32: bool = True, **attrs: int) -> Inspection:
    """A product with a constant factor, 1024 cubed."""
    op = registry().find("infera" if name == "FusedMatMul" else "", name, 28)
    assert op is not None
    case = Case("packed", (f32(1024, 1024), np.zeros((1024, 1024), np.float32)), attrs)
    site, ins = variants(op, case, "triton")[-1]
    launcher = CompileLauncher(arch)
    buffers = LaunchingBuffers(launcher, ins, site.outs, site.values)
    buffers.tf32 = tf32
    op.kernels["triton"].bind(site, buffers)
    (inspection,) = launcher.compiled
    return inspection


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize("name", ["MatMul", "Gemm", "FusedMatMul"])
def test_constant_factors_are_packed_for_tf32(name: str, arch: int) -> None:
    """Code, loads and registers are those of a factor that the file has transposed."""
    assert product(name, arch).sass == product("Gemm", arch, transB=1).sass


def test_packed_factors_take_half_the_copies_on_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = product("MatMul", 90)
    monkeypatch.setattr(_triton_matmul, "right_factor", lambda site, io: io.ins[1])
    plain = product("MatMul", 90)
    assert plain.count("LDGSTS") == 2 * packed.count("LDGSTS") > 0
    assert plain.registers > packed.registers


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("tf32", [False, True])
def test_what_is_packed_takes_no_second_copy(rows: int, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight: one form for any rows, beside which the constant itself is not read."""
    op = registry().find("", "MatMul", 28)
    assert op is not None
    case = Case("packed", (f32(rows, 24), np.zeros((24, 40), np.float32)))
    site, ins = variants(op, case, "triton")[-1]
    buffers = LaunchingBuffers(CompileLauncher(80), ins, site.outs, site.values)
    asked: list[object] = []

    def read(i: Any) -> Any:
        asked.append(i)
        return given[i]

    def pack(i: int, tag: str, build: Any) -> Any:
        asked.append((i, tag))
        return build(ins[i])

    given = buffers.ins
    for name, value in {"tf32": tf32, "ins": LazyInputs([0, 1], read), "pack": pack}.items():  # type: ignore[list-item]
        monkeypatch.setattr(buffers, name, value)
    op.kernels["triton"].bind(site, buffers)
    assert asked == [0, (1, "columns") if tf32 else 1]

"""Every operator's Triton kernel on every case that it supports, in Triton's interpreter, against `compute`."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from infera_gpu.op import Case, Op
from infera_gpu.ops import registry
from infera_gpu.spec import spec_of
from infera_kernels.launch import InterpreterLauncher
from tests.cases import Variant, assert_close, compute, covered, run, wrong
from tests.kernels.buffers import LaunchingBuffers, bindings
from tests.kernels.support import shard

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

pytestmark = pytest.mark.kernels

FOR_BLOCKS = re.compile(r"Conv.*: .*(winograd|blocks|large|stem-7x7|1d-few)|Pool.*: .*blocks")
"""Cases that are as large as the CPU's blocks want them: they would take minutes here, and show nothing more."""


def chosen() -> Iterator[tuple[Op, Case, list[Variant]]]:
    """What is covered. Of cases that declarations for several opsets share, with their kernel, a later one has one."""
    seen: set[object] = set()
    for op, case, found in covered("triton", most=1100):
        shared = {(id(op.kernels["triton"]), id(case)), op.qualified}
        if not shared <= seen and not FOR_BLOCKS.search(f"{op.name}: {case.id}"):
            seen |= shared
            yield op, case, found


COVERED = list(chosen())
MOST_PROGRAMS = 600
"""Programs of one launch that are worth interpreting, at a few milliseconds each."""


@pytest.mark.parametrize(
    ("op", "case", "variants"),
    [pytest.param(*row, id=f"{row[0].qualified}-{row[1].id}") for row in shard(COVERED)],
)
def test_kernel(op: Op, case: Case, variants: list[Variant], interpreter: InterpreterLauncher) -> None:
    kernel = op.kernels["triton"]
    for site, ins in variants:
        want = compute(op, site, ins)[: case.n_outs]
        for options in bindings(kernel, site):
            interpreter.launches.clear()
            buffers = LaunchingBuffers(interpreter, ins, [spec_of(w) for w in want], site.values, **options)
            calls = list(kernel.bind(site, buffers))
            buffers.check_workspace(kernel, site)
            buffers.prepare([wrong(w) for w in want])
            run(calls)
            assert len(interpreter.launches) == len(calls) >= (want[0].size > 0), "it does not launch"
            most = max((launch.grid[0] * launch.grid[1] * launch.grid[2] for launch in interpreter.launches), default=0)
            assert most <= MOST_PROGRAMS, f"{most} programs in one launch take too long here: choose a smaller case"
            buffers.check()
            for i, (got, w) in enumerate(zip(buffers.outs, want, strict=True)):
                assert_close(got, w, case.tol, f"output {i} {options}")


NAMES = ("MatMul", "Gemm", "FusedMatMul", "GatedMatMul", "NormalizedMatMul")
PRODUCTS = [row for row in COVERED if row[0].name in NAMES and row[0].domain != "com.microsoft"]


@pytest.mark.parametrize(
    ("op", "case", "variants"),
    [pytest.param(*row, id=f"{row[0].qualified}-{row[1].id}") for row in shard(PRODUCTS)],
)
def test_products_in_tf32(op: Op, case: Case, variants: list[Variant], interpreter: InterpreterLauncher) -> None:
    """Constant factors are packed for them. The interpreter rounds nothing."""
    for site, ins in variants:
        want = compute(op, site, ins)[: case.n_outs]
        buffers = LaunchingBuffers(interpreter, ins, [spec_of(w) for w in want], site.values)
        buffers.tf32 = True
        calls = list(op.kernels["triton"].bind(site, buffers))
        buffers.prepare([wrong(w) for w in want])
        run(calls)
        buffers.check()
        for i, (got, w) in enumerate(zip(buffers.outs, want, strict=True)):
            assert_close(got, w, case.tol, f"output {i}")


def test_every_kernel_has_a_case() -> None:
    with_kernel = {op.qualified for op in registry() if "triton" in op.kernels}
    assert with_kernel == {op.qualified for op, _, _ in COVERED}


def test_families_are_covered() -> None:
    """What a change to `supports` must not silently lose."""
    cases = Counter(op.name for op, _, _ in COVERED)
    for name in ("Add", "Div", "Pow", "Max", "Equal", "And", "Not", "Where", "Clip", "Cast", "Erf", "Gelu", "Relu"):
        assert cases[name] >= 1, name
    for name, least in {
        "Softmax": 8,
        "LogSoftmax": 8,
        "LayerNormalization": 10,
        "GroupNormalization": 3,
        "AxisNormalization": 6,
        "ReduceSum": 10,
        "ReduceMean": 10,
        "ArgMax": 7,
        "CumSum": 8,
        "TopK": 8,
        "MatMul": 9,
        "FusedMatMul": 12,
        "GatedMatMul": 16,
        "NormalizedMatMul": 9,
        "Conv": 23,
        "FusedConv": 26,
        "FusedConvNHWC": 40,
        "ConvTransposeNHWC": 12,
        "MaxPool": 30,
        "AveragePoolNHWC": 17,
        "GlobalAveragePoolNHWC": 3,
        "Attention": 41,
        "MultiHeadAttention": 7,
        "GroupQueryAttention": 14,
        "Rotary": 8,
        "RotaryEmbedding": 10,
        "QuantizeLinear": 38,
        "DequantizeLinear": 30,
        "MatMulInteger": 8,
        "QLinearConv": 12,
        "MatMulNBits": 6,
        "FusedMatMulNBits": 5,
        "LSTM": 14,
        "GRU": 15,
    }.items():
        assert cases[name] >= least, (name, cases[name])

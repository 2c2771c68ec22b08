"""What passes think a node makes (`passes/rules.py`) is what its operator declares that it makes, on every case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from infera_gpu.graph import Graph
from infera_gpu.op import Case, Op, Site
from infera_gpu.ops import registry
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.rules import RULES
from infera_gpu.spec import TensorSpec
from tests.cases import inputs_of, site_of


def name_of(op: Op) -> str:
    return f"{op.domain}.{op.name}" if op.domain else op.name


def cases() -> Iterator[Any]:
    """Of tensors that are made of tensors."""
    for op in registry():
        if name_of(op) in RULES:
            for case in op.cases:
                yield pytest.param(op, case, id=f"{op.qualified}-{case.id}")


def graph_of(site: Site) -> Graph:
    """The node alone. What its operator has to know is a constant."""
    named = list(zip(site.node.inputs, site.ins, site.values, strict=True))
    constants = {name: value for name, _, value in named if value is not None}
    inputs = {name: spec for name, spec, _ in named if spec is not None and name not in constants}
    outputs = dict.fromkeys(site.node.outputs[:1], TensorSpec((), site.outs[0].dtype, False))
    return Graph((site.node,), inputs, outputs, constants, {site.node.domain: site.opset})


@pytest.mark.parametrize("known", [False, True], ids=["inputs", "constants"])
@pytest.mark.parametrize(("op", "case"), list(cases()))
def test_a_rule_says_what_the_operator_says(op: Op, case: Case, known: bool) -> None:
    """It may know less: no shape, or not all of it."""
    ins = inputs_of(op, case)
    if not all(x is None or hasattr(x, "dtype") for x in ins):
        pytest.skip("of sequences")
    site = site_of(op, case, ins, constant=known)
    if not site.outs or not isinstance(site.outs[0], TensorSpec):
        pytest.skip("makes no tensor, or one that is as large as elements say")
    found = Draft(graph_of(site)).spec(site.node.outputs[0])
    if found is None:
        return
    assert found.dtype == site.outs[0].dtype
    if found.ranked:
        assert found.ndim == site.outs[0].ndim
        pairs = zip(found.shape, site.outs[0].dims, strict=True)
        assert all(a == b for a, b in pairs if isinstance(a, int)), (found, site.outs[0])


WITHOUT = frozenset(
    {
        *("ArgMax", "ArgMin", "CastLike", "ConvInteger", "OneHot", "QLinearConv", "QLinearMatMul", "Scatter", "SwiGLU"),
        *("TensorScatter", "infera.Elementwise", "infera.QuantizedConvNHWC", "infera.SumTo"),
        *(
            f"com.microsoft.{name}"
            for name in (
                *("DequantizeLinear", "DynamicQuantizeMatMul", "EmbedLayerNormalization", "GridSample", "NhwcMaxPool"),
                *("Pad", "QGemm", "QLinearAdd", "QLinearConcat", "QLinearConv", "QLinearGlobalAveragePool"),
                *("QLinearLeakyRelu", "QLinearMul", "QLinearSigmoid", "QLinearSoftmax", "QuantizeLinear"),
            )
        ),
    }
)
"""Operators with Triton kernels, of which passes know nothing that they make: of what follows, next to nothing then."""


def test_every_operator_with_a_kernel_has_a_rule() -> None:
    assert {name_of(op) for op in registry() if "triton" in op.kernels} - RULES.keys() == WITHOUT

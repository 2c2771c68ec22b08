"""What operators of com.microsoft refuse, and how they say so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from infera_gpu.errors import PlanError
from infera_gpu.graph import HostArray
from infera_gpu.op import Op, Site
from infera_gpu.ops import registry
from tests.cases import compute, inputs_of, site_of


def op_of(name: str) -> Op:
    op = registry().find("com.microsoft", name, 1)
    assert op is not None
    return op


def case_of(op: Op, id: str) -> tuple[Site, list[HostArray | None]]:
    case = next(c for c in op.cases if c.id == id)
    ins = list(inputs_of(op, case))
    return site_of(op, case, ins), ins


@pytest.mark.parametrize(
    ("name", "case", "attrs", "message"),
    [
        ("FusedGemm", "Relu", {"activation": "Gelu"}, "activation is 'Gelu', expected one of Celu"),
        ("FusedGemm", "LeakyRelu", {"activation_alpha": None}, "needs the attribute 'activation_alpha'"),
        ("FusedConv", "residual", {"activation": "relu"}, "activation 'relu' is not one of Clip"),
        ("FusedMatMul", "vector", {"transBatchA": 1}, "transBatchA is set for"),
        ("MatMulNBits", "symmetric", {"bits": 3}, "bits 3, block_size 32 are not valid"),
        ("MatMulNBits", "symmetric", {"K": 90}, "do not hold 5 x 3 blocks"),
        ("MatMulBnb4", "normal", {"transB": 0}, "transB 0 is not supported"),
        ("MatMulBnb4", "normal", {"quant_type": 2}, "quant_type 2 are not valid"),
        ("GatherBlockQuantized", "4_bits", {"gather_axis": 1}, "gather_axis 1 and quantize_axis 1: expected 0 and 1"),
        ("GatherBlockQuantized", "4_bits", {"block_size": 24}, "block_size is 24, expected a power of two"),
        ("QAttention", "plain", {"do_rotary": 1}, "do_rotary and past_present_share_buffer are not supported"),
        ("QMoE", "rows", {"quant_type": "fp4"}, "weights of other types than integers"),
        ("MoE", "relu", {"k": 4}, "k is 4, expected 1 to 3 experts"),
        ("MoE", "swiglu", {"swiglu_fusion": 0}, "swiglu that is not fused with the first"),
        ("DynamicQuantizeLSTM", "signed", {"hidden_size": 5}, "hidden_size is 5 but R is"),
        ("QLinearConcat", "two", {"axis": 3}, "axis 3 out of range"),
        ("CDist", "squares", {"metric": "cosine"}, "metric 'cosine' is not one of euclidean, sqeuclidean"),
        ("CausalConvWithState", "plain", {"dilation": 2}, "dilation is 2, only 1 is supported"),
        ("UnfoldTensor", "last", {"size": 9}, "windows of 9 elements in steps of 2 do not fit"),
        ("GroupNorm", "last", {"groups": 4}, "4 groups do not divide the channels"),
    ],
)
def test_attributes(name: str, case: str, attrs: dict[str, Any], message: str) -> None:
    op = op_of(name)
    site, _ = case_of(op, case)
    with pytest.raises(PlanError, match=message):
        op.infer(replace(site, attrs={**site.attrs, **attrs}, outs=()))


@pytest.mark.parametrize(
    ("name", "case", "left_out", "message"),
    [
        ("QGemm", "columns", 8, "y_scale and y_zero_point come together"),
        ("QLinearAdd", "broadcast", 6, "input 6 is required"),
        ("DynamicQuantizeLSTM", "signed", 8, "input 8 is required"),
        ("QMoE", "rows", 3, "input 3 is required"),
        ("QEmbedLayerNormalization", "segments", 15, "its scale .input 10. and zero point .input 15. come together"),
        ("LinearAttentionGate", "both", 3, "beta is wanted, but b is left out"),
    ],
)
def test_inputs(name: str, case: str, left_out: int, message: str) -> None:
    op = op_of(name)
    site, _ = case_of(op, case)
    fewer = tuple(None if i == left_out else s for i, s in enumerate(site.ins))
    with pytest.raises(PlanError, match=message):
        op.infer(replace(site, ins=fewer, outs=()))


def test_a_matrix_without_inverse() -> None:
    op = op_of("Inverse")
    site, _ = case_of(op, "matrix")
    with pytest.raises(PlanError, match="a matrix has no inverse"):
        compute(op, site, [np.ones((3, 3))])

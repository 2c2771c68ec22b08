"""Operators of com.microsoft: the attributes that onnxruntime's schemas have, with their defaults."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as pybind

from infera_gpu.op import REQUIRED, Op
from infera_gpu.ops import registry

SCHEMAS = {d.name: d for d in pybind.get_all_operator_schema() if d.domain == "com.microsoft"}

KERNELS_OWN = {
    ("QuantizeLinear", "axis"): 1,
    ("DequantizeLinear", "axis"): 1,
    ("RotaryEmbedding", "scale"): 1.0,
    ("MRotaryEmbedding", "scale"): 1.0,
}
"""Defaults that are onnxruntime's kernels', not the schemas'."""


def default(attribute: Any) -> Any:
    """What a schema says an attribute is if left out: None where it says nothing, strings as text."""
    if not attribute._default_value:
        return None
    value = onnx.helper.get_attribute_value(onnx.AttributeProto.FromString(attribute._default_value))
    return value.decode() if isinstance(value, bytes) else value


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in registry() if op.domain == "com.microsoft"])
def test_attributes_are_those_of_the_schema(op: Op) -> None:
    schema = SCHEMAS[op.name].attributes
    assert set(op.attrs) == set(schema)
    for name, ours in op.attrs.items():
        wanted = default(schema[name])
        if schema[name].required:
            assert ours is REQUIRED or wanted is not None, f"{name} is required"
        elif wanted is not None:
            assert ours == pytest.approx(wanted), f"{name} is {wanted} by default"
        else:
            assert not ours or ours == KERNELS_OWN[op.name, name], f"{name} has no default"

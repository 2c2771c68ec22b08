"""Models of one operator or a few, for rows: their inputs are random, their weights are constants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from infera_gpu.spec import onnx_of_dtype
from infera_gpu.specialize import Placed

Array = np.ndarray[Any, np.dtype[Any]]
OPSETS = {"": 23, "infera": 1, "com.microsoft": 1}
OUTPUT = "y"

_DRAWN = 1 << 20


def drawn(shape: Sequence[int], dtype: Any, *, scale: float = 1.0) -> Array:
    """Normally distributed values: 2^20 of them, over and over where there are more."""
    count = math.prod(shape)
    values = np.random.default_rng(len(shape) + sum(shape)).standard_normal(min(count, _DRAWN), np.float32) * scale
    return np.resize(values.astype(dtype), tuple(shape))


def node(kind: str, *inputs: str, output: str = OUTPUT, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), [output], name=output, **attributes)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Array],
    weights: Mapping[str, Array],
    shape: Sequence[int],
    dtype: Any,
) -> onnx.ModelProto:
    """The model whose output OUTPUT has this shape and type."""

    def value(name: str, shape: Sequence[int], dtype: Any) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx_of_dtype(np.dtype(dtype)), shape)

    graph = helper.make_graph(
        nodes,
        "row",
        [value(name, a.shape, a.dtype) for name, a in inputs.items()],
        [value(OUTPUT, shape, dtype)],
        [numpy_helper.from_array(a, name) for name, a in weights.items()],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def weights_in(model: onnx.ModelProto) -> list[Array]:
    """The constants, in order."""
    return [numpy_helper.to_array(i) for i in model.graph.initializer]


def alone(placed: Placed) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of one node of a plan, and feeds: with the shapes, types and attributes that it has there.

    What is constant there is so here, with other values.
    """
    site, op = placed.site, placed.op
    inputs: dict[str, Array] = {}
    weights: dict[str, Array] = {}
    names = []
    for i, spec in enumerate(site.ins):
        if spec is None:
            names.append("")
            continue
        names.append(f"x{i}")
        constant = site.value(i) is not None
        fan_in = math.prod(spec.dims[1:]) if constant and spec.ndim > 1 else 1
        (weights if constant else inputs)[names[-1]] = drawn(spec.dims, spec.dtype, scale=fan_in**-0.5)
    attributes = {k: v for k, v in site.node.attrs.items() if v is not None}
    made = node(op.name, *names, domain=op.domain, **attributes)
    out = site.outs[0]
    return model_of([made], inputs, weights, out.dims, out.dtype), inputs

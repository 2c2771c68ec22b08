"""Models quantised to eight bits as exporters write it: QuantizeLinear and DequantizeLinear around what multiplies.

What a convolution's result is added to, and what a maximum is taken of, is quantised as well, as TensorRT's guide to
explicit quantisation has it: one convolution then reads and writes integers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import infera_gpu
from infera_gpu.graph import HostArray

Array = np.ndarray[Any, np.dtype[Any]]
OUTPUT_AXIS = {"Conv": 0, "MatMul": 1, "Gemm": 0}
"""Of the weight, along which each output has a scale of its own."""


def _model(source: onnx.ModelProto, nodes: list[onnx.NodeProto], constants: Mapping[str, Array]) -> onnx.ModelProto:
    """`source` with other nodes, and those of the constants that they use."""
    graph, used = source.graph, {name for node in nodes for name in node.input}
    initializers = [numpy_helper.from_array(a, name) for name, a in constants.items() if name in used]
    made = helper.make_graph(nodes, graph.name, graph.input, graph.output, initializers)
    return helper.make_model(made, opset_imports=source.opset_import, ir_version=source.ir_version)


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """BatchNormalization that follows a Conv as a part of its weights, and a bias."""
    weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    made: dict[str, onnx.NodeProto] = {}
    for given in model.graph.node:
        conv = made.get(given.input[0])
        if given.op_type == "BatchNormalization" and conv is not None and conv.op_type == "Conv":
            scale, bias, mean, variance = (weights[name] for name in given.input[1:])
            epsilon = next(a.f for a in given.attribute if a.name == "epsilon")
            factor = scale / np.sqrt(variance + np.float32(epsilon))
            name = conv.input[1]
            weights[name] = weights[name] * factor[:, None, None, None]
            weights[f"{name}_bias"] = bias - mean * factor
            del made[conv.output[0]]
            conv.input.append(f"{name}_bias")
            conv.output[0] = given.output[0]
            made[given.output[0]] = conv
        else:
            node = onnx.NodeProto()
            node.CopyFrom(given)
            made[given.output[0]] = node
    return _model(model, list(made.values()), weights)


def quantised(model: onnx.ModelProto, feeds: Mapping[str, HostArray]) -> onnx.ModelProto:
    """The model whose convolutions and products with constant weights take int8 from both sides.

    Activations have one scale each, from the largest magnitude that `feeds` bring; weights one for each output.
    """
    model = folded(model)
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    made_by = {n.output[0]: n for n in model.graph.node}
    chosen = {n.output[0] for n in model.graph.node if n.op_type in OUTPUT_AXIS and n.input[1] in constants}
    read = {n.output[0]: i for n in model.graph.node if (i := _activation(n, made_by, chosen)) is not None}
    peaks = _peaks(model, sorted({made_by[o].input[i] for o, i in read.items()}), feeds)
    for o in read:  # the largest of a part is at most that of all, and has its scale: integers then stay as they are
        if made_by[o].op_type == "MaxPool" and o in peaks:
            peaks[o] = peaks[made_by[o].input[0]]
    nodes: list[onnx.NodeProto] = []

    def activation(name: str) -> str:
        scale, zero, stored, back = (f"{name}_{part}" for part in ("scale", "zero", "q", "dq"))
        if scale not in constants:
            constants[scale], constants[zero] = np.array(peaks[name] / 127, np.float32), np.array(0, np.int8)
            nodes.append(helper.make_node("QuantizeLinear", [name, scale, zero], [stored], name=stored))
            nodes.append(helper.make_node("DequantizeLinear", [stored, scale, zero], [back], name=back))
        return back

    def weight(name: str, axis: int) -> str:
        values, back = constants[name], f"{name}_dq"
        scales = np.abs(values).max(tuple(i for i in range(values.ndim) if i != axis)) / np.float32(127)
        along = scales.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        constants[f"{name}_q"] = np.rint(values / along).astype(np.int8)
        constants[f"{name}_scale"], constants[f"{name}_zero"] = scales, np.zeros(len(scales), np.int8)
        inputs = [f"{name}_{part}" for part in ("q", "scale", "zero")]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [back], name=back, axis=axis))
        return back

    for given in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(given)
        if given.output[0] in read:
            i = read[given.output[0]]
            node.input[i] = activation(given.input[i])
        if given.output[0] in chosen:
            node.input[1] = weight(given.input[1], OUTPUT_AXIS[given.op_type])
        nodes.append(node)
    made = _model(model, nodes, constants)
    onnx.checker.check_model(made)
    return made


def _activation(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto], chosen: set[str]) -> int | None:
    """Which input of a node is quantised, besides weights."""
    if node.output[0] in chosen or node.op_type == "MaxPool":
        return 0
    if node.op_type != "Add":
        return None
    convolved = [i for i, name in enumerate(node.input) if name in chosen and made_by[name].op_type == "Conv"]
    return None if not convolved else 1 - convolved[0]


def _peaks(model: onnx.ModelProto, names: list[str], feeds: Mapping[str, HostArray]) -> dict[str, float]:
    """The largest magnitude of each value."""
    inside = [name for name in names if name not in feeds]
    found = dict(feeds)
    if inside:
        seen = onnx.ModelProto()
        seen.CopyFrom(model)
        del seen.graph.output[:]
        seen.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inside)
        with infera_gpu.load(seen, device="cpu", jit=False) as session:
            found |= session.run(feeds)
    return {name: float(np.abs(found[name]).max()) for name in names}

"""The outputs that a model should have, as far as onnxruntime can tell them."""

from __future__ import annotations

import numpy as np
import onnx

from bench.inputs import Array, Feeds
from infera_gpu.verify import OnnxRuntime

_ORDERED = ("Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze")
"""Operators that keep their elements and the elements' order."""


def final_operators(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The Softmax or Sigmoid that makes an output, by the output's name."""
    producers = {value: node for node in model.graph.node for value in node.output}
    found: dict[str, onnx.NodeProto] = {}
    for output in model.graph.output:
        node = producers.get(output.name)
        while node is not None and node.op_type in _ORDERED:
            node = producers.get(node.input[0])
        if node is not None and node.op_type in ("Softmax", "Sigmoid"):
            found[output.name] = node
    return found


def with_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with one more output for each that a Softmax or Sigmoid makes: what goes into it. Edits `model`.

    A probability hides an error that its logit shows: both functions saturate.
    """
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = {value.name: value for value in (*inferred.value_info, *graph.output)}
    for node in final_operators(model).values():
        if node.input[0] not in {output.name for output in graph.output}:
            graph.output.append(known[node.input[0]])
    return model


class Reference:
    """onnxruntime without graph optimisations over `model`, whose logits are outputs too.

    Its Sigmoid is an approximation, off by up to 1.6e-7, which is 1e-3 of the peak where every probability is
    small (an image without a face); such outputs are computed from their logits in float64 instead.
    """

    def __init__(self, model: onnx.ModelProto, threads: int | None = None) -> None:
        self.model = with_logits(model)
        self.payload = self.model.SerializeToString()
        self._session = OnnxRuntime(self.payload, threads=threads)
        self._sigmoids = {
            output: node.input[0] for output, node in final_operators(self.model).items() if node.op_type == "Sigmoid"
        }

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Every output and every logit by name."""
        outputs = self._session.run(feeds)
        for output, logit in self._sigmoids.items():
            exact = 1 / (1 + np.exp(-outputs[logit].astype(np.float64)))
            outputs[output] = exact.astype(outputs[output].dtype).reshape(outputs[output].shape)
        return outputs

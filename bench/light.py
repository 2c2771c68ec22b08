"""The nine `light` models of the onnx package, with seeded random weights in place of their constant ones.

The package stores architectures only: every weight is a ConstantOfShape of 0.02, so all channels are equal, the stored
outputs are one number repeated, and a wrong channel order would go unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

NAMES = (
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "shufflenet",
    "squeezenet",
    "vgg19",
    "zfnet512",
)


def light(name: str, seed: int = 0) -> onnx.ModelProto:
    """One of NAMES, at batch 1 as stored."""
    path = Path(onnx.__file__).parent / "backend/test/data/light" / f"light_{name}.onnx"
    model = onnx.load(path)
    graph = model.graph
    rng = np.random.default_rng(seed)
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    made = {n.output[0]: tuple(shapes[n.input[0]].tolist()) for n in graph.node if n.op_type == "ConstantOfShape"}
    roles = _roles(graph.node, made)
    weights = [numpy_helper.from_array(_draw(rng, roles[v], shape), v) for v, shape in made.items()]
    nodes = [n for n in graph.node if n.op_type != "ConstantOfShape"]
    read = {value for n in nodes for value in n.input}
    kept = [t for t in graph.initializer if t.name in read]
    inputs = [value for value in graph.input if value.name in read and value.name not in {t.name for t in kept}]
    for repeated, values in ((graph.node, nodes), (graph.initializer, [*kept, *weights]), (graph.input, inputs)):
        fresh: list[Any] = list(values)
        del repeated[:]
        repeated.extend(fresh)
    model.ir_version = 4  # the first whose initialisers need not be inputs too
    return model


def _roles(nodes: Sequence[onnx.NodeProto], made: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """What each weight is to the node that reads it: "Conv.1" is the second input of a Conv."""
    roles: dict[str, str] = {}
    for node in nodes:
        for i, value in enumerate(node.input):
            if value in made:
                roles.setdefault(value, f"{node.op_type}.{i}")
    return roles


def _draw(rng: np.random.Generator, role: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """He-normal weights, statistics and scales around one, small biases: activations keep their magnitude."""
    normal = rng.standard_normal(shape, np.float32)
    fan_in = math.prod(shape[1:])
    spread = {"Conv.1": (0.0, math.sqrt(2 / fan_in)), "Gemm.1": (0.0, math.sqrt(1 / fan_in))}
    around_one = {"BatchNormalization.1", "Unsqueeze.0", "BatchNormalization.4"}
    mean, std = spread.get(role, (1.0, 0.1) if role in around_one else (0.0, 0.1))
    values = np.float32(mean) + normal * np.float32(std)
    return np.abs(values) if role == "BatchNormalization.4" else values

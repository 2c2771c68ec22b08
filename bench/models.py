"""The models by name: two built here with random weights, nine trained ones from the catalogue."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx

from bench.build import bert, resnet50
from infera_gpu.catalogue import CATALOGUE
from infera_gpu.fetch import cache_dir, fetch

BUILT: Mapping[str, Callable[[], onnx.ModelProto]] = {"resnet50": resnet50, "bert-base": bert}
REVISION = 1
"""Of the builders; part of the cached files' names, to be raised when a builder changes."""

_FINAL = ("Softmax", "Sigmoid")
_PASSIVE = ("Reshape", "Transpose", "Flatten", "Identity", "Squeeze", "Unsqueeze")


def path_of(name: str) -> Path:
    """The model's file, built or fetched on first use. Raises KeyError for an unknown name, FetchError out of reach."""
    if name not in BUILT:
        if name not in CATALOGUE:
            raise KeyError(name)
        return fetch(name)
    path = cache_dir() / "built" / f"{name}-{REVISION}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        onnx.save(BUILT[name](), partial)
        partial.replace(path)
    return path


def with_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with one more output for each output that a Softmax or Sigmoid makes: what goes into it.

    A probability hides an error that the logit shows: both saturate. Edits and returns `model`.
    """
    graph = model.graph
    producers = {value: node for node in graph.node for value in node.output}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = {value.name: value for value in (*inferred.value_info, *graph.output)}
    for output in list(graph.output):
        node = producers.get(output.name)
        while node is not None and node.op_type in _PASSIVE:
            node = producers.get(node.input[0])
        if node is not None and node.op_type in _FINAL and node.input[0] not in {o.name for o in graph.output}:
            graph.output.append(known[node.input[0]])
    return model

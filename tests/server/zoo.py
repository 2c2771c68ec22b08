"""Small models of many kinds, for the requests of `zoo_cases`: one of each datatype, of texts, of open dimensions, with
labels, of two inputs, of one that may be left out, of several versions, an ensemble.

    python -m tests.server.zoo FOLDER

writes them for a tritonserver of nvidia-pytriton, whose Python backend runs them with onnxruntime.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx.parser

from infera_server.codec import DATATYPES
from infera_server.models.modelconfig import type_name, type_of

ONNX_TYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float", "FP64": "double",
    "BYTES": "string",
}  # fmt: skip

Tensors = Sequence[tuple[str, str, str]]
"""Names, types and dimensions without the batch, of letters where they are open."""


def _model(max_batch: int, inputs: Tensors, outputs: Tensors, body: str, constants: str = "", more: str = "") -> Any:
    """The batch size, the model's text and its configuration."""
    ahead = "N, " if max_batch else ""
    texts, config = [], f"max_batch_size: {max_batch}\n{more}\n"
    for kind, tensors in (("input", inputs), ("output", outputs)):
        texts.append(", ".join(f"{ONNX_TYPES[t]}[{ahead}{dims}] {name}" for name, t, dims in tensors))
        for name, datatype, dims in tensors:
            declared = ", ".join(d if d.strip().isdigit() else "-1" for d in dims.split(","))
            of = type_name(type_of(DATATYPES[datatype], name))
            config += f'{kind} {{ name: "{name}" data_type: {of} dims: [{declared}] {EXTRA.get((kind, name), "")} }}\n'
    return f"g ({texts[0]}) => ({texts[1]}) {constants} {{ {body} }}", config


EXTRA = {("output", "classes"): 'label_filename: "labels.txt"', ("input", "B0"): "optional: true"}

_ENSEMBLE = """
platform: "ensemble" max_batch_size: 4
input { name: "A" data_type: TYPE_FP32 dims: [3] }
input { name: "B" data_type: TYPE_FP32 dims: [3] }
output { name: "OUT" data_type: TYPE_FP32 dims: [3] }
ensemble_scheduling {
  step { model_name: "add" model_version: -1 input_map { key: "A" value: "A" } input_map { key: "B" value: "B" }
         output_map { key: "C" value: "sum" } }
  step { model_name: "add" model_version: -1 input_map { key: "A" value: "sum" } input_map { key: "B" value: "B" }
         output_map { key: "D" value: "OUT" } }
}
"""


def _models() -> Iterator[tuple[str, dict[str, str], str]]:
    """Names, texts of the models by version, configurations."""

    def one(name: str, *args: Any, **more: Any) -> tuple[str, dict[str, str], str]:
        text, config = _model(*args, **more)
        return name, {"1": text}, config

    for datatype in ONNX_TYPES:
        yield one(datatype, 0, [("x", datatype, "n")], [("y", datatype, "n")], "y = Identity(x)")
    yield one("text", 8, [("x", "BYTES", "k")], [("y", "BYTES", "k")], "y = Identity(x)")
    yield one("word", 8, [("in", "BYTES", "1")], [("out", "BYTES", "1")], "out = Identity(in)")
    yield one("grid", 8, [("x", "FP32", "a, b")], [("y", "FP32", "a, b")], "y = Identity(x)")
    yield one("scores", 8, [("x", "FP32", "4")], [("classes", "FP32", "4")], "classes = Identity(x)")
    yield one("counts", 0, [("x", "INT32", "a, b")], [("y", "INT32", "a, b")], "y = Identity(x)")
    pair = [("A", "FP32", "3"), ("B", "FP32", "3")]
    yield one("add", 4, pair, [("C", "FP32", "3"), ("D", "FP32", "3")], "C = Add(A, B) D = Sub(A, B)")
    optional = "<float[2] B0 = {5, 6}>"
    inputs = [("x", "FP32", "2"), ("B0", "FP32", "2")]
    text, config = _model(0, inputs, [("y", "FP32", "2")], "y = Add(x, B0)", optional)
    yield "optional", {"1": text}, config
    texts = {}
    for version in ("1", "2", "10"):
        constant = f"<float k = {{{version}}}>"
        text, config = _model(
            8, [("x", "FP32", "2")], [("y", "FP32", "2")], "y = Mul(x, k)", constant,
            "version_policy { specific { versions: [1, 10] } }",
        )  # fmt: skip
        texts[version] = text
    yield "versions", texts, config
    yield "ensemble", {"1": ""}, _ENSEMBLE


BACKEND = """
import os
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        return [self.answer(r) for r in requests]

    def answer(self, request):
        feeds = {}
        for tensor in request.inputs():
            x = tensor.as_numpy()
            if x.dtype == object:
                x = np.array([s.decode("latin-1") for s in x.ravel()], object).reshape(x.shape)
            feeds[tensor.name()] = x
        wanted = sorted(request.requested_output_names())
        try:
            outputs = self.session.run(wanted, feeds)
        except Exception as error:
            return pb.InferenceResponse(error=pb.TritonError(str(error)))
        tensors = []
        for name, y in zip(wanted, outputs):
            if y.dtype == object:
                y = np.array([str(s).encode("latin-1") for s in y.ravel()], object).reshape(y.shape)
            tensors.append(pb.Tensor(name, np.ascontiguousarray(y)))
        return pb.InferenceResponse(tensors)
"""


def write(folder: Path, backend: str = "") -> None:
    """Write the models' folders; with the text of a `backend`, for Triton."""
    for name, texts, config in _models():
        for version, text in texts.items():
            place = folder / name / version
            place.mkdir(parents=True)
            if text:
                found = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
                onnx.save(found, place / "model.onnx")
                if backend:
                    (place / "model.py").write_text(backend)
        known = 'backend: "python" instance_group { kind: KIND_CPU }\n' if backend and name != "ensemble" else ""
        (folder / name / "config.pbtxt").write_text(known + config)
        if name == "scores":
            (folder / name / "labels.txt").write_text("cat\ndog big\nbird\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]), BACKEND)

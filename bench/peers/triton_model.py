"""The model in tritonserver's Python backend, whose wheel has no backend for ONNX."""

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb
from model import Session


class TritonPythonModel:
    def initialize(self, args: Any) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        self.session = Session(folder / "model.onnx")

    def execute(self, requests: Any) -> Any:
        import numpy as np

        inputs = [pb.get_input_tensor_by_name(r, "input").as_numpy() for r in requests]
        whole = self.session.run(inputs[0] if len(inputs) == 1 else np.concatenate(inputs))
        replies, start = [], 0
        for x in inputs:
            stop = start + len(x)
            replies.append(pb.InferenceResponse([pb.Tensor("output", whole[start:stop])]))
            start = stop
        return replies

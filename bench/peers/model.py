"""The model as every peer in Python runs it: onnxruntime on one thread."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Session:
    """`run` takes and gives [rows, columns] in float32."""

    def __init__(self, path: Path = Path("model.onnx")) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._name = self._session.get_inputs()[0].name

    def run(self, x: Any) -> Any:
        return self._session.run(None, {self._name: np.asarray(x, np.float32)})[0]

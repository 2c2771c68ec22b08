"""One load and one inference, in a process of its own: `python -m bench.first_worker CONTENDER MODEL FEEDS`.

FEEDS is an .npz file. Prints the seconds of each stage as JSON. Nothing of either runtime is imported up here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np

Run = Callable[[], object]
Load = Callable[[str, Mapping[str, Any]], Run]


def _infera(**options: Any) -> Load:
    import infera_gpu

    def load(model: str, feeds: Mapping[str, Any]) -> Run:
        session = infera_gpu.load(model, **options)
        return lambda: session.run(feeds)

    return load


def _infera_modules() -> None:
    """What infera_gpu imports when it loads its first model, but for the files of the operators that it has."""
    import onnx

    onnx.ModelProto()


def _compiled_modules() -> None:
    """The same with the kernels that numba compiles, which import it."""
    import_module("numba")
    _infera_modules()


def _onnxruntime() -> Load:
    import onnxruntime

    def load(model: str, feeds: Mapping[str, Any]) -> Run:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, feeds)

    return load


CONTENDERS: Mapping[str, tuple[Callable[[], Load], Callable[[], None]]] = {
    "infera": (partial(_infera, device="cpu", threads=1, jit=False), _infera_modules),
    "infera[jit]": (partial(_infera, device="cpu", threads=1, jit=True), _compiled_modules),
    "onnxruntime": (_onnxruntime, lambda: None),
}
"""How each is imported, and what it imports later."""

ON_GPU = "infera on a GPU"
_ALL: Mapping[str, tuple[Callable[[], Load], Callable[[], None]]] = {
    **CONTENDERS,
    ON_GPU: (partial(_infera, device="cuda"), _infera_modules),
}

STAGES = ("import", "modules", "load", "run", "again")
"""The package; what its first load imports; the model; its first inference, and its second."""


def stages(contender: str, model: str, feeds: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each of STAGES."""
    imported, modules = _ALL[contender]
    marks = [time.perf_counter()]
    load = imported()
    marks.append(time.perf_counter())
    modules()
    marks.append(time.perf_counter())
    run = load(model, feeds)
    marks.append(time.perf_counter())
    for _ in range(2):
        run()
        marks.append(time.perf_counter())
    return {stage: end - start for stage, (start, end) in zip(STAGES, pairwise(marks), strict=True)}


if __name__ == "__main__":
    with np.load(sys.argv[3]) as given:
        print(json.dumps(stages(sys.argv[1], sys.argv[2], dict(given))))

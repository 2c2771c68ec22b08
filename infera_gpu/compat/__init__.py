"""onnxruntime's API for the parts people use, so that changing one import moves existing code.

>>> import infera_gpu as ort                                                        # doctest: +SKIP
>>> session = ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])  # doctest: +SKIP
>>> session.run(None, {"x": x})                                                      # doctest: +SKIP

What is the same, what is accepted without effect and what is refused: docs/onnxruntime.md.
"""

from __future__ import annotations

from infera_gpu.compat.binding import IOBinding
from infera_gpu.compat.inference import InferenceSession
from infera_gpu.compat.options import (
    ExecutionMode,
    GraphOptimizationLevel,
    RunOptions,
    SessionOptions,
    set_default_logger_severity,
    set_default_logger_verbosity,
    set_seed,
)
from infera_gpu.compat.ortvalue import OrtValue
from infera_gpu.compat.providers import get_all_providers, get_available_providers, get_device, preload_dlls
from infera_gpu.compat.types import ModelMetadata, NodeArg

__all__ = [
    "ExecutionMode",
    "GraphOptimizationLevel",
    "IOBinding",
    "InferenceSession",
    "ModelMetadata",
    "NodeArg",
    "OrtValue",
    "RunOptions",
    "SessionOptions",
    "get_all_providers",
    "get_available_providers",
    "get_device",
    "preload_dlls",
    "set_default_logger_severity",
    "set_default_logger_verbosity",
    "set_seed",
]

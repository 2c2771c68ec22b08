"""infera_gpu: ONNX models on an NVIDIA GPU with CuPy and Triton kernels, and the same answers from NumPy without one.

>>> import infera_gpu
>>> session = infera_gpu.load("model.onnx")              # doctest: +SKIP
>>> session.run({"x": x})["y"]                            # doctest: +SKIP
"""

from __future__ import annotations

from infera_gpu.budget import VramBudget
from infera_gpu.compat import (
    ExecutionMode,
    GraphOptimizationLevel,
    InferenceSession,
    IOBinding,
    ModelMetadata,
    NodeArg,
    OrtValue,
    RunOptions,
    SessionOptions,
    get_all_providers,
    get_available_providers,
    get_device,
    preload_dlls,
    set_default_logger_severity,
    set_default_logger_verbosity,
    set_seed,
)
from infera_gpu.errors import (
    DeviceError,
    DeviceLostError,
    FetchError,
    InferaError,
    InputError,
    InvalidModel,
    InvarianceError,
    ModelError,
    OutOfMemoryError,
    PlanError,
    UnreachableError,
    UnsupportedOperatorError,
)
from infera_gpu.lease import Arena
from infera_gpu.opening import load
from infera_gpu.plan import Plan
from infera_gpu.session import Session
from infera_gpu.spec import TensorSpec

__version__ = "0.1.0"

__all__ = [
    "Arena",
    "DeviceError",
    "DeviceLostError",
    "ExecutionMode",
    "FetchError",
    "GraphOptimizationLevel",
    "IOBinding",
    "InferaError",
    "InferenceSession",
    "InputError",
    "InvalidModel",
    "InvarianceError",
    "ModelError",
    "ModelMetadata",
    "NodeArg",
    "OrtValue",
    "OutOfMemoryError",
    "Plan",
    "PlanError",
    "RunOptions",
    "Session",
    "SessionOptions",
    "TensorSpec",
    "UnreachableError",
    "UnsupportedOperatorError",
    "VramBudget",
    "__version__",
    "get_all_providers",
    "get_available_providers",
    "get_device",
    "load",
    "preload_dlls",
    "set_default_logger_severity",
    "set_default_logger_verbosity",
    "set_seed",
]

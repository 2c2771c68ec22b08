"""infera_gpu: ONNX models on an NVIDIA GPU with CuPy and Triton kernels, and the same answers from NumPy without one.

>>> import infera_gpu
>>> session = infera_gpu.load("model.onnx")              # doctest: +SKIP
>>> session.run({"x": x})["y"]                            # doctest: +SKIP
"""

from __future__ import annotations

from infera_gpu.compat import (
    GraphOptimizationLevel,
    InferenceSession,
    SessionOptions,
    get_available_providers,
    get_device,
)
from infera_gpu.errors import (
    DeviceError,
    FetchError,
    InferaError,
    InputError,
    ModelError,
    OutOfMemoryError,
    PlanError,
    UnreachableError,
    UnsupportedOperatorError,
)
from infera_gpu.plan import Plan
from infera_gpu.session import Session, load
from infera_gpu.spec import TensorSpec

__version__ = "0.1.0"

__all__ = [
    "DeviceError",
    "FetchError",
    "GraphOptimizationLevel",
    "InferaError",
    "InferenceSession",
    "InputError",
    "ModelError",
    "OutOfMemoryError",
    "Plan",
    "PlanError",
    "Session",
    "SessionOptions",
    "TensorSpec",
    "UnreachableError",
    "UnsupportedOperatorError",
    "__version__",
    "get_available_providers",
    "get_device",
    "load",
]

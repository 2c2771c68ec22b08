"""Launching Triton kernels without torch. Importing this loads neither triton nor cupy.

`CudaLauncher` runs them on a GPU; `CompileLauncher` compiles them for one, `InterpreterLauncher` interprets them on
NumPy arrays and `RecordingLauncher` only notes what would run, all three without a GPU.
"""

from infera_kernels.calls import Call
from infera_kernels.launch.binary import Inspection
from infera_kernels.launch.cache import KernelCache
from infera_kernels.launch.compiling import CompileLauncher
from infera_kernels.launch.cuda import CudaLauncher, CupyDriver, Driver
from infera_kernels.launch.descriptors import Descriptor
from infera_kernels.launch.interpreter import InterpreterLauncher
from infera_kernels.launch.recording import Launch, RecordingLauncher
from infera_kernels.launch.types import (
    Const,
    Launcher,
    LaunchError,
    Target,
    Typed,
    Unhinted,
    cudnn_of,
    describes,
    library_of,
    nominal_target,
    target_of,
)

__all__ = [
    "Call",
    "CompileLauncher",
    "Const",
    "CudaLauncher",
    "CupyDriver",
    "Descriptor",
    "Driver",
    "Inspection",
    "InterpreterLauncher",
    "KernelCache",
    "Launch",
    "LaunchError",
    "Launcher",
    "RecordingLauncher",
    "Target",
    "Typed",
    "Unhinted",
    "cudnn_of",
    "describes",
    "library_of",
    "nominal_target",
    "target_of",
]

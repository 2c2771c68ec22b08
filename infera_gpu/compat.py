"""onnxruntime's API for the parts people use, so that changing one import moves existing code.

>>> import infera_gpu as ort                                                        # doctest: +SKIP
>>> session = ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])  # doctest: +SKIP
>>> session.run(None, {"x": x})                                                      # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from infera_gpu.devices.cuda import why_unavailable
from infera_gpu.errors import DeviceError, InputError
from infera_gpu.loader import Source
from infera_gpu.session import Session, load
from infera_gpu.spec import Array, Dim, TensorSpec

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class GraphOptimizationLevel(IntEnum):
    """onnxruntime's levels: anything above ORT_DISABLE_ALL runs infera_gpu's passes."""

    ORT_DISABLE_ALL = 0
    ORT_ENABLE_BASIC = 1
    ORT_ENABLE_EXTENDED = 2
    ORT_ENABLE_LAYOUT = 3
    ORT_ENABLE_ALL = 99


class SessionOptions:
    """The options that mean something here. Assigning any other attribute raises AttributeError.

    `intra_op_num_threads` 0 leaves NumPy's BLAS as it is; `inter_op_num_threads` and `log_severity_level` are accepted
    and have no effect.
    """

    __slots__ = ("graph_optimization_level", "inter_op_num_threads", "intra_op_num_threads", "log_severity_level")

    graph_optimization_level: GraphOptimizationLevel
    inter_op_num_threads: int
    intra_op_num_threads: int
    log_severity_level: int

    def __init__(self) -> None:
        self.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL
        self.inter_op_num_threads = self.intra_op_num_threads = 0
        self.log_severity_level = 2


@dataclass(frozen=True, slots=True)
class NodeArg:
    """An input or output: its name, its shape (ints, symbols, None) and its type as onnxruntime spells it."""

    name: str
    shape: list[Dim]
    type: str


_TYPES = {"float32": "float", "float64": "double", "object": "string"}


def _arg(name: str, spec: TensorSpec) -> NodeArg:
    return NodeArg(name, list(spec.shape), f"tensor({_TYPES.get(spec.dtype.name, spec.dtype.name)})")


def get_available_providers() -> list[str]:
    """The providers that work on this machine, the preferred one first."""
    return [CPU] if why_unavailable() else [CUDA, CPU]


def get_device() -> str:
    """ "GPU" or "CPU"."""
    return "CPU" if why_unavailable() else "GPU"


Provider = str | tuple[str, Mapping[str, Any]]


def _device(providers: Sequence[Provider] | None, options: Sequence[Mapping[str, Any]] | None) -> str:
    """The device of the first provider that works, as onnxruntime chooses."""
    if not providers:
        return "auto"
    given = list(options or [{}] * len(providers))
    for provider, extra in zip(providers, given, strict=True):
        name, settings = (provider, extra) if isinstance(provider, str) else (provider[0], provider[1])
        if name == CUDA and not why_unavailable():
            return f"cuda:{int(settings.get('device_id', 0))}"
        if name == CPU:
            return "cpu"
        if name != CUDA:
            raise DeviceError(f"unknown provider '{name}'; expected {CUDA} or {CPU}")
    raise DeviceError(f"{CUDA} is not available ({why_unavailable()}); add '{CPU}' to providers to fall back")


class InferenceSession:
    """onnxruntime.InferenceSession over an infera_gpu.Session, which is `session`."""

    def __init__(
        self,
        path_or_bytes: Source,
        sess_options: SessionOptions | None = None,
        providers: Sequence[Provider] | None = None,
        provider_options: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        options = sess_options or SessionOptions()
        self._options = options
        self.session: Session = load(
            path_or_bytes,
            device=_device(providers, provider_options),
            threads=options.intra_op_num_threads or None,
            fuse=options.graph_optimization_level > GraphOptimizationLevel.ORT_DISABLE_ALL,
        )

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: object = None
    ) -> list[Array]:
        """The outputs named, in that order; all of them for None. Raises InputError for a name that is no output."""
        names = list(self.session.outputs) if not output_names else list(output_names)
        for name in names:
            if name not in self.session.outputs:
                raise InputError(f"'{name}' is not an output; the outputs are: {', '.join(self.session.outputs)}")
        results = self.session.run(input_feed)
        return [results[name] for name in names]

    def get_inputs(self) -> list[NodeArg]:
        return [_arg(k, s) for k, s in self.session.inputs.items()]

    def get_outputs(self) -> list[NodeArg]:
        return [_arg(k, s) for k, s in self.session.outputs.items()]

    def get_providers(self) -> list[str]:
        return [CPU] if self.session.device.name == "cpu" else [CUDA, CPU]

    def get_session_options(self) -> SessionOptions:
        return self._options

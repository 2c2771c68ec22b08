"""ONNX's backend interface, through which the ONNX project's own test suite runs a model: `onnx.backend.base.Backend`.

import infera_gpu.backend as backend
outputs = backend.prepare(onnx.load("model.onnx"), "CPU").run([x])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import helper
from onnx.backend.base import Backend, BackendRep, namedtupledict

from infera_gpu.devices.cuda import why_unavailable
from infera_gpu.errors import DeviceError, InputError
from infera_gpu.opening import load
from infera_gpu.session import Session

_KINDS = {"CPU": "cpu", "CUDA": "cuda"}


class InferaRep(BackendRep):
    """A prepared model. `run` takes its inputs in order, or by name, and gives the outputs in order and by name."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Raises InputError for more or fewer inputs than the model has."""
        names = tuple(self.session.inputs)
        if isinstance(inputs, Mapping):
            feeds = dict(inputs)
        else:
            given = list(inputs) if isinstance(inputs, Sequence) else [inputs]
            if len(given) != len(names):
                raise InputError(f"{len(given)} inputs were given, the model has {len(names)}: {', '.join(names)}")
            feeds = dict(zip(names, given, strict=True))
        results = self.session.run(feeds)
        made: tuple[Any, ...] = namedtupledict("Outputs", list(results))(*results.values())
        return made


class InferaBackend(Backend):
    """Loads models into sessions. `kwargs` are `infera_gpu.load`'s."""

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether "CPU", "CUDA" or "CUDA:N" can be used here."""
        kind, _, index = device.partition(":")
        return kind == "CPU" or (kind == "CUDA" and (index.isdigit() or not index) and why_unavailable() is None)

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> InferaRep:
        """Raises ModelError, UnsupportedOperatorError or DeviceError."""
        kind, _, index = device.partition(":")
        if kind not in _KINDS:
            raise DeviceError(f"device '{device}' is unknown, expected CPU, CUDA or CUDA:N")
        return InferaRep(load(model, device=_KINDS[kind] + (f":{index}" if index else ""), **kwargs))

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any) -> tuple[Any, ...]:
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(
        cls,
        node: onnx.NodeProto,
        inputs: Any,
        device: str = "CPU",
        outputs_info: Sequence[tuple[Any, tuple[int, ...]]] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """One node of the newest opset, unless `opset_version` says another, on arrays in the order of its inputs."""
        opset = int(kwargs.pop("opset_version", onnx.defs.onnx_opset_version()))
        names = [i for i in node.input if i]
        arrays = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
        graph = helper.make_graph(
            [node],
            node.op_type,
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
                for n, a in zip(names, arrays, strict=True)
            ],
            [onnx.ValueInfoProto(name=o) for o in node.output if o],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(node.domain, opset)])
        return cls.run_model(model, arrays, device, **kwargs)


is_compatible = InferaBackend.is_compatible
prepare = InferaBackend.prepare
run_model = InferaBackend.run_model
run_node = InferaBackend.run_node
supports_device = InferaBackend.supports_device

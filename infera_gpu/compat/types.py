"""How onnxruntime describes values and models, and how it spells types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from infera_gpu.errors import InputError
from infera_gpu.spec import Dim, DType, MapSpec, OptionalSpec, SequenceSpec, TensorSpec, ValueSpec, dtype_of_onnx

_SPELLINGS = {
    "float32": "float",
    "float64": "double",
    "object": "string",
    "float8_e8m0fnu": "float8e8m0",
    "float6_e2m3fn": "float6e2m3",
    "float6_e3m2fn": "float6e3m2",
    "float4_e2m1fn": "float4e2m1",
}


def type_name(dtype: DType) -> str:
    """onnxruntime's name of a tensor type: `tensor(float)`, `tensor(int64)`, `tensor(float8e4m3fn)`."""
    return f"tensor({_SPELLINGS.get(dtype.name, dtype.name.replace('_', ''))})"


def spelled(spec: ValueSpec | None) -> str:
    """onnxruntime's name of any type: `seq(tensor(float))`, `optional(tensor(int64))`, `map(int64,tensor(float))`."""
    match spec:
        case TensorSpec():
            return type_name(spec.dtype)
        case SequenceSpec():
            return f"seq({spelled(spec.elem)})"
        case OptionalSpec():
            return f"optional({spelled(spec.elem)})"
        case MapSpec():
            return f"map({_SPELLINGS.get(spec.key.name, spec.key.name)},{spelled(spec.value)})"
        case None:
            return "undefined"


def dtype_of(element_type: Any) -> DType:
    """The dtype of what onnxruntime takes as an element type: anything np.dtype takes, or a TensorProto.DataType.

    Raises InputError where it is neither.
    """
    try:
        return dtype_of_onnx(element_type) if isinstance(element_type, int) else np.dtype(element_type)
    except (KeyError, TypeError):
        raise InputError(
            f"{element_type!r} is no element type; expected a NumPy dtype or a TensorProto.DataType"
        ) from None


@dataclass(frozen=True, slots=True)
class NodeArg:
    """An input or output: its name, its shape (ints, symbols, None) and its type as onnxruntime spells it."""

    name: str
    shape: list[Dim]
    type: str

    @classmethod
    def of(cls, name: str, spec: ValueSpec) -> NodeArg:
        return cls(name, list(spec.shape) if isinstance(spec, TensorSpec) else [], spelled(spec))


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What the model file says about itself. `version` is the model's own, not its opset's."""

    custom_metadata_map: dict[str, str]
    description: str
    domain: str
    graph_description: str
    graph_name: str
    producer_name: str
    version: int

"""Cases as parts of an ONNX model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from infera_gpu.op import GraphText
from infera_gpu.spec import onnx_of_dtype


def value_info(name: str, value: Any) -> onnx.ValueInfoProto:
    """The type of an array, with its shape, of a list of arrays, or of a map."""
    if isinstance(value, dict):
        (key, found), *_ = value.items()
        kinds = {int: onnx.TensorProto.INT64, float: onnx.TensorProto.FLOAT, str: onnx.TensorProto.STRING}
        inner = helper.make_tensor_type_proto(kinds[type(found)], [])
        return helper.make_value_info(name, helper.make_map_type_proto(kinds[type(key)], inner))
    if isinstance(value, list):
        elem = value[0].dtype if value else np.dtype(np.float32)
        kind = helper.make_tensor_type_proto(onnx_of_dtype(elem), None)
        return helper.make_value_info(name, helper.make_sequence_type_proto(kind))
    return helper.make_tensor_value_info(name, onnx_of_dtype(value.dtype), value.shape)


def attributes(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as `helper.make_node` takes them."""

    def proto(value: Any) -> Any:
        if isinstance(value, GraphText):
            return onnx.parser.parse_graph(value.text)
        return numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value

    return {k: proto(v) for k, v in attrs.items()}

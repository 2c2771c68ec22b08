"""DataType of Triton's model configuration, in NumPy's terms."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from infera_gpu.errors import ModelError
from infera_server.codec import DATATYPES
from infera_server.protocols.protos import message


@cache
def _types() -> Any:
    return message("inference.ModelConfig").DESCRIPTOR.file.enum_types_by_name["DataType"]


def type_name(data_type: int) -> str:
    """`TYPE_FP32` for 11."""
    return str(_types().values_by_number[data_type].name)


def datatype_name(data_type: int) -> str:
    """The protocol's name: `FP32` for TYPE_FP32, `BYTES` for TYPE_STRING."""
    name = type_name(data_type).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def type_of(datatype: str) -> int:
    """The DataType of a datatype of the protocol."""
    return int(_types().values_by_name[f"TYPE_{'STRING' if datatype == 'BYTES' else datatype}"].number)


def dtype_of(data_type: int) -> np.dtype[Any]:
    """The NumPy dtype of a DataType. Raises ModelError for TYPE_INVALID, which a forgotten `data_type` is."""
    found = DATATYPES.get(datatype_name(data_type))
    if found is None:
        raise ModelError("must specify 'data_type' for every tensor")
    return found

"""The members of a ModelInferRequest: parameters, inputs and outputs asked for. What is wrong has Triton's text."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from infera_server import codec
from infera_server.codec import short
from infera_server.errors import BadRequest
from infera_server.requests import Options, Output, Parameter, Region, check_output, options
from infera_server.scheduling.explanation import PARAMETER
from infera_server.scheduling.signature import Signature

EMPTY_FINAL = "triton_enable_empty_final_response"

# --- parameters ------------------------------------------------------------------------------------------------------

_KINDS: dict[str, tuple[str, ...]] = {
    "sequence_id": ("int64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "priority": ("int64_param", "uint64_param"),
    "timeout": ("int64_param",),
    EMPTY_FINAL: ("bool_param",),
    PARAMETER: ("bool_param",),
}
_OTHERS = frozenset({"int64_param", "bool_param", "string_param", "double_param"})


def options_of(parameters: Any) -> Options:
    """What the parameters ask for."""
    found: dict[str, Parameter] = {}
    for key, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if key in _KINDS:
            if kind not in _KINDS[key]:
                raise _wrong_kind(key, " or ".join(_KINDS[key]))
        elif key.startswith("triton_"):
            raise BadRequest(
                "parameter keys starting with 'triton_' are reserved for Triton usage. "
                f"Only the following keys starting with 'triton_' are allowed: {EMPTY_FINAL}"
            )
        elif kind not in _OTHERS:
            raise _wrong_kind(short(key), "int64_param, bool_param, or string_param")
        found[key] = getattr(value, kind)
    for key in ("priority", "timeout"):
        if found.get(key, 0) < 0:  # type: ignore[operator]  # both are integers
            raise BadRequest(f"invalid value for '{key}', expected value >= 0.")
    return options(found)


def traces(parameters: Any) -> bool:
    """Whether these parameters ask where the request's time went."""
    return PARAMETER in parameters and bool(parameters[PARAMETER].bool_param)


def _wrong_kind(key: str, expected: str) -> BadRequest:
    return BadRequest(f"invalid value type for '{key}' parameter, expected {expected}.")


# --- inputs ----------------------------------------------------------------------------------------------------------

_FIELDS: dict[str, tuple[str, ...]] = {
    "bool_contents": ("BOOL",),
    "int_contents": ("INT8", "INT16", "INT32"),
    "int64_contents": ("INT64",),
    "uint_contents": ("UINT8", "UINT16", "UINT32"),
    "uint64_contents": ("UINT64",),
    "fp32_contents": ("FP32",),
    "fp64_contents": ("FP64",),
    "bytes_contents": ("BYTES",),
}
"""The datatypes of each typed field; the last is the one that Triton names."""


def source_of(entry: Any, model: Signature) -> tuple[bytes | None, Region | None]:
    """An input's bytes if they are in a typed field, or where in shared memory they are; else they are raw ones."""
    region = _region(entry) if entry.parameters else None
    if not entry.HasField("contents"):
        return None, region
    where = f"'{short(entry.name)}' for model '{model.name}'"
    if region is not None:
        raise BadRequest(f"unexpected 'content' provided when using shared memory for input tensor {where}")
    return _typed(entry, where), None


def _typed(entry: Any, where: str) -> bytes:
    """The bytes of the one typed field that has values."""
    found: Any = None
    for field, values in entry.contents.ListFields():
        if found is not None:
            raise BadRequest(
                f"unexpected explicit tensor data for input tensor {where}, binary data was already supplied."
            )
        datatypes = _FIELDS[field.name]
        if entry.datatype not in datatypes:
            raise BadRequest(
                f"unexpected explicit tensor data for input tensor {where} of type '{datatypes[-1]}', "
                f"expected datatype '{short(entry.datatype)}'"
            )
        found = values
    if found is None:
        return b""
    if entry.datatype == "BYTES":
        return b"".join(struct.pack("<I", len(item)) + item for item in found)
    dtype = codec.DATATYPES[entry.datatype]
    try:
        return np.fromiter(found, dtype, len(found)).tobytes()
    except OverflowError:
        raise BadRequest(f"input tensor {where}: a number does not fit in {entry.datatype}") from None


# --- shared memory ---------------------------------------------------------------------------------------------------


def _region(entry: Any) -> Region | None:
    """Where in shared memory a tensor lies, if it does."""
    name, offset, size = (
        _member(entry, f"shared_memory_{key}", kind)
        for key, kind in (("region", "string_param"), ("offset", "int64_param"), ("byte_size", "int64_param"))
    )
    for key, value in (("offset", offset), ("byte_size", size)):
        if name is None and value is not None:
            raise BadRequest(
                f"'shared_memory_{key}' can not be specified without 'shared_memory_region' parameter "
                f"for tensor '{short(entry.name)}'"
            )
    if name is None:
        return None
    if size is None:
        raise BadRequest(
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter "
            f"for tensor '{short(entry.name)}'"
        )
    if size < 0 or (offset or 0) < 0:
        raise BadRequest(f"Invalid offset + byte size for shared memory region: '{short(name)}'")
    return Region(name, offset or 0, size)


def _member(entry: Any, key: str, kind: str) -> Any:
    if key not in entry.parameters:
        return None
    value = entry.parameters[key]
    if value.WhichOneof("parameter_choice") != kind:
        raise BadRequest(f"invalid value type for '{key}' parameter for tensor '{short(entry.name)}', expected {kind}.")
    return getattr(value, kind)


# --- outputs ---------------------------------------------------------------------------------------------------------


def outputs_of(entries: Any, model: Signature) -> list[Output]:
    wanted: dict[str, Output] = {}
    for entry in entries:
        name, region, classes = entry.name, None, 0
        if entry.parameters:
            region = _region(entry)
            classes = _classes(entry.parameters)
            if region is not None and classes:
                raise BadRequest("output can't set both 'shared_memory_region' and 'classification'")
        check_output(name, classes, model)
        wanted.setdefault(name, Output(name, True, classes, region))
    return list(wanted.values())


def _classes(parameters: Any) -> int:
    if "classification" not in parameters:
        return 0
    value = parameters["classification"]
    if value.WhichOneof("parameter_choice") != "int64_param":
        raise BadRequest("invalid value type for 'classification' parameter, expected int64_param")
    if value.int64_param <= 0:
        raise BadRequest("invalid value for 'classification' parameter, expected >= 0")
    return int(value.int64_param)

"""Tensors on the wire: little-endian bytes or JSON values <-> arrays, without a copy where the bytes allow it.

What cannot be read raises BadRequest. Texts are Triton's where it has one.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import orjson

from infera_server.errors import BadRequest
from infera_server.scheduling.rows import HostArray

Buffer: TypeAlias = bytes | memoryview

UNLOCKING, MAX_LOCKED = 500, 1 << 14
"""Elements that NumPy converts with the interpreter's lock held, and that are worth converting in such pieces."""

PIECE = 1 << 16
"""Elements of a tensor that are read from JSON or written at a time: the interpreter's lock is held meanwhile."""

MAX_DIMENSIONS = 32
MAX_DIMENSION = 2**31 - 1

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BYTES": np.dtype(object),
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_BINARY_ONLY = frozenset({"FP16", "BF16"})

# What NumPy may infer for a JSON list of each kind of datatype, and Triton's text for anything else.
_JSON_KINDS: dict[str, tuple[str, str]] = {
    "b": ("biu", "non-boolean as boolean"),
    "u": ("iu", "non-unsigned-integer as unsigned-integer"),
    "i": ("iu", "non-signed-integer as signed-integer"),
    "f": ("iuf", "non-number as double"),
}


def datatype_of(dtype: np.dtype[Any], name: str) -> str:
    """The protocol's name of a dtype. Raises ValueError, naming tensor `name`, where it has none."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ValueError(f"'{name}' is {dtype.name}, which the V2 protocol cannot carry") from None


def short(text: str, most: int = 100) -> str:
    """Text of a request, fit for quoting back."""
    return text if len(text) <= most else text[:most] + "..."


def shape_of(value: object) -> tuple[int, ...]:
    """A shape out of JSON: non-negative integers, no more and no larger than an array may have."""
    if type(value) is not list:
        raise BadRequest("Unable to parse 'shape': attempt to access JSON non-array as array")
    if len(value) > MAX_DIMENSIONS:
        raise BadRequest(f"Unable to parse 'shape': {len(value)} dimensions, at most {MAX_DIMENSIONS} are supported")
    for dim in value:
        if type(dim) is not int or dim < 0:
            raise BadRequest("Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer")
        if dim > MAX_DIMENSION:
            raise BadRequest(f"Unable to parse 'shape': dimension {dim} is over {MAX_DIMENSION}")
    return tuple(value)


# --- bytes -----------------------------------------------------------------------------------------------------------


def from_bytes(data: Buffer, dtype: np.dtype[Any], shape: tuple[int, ...], name: str, model: str = "") -> HostArray:
    """The tensor in `data`, whose length is exactly that of the shape: a read-only view, maybe unaligned.

    BYTES elements become str; what is not UTF-8 survives the round trip as surrogate escapes. Errors name the
    tensor and the `model` whose it is.
    """
    if dtype.hasobject:
        return _reshape(_strings_from_bytes(data, math.prod(shape), name, model), shape, name)
    flat = np.frombuffer(data, np.uint8 if dtype.kind == "b" else dtype)
    if dtype.kind == "b":
        flat = flat != 0  # a bool byte other than 0 and 1 is undefined behaviour in most kernels
    return _reshape(flat, shape, name)


def nbytes_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int | None:
    """Bytes of such a tensor; None for BYTES, where only the data says."""
    return None if dtype.hasobject else math.prod(shape) * dtype.itemsize


def to_bytes(array: HostArray) -> Buffer:
    """The tensor's bytes, row-major; a view of a large contiguous array, which must not change afterwards."""
    if array.dtype.hasobject:
        return b"".join(struct.pack("<I", len(raw)) + raw for raw in map(_encode, array.ravel()))
    if array.nbytes < 1 << 16:
        return array.tobytes()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def text_bytes(array: HostArray) -> int:
    """About how many bytes the elements of BYTES have."""
    return sum(len(item) if isinstance(item, bytes | str) else 1 for item in array.flat)


def _encode(item: object) -> bytes:
    return item if isinstance(item, bytes) else str(item).encode("utf-8", "surrogateescape")


def _strings_from_bytes(data: Buffer, count: int, name: str, model: str) -> HostArray:
    items: list[str] = []
    offset, end = 0, len(data)
    while offset < end:
        start = offset + 4
        if start > end:
            raise BadRequest(
                f"incomplete string length indicator for {_input_of(name, model)}, expecting 4 bytes but only "
                f"{end - offset} bytes available. Please make sure the string length indicator is in one buffer."
            )
        if len(items) == count:
            raise BadRequest(
                f"unexpected number of string elements {count + 1} for {_input_of(name, model)}, expecting {count}"
            )
        size = int.from_bytes(data[offset:start], "little")
        offset = start + size
        if offset > end:
            raise BadRequest(
                f"incomplete string data for {_input_of(name)}, expecting string of length {size} "
                f"but only {end - start} bytes available"
            )
        items.append(bytes(data[start:offset]).decode("utf-8", "surrogateescape"))
    if len(items) != count:
        raise BadRequest(f"expected {count} string elements for {_input_of(name, model)}, got {len(items)}")
    return _strings(items)


def _input_of(name: str, model: str = "") -> str:
    return f"inference input '{name}' for model '{model}'" if model else f"inference input '{name}'"


def _strings(items: list[str]) -> HostArray:
    flat = np.empty(len(items), object)
    flat[:] = items
    return flat


def _reshape(flat: HostArray, shape: tuple[int, ...], name: str) -> HostArray:
    try:
        return flat.reshape(shape)
    except ValueError:  # a zero beside dimensions whose product no array can have
        raise BadRequest(f"input '{name}': no array has the shape {list(shape)}") from None


# --- JSON ------------------------------------------------------------------------------------------------------------


def check_json(verb: str, datatype: str, what: str) -> None:
    """Raises BadRequest for a datatype that goes in binary only: JSON has no 16-bit floats."""
    if datatype in _BINARY_ONLY:
        raise BadRequest(
            f"{verb} {datatype} data via JSON is not supported. Please use the binary data format for {what}"
        )


def from_json(data: object, datatype: str, shape: tuple[int, ...], name: str) -> HostArray:
    """The tensor in a JSON list, flat or nested in any way: its elements in row-major order fill the shape."""
    check_json("receiving", datatype, f"input {name}")
    if type(data) is not list:
        raise BadRequest("Unable to parse 'data': attempt to access JSON non-array as array")
    if len(data) > max(math.prod(shape), *shape, 1):  # before anything is made of a million empty lists
        raise BadRequest("Unable to parse 'data': Shape does not match true shape of 'data' field")
    dtype = DATATYPES[datatype]
    flat = _strings_from_json(data) if dtype.hasobject else _numbers_from_json(data, dtype)
    if flat.size != math.prod(shape):
        raise BadRequest("Unable to parse 'data': Shape does not match true shape of 'data' field")
    return _reshape(flat.reshape(-1), shape, name)


def _numbers_from_json(data: list[Any], dtype: np.dtype[Any]) -> HostArray:
    kinds, text = _JSON_KINDS[dtype.kind]
    try:
        found = _array(data)
    except (ValueError, OverflowError, RecursionError):
        raise BadRequest("Unable to parse 'data': Shape does not match true shape of 'data' field") from None
    if found.size == 0:
        return np.empty(found.shape, dtype)
    if dtype.kind in "iu" and found.dtype.kind == "f":  # fractions, or integers that only UINT64 holds beside others
        found = np.array(data, object)
        if not all(type(value) is int for value in found.flat):
            raise BadRequest(f"Unable to parse 'data': attempt to access JSON {text}")
    elif found.dtype.kind not in kinds:
        raise BadRequest(f"Unable to parse 'data': attempt to access JSON {text}")
    try:
        with np.errstate(over="raise", invalid="ignore"):
            values = _cast(found, dtype)
    except (FloatingPointError, OverflowError):
        raise BadRequest(f"Unable to parse 'data': a number is too big for {_NAMES[dtype]}") from None
    if dtype.kind != "f" and found.dtype != dtype and not np.array_equal(values, found):
        raise BadRequest(f"Unable to parse 'data': a number does not fit in {_NAMES[dtype]}")
    return values


def _array(data: list[Any]) -> HostArray:
    """`np.array(data)`; of a long list in a list only that."""
    if len(data) == 1 and type(data[0]) is list and len(data[0]) > PIECE:
        data = data[0]
    if len(data) <= PIECE:
        return np.array(data)
    return np.concatenate([np.array(data[start : start + PIECE]) for start in range(0, len(data), PIECE)])


def _cast(array: HostArray, dtype: np.dtype[Any]) -> HostArray:
    """`array.astype(dtype)`. NumPy lets go of the interpreter's lock for what it takes to be long work, from 500
    elements on; getting it back from a busy engine thread takes longer than some thousands of them."""
    if array.dtype == dtype or array.size > MAX_LOCKED or not array.flags.c_contiguous:
        return array.astype(dtype)
    cast = np.empty(array.shape, dtype)
    to, of = cast.reshape(-1), array.reshape(-1)
    for start in range(0, array.size, UNLOCKING):
        to[start : start + UNLOCKING] = of[start : start + UNLOCKING]
    return cast


def _strings_from_json(data: list[Any]) -> HostArray:
    items: list[str] = []
    stack = [iter(data)]
    while stack:
        for item in stack[-1]:
            if type(item) is str:
                items.append(item)
            elif type(item) is list:
                if len(stack) >= MAX_DIMENSIONS:
                    raise BadRequest(f"Unable to parse 'data': nested deeper than {MAX_DIMENSIONS} lists")
                stack.append(iter(item))
                break
            else:
                raise BadRequest("Unable to parse JSON bytes array: attempt to access JSON non-string as string")
        else:
            stack.pop()
    try:
        "".join(items).encode()
    except UnicodeEncodeError:
        raise BadRequest("Unable to parse 'data': a string holds a lone surrogate") from None
    return _strings(items)


def to_json(array: HostArray, datatype: str, name: str) -> bytes:
    """The flat JSON list. Not-a-number and infinities are written as Triton writes them."""
    if datatype == "BYTES":
        texts = [
            item.decode("utf-8", "surrogateescape") if isinstance(item, bytes) else str(item) for item in array.flat
        ]
        try:
            return orjson.dumps(texts)
        except orjson.JSONEncodeError:
            raise BadRequest(f"output '{name}' is not UTF-8. Please use the binary data format for it") from None
    flat = np.ascontiguousarray(array).reshape(-1)
    write = _any_numbers if flat.dtype.kind == "f" and not np.isfinite(flat).all() else _numbers
    if flat.size <= PIECE:
        return write(flat)
    pieces = [write(flat[start : start + PIECE]) for start in range(0, flat.size, PIECE)]
    return b"[%s]" % b",".join([piece[1:-1] for piece in pieces])


def _numbers(flat: HostArray) -> bytes:
    return orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)


def _any_numbers(flat: HostArray) -> bytes:
    return json.dumps(flat.tolist()).encode()


# --- classification --------------------------------------------------------------------------------------------------


def top_classes(array: HostArray, count: int, rows: bool, labels: Sequence[str] = ()) -> HostArray:
    """`score:index[:label]` of the `count` largest scores, best first, ties by index; with `rows`, of each row."""
    scores = array.reshape(array.shape[0], -1) if rows else array.reshape(1, -1)
    count = min(count, scores.shape[1])
    order = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :count]
    text = "{:.6f}:{}" if array.dtype.kind not in "biu" else "{:d}:{}"
    best = np.empty(order.shape, object)
    for row, column in np.ndindex(*order.shape):
        index = order[row, column]
        named = f":{labels[int(index)]}" if index < len(labels) else ""
        best[row, column] = text.format(scores[row, index].item(), index) + named
    return best if rows else best[0]

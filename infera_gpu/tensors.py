"""TensorProto and SparseTensorProto -> arrays. Sizes are checked before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np

from infera_gpu.errors import InvalidModel
from infera_gpu.external import ExternalFiles
from infera_gpu.graph import FOLD_LIMIT, HostArray
from infera_gpu.spec import DType, dtype_of_onnx
from infera_gpu.wellformed import text

if TYPE_CHECKING:
    import onnx

Buffer: TypeAlias = bytes | memoryview | HostArray

_PACKED_BITS: Mapping[DType, int] = {
    np.dtype(ml_dtypes.int4): 4,
    np.dtype(ml_dtypes.uint4): 4,
    np.dtype(ml_dtypes.float4_e2m1fn): 4,
    np.dtype(ml_dtypes.int2): 2,
    np.dtype(ml_dtypes.uint2): 2,
    np.dtype(ml_dtypes.float6_e2m3fn): 6,
    np.dtype(ml_dtypes.float6_e3m2fn): 6,
}
"""Types whose elements follow each other bit by bit, from the lowest bits on; NumPy gives each a byte of its own."""

_NATIVE = "biufc"
"""The kinds of types whose elements are whole bytes: a dtype takes long to look up."""

_FIELDS: Mapping[int, tuple[str, DType]] = {
    1: ("float_data", np.dtype(np.float32)),
    **dict.fromkeys((2, 3, 6), ("int32_data", np.dtype(np.int32))),
    7: ("int64_data", np.dtype(np.int64)),
    11: ("double_data", np.dtype(np.float64)),
}
"""By data type: where a TensorProto has its elements as numbers, and as which; of the types whose fields hold nothing
but the numbers themselves. onnx asks more of each tensor, and models of small layers have many."""

_EXTERNAL = 1
"""TensorProto.DataLocation"""

DENSEST = 64
"""Times as many bytes as are stored may be made of sparse tensors."""

FREE_DENSE = 16 << 20
"""Bytes that may be made of them in any case."""

MAX_RANK = 32
"""Axes of a tensor; NumPy itself stops at 64."""


class Tensors:
    """Reads the tensors of one model; `model` is its path, None where it came without one.

    Arrays are read-only. Those in external files look into the file, which is `mapped`, or read as a whole; what has to
    be copied out of one (packed or unaligned elements, booleans) is read once, and what is read so never adds up to
    more than the files hold.
    """

    def __init__(self, model: Path | None = None, mapped: bool = True) -> None:
        self._files = None if model is None else ExternalFiles(model, mapped)
        self._copies: dict[tuple[str, int, tuple[int, ...], int], HostArray] = {}
        self._copied = 0
        self._dense = self._stored = 0

    def array(self, tensor: onnx.TensorProto, what: str, body: Buffer | None = None) -> HostArray:
        """The tensor as an array. `body` is its raw data, where that has been cut out.

        Raises InvalidModel, naming it as `what`.
        """
        dtype, shape = self._type(tensor, what)
        if tensor.HasField("segment"):
            raise InvalidModel(f"{what} is a segment of a tensor, which is not supported")
        if tensor.data_location == _EXTERNAL:
            array = self._external(tensor, dtype, shape, what)
        elif tensor.HasField("raw_data"):
            array = _elements(tensor.raw_data if body is None else body, dtype, shape, what)
        else:
            array = _typed(tensor, dtype, shape, what)
        array.flags.writeable = False
        return array

    def _type(self, tensor: onnx.TensorProto, what: str) -> tuple[DType, tuple[int, ...]]:
        try:
            dtype = dtype_of_onnx(tensor.data_type)
        except KeyError:
            raise InvalidModel(f"{what} has the unknown element type {tensor.data_type}") from None
        return dtype, _shape(tensor.dims, what)

    def _external(self, tensor: onnx.TensorProto, dtype: DType, shape: tuple[int, ...], what: str) -> HostArray:
        if self._files is None:
            raise InvalidModel(f"{what} lies in an external file; load the model from its path instead of from bytes")
        if dtype.kind == "O":
            raise InvalidModel(f"{what} has strings in an external file, which ONNX does not allow")
        entries = {text(e.key): text(e.value) for e in tensor.external_data}
        data = self._files.read(entries.get("location", ""))
        offset = _number(entries, "offset", 0, what)
        length = _number(entries, "length", nbytes(dtype, shape), what)
        if offset + length > len(data):
            raise InvalidModel(
                f"{what} is said to lie at bytes {offset:,} to {offset + length:,} of "
                f"'{entries['location']}', which has {len(data):,}"
            )
        key = (entries["location"], offset, shape, tensor.data_type)
        if key in self._copies:
            return self._copies[key]
        array = _elements(data[offset : offset + length], dtype, shape, what)
        if np.shares_memory(array, np.frombuffer(data, np.uint8)) or not array.size:
            return array
        self._copied += length
        if self._copied > self._files.nbytes:
            raise InvalidModel(f"{what}: tensors that overlap in '{entries['location']}' would have to be copied")
        self._copies[key] = array
        return array

    def sparse(self, tensor: onnx.SparseTensorProto, what: str) -> HostArray:
        """The sparse tensor, written out. Raises InvalidModel, also where they are large beside what is stored."""
        values = self.array(tensor.values, f"{what}: its values")
        indices = self.array(tensor.indices, f"{what}: its indices")
        shape = _shape(tensor.dims, what)
        count = len(values) if values.ndim == 1 else -1
        if indices.dtype != np.int64 or indices.shape not in ((count,), (count, len(shape))):
            raise InvalidModel(
                f"{what} has values {list(values.shape)} and indices {indices.dtype.name}{list(indices.shape)}, "
                f"expected [n] values and int64 indices [n] or [n, {len(shape)}]"
            )
        self._dense += math.prod(shape) * values.dtype.itemsize
        self._stored += values.nbytes + indices.nbytes
        most = min(FOLD_LIMIT, max(FREE_DENSE, DENSEST * self._stored))
        if self._dense > most:
            raise InvalidModel(f"{what}: sparse tensors of {self._dense:,} bytes written out, at most {most:,} are")
        linear = indices
        if indices.ndim == 2:
            if count and not ((indices >= 0) & (indices < np.array(shape, np.int64))).all():
                raise InvalidModel(f"{what} has an index outside of {list(shape)}")
            strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            linear = indices @ np.array(strides, np.int64)
        if count and not (linear.min() >= 0 and linear.max() < math.prod(shape)):
            raise InvalidModel(f"{what} has an index outside of {list(shape)}")
        if (linear[1:] <= linear[:-1]).any():
            raise InvalidModel(f"{what} has indices that do not ascend")
        dense = np.full(math.prod(shape), "" if values.dtype.kind == "O" else 0, values.dtype)
        dense[linear] = values
        dense.flags.writeable = False
        return dense.reshape(shape)


def nbytes(dtype: DType, shape: tuple[int, ...]) -> int:
    """Bytes that a file needs for a tensor."""
    if dtype.kind in _NATIVE:
        return math.prod(shape) * dtype.itemsize
    return -(-math.prod(shape) * _PACKED_BITS.get(dtype, 8 * dtype.itemsize) // 8)


def _shape(dims: Any, what: str) -> tuple[int, ...]:
    shape = tuple(map(int, dims))
    if not shape or (min(shape) > 0 and len(shape) <= MAX_RANK and math.prod(shape) < 1 << 58):
        return shape
    if any(d < 0 for d in shape):
        raise InvalidModel(f"{what} has the shape {list(shape)}")
    if len(shape) > MAX_RANK:
        raise InvalidModel(f"{what} has {len(shape)} axes, at most {MAX_RANK} are supported")
    if math.prod(d for d in shape if d) >= 1 << 58:
        raise InvalidModel(f"{what} has the shape {list(shape)}, which no memory holds")
    return shape


def _number(entries: dict[str, str], key: str, default: int, what: str) -> int:
    given = entries.get(key)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 20):
        raise InvalidModel(f"{what}: its external data has the {key} {given!r:.40}, expected a number of bytes")
    return int(given)


def _elements(data: Buffer, dtype: DType, shape: tuple[int, ...], what: str) -> HostArray:
    """Little-endian bytes as an array: a view where elements are aligned, whole bytes and no booleans."""
    expected = nbytes(dtype, shape)
    if dtype.kind == "O":
        raise InvalidModel(f"{what} has strings as raw bytes, which ONNX does not allow")
    if len(data) != expected:
        raise InvalidModel(f"{what} of shape {list(shape)} needs {expected:,} bytes, it has {len(data):,}")
    if not expected:
        return np.empty(shape, dtype)
    bits = None if dtype.kind in _NATIVE else _PACKED_BITS.get(dtype)
    if bits:
        return _low_bits(_unpacked(np.frombuffer(data, np.uint8), bits, math.prod(shape)), dtype, bits).reshape(shape)
    if dtype.kind == "b":
        truth: HostArray = np.frombuffer(data, np.uint8) != 0
        return truth.reshape(shape)
    array: HostArray = np.frombuffer(data, dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


def _unpacked(packed: HostArray, bits: int, count: int) -> HostArray:
    """The first `count` groups of `bits` bits, one a byte."""
    if 8 % bits:
        single = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
        return np.packbits(single, axis=1, bitorder="little")[:, 0]
    shifts = np.arange(0, 8, bits).astype(np.uint8)
    values: HostArray = (packed[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(-1)[:count]


def _low_bits(values: HostArray, dtype: DType, bits: int) -> HostArray:
    """Bit patterns of a packed type, one a byte, as that type."""
    if dtype.name.startswith("int"):
        sign = np.uint8(1 << (bits - 1))
        return ((values ^ sign).astype(np.int8) - np.int8(sign)).astype(dtype)
    return values.astype(dtype) if dtype.name.startswith("uint") else values.view(dtype)


def _typed(tensor: onnx.TensorProto, dtype: DType, shape: tuple[int, ...], what: str) -> HostArray:
    """The elements of a tensor that has them in the field of their type."""
    field = _FIELDS.get(tensor.data_type)
    try:
        if field is not None:
            numbers: HostArray = np.array(getattr(tensor, field[0]), field[1])
            return numbers.astype(dtype, copy=False).reshape(shape)
        from onnx import numpy_helper

        made: HostArray = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise InvalidModel(f"{what} of shape {list(shape)} is damaged: {error}") from None
    return made

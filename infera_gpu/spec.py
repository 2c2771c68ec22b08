"""Tensor types: a shape and a dtype, and the table between ONNX's element types and NumPy's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

Dim: TypeAlias = int | str | None
"""A size, a symbol (equal symbols are equal sizes), or None where nothing is known."""

Array: TypeAlias = Any
"""A numpy.ndarray or a cupy.ndarray: the runtime is written for both and imports only the first."""

DType: TypeAlias = np.dtype[Any]

_INT = frozenset({int})

# TensorProto.DataType, by number (onnx.proto is append-only, so the numbers are stable).
_ONNX_TO_NUMPY: dict[int, DType] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    4: np.dtype(np.uint16),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    8: np.dtype(object),  # STRING: Python str, never in an arena
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    12: np.dtype(np.uint32),
    13: np.dtype(np.uint64),
    14: np.dtype(np.complex64),
    15: np.dtype(np.complex128),
    16: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype(ml_dtypes.float8_e4m3fn),
    18: np.dtype(ml_dtypes.float8_e4m3fnuz),
    19: np.dtype(ml_dtypes.float8_e5m2),
    20: np.dtype(ml_dtypes.float8_e5m2fnuz),
    21: np.dtype(ml_dtypes.uint4),
    22: np.dtype(ml_dtypes.int4),
    23: np.dtype(ml_dtypes.float4_e2m1fn),
    24: np.dtype(ml_dtypes.float8_e8m0fnu),
    25: np.dtype(ml_dtypes.uint2),
    26: np.dtype(ml_dtypes.int2),
    27: np.dtype(ml_dtypes.float6_e2m3fn),
    28: np.dtype(ml_dtypes.float6_e3m2fn),
}
_NUMPY_TO_ONNX: dict[DType, int] = {dtype: code for code, dtype in _ONNX_TO_NUMPY.items()}


def dtype_of_onnx(code: int) -> DType:
    """The NumPy dtype of a TensorProto.DataType. Raises KeyError for UNDEFINED and for types not known here."""
    return _ONNX_TO_NUMPY[code]


def onnx_of_dtype(dtype: DType) -> int:
    """The TensorProto.DataType of a NumPy dtype. Raises KeyError for a dtype that ONNX has not."""
    return _NUMPY_TO_ONNX[np.dtype(dtype)]


@dataclass(frozen=True, slots=True, init=False)
class TensorSpec:
    """The type of a tensor: its shape (symbols in a Graph, integers only in a Plan) and its dtype.

    A model may leave out a shape altogether: such a spec is not `ranked`, and its `shape` is empty and says nothing.
    """

    shape: tuple[Dim, ...]
    dtype: DType
    ranked: bool = True

    def __init__(self, shape: tuple[Dim, ...], dtype: DType, ranked: bool = True) -> None:
        """What dataclass would write, in half the time: planning makes hundreds of a small model."""
        _set_shape(self, shape)
        _set_dtype(self, dtype)
        _set_ranked(self, ranked)

    @property
    def is_static(self) -> bool:
        """Whether every dimension is an integer."""
        return self.ranked and _INT.issuperset(map(type, self.shape))

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape as integers. Raises TypeError where a dimension is symbolic."""
        for d in self.shape:  # asked for again and again while planning: quicker than `is_static`
            if type(d) is not int:
                raise TypeError(f"{self} is not static")
        if not self.ranked:
            raise TypeError(f"{self} is not static")
        return self.shape  # type: ignore[return-value]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        name = "string" if self.dtype == object else self.dtype.name
        if not self.ranked:
            return f"{name}[...]"
        return f"{name}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"


_set_shape, _set_dtype, _set_ranked = (vars(TensorSpec)[name].__set__ for name in ("shape", "dtype", "ranked"))


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """The type of a sequence: a list at run time. `elem` is None where the type of its elements is not told."""

    elem: ValueSpec | None = None

    def __str__(self) -> str:
        return f"sequence({self.elem or '?'})"


@dataclass(frozen=True, slots=True)
class OptionalSpec:
    """The type of a value that may be absent: at run time the value itself, or None."""

    elem: ValueSpec | None = None

    def __str__(self) -> str:
        return f"optional({self.elem or '?'})"


@dataclass(frozen=True, slots=True)
class MapSpec:
    """The type of a map from integers or strings to values: a dict at run time."""

    key: DType
    value: ValueSpec | None = None

    def __str__(self) -> str:
        return f"map({'string' if self.key.kind == 'O' else self.key.name}, {self.value or '?'})"


ValueSpec: TypeAlias = TensorSpec | SequenceSpec | OptionalSpec | MapSpec
"""The type of any value of a graph."""


def tensors_of(specs: Mapping[str, ValueSpec], what: str) -> dict[str, TensorSpec]:
    """The specs, where all of them are tensors'. Raises TypeError naming `what` and the first that is none."""
    for name, spec in specs.items():
        if not isinstance(spec, TensorSpec):
            raise TypeError(f"{what} '{name}' is a {spec}, where only tensors can be used; see Session.run in Python")
    return {name: spec for name, spec in specs.items() if isinstance(spec, TensorSpec)}


def is_plain(spec: ValueSpec) -> bool:
    """Whether such values are bytes that an arena can hold: tensors, those of strings excepted."""
    return isinstance(spec, TensorSpec) and spec.dtype.kind != "O"


def value_spec(value: Any) -> ValueSpec:
    """The type of a value at run time: an array, a list, a dict or None."""
    match value:
        case None:
            return OptionalSpec()
        case list():
            return SequenceSpec(value_spec(value[0]) if value else None)
        case dict():
            key = next(iter(value), 0)
            return MapSpec(np.dtype(object if isinstance(key, str) else np.int64))
        case _:
            return spec_of(value)


def spec_of(array: Array) -> TensorSpec:
    """The spec of an array."""
    if type(array) is np.ndarray:
        return TensorSpec(array.shape, array.dtype)
    return TensorSpec(tuple(int(d) for d in array.shape), np.dtype(array.dtype))


def constant(array: Array) -> np.ndarray[Any, DType]:
    """`array` as a constant: a read-only host array."""
    fixed = np.asarray(array).view()
    fixed.flags.writeable = False
    return fixed


@lru_cache(maxsize=4096)
def broadcast_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """np.broadcast_shapes, remembered: a model's layers ask the same. Raises ValueError where there is none."""
    return np.broadcast_shapes(*shapes)


def bind_symbols(pairs: Iterable[tuple[str, TensorSpec, tuple[int, ...]]]) -> dict[str, int]:
    """Symbol sizes from (value name, declared spec, actual shape). Raises ValueError naming the first contradiction."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, spec, shape in pairs:
        if not spec.ranked:
            continue
        if len(spec.shape) != len(shape):
            dimensions = "dimension" if len(shape) == 1 else "dimensions"
            raise ValueError(f"'{name}' has {len(shape)} {dimensions} {list(shape)}, expected {spec}")
        for declared, actual in zip(spec.shape, shape, strict=True):
            if isinstance(declared, int) and declared != actual:
                raise ValueError(f"'{name}' has shape {list(shape)}, expected {spec}")
            if isinstance(declared, str):
                size, by = sizes.setdefault(declared, (actual, name))
                if size != actual:
                    raise ValueError(
                        f"'{name}' has shape {list(shape)}: '{declared}' is {actual} there but {size} in '{by}'"
                    )
    return {symbol: size for symbol, (size, _) in sizes.items()}

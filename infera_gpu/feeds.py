"""What callers feed -> values of the inputs' types."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from infera_gpu.devices import Device
from infera_gpu.errors import InputError
from infera_gpu.spec import Array, DType, MapSpec, OptionalSpec, SequenceSpec, TensorSpec, ValueSpec


def not_feeds(given: object) -> InputError:
    """The error for `given` where the feeds of a run were expected."""
    return InputError(
        f"feeds are a mapping from input names to arrays, not {type(given).__name__}; "
        "run(output_names, feeds), as in onnxruntime, is a method of infera_gpu.InferenceSession"
    )


def value_of(name: str, value: Any, spec: ValueSpec, device: Device) -> Any:
    """The feed as a value of the input's type. Raises InputError."""
    match spec:
        case TensorSpec():
            return _array(name, value, spec, device)
        case OptionalSpec():
            return None if value is None else value if spec.elem is None else value_of(name, value, spec.elem, device)
        case SequenceSpec():
            if not isinstance(value, list | tuple):
                raise InputError(f"input '{name}' is {type(value).__name__}, expected a list: {spec}")
            elem = spec.elem
            return [v if elem is None else value_of(f"{name}[{i}]", v, elem, device) for i, v in enumerate(value)]
        case MapSpec():
            if not isinstance(value, Mapping):
                raise InputError(f"input '{name}' is {type(value).__name__}, expected a dict: {spec}")
            return dict(value)


def shape_of(name: str, value: Any) -> tuple[int, ...]:
    """The shape that an array has, or that is given. Raises InputError for what is none."""
    given = value.shape if hasattr(value, "shape") else value
    try:
        sizes = tuple(map(operator.index, given))
    except TypeError:
        sizes = (-1,)
    if min(sizes, default=0) < 0:
        raise InputError(f"input '{name}' is {value!r:.80}, expected an array or a shape: sizes from 0 on")
    return sizes


def _array(name: str, value: Any, spec: TensorSpec, device: Device) -> Array:
    """The feed as an array of the input's dtype. Python numbers and lists have no dtype of their own."""
    if value is None:
        raise InputError(f"input '{name}' is None, expected {spec}")
    if spec.dtype == object:
        return _strings(name, value)
    array = device.accepts(value)
    if array is None and hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray | np.generic):
        try:
            array = np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError) as error:
            raise InputError(f"input '{name}' cannot be read on {device.name}: {error}") from None
    if array is None:
        try:
            array = np.asarray(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"input '{name}' cannot be made an array of {spec}: {error}") from None
        if not isinstance(value, np.ndarray | np.generic) and _is_exact(array, spec.dtype):
            return array.astype(spec.dtype)
    if array.dtype == spec.dtype:
        return array
    if array.dtype == spec.dtype.newbyteorder():
        return array.astype(spec.dtype)
    raise InputError(f"input '{name}' is {_kind(array.dtype)}, expected {spec}{_remedy(value, array, spec)}")


def _kind(dtype: DType) -> str:
    """NumPy's name, but without the length of text: "str64" looks like a type that somebody chose."""
    return {"U": "str", "S": "bytes"}.get(dtype.kind, dtype.name)


def _remedy(value: Any, array: Array, spec: TensorSpec) -> str:
    """How the feed becomes one of the right type, where one call does it: what text means only the caller knows."""
    if array.dtype.kind not in "biufc":
        return ""
    if hasattr(value, "astype"):
        return f"; convert it with .astype('{spec.dtype.name}')"
    return f"; convert it with numpy.array(..., '{spec.dtype.name}')" if spec.dtype.isbuiltin == 1 else ""


def _strings(name: str, value: Any) -> np.ndarray[Any, Any]:
    """Text, in lists or arrays of any kind, as an array of str. Raises InputError for anything else."""
    array = np.array(value, dtype=object)
    for i, text in enumerate(array.flat):
        if isinstance(text, bytes):
            array.flat[i] = text.decode(errors="replace")
        elif not isinstance(text, str):
            raise InputError(f"input '{name}' has a {type(text).__name__} among its elements, expected strings")
    return array


def _is_exact(array: np.ndarray[Any, Any], dtype: DType) -> bool:
    """Whether Python numbers, as NumPy reads them, are values of `dtype`: no fraction, sign or text is lost."""
    if array.dtype.kind not in "biuf" or (array.dtype.kind == "b") != (dtype.kind == "b"):
        return array.size == 0
    if array.dtype.kind == "f" and dtype.kind in "iu":
        return False
    with np.errstate(all="ignore"):
        there = array.astype(dtype)
        return dtype.kind not in "iu" or bool((there.astype(array.dtype) == array).all())

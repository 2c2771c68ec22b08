"""onnxruntime.OrtValue: a tensor in host memory or on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from infera_gpu.compat.types import dtype_of, type_name
from infera_gpu.devices import Device, open_device
from infera_gpu.errors import DeviceError, InputError
from infera_gpu.graph import HostArray
from infera_gpu.spec import Array, DType, onnx_of_dtype


def open_place(device_type: str, device_id: int, near: Device | None = None) -> Device:
    """The device that onnxruntime calls (`device_type`, `device_id`); `near` itself where it is that one.

    Raises DeviceError where it is unknown or absent.
    """
    kind = device_type.lower()
    if kind not in ("cpu", "cuda"):
        raise DeviceError(f"unknown device type '{device_type}'; expected cpu or cuda")
    name = "cpu" if kind == "cpu" else f"cuda:{device_id}"
    return near if near is not None and near.name == name else open_device(name)


def host_array(value: object, what: str) -> HostArray:
    """`value` as it is, contiguous. Raises InputError for anything but a numeric NumPy array."""
    if not isinstance(value, np.ndarray) or value.dtype.kind in "OUS":
        kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise InputError(f"{what} is {kind}, expected a numeric numpy.ndarray")
    return value if value.flags.c_contiguous else np.ascontiguousarray(value)


class OrtValue:
    """A dense tensor on a device. Made by the class methods or by a run; `array` is the NumPy or CuPy array itself."""

    __slots__ = ("array", "device")

    def __init__(self, array: Array, device: Device) -> None:
        self.array, self.device = array, device

    @classmethod
    def ortvalue_from_numpy(cls, numpy_obj: HostArray, /, device_type: str = "cpu", device_id: int = 0) -> OrtValue:
        """On the CPU it shares memory with the array, where that is contiguous; on a GPU it is a copy.

        Raises InputError for anything but a numeric array.
        """
        return cls.placed(host_array(numpy_obj, "numpy_obj"), open_place(device_type, device_id))

    @classmethod
    def ortvalue_from_shape_and_type(
        cls, shape: Sequence[int], element_type: Any, device_type: str = "cpu", device_id: int = 0
    ) -> OrtValue:
        """Uninitialised memory. `element_type` is a NumPy dtype or a TensorProto.DataType."""
        return cls.empty(tuple(shape), dtype_of(element_type), open_place(device_type, device_id))

    @classmethod
    def placed(cls, host: HostArray, device: Device) -> OrtValue:
        """A host array on `device`; on the CPU without a copy."""
        with device.running():
            array = device.constant(host, device.space)
            device.synchronize()
        return cls(array, device)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: DType, device: Device) -> OrtValue:
        """Uninitialised memory on `device`."""
        with device.running():
            return cls(device.xp.empty(shape, dtype), device)

    @classmethod
    def at_address(cls, address: int, shape: Sequence[int], element_type: Any, device: Device) -> OrtValue:
        """Memory of the caller's, who keeps it alive and says what it holds: neither can be checked."""
        dtype, dims = dtype_of(element_type), tuple(int(d) for d in shape)
        nbytes = math.prod(dims) * dtype.itemsize
        if not nbytes:
            return cls.empty(dims, dtype, device)
        protocol = "__array_interface__" if device.space == "host" else "__cuda_array_interface__"
        interface = {"shape": (nbytes,), "typestr": "|u1", "data": (int(address), False), "version": 3}
        with device.running():
            raw = device.xp.asarray(SimpleNamespace(**{protocol: interface}))
        return cls(raw.view(dtype).reshape(dims), device)

    def numpy(self) -> HostArray:
        """The array itself where it lies in host memory; a copy of what lies on a GPU."""
        return self.array if self.device.space == "host" else self.copy()

    def copy(self) -> HostArray:
        """A copy in host memory."""
        host = np.empty(self.array.shape, self.array.dtype)
        self._copy(self.array, host)
        return host

    def readable_on(self, device: Device) -> Array:
        """The array, where what runs on `device` can read it; else a copy in host memory."""
        return self.array if self.device.name in ("cpu", device.name) else self.copy()

    def update_inplace(self, data: HostArray | OrtValue) -> None:
        """Copy `data` here. Raises InputError where dtype or number of elements differ, or this memory is read-only."""
        source = data.readable_on(self.device) if isinstance(data, OrtValue) else host_array(data, "data")
        if source.dtype != self.array.dtype or source.size != self.array.size:
            raise InputError(
                f"data is {source.dtype.name}{list(source.shape)}, expected {self.array.dtype.name}{self.shape()}"
            )
        if isinstance(self.array, np.ndarray) and not self.array.flags.writeable:
            raise InputError("the memory of this OrtValue is read-only: it shares that of a read-only array")
        self._copy(source.reshape(self.array.shape), self.array)

    def _copy(self, source: Array, target: Array) -> None:
        with self.device.running():
            copy, args = self.device.transfer(source, target)
            copy(*args)
            self.device.synchronize()

    def shape(self) -> list[int]:
        return [int(d) for d in self.array.shape]

    def data_type(self) -> str:
        """As onnxruntime spells it: `tensor(float)`."""
        return type_name(np.dtype(self.array.dtype))

    def element_type(self) -> int:
        """The TensorProto.DataType."""
        return onnx_of_dtype(self.array.dtype)

    def tensor_size_in_bytes(self) -> int:
        return int(self.array.nbytes)

    def device_name(self) -> str:
        """ "cpu" or "cuda"."""
        return self.device.name.partition(":")[0]

    def data_ptr(self) -> int:
        """The address of the first element, in the device's memory."""
        return int(self.array.ctypes.data if self.device.space == "host" else self.array.data.ptr)

    def has_value(self) -> bool:
        return True

    def is_tensor(self) -> bool:
        return True

    def is_sparse_tensor(self) -> bool:
        return False

    def is_tensor_sequence(self) -> bool:
        return False

    def __array__(self, dtype: DType | None = None, copy: bool | None = None) -> HostArray:
        """`numpy()`, in the way of np.array. Raises ValueError where `copy=False` and one is needed."""
        if self.device.space == "host":
            return np.array(self.array, dtype, copy=copy)
        if copy is False:
            raise ValueError(f"a tensor on {self.device.name} cannot be given to NumPy without a copy")
        return self.copy().astype(dtype or self.array.dtype, copy=False)

    def __dlpack__(self, **how: Any) -> Any:
        return self.array.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()  # type: ignore[no-any-return]

"""CuPy 14.2 over NumPy for what portable definitions ask of it: computes as NumPy does, refuses what CuPy refuses.

What CuPy has and takes is written down here, from its sources at v14.2.0 (github.com/cupy/cupy); the file is named
beside each rule. What is not written down is refused as well. `tests/test_portable.py` compares names and parameters
with CuPy itself where that is installed. Nothing here tells of CuPy's kernels: the values are NumPy's.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

TYPES = {"bool", *(f"{kind}int{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)), "bfloat16"} | {
    "float16", "float32", "float64", "complex64", "complex128",
}  # fmt: skip
"""What elements may be: cupy/_core/_dtype.pyx and _scalar.pyx."""

FUNCTIONS: Mapping[str, str] = {
    **dict.fromkeys(("amax", "amin"), "a, axis=None, out=None, keepdims=False"),
    "arange": "start, stop=None, step=1, dtype=None",
    **dict.fromkeys(("argmax", "argmin"), "a, axis=None, dtype=None, out=None, keepdims=False"),
    "argsort": "a, axis=-1, kind=None",
    "asarray": "a, dtype=None, order=None, *, copy=None, blocking=False",
    "ascontiguousarray": "a, dtype=None",
    "atleast_1d": "*arys",
    "broadcast_arrays": "*args",
    "broadcast_to": "array, shape",
    "clip": "a, a_min, a_max, out=None",
    **dict.fromkeys(("concatenate", "stack"), "tup, axis=0, out=None, *, dtype=None, casting='same_kind'"),
    **dict.fromkeys(("cumprod", "cumsum"), "a, axis=None, dtype=None, out=None"),
    "einsum": "*operands, **kwargs",
    **dict.fromkeys(("empty", "ones", "zeros"), "shape, dtype=float, order='C'"),
    "expand_dims": "a, axis",
    "eye": "N, M=None, k=0, dtype=float, order='C'",
    **dict.fromkeys(("fft.fft", "fft.ifft", "fft.irfft", "fft.rfft"), "a, n=None, axis=-1, norm=None"),
    "flip": "a, axis=None",
    "full": "shape, fill_value, dtype=None, order='C'",
    "isneginf": "x, out=None",
    "lib.stride_tricks.as_strided": "x, shape=None, strides=None",
    "meshgrid": "*xi, **kwargs",
    "moveaxis": "a, source, destination",
    **dict.fromkeys(("flatnonzero", "linalg.det", "linalg.inv", "ndim", "nonzero"), "a"),
    **dict.fromkeys(("ones_like", "zeros_like"), "a, dtype=None, order='K', subok=None, shape=None"),
    **dict.fromkeys(("prod", "sum"), "a, axis=None, dtype=None, out=None, keepdims=False"),
    "repeat": "a, repeats, axis=None",
    "searchsorted": "a, v, side='left', sorter=None",
    "split": "ary, indices_or_sections, axis=0",
    "take": "a, indices, axis=None, out=None",
    "take_along_axis": "a, indices, axis",
    "tile": "A, reps",
    "unravel_index": "indices, dims, order='C'",
    "where": "condition, x=None, y=None",
}
"""Functions and their parameters."""

METHODS: Mapping[str, str] = {
    **dict.fromkeys(("all", "any", "max", "min"), "axis=None, out=None, keepdims=False"),
    **dict.fromkeys(("argmax", "argmin"), "axis=None, out=None, dtype=None, keepdims=False"),
    "astype": "dtype, order='K', casting=None, subok=None, copy=True",
    "copy": "order='C'",
    "item": "",
    **dict.fromkeys(("mean", "sum"), "axis=None, dtype=None, out=None, keepdims=False"),
    "reshape": "*shape, order='C', copy=None",
    "swapaxes": "axis1, axis2",
    "take": "indices, axis=None, out=None",
    "transpose": "*axes",
    "var": "axis=None, dtype=None, out=None, ddof=0, keepdims=False",
    "view": "dtype=None, type=None",
}
"""Those of arrays, and their parameters: cupy/_core/core.pyx."""

ATTRIBUTES = frozenset({"T", "dtype", "imag", "ndim", "real", "shape", "size", "strides"})

_UFUNCS = """
abs absolute add arccos arccosh arcsin arcsinh arctan arctanh bitwise_and bitwise_or bitwise_xor ceil cos cosh divide
equal exp expm1 floor floor_divide fmax fmin fmod greater greater_equal invert isfinite isinf isnan left_shift less
less_equal log logaddexp logical_and logical_not logical_or logical_xor matmul maximum minimum multiply negative
not_equal power reciprocal remainder right_shift rint sign sin sinh sqrt subtract tan tanh true_divide trunc
"""
UFUNCS = frozenset(_UFUNCS.split())
"""They take operands and `out`, `dtype` and `casting`, but no `where`: `ufunc.__call__` in cupy/_core/_kernel.pyx."""

_WIDE = frozenset({"int32", "int64", "uint32", "uint64", "float32", "float64"})
AT: Mapping[str, frozenset[str]] = {
    "add": _WIDE | {"float16"},
    "subtract": frozenset({"int32", "uint32"}),
    **dict.fromkeys(("maximum", "minimum"), frozenset({"int32", "int64", "uint32", "uint64"})),
}
"""What the `at` of a ufunc takes: `_scatter_op_single` in cupy/_core/_routines_indexing.pyx, which lets floats of
`maximum` and `minimum` through, too, but cupy/_core/include/cupy/atomics.cuh compares them by `fmaxf` and `fminf`: NaN
is dropped and float64 rounded."""

LACKING: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("argsort", "matmul"), frozenset({"bfloat16"})),
    "fmod": frozenset({"int64", "uint64"}),
}
"""Elements that these do not take: cupy/_core/include/cupy/type_dispatcher.cuh, of `argsort`, and
cupy/_core/_routines_linalg.pyx; or do not compute exactly: `fmod` goes through float64, cupy/_math/arithmetic.py."""

WIDENING = frozenset({"clip", "where"})
"""These make float32 of bfloat16: cupy/_core/_routines_math.pyx and cupy/_sorting/search.py."""

FROM_HOST: Mapping[str, str] = {"asarray": "a", "ascontiguousarray": "a", "full": "fill_value"}
"""The parameter that may be a numpy.ndarray, `full`'s of one element: `copyto` in cupy/_manipulation/basic.py. Anywhere
else, but as an index, that is an "Unsupported type": `_preprocess_arg` in cupy/_core/_kernel.pyx."""

NAMESPACES = frozenset({"fft", "lib", "lib.stride_tricks", "linalg"})

SAME = frozenset({"bool_", "dtype", "finfo", "iinfo", "promote_types", *TYPES} - {"bfloat16", "bool"})
"""What is NumPy's own, or as good as."""


class Refused(TypeError):
    """CuPy would raise here."""


def signature(parameters: str) -> inspect.Signature:
    """Of a function with these parameters."""
    made: Callable[..., None] = eval(f"lambda {parameters}: None")
    return inspect.signature(made)


_SIGNATURES = {
    **{name: signature(parameters) for name, parameters in FUNCTIONS.items()},
    **{f"ndarray.{name}": signature(parameters) for name, parameters in METHODS.items()},
}


def _host(value: Any, name: str) -> Any:
    """What CuPy was given, for NumPy."""
    match value:
        case ndarray():
            return value.host
        case np.ndarray():
            raise Refused(f"{name}: Unsupported type numpy.ndarray")
        case list() | tuple():
            return type(value)(_host(v, name) for v in value)
    return value


def _device(value: Any) -> Any:
    """What NumPy made, as CuPy gives it: never as a scalar."""
    match value:
        case np.ndarray() | np.generic():
            return ndarray(np.asarray(value))
        case list() | tuple():
            return type(value)(map(_device, value))
    return value


def _call(function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`function` of the arguments, where CuPy's takes them."""
    try:
        given = _SIGNATURES[name].bind(*args, **kwargs).arguments
    except TypeError as error:
        raise Refused(f"{name}: {error}") from None
    array = given.get(FROM_HOST.get(name, ""))
    if isinstance(array, np.ndarray) and (name != "full" or array.size == 1):
        args = tuple(ndarray(v) if v is array else v for v in args)
    _check(name, args)
    taken = _host(args, name)
    if name in WIDENING:
        taken = tuple(v.astype(np.float32) if getattr(v, "dtype", None) == ml_dtypes.bfloat16 else v for v in taken)
    return _device(function(*taken, **{k: _host(v, name) for k, v in kwargs.items()}))


def _check(name: str, operands: tuple[Any, ...]) -> None:
    """Raises Refused where CuPy's function does not take such elements."""
    if name in LACKING:
        dtype = np.result_type(*(v.dtype for v in operands if isinstance(v, ndarray)))
        if dtype.name in LACKING[name]:
            raise Refused(f"{name}: elements are {dtype}")


class Ufunc:
    """A ufunc of NumPy's as CuPy has it."""

    def __init__(self, host: np.ufunc) -> None:
        self._host, self.__name__ = host, host.__name__

    def __call__(self, *operands: Any, out: Any = None, **how: Any) -> Any:
        if more := how.keys() - {"dtype", "casting"}:
            raise Refused(f"{self.__name__}: Wrong arguments {more}")
        _check(self.__name__, operands)
        (target,) = out if isinstance(out, tuple) else (out,)
        made = self._host(*_host(operands, self.__name__), out=_host(target, self.__name__), **how)
        return _device(made) if target is None else target

    def at(self, a: ndarray, indices: Any, b: Any) -> None:
        """Raises Refused for types that CuPy's refuses or computes otherwise."""
        if a.dtype.name not in AT.get(self.__name__, ()):
            raise Refused(f"{self.__name__}.at: elements are {a.dtype}")
        self._host.at(a.host, _index(indices), _host(b, self.__name__))


def _index(given: Any) -> Any:
    """An index of NumPy's: CuPy's may hold arrays of either."""
    if isinstance(given, tuple):
        return tuple(map(_index, given))
    return given.host if isinstance(given, ndarray) else given


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array "on the GPU", over one of NumPy's that nobody sees."""

    __slots__ = ("host",)

    def __init__(self, host: np.ndarray[Any, Any]) -> None:
        if host.dtype.name not in TYPES:
            raise Refused(f"Unsupported dtype {host.dtype}")
        self.host = host

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise Refused("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *operands: Any, **how: Any) -> Any:
        if method != "__call__":
            raise Refused(f"{ufunc.__name__}.{method}")
        return getattr(xp, ufunc.__name__)(*operands, **how)

    def __array_function__(self, function: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(xp, function.__name__)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES:
            return _device(getattr(self.host, name))
        if name not in METHODS:
            raise AttributeError(f"whether cupy.ndarray has {name} is not written down in {__name__}")
        method = getattr(self.host, name)
        if name == "item":
            return method
        return lambda *args, **kwargs: _call(method, f"ndarray.{name}", args, kwargs)

    def __getitem__(self, index: Any) -> Any:
        return _device(self.host[_index(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.host[_index(index)] = _host(value, "assignment")

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self.host)

    def __bool__(self) -> bool:
        return bool(self.host)

    def __int__(self) -> int:
        return int(self.host)

    def __float__(self) -> float:
        return float(self.host)

    def __index__(self) -> int:
        return int(self.host.__index__())


class _Module:
    """`cupy`, or a part of it."""

    ndarray = ndarray

    def __init__(self, host: Any, inside: str = "") -> None:
        self._host, self._inside = host, inside

    def __getattr__(self, name: str) -> Any:
        path = self._inside + name
        host: Any = getattr(self._host, name, None)
        if path in NAMESPACES:
            return _Module(host, f"{path}.")
        if path in UFUNCS:
            return Ufunc(host)
        if path in SAME:
            return host
        if path not in FUNCTIONS:
            raise AttributeError(f"whether cupy has {path} is not written down in {__name__}")
        return lambda *args, **kwargs: _call(host, path, args, kwargs)


xp: Any = _Module(np)
"""What stands in for the module `cupy`."""


def special() -> types.ModuleType:
    """What stands in for the module `cupyx.scipy.special`."""
    made = types.ModuleType("cupyx.scipy.special")
    made.__dict__["erf"] = lambda x: ndarray(np.frompyfunc(math.erf, 1, 1)(x.host).astype(x.dtype))
    return made

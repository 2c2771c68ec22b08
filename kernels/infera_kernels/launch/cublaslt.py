"""Matrix products by cuBLASLt, through its C interface: a product is one call, which allocates nothing and which a
stream can record.

Numbers are those of cublasLt.h and library_types.h of CUDA 12 and 13. The library counts columns where arrays here have
rows, so that it is asked for out' = b' a', of matrices that lie as they are.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Hashable
from contextlib import suppress
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any, NamedTuple

from infera_kernels.calls import Call
from infera_kernels.launch.nvidia import LibraryError, find, release
from infera_kernels.launch.types import address_of

_log = logging.getLogger(__name__)

OFF = "INFERA_CUBLASLT"
"""Environment: 0 and it is not used."""

TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
"""cudaDataType of the types that it multiplies here."""

_FLOAT32, _TF32 = 68, 77
"""cublasComputeType_t: sums in float32, of exact products, and of float32 that is rounded to tf32."""

_TRANSA, _TRANSB, _EPILOGUE, _BIAS = 3, 4, 7, 8
_BATCH, _STEP = 5, 6
_WORKSPACE, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)
_IN_FLOAT32 = 2
"""cublasLtReductionScheme_t: parts of a sum meet in the workspace, as they were summed. By others they meet in the
output, in its type, and not always in one order."""

_PLAIN, _ADD_BIAS = 1, 4
ACTIVATIONS = {None: 0, "relu": 2, "gelu_tanh": 32}
"""cublasLtEpilogue_t, where an activation after a bias is their sum; its GELU is the tanh form."""

REMEMBERED = 4096
"""Algorithms that are remembered: layers of a model ask for the same ones."""

ALIGNED = 256
"""Bytes: what the library takes pointers to be aligned to unless it is told, and its workspace must be."""


class Matrix(NamedTuple):
    """Matrices in an array, `step` elements apart. Rows lie `line` elements apart, each in one piece; where it is
    `turned`, columns do."""

    array: Any
    line: int
    turned: bool
    step: int = 0


class Product(NamedTuple):
    """out = activation(alpha a @ b + bias + beta residual), `batch` of them: a (M, K), b (K, N), out and the residual
    (M, N) with rows in one piece, bias (N,), all of one type, and summed in float32."""

    sizes: tuple[int, int, int]
    """M, N, K"""
    batch: int
    dtype: str
    a: Matrix
    b: Matrix
    out: Matrix
    residual: Matrix | None = None
    bias: Any = None
    alpha: float = 1.0
    beta: float = 1.0
    activation: str | None = None
    tf32: bool = False


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@cache
def library() -> Any | None:
    """The library; None where it is not installed, or turned OFF."""
    return find("cublasLt", OFF)


def installed() -> str:
    """The release of the library, as 13.1.0; empty where there is none."""
    return release(library(), "cublasLtGetVersion")


def lying(rows: int, columns: int, strides: tuple[int, int]) -> tuple[int, bool] | None:
    """`line` and `turned` of a Matrix with these strides, in elements; None where neither rows nor columns lie in one
    piece, or they overlap."""
    down, across = strides
    if (across == 1 or columns == 1) and (down >= columns or rows == 1):
        return (down if rows > 1 else columns), False
    if (down == 1 or rows == 1) and (across >= rows or columns == 1):
        return (across if columns > 1 else rows), True
    return None


@cache
def _handle(found: Any, device_id: int) -> c_void_p | None:
    """The library at work on the GPU, which is current: one for the process, since to destroy one waits for the GPU.
    None where it does not start."""
    handle = c_void_p()
    if status := found["cublasLtCreate"](byref(handle)):
        _log.warning("cuBLASLt is not used, it does not start on GPU %d: status %d", device_id, status)
        return None
    return handle


class CublasLt:
    """Products on one GPU and one stream. It is used with that GPU current."""

    def __init__(self, found: Any, device_id: int, stream: int) -> None:
        self._found, self._device_id, self._stream = found, device_id, stream
        self._algorithms: dict[Hashable, _Found | None] = {}
        self._lock = threading.Lock()

    def call(self, product: Product, workspace: Any) -> Call | None:
        """The product, which may use `workspace` while it runs and nobody else meanwhile, ALIGNED memory of the GPU.

        None where the library has no algorithm for it, or does not work here. Raises LibraryError.
        """
        with self._lock:
            handle = _handle(self._found, self._device_id)
            if handle is None:
                return None
            made = _Bound(self._found, product)
            same = product._replace(a=None, b=None, out=None, residual=None, bias=None)  # type: ignore[arg-type]
            key = (same, *made.lies, workspace.nbytes)
            if key not in self._algorithms:
                if len(self._algorithms) >= REMEMBERED:
                    self._algorithms.clear()
                self._algorithms[key] = self._asked(handle, made, workspace.nbytes)
            algorithm = self._algorithms[key]
        if algorithm is None:
            return None
        made.keep = (made.keep, algorithm, workspace)
        room = c_void_p(address_of(workspace)), c_size_t(workspace.nbytes)
        return made.multiply, (handle, *made.operands, byref(algorithm), *room, c_void_p(self._stream))

    def _asked(self, handle: c_void_p, made: _Bound, nbytes: int) -> _Found | None:
        """What the library takes to be fastest."""
        wanted, count, found = c_void_p(), c_int(), _Found()
        check(self._found, "MatmulPreferenceCreate", byref(wanted))
        try:
            values = [
                (_WORKSPACE, c_uint64(nbytes)),
                (_REDUCTIONS, c_uint32(_IN_FLOAT32)),
                *zip(_ALIGNMENTS, map(c_uint32, made.aligned), strict=True),
            ]
            for attribute, value in values:
                check(self._found, "MatmulPreferenceSetAttribute", wanted, attribute, *_given(value))
            status = self._found["cublasLtMatmulAlgoGetHeuristic"](
                handle, made.operation, *made.layouts, wanted, 1, byref(found), byref(count)
            )
        finally:
            self._found["cublasLtMatmulPreferenceDestroy"](wanted)
        return None if status or not count.value or found.state else found


def check(found: Any, name: str, *args: Any) -> None:
    """Calls a function. Raises LibraryError where that fails."""
    if status := found[f"cublasLt{name}"](*args):
        raise _failed(name, status)


def _failed(name: str, status: int) -> LibraryError:
    return LibraryError(f"cublasLt{name} failed with status {status}; {OFF}=0 leaves products to Triton's kernels")


def _given(value: Any) -> tuple[Any, c_size_t]:
    """A value as the functions that set attributes take it."""
    return byref(value), c_size_t(ctypes.sizeof(value))


class _Bound:
    """A product with its descriptors, which it owns. `operands` are arguments of cublasLtMatmul."""

    def __init__(self, found: Any, p: Product) -> None:
        self._found = found
        self.operation, self._made = c_void_p(), list[tuple[str, c_void_p]]()
        (m, n, k), bias = p.sizes, c_void_p(None if p.bias is None else address_of(p.bias))
        check(found, "MatmulDescCreate", byref(self.operation), _TF32 if p.tf32 else _FLOAT32, TYPES["float32"])
        self._made.append(("MatmulDescDestroy", self.operation))
        epilogue = ACTIVATIONS[p.activation] + (0 if p.bias is None else _ADD_BIAS)
        for attribute, value in (
            (_TRANSA, c_int32(p.b.turned)),
            (_TRANSB, c_int32(p.a.turned)),
            (_EPILOGUE, c_uint32(epilogue or _PLAIN)),
            *([] if p.bias is None else [(_BIAS, bias)]),
        ):
            check(found, "MatmulDescSetAttribute", self.operation, attribute, *_given(value))
        third = p.out if p.residual is None else p.residual
        matrices = (p.b, p.a, third, p.out)
        sizes = ((n, k), (k, m), (n, m), (n, m))
        self.layouts = [
            self._layout(p, x, size[::-1] if x.turned else size) for x, size in zip(matrices, sizes, strict=True)
        ]
        addresses = [address_of(x.array) for x in matrices]
        self.aligned = [min(ALIGNED, at & -at) for at in addresses]
        self.lies = (
            *(x[1:] for x in matrices),
            *(p.residual is None, *self.aligned, bias.value and bias.value % ALIGNED),
        )
        alpha, beta = c_float(p.alpha), c_float(0.0 if p.residual is None else p.beta)
        left, right, added, out = ((c_void_p(at), layout) for at, layout in zip(addresses, self.layouts, strict=True))
        self.operands: tuple[Any, ...] = (self.operation, byref(alpha), *left, *right, byref(beta), *added, *out)
        self.keep: Any = (p, alpha, beta)
        self._multiply = found["cublasLtMatmul"]

    def _layout(self, p: Product, x: Matrix, size: tuple[int, int]) -> c_void_p:
        layout = c_void_p()
        check(self._found, "MatrixLayoutCreate", byref(layout), TYPES[p.dtype], *map(c_uint64, size), c_int64(x.line))
        self._made.append(("MatrixLayoutDestroy", layout))
        if p.batch > 1:
            for attribute, value in ((_BATCH, c_int32(p.batch)), (_STEP, c_int64(x.step))):
                check(self._found, "MatrixLayoutSetAttribute", layout, attribute, *_given(value))
        return layout

    def multiply(self, *args: Any) -> None:
        if status := self._multiply(*args):
            raise _failed("Matmul", status)

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the process the library may be gone
            for destroy, made in self._made:
                self._found[f"cublasLt{destroy}"](made)

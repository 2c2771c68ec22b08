"""Whether two runs of a model agree: the comparison that tests, benchmarks and `infera verify` share.

Agreement is judged output by output. Floats may differ by a fraction of the output's peak, the largest finite
magnitude of the reference: unlike an elementwise relative error it does not blow up around zeros, and unlike an
absolute one it means the same for logits and for activations. Integers, booleans and strings must be equal.

There are two references. onnxruntime is another implementation: it shows what is computed wrongly. The model in float64
is our own: it shows who rounds worse where the two differ by little (an approximate Sigmoid, whose absolute error of
1.6e-7 is large where the whole output is close to zero).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from infera_gpu.devices.cpu import CpuDevice
from infera_gpu.errors import InferaError
from infera_gpu.graph import Graph, HostArray, Node, version_of
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes import Precision
from infera_gpu.session import Session
from infera_gpu.source import Source
from infera_gpu.spec import TensorSpec, ValueSpec, onnx_of_dtype, spec_of
from infera_gpu.supported import check_supported

TOLERANCE = 1e-4
"""Of the output's peak: what float32 kernels that sum in different orders stay well below."""

AGREEMENT = 2e-5
"""Of the output's peak: how near models that stay in float32 come to onnxruntime, as tests and benchmarks check."""

TOLERANCES: Mapping[Precision, float] = MappingProxyType(
    {"fp32": TOLERANCE, "tf32": 5e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 1e-1}
)
"""What most models stay below at a precision."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one output is from its reference.

    `error` is max |got - want| / `peak`; without a peak (a reference that is empty or all zero) it is max |got - want|.
    It is infinite where `problem` says that the two cannot be compared, or where values that must be equal are not.
    """

    name: str
    error: float
    peak: float
    exact: bool = False
    problem: str = ""

    def within(self, tolerance: float = TOLERANCE) -> bool:
        """Whether the output agrees; `tolerance` is a fraction of the peak."""
        return self.error <= (0.0 if self.exact else tolerance)

    def __str__(self) -> str:
        return f"{self.name}: {self.problem or f'error {self.error:.3g} of the peak {self.peak:.4g}'}"


def difference(name: str, got: HostArray, want: HostArray) -> Difference:
    """Compares one output with its reference."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return Difference(name, math.inf, 0.0, problem=f"is {spec_of(got)}, expected {spec_of(want)}")
    if not _is_float(want.dtype):
        unequal = int(np.count_nonzero(got != want))
        problem = f"{unequal} of {want.size} values differ, they must be equal" if unequal else ""
        peak = float(np.abs(want.astype(np.float64)).max(initial=0)) if want.dtype.kind in "iub" else 0.0
        return Difference(name, math.inf if unequal else 0.0, peak, exact=True, problem=problem)

    wide = np.complex128 if want.dtype.kind == "c" else np.float64
    g, w = got.astype(wide), want.astype(wide)
    finite = np.isfinite(w)
    same = np.isfinite(g) == finite
    same &= finite | (g == w) | (np.isnan(g) & np.isnan(w))
    peak = float(np.abs(w[finite]).max(initial=0))
    if not same.all():
        first = np.unravel_index(int(np.argmin(same)), same.shape)
        where = ", ".join(str(int(i)) for i in first)
        return Difference(name, math.inf, peak, problem=f"[{where}] is {g[first]}, expected {w[first]}")
    return Difference(name, float(np.abs(g[finite] - w[finite]).max(initial=0)) / (peak or 1.0), peak)


def compare(got: Mapping[str, HostArray], want: Mapping[str, HostArray]) -> tuple[Difference, ...]:
    """One Difference for each output of the reference, in its order. A missing output is an infinite error."""
    return tuple(
        difference(name, got[name], reference)
        if name in got
        else Difference(name, math.inf, 0.0, problem="is missing from the outputs")
        for name, reference in want.items()
    )


def _is_float(dtype: np.dtype[Any]) -> bool:
    if dtype.kind in "fc":
        return True
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return True


class NotInstalledError(InferaError):
    """The reference is a package that is not here."""


class OnnxRuntime:
    """The model in onnxruntime on the CPU, the reference that is not ours.

    Graph optimisations are off unless asked for: on x86 processors without VNNI the optimised integer kernels saturate
    their products and differ from the operators' definition by a large part of the peak.
    Raises NotInstalledError where onnxruntime is not, and InferaError where it refuses the model.
    """

    def __init__(self, model: str | Path | bytes, *, threads: int | None = None, optimized: bool = False) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise NotInstalledError("onnxruntime is not installed: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = threads or 0
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
        source = model if isinstance(model, bytes) else str(model)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class but this
            raise InferaError(f"onnxruntime cannot load the model: {_first_line(error)}") from error
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, HostArray]) -> dict[str, HostArray]:
        """Every output by name. Raises InferaError where onnxruntime fails."""
        try:
            return dict(zip(self._names, self._session.run(None, dict(feeds)), strict=True))
        except Exception as error:
            raise InferaError(f"onnxruntime cannot run the model: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# ---- the model in float64

_FLOAT64 = np.dtype(np.float64)
_NARROW = tuple(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))
_NARROW_CODES = tuple(map(onnx_of_dtype, _NARROW))
_TYPE_ATTRIBUTES = ("to", "dtype", "output_datatype", "output_dtype", "stash_type")
"""The attributes that hold an element type, in every operator that has one of these names."""


class _PlainDevice(CpuDevice):
    """The CPU without kernels: every operator runs its own function."""

    kinds: tuple[str, ...] = ()


def run_in_float64(model: Source, feeds: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """Every output by name, each float computed in float64 from the same weights and feeds.

    The nodes run as the file has them, each by its operator's plain function: no fusion and no kernel, whose errors
    this is to measure. An error in a plain function itself shows in onnxruntime only. Inside quantised operators and
    in Resize's coordinates the arithmetic is float32, as ONNX defines it. Raises as `infera_gpu.load` and
    `Session.run` do.
    """
    graph = load_graph(model)
    check_supported(graph, registry())
    with Session(_widened_graph(graph), _PlainDevice(), fuse=False) as session:
        return session.run(widened(feeds))


def widened(arrays: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """The arrays, floats narrower than float64 converted to it; float8, a storage format, is left."""
    return {name: _wide(array) for name, array in arrays.items()}


def _wide(array: HostArray) -> HostArray:
    return array.astype(_FLOAT64) if array.dtype in _NARROW else array


def _widened_graph(graph: Graph) -> Graph:
    def wide(specs: Mapping[str, ValueSpec]) -> dict[str, ValueSpec]:
        return {
            k: replace(s, dtype=_FLOAT64) if isinstance(s, TensorSpec) and s.dtype in _NARROW else s
            for k, s in specs.items()
        }

    return replace(
        graph,
        nodes=tuple(_widened_node(n, graph.opsets) for n in graph.nodes),
        inputs=wide(graph.inputs),
        outputs=wide(graph.outputs),
        constants=widened(graph.constants),
        specs=wide(graph.specs),
    )


def _widened_node(node: Node, opsets: Mapping[str, int]) -> Node:
    """The node with its element types written out: left out, they mean float32 to some operators."""
    op = registry().find(node.domain, node.op, version_of(node, opsets))
    attrs = dict(node.attrs) if op is None else {k: v for k, v in op.fill(node).items() if v is not None}
    for name, value in attrs.items():
        if isinstance(value, Graph):
            attrs[name] = _widened_graph(value)
        elif isinstance(value, np.ndarray):
            attrs[name] = _wide(value)
        elif name in _TYPE_ATTRIBUTES and value in _NARROW_CODES:
            attrs[name] = onnx_of_dtype(_FLOAT64)
    if node.op == "ConstantOfShape":
        attrs.setdefault("value", np.zeros(1))
    return replace(node, attrs=attrs)

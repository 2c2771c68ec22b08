"""Float32 graphs in half precision: what gains is computed on float16 or bfloat16, what is sensitive stays.

A value exists in float32, in half precision, or in both, with a Cast between; who runs how is data. Products,
convolutions and attention always run in half precision: their kernels sum in float32. What moves data or works
elementwise follows its operands; so do norms and softmax, whose kernels keep statistics in float32. Everything else
stays float32: sums, powers, exponentials, quotients of two values, who would meet a constant that half precision cannot
hold, and what is read by such alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import ml_dtypes
import numpy as np

from infera_gpu.graph import Graph, HostArray, Node, made_name
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.pattern import own_opset
from infera_gpu.passes.permute import with_attrs
from infera_gpu.passes.quantized_finish import PRODUCTS
from infera_gpu.spec import DType, onnx_of_dtype

HALF = "half"
"""What the name of a value in half precision ends with, as `made_name` makes it."""

FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


LARGEST: Mapping[DType, float] = MappingProxyType({FLOAT16: 61440.0, BFLOAT16: float(ml_dtypes.finfo(BFLOAT16).max)})
"""What a value is held to before it is rounded. Float32's lowest, which hides keys from a query, would be -inf in both
types, and NaN where nothing else is seen. Float16 ends at 65,504: the rest is for the scores that a mask is added to.
"""


@dataclass(frozen=True, slots=True)
class Way:
    """How an operator runs in half precision.

    One that `seeds` does so whatever its operands are, the others where one of them is half already. `inputs` and
    `outputs` are those of the operator's main element type; None for all of them. An input that `may_be_bool` is left
    alone where it is.
    """

    seeds: bool = False
    may_be_bool: int = -1
    inputs: frozenset[int] | None = None
    outputs: frozenset[int] | None = frozenset({0})
    says_type: bool = False
    """Whether the attribute `to` is the type of what it makes, which its inputs do not tell."""


_FIRST = frozenset({0})
_ELEMENTWISE = (
    *(
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Max",
        "Min",
        "Neg",
        "Abs",
        "Clip",
        "Relu",
        "LeakyRelu",
        "Elu",
        "Selu",
        "Celu",
        "Sigmoid",
    ),
    *("HardSigmoid", "HardSwish", "Tanh", "Softplus", "Softsign", "Swish", "Mish", "Gelu", "PRelu", "Erf"),
    *("infera.Gelu", "com.microsoft.Gelu", "com.microsoft.FastGelu", "com.microsoft.BiasGelu"),
    "com.microsoft.QuickGelu",
)
_NORMS = (
    *("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization"),
    *("SimplifiedLayerNormalization", "infera.WidenedNormalization"),
)
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_PRODUCTS = (
    *("MatMul", "Gemm", "Conv", "ConvTranspose", "infera.FusedMatMul", "infera.FusedConv"),
    *("infera.GatedMatMul", "infera.NormalizedMatMul"),
    *("com.microsoft.FusedMatMul", "com.microsoft.FusedGemm", "com.microsoft.FusedConv"),
)
_ATTENTION = {"Attention": 6, "infera.Attention": 4, "com.microsoft.MultiHeadAttention": 4}
"""How many of the first inputs have the element type; what follows are lengths, or what their kernels refuse."""
_MOVES = (
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Slice", "Gather", "GatherElements"),
    *("GatherND", "Tile", "DepthToSpace", "SpaceToDepth", "Identity", "Dropout", "Trilu", "ReduceMax", "ReduceMin"),
    "Resize",
)

_RESIDUAL, _SCALE = 3, 8
"""Inputs of quantised products: see `ops/quantized.py`."""

_NUMBERS = frozenset({"value"})
"""Attributes that are elements of the result: of Pad, before opset 11."""

WAYS: Mapping[str, Way] = MappingProxyType(
    {
        **dict.fromkeys(_PRODUCTS, Way(seeds=True)),
        **{op: Way(True, 3, frozenset(range(n)), outputs=None) for op, n in _ATTENTION.items()},
        **dict.fromkeys((*_ELEMENTWISE, *_NORMS, *_POOLS, "Concat"), Way()),
        **dict.fromkeys(_MOVES, Way(inputs=_FIRST)),
        "BatchNormalization": Way(outputs=None),
        "Split": Way(inputs=_FIRST, outputs=None),
        "Pad": Way(inputs=frozenset({0, 2})),
        "Where": Way(inputs=frozenset({1, 2})),
        "infera.Lookup": Way(inputs=frozenset({1})),
        "infera.EmbeddedNormalization": Way(inputs=frozenset({1, 3, 5, 6, 7})),
        "infera.Rotary": Way(),
        "com.microsoft.SkipLayerNormalization": Way(outputs=frozenset({0, 3})),
        "QuantizeLinear": Way(inputs=_FIRST, outputs=frozenset()),
        "infera.QuantizedLayerNormalization": Way(inputs=frozenset(range(3))),
        **dict.fromkeys(PRODUCTS, Way(seeds=True, inputs=frozenset({_RESIDUAL}), says_type=True)),
    }
)
"""Operators that may run in half precision."""


def way_of(node: Node) -> Way | None:
    """How a node runs in half precision, None where it does not. What quantises its result makes integers, and reads a
    residual as it is."""
    way = WAYS.get(node.qualified)
    if way is None or not way.says_type or len(node.inputs) <= _SCALE or not node.inputs[_SCALE]:
        return way
    return replace(way, seeds=False, outputs=frozenset(), says_type=False)


def halved(graph: Graph, dtype: DType) -> Graph:
    """The graph with its inner values in `dtype`; inputs, outputs and what subgraphs capture stay as they are."""
    return _Conversion(graph, dtype).run()


class _Conversion:
    def __init__(self, graph: Graph, dtype: DType) -> None:
        self.graph, self.dtype = graph, dtype
        self.draft = Draft(graph)
        self.nodes: list[Node] = []
        self.constants: dict[str, HostArray] = dict(graph.constants)
        self.halves: dict[str, str] = {}
        """Value -> the name of what it is in half precision."""
        self.wide = {*graph.inputs, *graph.constants}
        """Values that exist as the model has them."""

    def run(self) -> Graph:
        last = {v: i for i, node in enumerate(self.graph.nodes) for v in (*node.outputs, *node.reads)}
        ended: dict[int, list[str]] = {}
        for value in self.graph.outputs:
            if value in last:
                ended.setdefault(last[value], []).append(value)
        for i, node in enumerate(self.graph.nodes):
            way = way_of(node)
            if way is not None and self.runs_in_half(node, way):
                self.narrow(node, way)
            elif node.qualified in ("Shape", "Size"):
                value = node.inputs[0]
                self.nodes.append(node if value in self.wide else replace(node, inputs=(self.halves[value],)))
                self.wide.update(node.outputs)
            else:
                for value in node.reads:
                    self.widened(value)
                self.nodes.append(node)
                self.wide.update(filter(None, node.outputs))
            for value in ended.get(i, ()):  # nothing else reads it: both would take memory until the end
                self.widened(value)
        for value in self.graph.outputs:
            self.widened(value)
        read = {v for n in self.nodes for v in n.reads} | set(self.graph.outputs)
        constants = {k: v for k, v in self.constants.items() if k in read}
        return replace(self.graph, nodes=tuple(self.nodes), constants=constants)

    # ---- who runs how

    def runs_in_half(self, node: Node, way: Way) -> bool:
        values = [v for i, v in enumerate(node.inputs) if v and self.has_type(i, v, way)]
        if not (values or way.says_type) or node.subgraphs or not all(map(self.is_float, values)):
            return False
        constants = [v for v in values if v in self.graph.constants]
        numbers = [self.graph.constants[v] for v in constants]
        numbers += [np.asarray(node.attrs[k]) for k in _NUMBERS & node.attrs.keys()]
        if not all(map(self.holds, numbers)) or (node.qualified == "Div" and not self.divides(values[1])):
            return False
        if way.says_type:
            return any(r.qualified in WAYS for r in self.draft.readers.get(node.outputs[0], {}).values())
        if way.seeds:
            return True
        follows = len(constants) == len(values) or any(v in self.halves for v in values)
        return follows and not self.feeds_float32(node)

    def has_type(self, i: int, value: str, way: Way) -> bool:
        """Whether an input, if it is float32, has the main element type."""
        if i == way.may_be_bool:
            spec = self.draft.spec(value)
            if spec is not None and spec.dtype == np.bool_:
                return False
        return way.inputs is None or i in way.inputs

    def feeds_float32(self, node: Node) -> bool:
        """Whether all that read what a node makes stay float32: the squares of a variance, which cancel."""
        readers = [r for o in node.outputs for r in self.draft.readers.get(o, {}).values()]
        return bool(readers) and all(r.qualified not in WAYS and r.qualified not in ("Shape", "Size") for r in readers)

    def is_float(self, value: str) -> bool:
        """Whether the value is float32 as the model has it."""
        if value in self.halves:
            return True
        spec = self.draft.spec(value)
        return spec is not None and spec.dtype == FLOAT32

    def holds(self, constant: HostArray) -> bool:
        """Whether half precision has a constant's range: float16 ends at 65,504, bfloat16 a little below float32, and
        what is all below the least number is zero."""
        magnitudes = np.abs(constant)
        finite = magnitudes[np.isfinite(magnitudes)]
        largest = float(finite.max(initial=0.0))
        limits = ml_dtypes.finfo(self.dtype)
        return largest == 0.0 or float(limits.smallest_subnormal) <= largest <= float(limits.max)

    def divides(self, value: str) -> bool:
        """Whether a divisor is known, and no subnormal number of float16: an epsilon would lose its digits."""
        divisor = self.graph.constants.get(value)
        return divisor is not None and bool((np.abs(divisor) >= np.finfo(FLOAT16).smallest_normal).all())

    # ---- making values

    def narrow(self, node: Node, way: Way) -> None:
        inputs = tuple(
            self.half(v) if v and self.has_type(i, v, way) else self.widened(v) for i, v in enumerate(node.inputs)
        )
        outputs = []
        for i, value in enumerate(node.outputs):
            if value and (way.outputs is None or i in way.outputs):
                self.halves[value] = made_name(value, HALF)
                outputs.append(self.halves[value])
            else:
                outputs.append(value)
                self.wide.add(value)
        made = replace(node, inputs=inputs, outputs=tuple(outputs))
        self.nodes.append(with_attrs(made, to=onnx_of_dtype(self.dtype)) if way.says_type else made)

    def half(self, value: str) -> str:
        """The name of the value in half precision, which a Cast makes where nothing else did."""
        if value not in self.halves:
            name = self.halves[value] = made_name(value, HALF)
            if value in self.graph.constants:
                self.constants[name] = self.graph.constants[value].astype(self.dtype)
            else:
                self.nodes.append(self.cast(self.bounded(value), name, self.dtype))
        return self.halves[value]

    def bounded(self, value: str) -> str:
        """The value within what half precision holds: what is computed or given may be beyond it. Infinities stay: a
        row of a mask that has no other value is one that sees nothing."""
        most = LARGEST[self.dtype]
        low, high, name, within, endless = (
            made_name(value, what) for what in ("lowest", "highest", "bounded", "within", "endless")
        )
        if own_opset(self.graph, 11):  # older ones say them as attributes
            opset = own_opset(self.graph, 6)
            self.nodes.append(Node("Clip", (value,), (within,), {"min": -most, "max": most}, opset=opset))
        else:
            self.constants |= {low: np.array(-most, FLOAT32), high: np.array(most, FLOAT32)}
            self.nodes.append(Node("Clip", (value, low, high), (within,)))
        self.nodes += [
            Node("IsInf", (value,), (endless,), opset=own_opset(self.graph, 10)),
            Node("Where", (endless, value, within), (name,), opset=own_opset(self.graph, 9)),
        ]
        return name

    def widened(self, value: str) -> str:
        """The value's own name, under which a Cast makes it where it is there in half precision alone."""
        if value not in self.wide and value in self.halves:
            self.nodes.append(self.cast(self.halves[value], value, FLOAT32))
            self.wide.add(value)
        return value

    def cast(self, source: str, target: str, dtype: DType) -> Node:
        since = 13 if self.dtype == BFLOAT16 else 6
        return Node("Cast", (source,), (target,), {"to": onnx_of_dtype(dtype)}, opset=own_opset(self.graph, since))

"""What is known of values before any shape is: element types, ranks, and dimensions where they follow.

Only what the inputs and constants say counts, which every run is held to; what a file claims of other values does not.
A dimension that is not known is named by the value that it is met in, so that equal names are equal sizes (`sizes`).
A value without a rule is unknown. Rules need not refuse what is wrong: planning does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from infera_gpu.graph import JOINT, Graph, HostArray, Node, made_name
from infera_gpu.passes import sizes
from infera_gpu.spec import Dim, DType, TensorSpec, dtype_of_onnx, spec_of

MAX_RANK = 64
"""Of arrays, as NumPy has it: a file may ask for more."""

Known: TypeAlias = TensorSpec | None
Rule: TypeAlias = Callable[["Facts", Node, Sequence[Known]], Known]
"""The type of output 0, from the node and what is known of its inputs."""


class Facts:
    """The types of a graph's values, found out when they are asked for. `producers` may change as long as the values
    of a name stay alike. `known` is what has been found out before of values of these names, and is added to."""

    def __init__(self, graph: Graph, producers: Mapping[str, Node], known: dict[str, Known] | None = None) -> None:
        self._graph, self.producers = graph, producers
        self._known = {} if known is None else known
        self._sizes: dict[str, sizes.Sizes | None] = {}

    def constant(self, value: str) -> HostArray | None:
        return self._graph.constants.get(value)

    def spec(self, value: str) -> Known:
        """What is known of a value; None where not even its element type is."""
        known, producers, todo = self._known, self.producers, [value]
        while todo:
            asked = todo[-1]
            n = None if asked in known else producers.get(asked)
            if n is not None:
                rule = RULES.get(n.qualified) if n.outputs[0] == asked or n.op == "Split" else None
                missing = [] if rule is None else [i for i in n.inputs if i and i not in known]
                if missing:
                    known.update({i: self._given(i) for i in missing if i not in producers})
                    todo += [i for i in missing if i not in known]
                    continue
                known[asked] = None if rule is None else self._applied(rule, n, asked)
            elif asked not in known:
                known[asked] = self._given(asked)
            todo.pop()
        return known[value]

    def sizes(self, value: str) -> sizes.Sizes | None:
        """The elements of a shape that the graph computes; None where not even their count is known."""
        return sizes.sizes(self, value, self._sizes)

    def _given(self, value: str) -> Known:
        constant = self.constant(value)
        if constant is not None:
            return spec_of(constant)
        spec = self._graph.inputs.get(value)
        return _with_names(spec, value) if isinstance(spec, TensorSpec) else None

    def _applied(self, rule: Rule, n: Node, value: str) -> Known:
        try:
            made = rule(self, n, [self._known.get(i) if i else None for i in n.inputs])
            return made if made is None else _with_names(made, value)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return None


def _with_names(spec: TensorSpec, value: str) -> TensorSpec:
    """Each dimension that is not known has a name: that of the value and its axis."""
    if None not in spec.shape:
        return spec
    shape = tuple([made_name(value, str(i)) if d is None else d for i, d in enumerate(spec.shape)])
    return TensorSpec(shape, spec.dtype, spec.ranked)


def _unranked(spec: Known, dtype: DType | None = None) -> Known:
    return None if spec is None else TensorSpec((), dtype or spec.dtype, ranked=False)


def _with_dtype(spec: Known, dtype: DType) -> TensorSpec:
    return TensorSpec((), dtype, ranked=False) if spec is None else TensorSpec(spec.shape, dtype, spec.ranked)


def _same(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    return ins[0]


def _cast(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    return _with_dtype(ins[0], dtype_of_onnx(n.attrs["to"]))


def broadcast(shapes: Sequence[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    """The shape that shapes broadcast to, as far as it is known."""
    rank = max(map(len, shapes))
    found: list[Dim] = []
    for column in zip(*((1,) * (rank - len(s)) + s for s in shapes), strict=True):
        wide = {d for d in column if d != 1}
        sizes = [d for d in wide if isinstance(d, int)]
        found.append(sizes[0] if sizes else wide.pop() if len(wide) == 1 else None if wide else 1)
    return tuple(found)


def _elementwise(first: int = 0, dtype: DType | None = None) -> Rule:
    """All inputs broadcast; the element type is `dtype`, or that of input `first`."""

    def rule(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
        like = ins[first]
        made = dtype or (like.dtype if like is not None else None)
        if made is None:
            made = next((s.dtype for s in ins[first:] if s is not None), None)
        if made is None:
            return None
        shapes = [s.shape for s in ins if s is not None and s.ranked]
        known = len(shapes) == len(ins)
        return TensorSpec(broadcast(shapes) if known else (), made, known)

    return rule


def _product(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    a, b = ins[:2]
    apart = n.attrs.get("transBatchA") or n.attrs.get("transBatchB")
    if a is None or b is None or not (a.ranked and b.ranked) or min(a.ndim, b.ndim) < 2 or apart:
        return _unranked(a or b)
    left, right = (
        (*s.shape[:-2], s.shape[-1], s.shape[-2]) if n.attrs.get(flag) else s.shape
        for s, flag in ((a, "transA"), (b, "transB"))
    )
    return TensorSpec((*broadcast([left[:-2], right[:-2]]), left[-2], right[-1]), a.dtype)


def _gemm(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """A product of matrices: operands that may be anything else have two axes here."""
    return _product(facts, n, [TensorSpec((None, None), s.dtype) if s and not s.ranked else s for s in ins[:2]])


def _convolved(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """(batch, channels, ...), of as many axes as the weights have."""
    x, w = ins[0], ins[1] if len(ins) > 1 and n.op.endswith(("Conv", "ConvTranspose")) else None
    if x is None or not x.ranked:
        x = TensorSpec((None,) * w.ndim, x.dtype) if x is not None and w is not None and w.ranked else _unranked(x)
    if x is None or not x.ranked:
        return x
    channels: Dim = None
    if w is not None and w.ranked and n.op.endswith("Conv"):
        channels = w.shape[0]
    elif n.op.endswith("Pool"):
        channels = x.shape[1]
    spatial: tuple[Dim, ...] = (1,) * (x.ndim - 2) if n.op.startswith("Global") else (None,) * (x.ndim - 2)
    return TensorSpec((x.shape[0], channels, *spatial), x.dtype)


def _attended(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """As many vectors as there are queries, as long as values are."""
    q, v = ins[0], ins[2]
    if q is None or v is None or not (q.ranked and v.ranked) or min(q.ndim, v.ndim) < 2:
        return _unranked(q)
    lead = q.shape[:-2]
    if not n.attrs.get("alike") and not n.attrs.get("repeated"):
        given = [s for s, name in zip(ins[:6], n.inputs, strict=False) if name]
        if any(s is None or not s.ranked for s in given):
            return _unranked(q)
        lead = broadcast([s.shape[:-2] for s in given if s is not None])
    made = (*lead, q.shape[-2], v.shape[-1])
    return TensorSpec((made[0], made[2], made[1], made[3]) if n.attrs.get("heads_last") else made, q.dtype)


def _einsum(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """As many axes as the equation names."""
    x, (_, arrow, made) = ins[0], str(n.attrs["equation"]).partition("->")
    if x is None or not arrow or "." in made:
        return _unranked(x)
    return TensorSpec((None,) * len(made.replace(" ", "")), x.dtype)


def _transposed(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    x, given = ins[0], n.attrs.get("perm")
    if x is None or not x.ranked:
        return TensorSpec((None,) * len(given), x.dtype) if x is not None and given else _unranked(x)
    perm = given or range(x.ndim)[::-1]
    return TensorSpec(tuple(x.shape[p] for p in perm), x.dtype)


def _reshaped(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    x, target, of = ins[0], facts.sizes(n.inputs[1]), ins[1]
    if x is None or target is None:
        rank = of.shape[0] if of is not None and of.ranked and of.ndim == 1 else None
        if x is None or not isinstance(rank, int) or rank > MAX_RANK:
            return _unranked(x)
        return TensorSpec((None,) * rank, x.dtype)
    shape = x.shape if x.ranked else (None,) * MAX_RANK
    return TensorSpec(sizes.reshaped(shape, target, not n.attrs.get("allowzero", 0)), x.dtype)


def _flattened(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    return None if ins[0] is None else TensorSpec((None, None), ins[0].dtype)


def _given_axes(facts: Facts, n: Node) -> tuple[int, ...] | None:
    """Axes from the attribute or from constant input 1; None where they are left out. Raises where they are unknown."""
    if "axes" in n.attrs:
        return tuple(n.attrs["axes"])
    if len(n.inputs) < 2 or not n.inputs[1]:
        return None
    found = facts.constant(n.inputs[1])
    if found is None or found.dtype.kind != "i":
        raise LookupError
    return tuple(found.reshape(-1).tolist())


def _reduced(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    x = ins[0]
    if x is None or not x.ranked:
        return _unranked(x)
    axes = _given_axes(facts, n)
    gone = {a % x.ndim for a in axes} if axes else set(range(0 if n.attrs.get("noop_with_empty_axes") else x.ndim))
    if n.attrs.get("keepdims", 1):
        return TensorSpec(tuple(1 if i in gone else d for i, d in enumerate(x.shape)), x.dtype)
    return TensorSpec(tuple(d for i, d in enumerate(x.shape) if i not in gone), x.dtype)


def _unsqueezed(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    x, axes = ins[0], _given_axes(facts, n)
    if x is None or not x.ranked or axes is None:
        return _unranked(x)
    rank = x.ndim + len(axes)
    new, old = {a % rank for a in axes}, iter(x.shape)
    if len(new) != len(axes):  # which planning refuses
        return _unranked(x)
    return TensorSpec(tuple(1 if i in new else next(old) for i in range(rank)), x.dtype)


def _squeezed(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    x, axes = ins[0], _given_axes(facts, n)
    if x is None or not x.ranked or (axes is None and not x.is_static):
        return _unranked(x)
    gone = {i for i, d in enumerate(x.shape) if d == 1} if axes is None else {a % x.ndim for a in axes}
    return TensorSpec(tuple(d for i, d in enumerate(x.shape) if i not in gone), x.dtype)


def _gathered(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    x, index = ins[:2]
    if x is None or index is None or not (x.ranked and index.ranked):
        return _unranked(x)
    axis = int(n.attrs.get("axis", 0)) % x.ndim
    return TensorSpec((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]), x.dtype)


def _gathered_along_axes(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """Each index in the last axis of the indices is along one of the first axes of the data."""
    x, index = ins[:2]
    if x is None or index is None or not (x.ranked and index.ranked) or n.attrs.get("batch_dims", 0):
        return _unranked(x)
    count = index.shape[-1]
    if not isinstance(count, int) or not 0 < count <= x.ndim:
        return _unranked(x)
    return TensorSpec((*index.shape[:-1], *x.shape[count:]), x.dtype)


def _looked_up(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """Rows of a table, in place of the indices' last axis."""
    ids, table = ins[:2]
    if ids is None or table is None or not (ids.ranked and table.ranked) or len(n.inputs) > 2:
        return _unranked(table)
    return TensorSpec((*ids.shape[:-1], table.shape[-1]), table.dtype)


def _of_same_rank(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """Slice, Pad: which dimensions stay is not followed."""
    x = ins[0]
    return _unranked(x) if x is None or not x.ranked else TensorSpec((None,) * x.ndim, x.dtype)


def _split(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """Of every part: its size is followed where all have the same."""
    x = ins[0]
    if x is None or not x.ranked:
        return _unranked(x)
    axis, count = int(n.attrs.get("axis", 0)) % x.ndim, len(n.outputs)
    whole, even = x.shape[axis], "split" not in n.attrs and (len(n.inputs) < 2 or not n.inputs[1])
    part = whole // count if even and isinstance(whole, int) and whole % count == 0 else None
    return TensorSpec(tuple(part if i == axis else d for i, d in enumerate(x.shape)), x.dtype)


def _counted(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """A Range: from 0 in steps of 1 as many as its end, which may be a size."""
    start, end, step = (facts.sizes(i) for i in n.inputs)
    count = end[0] if (start, step) == ((0,), (1,)) and end is not None else None
    return None if ins[0] is None else TensorSpec((max(count, 0) if isinstance(count, int) else count,), ins[0].dtype)


def _joined(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    x = ins[0]
    if x is None or not all(s is not None and s.ranked and s.ndim == x.ndim for s in ins):
        return _unranked(x)
    axis = int(n.attrs["axis"]) % x.ndim
    along = [*zip(*(s.shape for s in ins if s is not None), strict=True)]
    numbers = [d for d in along[axis] if isinstance(d, int)]
    whole = sum(numbers) if len(numbers) == len(ins) else None
    return TensorSpec(tuple(whole if i == axis else _best(dims) for i, dims in enumerate(along)), x.dtype)


def _best(dims: Sequence[Dim]) -> Dim:
    """What is best known of equal sizes: a number, a dimension of the model's inputs, or the first of their names."""
    return min(dims, key=lambda d: 0 if isinstance(d, int) else 1 if d is not None and JOINT not in d else 2)


def _power(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """Of the base's type, which the exponent's says nothing about."""
    return None if ins[0] is None else _elementwise()(facts, n, ins)


def _dequantized(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """The type that is asked for, else that of the scale."""
    if n.attrs.get("output_dtype", 0):
        return _with_dtype(ins[0], dtype_of_onnx(n.attrs["output_dtype"]))
    return _with_dtype(ins[0], ins[1].dtype) if ins[1] is not None else None


def _integer_product(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    return _with_dtype(_product(facts, n, ins), np.dtype(np.int32))


def _expanded(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    (x, target), shape = ins, facts.sizes(n.inputs[1])
    if x is None or not x.ranked:
        return _unranked(x)
    if shape is not None:
        return TensorSpec(broadcast([x.shape, shape]), x.dtype)
    count = target.shape[0] if target is not None and target.ranked and target.ndim == 1 else None
    if not isinstance(count, int) or count > MAX_RANK:
        return _unranked(x)
    return TensorSpec((None,) * max(x.ndim, count), x.dtype)


def _quantized(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """Of the zero point's type; without one it depends on attributes."""
    zero = ins[2] if len(ins) > 2 else None
    return None if zero is None else _with_dtype(ins[0], zero.dtype)


def _centred(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    return _with_dtype(ins[0], np.dtype(np.float32))


def _finished(product: Rule) -> Rule:
    """A quantised product with all that follows it: of the type of the last zero point, or of floats."""

    def rule(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
        zero = ins[9] if len(ins) > 9 else None
        dtype = dtype_of_onnx(n.attrs.get("to", 1)) if zero is None else zero.dtype
        made, residual = product(facts, n, ins), ins[3] if len(n.inputs) > 3 and n.inputs[3] else None
        if len(n.inputs) <= 3 or not n.inputs[3]:
            return _with_dtype(made, dtype)
        if made is None or residual is None or not (made.ranked and residual.ranked):
            return _unranked(made, dtype)
        return TensorSpec(broadcast([made.shape, residual.shape]), dtype)

    return rule


def _alike(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    """Of input 0's type; its shape is not followed."""
    return _unranked(ins[0])


def _size(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    return TensorSpec((), np.dtype(np.int64))


def _shape(facts: Facts, n: Node, ins: Sequence[Known]) -> Known:
    x = ins[0]
    axes = range(x.ndim)[n.attrs.get("start", 0) : n.attrs.get("end")] if x is not None and x.ranked else None
    return TensorSpec((None if axes is None else len(axes),), np.dtype(np.int64))


_ACTIVATIONS = (
    *(
        "Relu",
        "LeakyRelu",
        "Elu",
        "Selu",
        "Celu",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Tanh",
        "Softplus",
        "Softsign",
    ),
    *("ThresholdedRelu", "Mish", "Swish", "Shrink", "Gelu", "infera.Gelu", "PRelu", "Clip", "com.microsoft.QuickGelu"),
    *("com.microsoft.Gelu", "com.microsoft.FastGelu", "com.microsoft.BiasGelu"),
)
_FUNCTIONS = (
    *("Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Tan", "Asin"),
    *("Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Erf", "Not", "Identity", "Dropout", "CumSum"),
)
_NORMS = (
    *("Softmax", "LogSoftmax", "Hardmax", "LayerNormalization", "RMSNormalization", "InstanceNormalization", "LRN"),
    *("GroupNormalization", "BatchNormalization", "MeanVarianceNormalization", "LpNormalization"),
    *("SimplifiedLayerNormalization", "com.microsoft.SkipLayerNormalization", "infera.L2Normalization", "Trilu"),
    *("infera.AxisNormalization", "RotaryEmbedding", "infera.Rotary", "infera.QuantizedLayerNormalization"),
)
_OTHERS = (
    *("LSTM", "GRU", "RNN", "GatherElements", "ScatterND", "ScatterElements", "Compress", "Tile"),
    *("DepthToSpace", "SpaceToDepth", "Upsample", "GridSample", "RoiAlign", "TopK", "STFT", "DFT"),
    *("ReduceL1", "ReduceLogSumExp", "ReduceLogSum", "LpPool"),
)
_PRODUCTS = (
    *("MatMul", "infera.FusedMatMul"),
    *("com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul"),
)
_STORED = (
    *("infera.FusedConvNHWC", "infera.ConvTransposeNHWC", "infera.MaxPoolNHWC", "infera.AveragePoolNHWC"),
    *("infera.GlobalMaxPoolNHWC", "infera.GlobalAveragePoolNHWC", "infera.BatchNormalizationNHWC", "infera.LRNNHWC"),
    *("infera.ReshapeStored", "infera.FlattenStored"),
)
_BOOL = np.dtype(np.bool_)

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys((*_ACTIVATIONS, *_FUNCTIONS, *_NORMS), _same),
        **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Sum", "Mean", "BitShift"), _elementwise()),
        "infera.WidenedNormalization": _elementwise(),
        **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"), _elementwise()),
        "Pow": _power,
        **dict.fromkeys(("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"), _elementwise(dtype=_BOOL)),
        **dict.fromkeys(("And", "Or", "Xor", "IsNaN", "IsInf"), _elementwise(dtype=_BOOL)),
        "Where": _elementwise(1),
        "Cast": _cast,
        **dict.fromkeys(_PRODUCTS, _product),
        **dict.fromkeys(("Gemm", "com.microsoft.FusedGemm"), _gemm),
        **dict.fromkeys(
            ("Conv", "infera.FusedConv", "com.microsoft.FusedConv", "ConvTranspose", "MaxPool", "AveragePool"),
            _convolved,
        ),
        **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _convolved),
        "Transpose": _transposed,
        "Reshape": _reshaped,
        "Flatten": _flattened,
        **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"), _reduced),
        **dict.fromkeys(("ReduceL2", "ReduceSumSquare"), _reduced),
        "Unsqueeze": _unsqueezed,
        "Squeeze": _squeezed,
        "Gather": _gathered,
        "GatherND": _gathered_along_axes,
        "infera.Lookup": _looked_up,
        **dict.fromkeys(("Slice", "Pad", "Resize"), _of_same_rank),
        "Split": _split,
        "Concat": _joined,
        "Einsum": _einsum,
        "infera.Attention": _attended,
        "DequantizeLinear": _dequantized,
        "QuantizeLinear": _quantized,
        "infera.Centre": _centred,
        "infera.QuantizedConv": _finished(_convolved),
        "infera.QuantizedMatMul": _finished(_product),
        "MatMulInteger": _integer_product,
        **dict.fromkeys((*_OTHERS, *_STORED), _alike),
        "Expand": _expanded,
        "Shape": _shape,
        "Size": _size,
        "Range": _counted,
    }
)
"""Operator -> its rule."""

"""Types of what computes, and the table of all rules: see `facts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from infera_gpu.graph import Node
from infera_gpu.passes import rules_moving
from infera_gpu.passes.known import Asked, Known, Rule, broadcast, unranked, with_dtype
from infera_gpu.spec import Dim, DType, TensorSpec, dtype_of_onnx


def _same(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    return ins[0]


def _cast(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    return with_dtype(ins[0], dtype_of_onnx(n.attrs["to"]))


def _elementwise(first: int = 0, dtype: DType | None = None) -> Rule:
    """All inputs broadcast; the element type is `dtype`, or that of input `first`."""

    def rule(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
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


def _product(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    a, b = ins[:2]
    apart = n.attrs.get("transBatchA") or n.attrs.get("transBatchB")
    if a is None or b is None or not (a.ranked and b.ranked) or min(a.ndim, b.ndim) < 2 or apart:
        return unranked(a or b)
    left, right = (
        (*s.shape[:-2], s.shape[-1], s.shape[-2]) if n.attrs.get(flag) else s.shape
        for s, flag in ((a, "transA"), (b, "transB"))
    )
    return TensorSpec((*broadcast([left[:-2], right[:-2]]), left[-2], right[-1]), a.dtype)


def _gemm(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """A product of matrices: operands that may be anything else have two axes here."""
    return _product(facts, n, [TensorSpec((None, None), s.dtype) if s and not s.ranked else s for s in ins[:2]])


def _convolved(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """(batch, channels, ...), of as many axes as the weights have."""
    x, w = ins[0], ins[1] if len(ins) > 1 and n.op.endswith(("Conv", "ConvTranspose")) else None
    if x is None or not x.ranked:
        x = TensorSpec((None,) * w.ndim, x.dtype) if x is not None and w is not None and w.ranked else unranked(x)
    if x is None or not x.ranked:
        return x
    channels: Dim = None
    if w is not None and w.ranked and n.op.endswith("Conv"):
        channels = w.shape[0]
    elif w is not None and w.ranked and isinstance(w.shape[1], int):
        channels = w.shape[1] * int(n.attrs.get("group", 1))
    elif n.op.endswith("Pool"):
        channels = x.shape[1]
    if n.op.startswith("Global"):
        return TensorSpec((x.shape[0], channels, *(1,) * (x.ndim - 2)), x.dtype)
    kernel = n.attrs.get("kernel_shape") or (w.shape[2:] if w is not None and w.ranked else ())
    known = len(kernel) == x.ndim - 2 and n.op != "ConvTranspose" and not n.attrs.get("ceil_mode", 0)
    spatial = _places(n, x.shape[2:], kernel) if known else [None] * (x.ndim - 2)
    return TensorSpec((x.shape[0], channels, *spatial), x.dtype)


def _places(n: Node, sizes: Sequence[Dim], kernel: Sequence[Dim]) -> list[Dim]:
    """How many places a window has along each axis; as many as there were, where it moves by one and padding makes up
    for its reach."""
    made: list[Dim] = []
    count, auto = len(sizes), n.attrs.get("auto_pad", "NOTSET")
    strides, dilations = (n.attrs.get(name) or (1,) * count for name in ("strides", "dilations"))
    pads = n.attrs.get("pads") or (0,) * 2 * count
    for i, (size, k) in enumerate(zip(sizes, kernel, strict=True)):
        less = dilations[i] * (k - 1) if isinstance(k, int) else None
        if less is not None and auto in ("NOTSET", "VALID"):
            less -= pads[i] + pads[count + i] if auto == "NOTSET" else 0
        elif less is not None:
            less = 0
        if strides[i] == 1 and less == 0:
            made.append(size)
        elif isinstance(size, int) and less is not None and size > less:
            made.append((size - less - 1) // strides[i] + 1)
        else:
            made.append(None)
    return made


def _attended(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """As many vectors as there are queries, as long as values are."""
    q, v = ins[0], ins[2]
    if q is None or v is None or not (q.ranked and v.ranked) or min(q.ndim, v.ndim) < 2:
        return unranked(q)
    repeated = n.attrs.get("repeated")
    lead = v.shape[:-2] if n.attrs.get("alike") and not repeated else q.shape[:-2]  # which masks may widen
    if not n.attrs.get("alike") and not repeated:
        given = [s for s, name in zip(ins[:6], n.inputs, strict=False) if name]
        if any(s is None or not s.ranked for s in given):
            return unranked(q)
        lead = broadcast([s.shape[:-2] for s in given if s is not None])
    made = (*lead, q.shape[-2], v.shape[-1])
    return TensorSpec((made[0], made[2], made[1], made[3]) if n.attrs.get("heads_last") else made, q.dtype)


def _attended_whole(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """Operators that attend by themselves: a vector for each query, whose heads may be apart or lie among keys."""
    q, v = ins[0], ins[2] if len(ins) > 2 else None
    if q is None or not q.ranked or q.ndim not in (3, 4, 5):
        return unranked(q)
    size = v.shape[-1] if q.ndim == 4 and v is not None and v.ndim == 4 else None
    return TensorSpec((*q.shape[: 2 if q.ndim == 5 else -1], size), q.dtype)


def _power(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """Of the base's type, which the exponent's says nothing about."""
    return None if ins[0] is None else _elementwise()(facts, n, ins)


def _dequantized(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """The type that is asked for, else that of the scale."""
    if n.attrs.get("output_dtype", 0):
        return with_dtype(ins[0], dtype_of_onnx(n.attrs["output_dtype"]))
    return with_dtype(ins[0], ins[1].dtype) if ins[1] is not None else None


def _integer_product(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    return with_dtype(_product(facts, n, ins), np.dtype(np.int32))


def _scaled_product(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    return with_dtype(_product(facts, n, ins), np.dtype(np.float32))


def _dynamic(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """The integers: who asks for the scale or the zero point is told nothing."""
    return with_dtype(ins[0], np.dtype(np.uint8))


def _quantized(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """Of the zero point's type; without one it depends on attributes."""
    zero = ins[2] if len(ins) > 2 else None
    return None if zero is None else with_dtype(ins[0], zero.dtype)


def _centred(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    return with_dtype(ins[0], np.dtype(np.float32))


def _finished(product: Rule) -> Rule:
    """A quantised product with all that follows it: of the type of the last zero point, or of floats."""

    def rule(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
        zero = ins[9] if len(ins) > 9 else None
        dtype = dtype_of_onnx(n.attrs.get("to", 1)) if zero is None else zero.dtype
        return with_dtype(_with_residual(product)(facts, n, ins), dtype)

    return rule


def _few_bits(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """N columns of the type of what is multiplied."""
    a, columns = ins[0], int(n.attrs["N"])
    return TensorSpec((*a.shape[:-1], columns), a.dtype) if a is not None and a.ranked else unranked(a)


def _with_residual(product: Rule, i: int = 3) -> Rule:
    """A product, and input i, which is added to it and may be wider."""

    def rule(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
        made = product(facts, n, ins)
        if len(n.inputs) <= i or not n.inputs[i]:
            return made
        residual = ins[i]
        if made is None or residual is None or not (made.ranked and residual.ranked):
            return unranked(made)
        return TensorSpec(broadcast([made.shape, residual.shape]), made.dtype)

    return rule


def _alike(facts: Asked, n: Node, ins: Sequence[Known]) -> Known:
    """Of input 0's type; its shape is not followed."""
    return unranked(ins[0])


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
    *("Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Erf", "Identity", "Dropout", "CumSum"),
)
_NORMS = (
    *("Softmax", "LogSoftmax", "Hardmax", "LayerNormalization", "RMSNormalization", "InstanceNormalization", "LRN"),
    *("GroupNormalization", "BatchNormalization", "MeanVarianceNormalization", "LpNormalization"),
    *("SimplifiedLayerNormalization", "com.microsoft.SkipLayerNormalization", "infera.L2Normalization", "Trilu"),
    *("infera.AxisNormalization", "RotaryEmbedding", "infera.Rotary", "infera.QuantizedLayerNormalization"),
    *("com.microsoft.SkipSimplifiedLayerNormalization", "com.microsoft.RotaryEmbedding", "com.microsoft.Trilu"),
    *("com.microsoft.GroupNorm", "com.microsoft.SkipGroupNorm", "CumProd", "ReverseSequence"),
)
_OTHERS = (
    *("LSTM", "GRU", "RNN", "GatherElements", "ScatterND", "ScatterElements", "Compress", "Tile"),
    *("DepthToSpace", "SpaceToDepth", "Upsample", "GridSample", "RoiAlign", "TopK", "STFT", "DFT"),
    *("ReduceL1", "ReduceLogSumExp", "ReduceLogSum", "LpPool"),
)
_PRODUCTS = (
    *("MatMul", "infera.GatedMatMul", "infera.NormalizedMatMul"),
    *("com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul"),
)
_ATTENTIONS = (
    "Attention",
    *(f"com.microsoft.{op}" for op in ("Attention", "MultiHeadAttention", "GroupQueryAttention")),
)
_STORED = (
    *("infera.FusedConvNHWC", "infera.ConvTransposeNHWC", "infera.MaxPoolNHWC", "infera.AveragePoolNHWC"),
    *("infera.GlobalMaxPoolNHWC", "infera.GlobalAveragePoolNHWC", "infera.BatchNormalizationNHWC", "infera.LRNNHWC"),
    *("infera.ReshapeStored", "infera.FlattenStored"),
)
_BOOL = np.dtype(np.bool_)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **rules_moving.RULES,
        **dict.fromkeys((*_ACTIVATIONS, *_FUNCTIONS, *_NORMS), _same),
        **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Sum", "Mean", "BitShift"), _elementwise()),
        "infera.WidenedNormalization": _elementwise(),
        **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"), _elementwise()),
        "Pow": _power,
        **dict.fromkeys(("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"), _elementwise(dtype=_BOOL)),
        **dict.fromkeys(("And", "Or", "Xor", "Not", "IsNaN", "IsInf"), _elementwise(dtype=_BOOL)),
        "Where": _elementwise(1),
        "Cast": _cast,
        **dict.fromkeys(_PRODUCTS, _product),
        "infera.FusedMatMul": _with_residual(_product),
        "com.microsoft.MatMulNBits": _few_bits,
        "infera.FusedMatMulNBits": _with_residual(_few_bits, 6),
        **dict.fromkeys(("Gemm", "com.microsoft.FusedGemm"), _gemm),
        **dict.fromkeys(
            ("Conv", "infera.FusedConv", "com.microsoft.FusedConv", "ConvTranspose", "MaxPool", "AveragePool"),
            _convolved,
        ),
        **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _convolved),
        "infera.Attention": _attended,
        **dict.fromkeys(_ATTENTIONS, _attended_whole),
        "DequantizeLinear": _dequantized,
        "QuantizeLinear": _quantized,
        "infera.Centre": _centred,
        "infera.QuantizedConv": _finished(_convolved),
        "infera.QuantizedMatMul": _finished(_product),
        "MatMulInteger": _integer_product,
        "com.microsoft.MatMulIntegerToFloat": _scaled_product,
        "DynamicQuantizeLinear": _dynamic,
        **dict.fromkeys((*_OTHERS, *_STORED), _alike),
    }
)
"""Operator -> its rule."""

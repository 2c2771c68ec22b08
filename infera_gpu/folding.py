"""What may be computed ahead of a run: what costs little beside what the file brings, in memory and in work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from infera_gpu.graph import FOLD_LIMIT, HostArray
from infera_gpu.op import Op, Site
from infera_gpu.spec import TensorSpec, is_plain

FREE_BYTES = 64 << 20
"""May be made whatever the file brings."""

TIMES = 16
"""Weights of 8 bits are converted, shifted and scaled, each into float32: twelve times what the file brings."""

FREE_WORK = 1 << 28
"""Inputs' elements times outputs' elements: no operator takes more steps than that, and few take as many."""

LINEAR = frozenset((
    *("Abs", "Acos", "Add", "And", "ArgMax", "ArgMin", "Asin", "Atan", "BitwiseAnd", "BitwiseNot", "BitwiseOr"),
    *("BitwiseXor", "Cast", "CastLike", "Ceil", "Clip", "Concat", "ConstantOfShape", "Cos", "DepthToSpace"),
    *("DequantizeLinear", "Div", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "Gather"),
    *("GatherElements", "GatherND", "Greater", "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "Less"),
    *("LessOrEqual", "Log", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Not", "OneHot", "Or", "Pad", "Pow"),
    *("QuantizeLinear", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"),
    *("Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign", "Sin", "Size"),
    *("Slice", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tan", "Tanh", "Tile", "Transpose"),
    *("Trilu", "Unsqueeze", "Where", "Xor"),
))  # fmt: skip
"""Standard operators whose work and temporaries are a few times their inputs and outputs."""


def fold_budget(constants: Mapping[str, HostArray]) -> int:
    """Bytes that may be computed ahead: TIMES what the file brings, at least FREE_BYTES, at most FOLD_LIMIT."""
    if TIMES * sum([a.nbytes for a in constants.values()]) <= FREE_BYTES:
        return FREE_BYTES
    brought = {a.__array_interface__["data"][0]: a.nbytes for a in constants.values()}
    return min(FOLD_LIMIT, max(FREE_BYTES, TIMES * sum(brought.values())))


def may_fold(op: Op, site: Site, made: Sequence[TensorSpec | None], budget: int) -> bool:
    """Whether the node, whose outputs will be like `made`, is to be computed ahead with `budget` bytes left.

    None in `made` is an output whose size depends on the inputs' values: it is taken to be as large as it can be.
    """
    taken = [s for s in site.ins if s is not None]
    elements = sum(s.size for s in taken)
    sized = [s for s in made if s is not None and is_plain(s)]
    unsized = (len(made) - len(sized)) * elements * max((s.ndim for s in taken), default=0)
    if sum(s.nbytes for s in sized) + 8 * unsized > budget:
        return False
    if not op.domain and op.name in LINEAR:
        return True
    return (1 + elements) * (1 + unsized + sum(s.size for s in sized)) <= FREE_WORK

"""Products whose sides onnxruntime's optimiser found transposed are again what an exporter wrote, where more than a
Softmax reads them: what is around them is recognised by it."""

from __future__ import annotations

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.attention import rank_of
from infera_gpu.passes.engine import Fusion, Match, Replacement, changed, node, standard

_SIDES = (("a", "transA"), ("b", "transB"))


def _is_among_reshapes(match: Match) -> bool:
    """The product is laid out otherwise, or read by several; and either side is a value of known axes."""
    attrs, out = match.root.attrs, match.root.outputs[0]
    readers = list(match.draft.readers.get(out, {}).values())
    if len(readers) == 1 and readers[0].qualified != "Reshape":
        return False
    if attrs.get("transBatchA", 0) or attrs.get("transBatchB", 0) or not any(attrs.get(flag, 0) for _, flag in _SIDES):
        return False
    x = match.spec("a")
    values = [match.values[name] for name, _ in _SIDES]
    known = x is not None and x.dtype.kind == "f" and all((rank_of(match, v) or 0) > 2 for v in values)
    return known and not any(v in match.graph.constants for v in values)


def _as_written(match: Match) -> Replacement:
    attrs, out, x = match.root.attrs, match.root.outputs[0], match.spec("a")
    assert x is not None
    before: list[Node] = []
    inputs: list[str] = []
    for name, flag in _SIDES:
        value = match.values[name]
        if attrs.get(flag, 0):
            axes = range(rank_of(match, value) or 0)
            turned = made_name(out, name)
            before.append(Node("Transpose", (value,), (turned,), {"perm": (*axes[:-2], *axes[:-3:-1])}))
            value = turned
        inputs.append(value)
    alpha = float(attrs.get("alpha", 1.0))
    if alpha == 1:
        return Replacement(standard(match, "MatMul", 1, tuple(inputs), {}), before=tuple(before))
    product, factor = made_name(out, "product"), made_name(out, "alpha")
    constants: dict[str, HostArray] = {factor: np.array(alpha, x.dtype)}
    before.append(Node("MatMul", tuple(inputs), (product,), {}))
    return Replacement(standard(match, "Mul", 7, (product, factor), {}), constants, tuple(before))


_EXAMPLE = """
        example (float[B, 3, S, 4] q, float[B, 3, T, 4] k) => (float[B, 3, S, T] y, int64[4] s) {
            e = com.microsoft.FusedMatMul <alpha = 0.5, transB = 1> (q, k)
            s = Shape(e)
            y = Softmax(e)
        }"""

TRANSPOSED = Fusion(
    name="product_of_transposed",
    patterns=(node(("com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul"), "a", "b"),),
    guard=_is_among_reshapes,
    build=_as_written,
    example=_EXAMPLE,
    near_misses=(
        changed(
            _EXAMPLE, ("example (", "of_scores_alone ("), (", int64[4] s)", ")"), ("            s = Shape(e)\n", "")
        ),
        changed(
            _EXAMPLE,
            ("example (", "nothing_transposed ("),
            (", transB = 1", ""),
            ("float[B, 3, T, 4] k", "float[B, 3, 4, T] k"),
        ),
        changed(
            _EXAMPLE, ("example (", "batches_after_the_first_axis ("), (", transB = 1", ", transB = 1, transBatchA = 1")
        ),
        changed(_EXAMPLE, ("example (", "of_a_matrix ("), ("float[B, 3, T, 4] k", "float[T, 4] k")),
    ),
)

FUSIONS = (TRANSPOSED,)

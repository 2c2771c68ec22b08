"""Attention within windows, as Swin has it: scores are laid out by window, get a mask for each, and are laid out back.

Queries, keys and values are laid out by window instead, which takes no copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.passes.attention import factor_of, is_last_axis, scaled
from infera_gpu.passes.engine import (
    Fusion,
    Match,
    Replacement,
    changed,
    either,
    node,
    standard,
)
from infera_gpu.passes.pattern import Arg, P


def _product(q: Arg) -> P:
    return node("MatMul", q, "kt", name="scores")


def _core(terms: Arg) -> P:
    biased = either(node("Add", terms, "mask", commutes=True), terms)
    masked = node("Add", node("Reshape", biased, "windows", name="apart"), "further", commutes=True)
    softmax = node("Softmax", node("Reshape", masked, "whole", name="together"), name="softmax")
    return node("MatMul", softmax, "v")


def _sizes(match: Match) -> tuple[int, ...] | None:
    """(windows, heads, length, size of queries, size of values), where operands are of these and of one batch."""
    specs = [match.spec(name) for name in ("q", "kt", "v")]
    target = match.draft.sizes(match.values["windows"])
    if target is None or len(target) != 5 or any(s is None or not s.ranked or s.ndim != 4 for s in specs):
        return None
    q, kt, v = (s.shape for s in specs if s is not None)
    found = (target[1], *q[1:], v[3])
    sizes = tuple(d for d in found if isinstance(d, int) and d > 0)
    if len(sizes) < len(found) or not q[0] == kt[0] == v[0]:
        return None
    heads, length, size = sizes[1:4]
    fits = kt[1:] == (heads, size, length) and v[1:3] == (heads, length) and target[2:] == (heads, length, length)
    return sizes if fits else None


def _is_back(match: Match, scores: Sequence[int]) -> bool:
    """Scores are laid out as they were."""
    whole = match.draft.sizes(match.values["whole"])
    by_name = any(match.nodes[name].attrs.get("allowzero", 0) for name in ("apart", "together"))
    return whole is not None and len(whole) == 4 and whole[1:] == tuple(scores) and not by_name


def _broadcasts(match: Match, name: str, shape: Sequence[int]) -> bool:
    """Whether a term adds nothing to a shape: it has as many axes at most, and is as long or of one element."""
    spec = match.spec(name)
    if spec is None or not spec.ranked or spec.ndim > len(shape):
        return False
    return all(d in (1, size) for d, size in zip(spec.shape[::-1], shape[::-1], strict=False))


def _is_by_window(match: Match) -> bool:
    found = _sizes(match)
    if found is None or not is_last_axis(match):
        return False
    windows, heads, length = found[:3]
    scores = (heads, length, length)
    biased = "mask" not in match.values or _broadcasts(match, "mask", (1, *scores))
    return biased and _broadcasts(match, "further", (1, windows, *scores)) and _is_back(match, scores)


def _by_window(match: Match) -> Replacement:
    found, out = _sizes(match), match.root.outputs[0]
    assert found is not None
    windows, heads, length, size, wide = found
    constants: dict[str, HostArray] = {}
    before: list[Node] = []

    def added(name: str, value: Sequence[int]) -> str:
        constants[made_name(out, name)] = np.array(value, np.int64)
        return made_name(out, name)

    def target(name: str, like: str, rest: Sequence[int]) -> str:
        """A shape whose first size is that of a given one."""
        given = match.graph.constants.get(match.values[like])
        if given is not None:
            return added(f"{name} target", (int(given[0]), *rest))
        first, made = made_name(out, f"first of {like}"), made_name(out, f"{name} target")
        if all(first not in n.outputs for n in before):
            before.append(Node("Gather", (match.values[like], added("zero", (0,))), (first,), {}))
        before.append(Node("Concat", (first, added(f"{name} rest", rest)), (made,), {"axis": 0}))
        return made

    read = {}
    for name, rest in (("q", (length, size)), ("kt", (size, length)), ("v", (length, wide))):
        read[name] = made_name(out, name)
        shape = target(name, "windows", (windows, heads, *rest))
        before.append(Node("Reshape", (match.values[name], shape), (read[name],), {}))
    attended, whole = made_name(out, "attended"), target("whole", "whole", (heads, length, wide))
    inputs = (*read.values(), match.values.get("mask", ""), "", match.values["further"])
    before.append(Node("Attention", inputs, (attended,), {"scale": factor_of(match)}, domain="infera", name=attended))
    return Replacement(standard(match, "Reshape", 5, (attended, whole), {}), constants, tuple(before))


_EXAMPLE = """
        example (float[B, 3, 4, 5] q, float[B, 3, 5, 4] kt, float[B, 3, 4, 6] v, float[1, 3, 4, 4] bias,
         float[1, 2, 1, 4, 4] mask) => (float[B, 3, 4, 6] y)
        <float s = {0.5}, int64[5] windows = {-1, 2, 3, 4, 4}, int64[4] whole = {-1, 3, 4, 4}> {
            qs = Mul(q, s)
            a = MatMul(qs, kt)
            b = Add(a, bias)
            c = Reshape(b, windows)
            d = Add(c, mask)
            e = Reshape(d, whole)
            f = Softmax <axis = -1> (e)
            y = MatMul(f, v)
        }"""

WINDOWS = Fusion(
    name="attention_by_window",
    patterns=(_core(_product(scaled("q"))), _core(scaled(_product("q"))), _core(_product("q"))),
    guard=_is_by_window,
    build=_by_window,
    reassociates=True,
    kinds=frozenset({"jit", "triton"}),
    example=_EXAMPLE,
    near_misses=(
        changed(
            _EXAMPLE,
            ("example (", "a_bias_for_each_of_a_batch ("),
            ("float[1, 3, 4, 4] bias", "float[B, 3, 4, 4] bias"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "a_mask_for_each_of_a_batch ("),
            ("float[1, 2, 1, 4, 4] mask", "float[C, 2, 1, 4, 4] mask"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "keys_of_another_batch ("),
            ("float[B, 3, 5, 4] kt", "float[1, 3, 5, 4] kt"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "heads_laid_out_otherwise ("),
            ("whole = {-1, 3, 4, 4}", "whole = {-1, 4, 3, 4}"),
            ("float[B, 3, 4, 6] v", "float[B, 1, 4, 6] v"),
            ("=> (float[B, 3, 4, 6] y)", "=> (float[B, 4, 3, 6] y)"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "softmax_over_queries ("),
            ("Softmax <axis = -1>", "Softmax <axis = 2>"),
        ),
        changed(
            _EXAMPLE,
            ("example (", "masked_scores_are_an_output ("),
            ("6] y)", "6] y, float[C, 2, 3, 4, 4] d)"),
        ),
    ),
)
"""NumPy's kernel has a product for each block of queries and gains nothing by it."""

FUSIONS = (WINDOWS,)

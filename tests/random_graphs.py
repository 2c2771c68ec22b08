"""Random models: small graphs of views, fan-out, repeated operands, branches, data-dependent shapes, fusable chains.

The same seed gives the same model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from infera_gpu.graph import HostArray
from tests import draft_steps
from tests.drafts import BOOL, FLOAT, INT, Draft, Shape, Unfit, joined, joins

OPSET = 17


@dataclass(frozen=True)
class Example:
    """A model and two sets of inputs for it."""

    model: onnx.ModelProto
    feeds: tuple[Mapping[str, HostArray], Mapping[str, HostArray]]


# ---- what is fused


def residual(d: Draft, x: str) -> str:
    """`x` with another value added: itself, one of its shape, or one that it broadcasts with."""
    way = d.rng.random()
    y = x if way < 0.2 else d.pick(fits=(lambda shape: shape == d.shape(x)) if way < 0.6 else joins(d.shape(x)))
    return d.emit("Add", d.rng.sample([x, y], 2), joined(d.shape(x), d.shape(y)))


def activated(d: Draft, x: str) -> str:
    op = d.rng.choice(("Relu", "Tanh", "Sigmoid", "HardSwish", "Clip", "Gelu", "Silu"))
    shape = d.shape(x)
    if op == "Clip":
        return d.emit(op, [x, d.constant(0, np.float32), d.constant(6, np.float32)], shape)
    if op == "Silu":
        return d.emit("Mul", d.rng.sample([x, d.emit("Sigmoid", [x], shape)], 2), shape)
    if op != "Gelu":
        return d.emit(op, [x], shape)
    half, one, root = (d.constant(v, np.float32) for v in (0.5, 1, math.sqrt(2)))
    erf = d.emit("Erf", [d.emit("Div", [x, root], shape)], shape)
    return d.emit("Mul", [d.emit("Mul", [x, d.emit("Add", [erf, one], shape)], shape), half], shape)


def finished(d: Draft, x: str) -> None:
    """Some of what follows a product or a convolution in a network."""
    if d.maybe():
        x = activated(d, x)
    if d.maybe():
        x = residual(d, x)
    if d.maybe():
        activated(d, x)


def linear(d: Draft) -> None:
    x = d.pick(fits=lambda shape: len(shape) > 0 and shape[-1] > 0)
    n = d.rng.choice((1, 2, 3))
    out = d.emit("MatMul", [x, d.normal(d.shape(x)[-1], n)], (*d.shape(x)[:-1], n))
    if d.maybe(0.6):
        out = d.emit("Add", d.rng.sample([out, d.normal(n)], 2), joined(d.shape(out), (n,)))
    finished(d, out)


def product(d: Draft) -> None:
    x = d.pick(fits=lambda shape: len(shape) > 1)
    y = d.pick(fits=lambda shape: len(shape) == 2 and shape[0] == d.shape(x)[-1])
    finished(d, d.emit("MatMul", [x, y], (*d.shape(x)[:-1], d.shape(y)[1])))


def gemm(d: Draft) -> None:
    x = d.pick(fits=lambda shape: len(shape) == 2 and 0 not in shape)
    trans_a, trans_b, n = d.rng.randint(0, 1), d.rng.randint(0, 1), d.rng.choice((1, 2, 3))
    m, k = d.shape(x)[::-1] if trans_a else d.shape(x)
    ins = [x, d.normal(*((n, k) if trans_b else (k, n)))]
    if d.maybe(0.7):
        ins.append(d.normal(*d.rng.choice(((n,), (1, n), (m, 1), (m, n), ()))))
    scale = d.rng.choice((1.0, 0.5))
    finished(d, d.emit("Gemm", ins, (m, n), transA=trans_a, transB=trans_b, alpha=scale, beta=2 * scale))


def conv(d: Draft) -> None:
    x = d.pick(fits=lambda shape: len(shape) == 4 and 0 not in shape)
    n, c, h, w = d.shape(x)
    m, k = d.rng.choice((1, 2, 3)), d.rng.choice((1, min(2, h, w)))
    shape = (n, m, h - k + 1, w - k + 1)
    out = d.emit("Conv", [x, d.normal(m, c, k, k), *([d.normal(m)] if d.maybe() else [])], shape)
    if d.maybe(0.4):
        variance = d.constant(np.abs(d.numbers.standard_normal(m)) + 0.5, np.float32)
        out = d.emit("BatchNormalization", [out, *(d.normal(m) for _ in range(3)), variance], shape)
    if d.maybe(0.3):
        out = d.emit("Mul", [out, d.normal(*d.rng.choice(((m, 1, 1), (1, m, 1, 1), (1,))))], shape)
    finished(d, out)


def pool(d: Draft) -> None:
    x = d.pick(fits=lambda shape: len(shape) == 4 and 0 not in shape)
    n, c, h, w = d.shape(x)
    op = d.rng.choice(("GlobalAveragePool", "MaxPool", "AveragePool", "Resize"))
    if op == "GlobalAveragePool":
        d.emit(op, [x], (n, c, 1, 1))
    elif op == "Resize":
        mode = d.rng.choice(("nearest", "linear"))
        d.emit(op, [x, "", d.constant([1, 1, 2, 2], np.float32)], (n, c, 2 * h, 2 * w), mode=mode)
    elif min(h, w) > 1:
        d.emit(op, [x], (n, c, h - 1, w - 1), kernel_shape=[2, 2])


# ---- what is planned in several segments


def select(d: Draft) -> None:
    """The positive elements of a value, by Compress or by NonZero, down to their sum."""
    if d.is_branch:
        raise Unfit
    x = d.pick(fits=lambda shape: len(shape) > 0)
    size = math.prod(d.shape(x))
    flat = d.emit("Reshape", [x, d.constant([size])], (size,), allowzero=1)
    kept = d.emit("Greater", [flat, d.constant(0, np.float32)], (size,), BOOL)
    (chosen,) = d.node("Compress", [flat, kept], axis=0)
    (last,) = d.node(d.rng.choice(("Relu", "Neg", "Identity")), [chosen])
    if d.maybe():
        (last,) = d.node("Add", [chosen, d.rng.choice((last, chosen))])
    if d.maybe():
        at = d.node("Transpose", d.node("NonZero", [kept]))
        (last,) = d.node("Mul", [*d.node("GatherND", [flat, *at]), last])
    d.emit("ReduceSum", [last, d.constant([0])], (1,), keepdims=1)
    d.unsized.append(last)


def branch(d: Draft) -> None:
    """An If on a value that a run tells; its branches read values around them."""
    if d.prefix.count("/") > 1:
        raise Unfit
    target = d.pick(fits=lambda shape: 0 not in shape)
    shape = d.shape(target)
    top = d.emit("ReduceMax", [target], (), keepdims=0)
    condition = d.emit("Greater", [top, d.constant(d.rng.choice((0, 0.7, 5)), np.float32)], (), BOOL)
    count = d.rng.choice((1, 2))
    graphs = {}
    for side in ("then_branch", "else_branch"):
        inner = Draft(d.rng, d.steps, d.values, f"{d.prefix}{side[0]}{len(d.nodes)}/")
        for _ in range(d.rng.randint(1, 4)):
            inner.step()
        outs: list[str] = []
        for _ in range(count):
            name = inner.pick(fits=lambda other: other == shape)
            if name in inner.outer or name in outs or d.maybe():
                name = inner.emit("Identity", [name], shape)
            outs.append(name)
        outputs = [helper.make_tensor_value_info(o, FLOAT, None) for o in outs]
        graphs[side] = helper.make_graph(inner.nodes, side, [], outputs, inner.constants)
    for name in d.node("If", [condition], count, **graphs):
        d.values[name] = (FLOAT, shape)


STEPS: tuple[Callable[[Draft], None], ...] = (
    *draft_steps.STEPS,
    *(linear, linear, product, gemm, conv, conv, pool, select, select, branch, branch),
)

_KINDS = (FLOAT, FLOAT, FLOAT, INT, BOOL)
_SHAPES: tuple[Shape, ...] = (
    *((), (1,), (3,), (4,), (2, 3), (3, 3), (1, 3), (2, 1, 3), (2, 3, 4)),
    *((1, 2, 3, 3), (2, 1, 4, 4), (0,), (2, 0)),
)


def draw(seed: int) -> Example:
    """The model of a seed, its inputs' dimensions partly symbolic."""
    d = Draft(random.Random(seed), STEPS)
    inputs = []
    for i in range(d.rng.randint(1, 3)):
        kind, shape = (FLOAT if i == 0 else d.rng.choice(_KINDS)), d.rng.choice(_SHAPES)
        d.values[f"x{i}"] = (kind, shape)
        declared = [f"d{i}_{k}" if d.maybe(0.4) else n for k, n in enumerate(shape)]
        inputs.append(helper.make_tensor_value_info(f"x{i}", kind, declared))
    feeds = tuple({v.name: _array(d, *d.values[v.name]) for v in inputs} for _ in range(2))
    for _ in range(d.rng.randint(2, 14)):
        d.step()
    names = list(d.values)
    wanted = [d.rng.choice(names[-8:]) for _ in range(d.rng.randint(1, 4))] + d.unsized[:2]
    wanted += [d.rng.choice(names)] if d.maybe(0.4) else []
    outputs = [
        helper.make_tensor_value_info(o, d.kind(o) if o in d.values else FLOAT, None) for o in dict.fromkeys(wanted)
    ]
    graph = helper.make_graph(d.nodes, f"seed{seed}", inputs, outputs, d.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    return Example(model, (feeds[0], feeds[1]))


def _array(d: Draft, kind: int, shape: Shape) -> HostArray:
    if kind == FLOAT:
        return np.asarray(d.numbers.standard_normal(shape), np.float32)
    if kind == INT:
        return np.asarray(d.numbers.integers(-3, 4, shape))
    return np.asarray(d.numbers.random(shape) < 0.5)

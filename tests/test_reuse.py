"""Values written where parts of others lay that nobody reads any more."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import numpy as np
import pytest

import infera_gpu
from infera_gpu import lower
from infera_gpu.graph import HostArray
from infera_gpu.layout import Operand
from infera_gpu.plan import Plan
from tests.text import parse

REUSED = "where others lay"


def numbers(*shape: int, seed: int = 0) -> HostArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def planned(text: str, feeds: Mapping[str, HostArray], device: str = "recording") -> Plan:
    """The plan, after the second of two runs has given what the graph as written gives."""
    model = parse(text)
    with infera_gpu.load(model, device="cpu", fuse=False) as session:
        want = session.run(feeds)
    with infera_gpu.load(model, device=device, fuse=False, threads=1) as session:
        session.run({name: x + 1 for name, x in feeds.items()})
        for name, got in session.run(feeds).items():
            np.testing.assert_allclose(got, want[name], rtol=1e-5, atol=1e-5, err_msg=text)
        plan = session.plan_for(feeds)
    for step in plan.steps:
        for out in step.outs:
            read = [o for o in step.ins if o is not None and not o.constant and elements(o) & elements(out)]
            assert read in ([], [out]), f"{step.label} writes to what it reads elsewhere\n{text}"
    return plan


def elements(operand: Operand) -> set[int]:
    """Where in the arena the elements of an operand begin; one of a few elements."""
    if math.prod(operand.shape) > 1000:
        return set()
    found = {operand.offset}
    for d, stride in zip(operand.shape, operand.strides, strict=True):
        found = {at + i * stride for at in found for i in range(d)}
    return found


def attention(after: str = "y = MatMul(f, o)", outputs: str = "float[1, 5, 8] y") -> str:
    return f"""
    g (float[1, 5, 8] x, float[8, 24] w, float[8, 8] o) => ({outputs})
    <int64[3] sizes = {{8, 8, 8}}, int64[4] heads = {{0, 0, 2, 4}}, int64[3] flat = {{0, 0, 8}}> {{
        p = MatMul(x, w)
        q, k, v = Split <axis = 2> (p, sizes)
        qr = Reshape(q, heads)
        kr = Reshape(k, heads)
        vr = Reshape(v, heads)
        qh = Transpose <perm = [0, 2, 1, 3]> (qr)
        kh = Transpose <perm = [0, 2, 3, 1]> (kr)
        vh = Transpose <perm = [0, 2, 1, 3]> (vr)
        s = MatMul(qh, kh)
        c = MatMul(s, vh)
        t = Transpose <perm = [0, 2, 1, 3]> (c)
        f = Reshape(t, flat)
        {after}
    }}"""


FEEDS = {"x": numbers(1, 5, 8), "w": numbers(8, 24, seed=1), "o": numbers(8, 8, seed=2)}
ROW = 5 * 8 * 4
"""Bytes of queries, of keys, of values, of what attention gives."""


def test_what_attention_gives_lies_where_the_queries_lay() -> None:
    plan = planned(attention(), FEEDS)
    assert [s.label.split()[0] for s in plan.steps] == ["MatMul"] * 4
    assert plan.saved[REUSED] == ROW
    context, product = plan.steps[2].outs[0], plan.steps[0].outs[0]
    assert (context.root, context.offset) == (product.root, product.offset)


@pytest.mark.parametrize(
    ("after", "outputs"),
    [
        ("z = Neg(q)  y = MatMul(f, o)", "float[1, 5, 8] y, float[1, 5, 8] z"),
        ("z = Exp(qr)  y = MatMul(f, o)", "float[1, 5, 8] y, float[1, 5, 2, 4] z"),
        ("z = Exp(p)  y = MatMul(f, o)", "float[1, 5, 8] y, float[1, 5, 24] z"),
    ],
)
def test_what_is_read_later_is_not_overwritten(after: str, outputs: str) -> None:
    plan = planned(attention(after, outputs), FEEDS)
    assert any(s.kind == "copy" for s in plan.steps)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("after", "outputs"),
    [
        ("y = Softmax <axis = -1> (f)", "float[1, 5, 8] y"),
        ("y = MatMul(f, o)", "float[1, 5, 8] y, float[1, 2, 5, 4] c"),
        ("y = Identity(f)", "float[1, 5, 8] y"),
    ],
)
def test_what_must_be_contiguous_lies_by_itself(after: str, outputs: str) -> None:
    assert not planned(attention(after, outputs), FEEDS).saved[REUSED]


def test_inputs_of_the_graph_are_not_written_to() -> None:
    text = """
    g (float[4, 6] x) => (float[4, 3] y) {
        a, b = Split <axis = 1> (x)
        c = Exp(a)
        y = Mul(c, b)
    }"""
    assert not planned(text, {"x": numbers(4, 6)}).saved[REUSED]


@pytest.mark.kernels
def test_elements_are_computed_in_place_of_a_part() -> None:
    text = """
    g (float[4, 6] x, float[3, 2] w) => (float[4, 2] y) {
        p = Tanh(x)
        a, b = Split <axis = 1> (p)
        c = Sigmoid(a)
        d = Mul(c, b)
        y = MatMul(d, w)
    }"""
    plan = planned(text, {"x": numbers(4, 6), "w": numbers(3, 2)})
    assert plan.saved[REUSED] == 2 * 4 * 3 * 4
    assert len({s.outs[0].root for s in plan.steps[:3]}) == 1


def test_a_part_that_is_stretched_is_not_written_to() -> None:
    text = """
    g (float[4, 2] x, float[3, 2] w) => (float[4, 2] y) <int64[2] wide = {4, 3}> {
        p = Tanh(x)
        a, b = Split <axis = 1> (p)
        e = Expand(a, wide)
        c = Sigmoid(e)
        d = Mul(c, b)
        y = MatMul(d, w)
    }"""
    assert not planned(text, {"x": numbers(4, 2), "w": numbers(3, 2)}).saved[REUSED]


def test_two_outputs_of_a_node_do_not_lie_in_one_part() -> None:
    text = """
    g (float[1, 2, 9] x, float[4, 2, 5] s, float[1, 12, 5] w, float[1, 12, 3] r, float[3, 2] o)
        => (float[1, 2, 2] y, float[1, 2, 2] z, float[1, 2, 3] u) <int64[3] sizes = {3, 3, 3}> {
        p = Tanh(x)
        a, b, c = Split <axis = 2> (p, sizes)
        u = Exp(a)
        _, h, m = LSTM <hidden_size = 3> (s, w, r, , , b, c)
        y = MatMul(h, o)
        z = MatMul(m, o)
    }"""
    shapes = {"x": (1, 2, 9), "s": (4, 2, 5), "w": (1, 12, 5), "r": (1, 12, 3), "o": (3, 2)}
    planned(text, {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())})


def test_a_copy_that_is_read_again_is_not_written_to() -> None:
    text = """
    g (float[4, 6] x) => (float[8, 3] y, float[6, 4] z)
    <int64[2] shape = {8, 3}, int64[2] sizes = {2, 1}, float[2, 3] o = {1, 2, 3, 4, 5, 6}> {
        p = Tanh(x)
        t = Transpose <perm = [1, 0]> (p)
        n = Reshape(t, shape)
        a, b = Split <axis = 1> (n, sizes)
        c = Sigmoid(a)
        d = Mul(c, b)
        y = MatMul(d, o)
        z = Softmax <axis = -1> (t)
    }"""
    planned(text, {"x": numbers(4, 6)})


def test_the_cpu_computes_on_what_is_contiguous() -> None:
    assert not planned(attention(), FEEDS, "cpu").saved[REUSED]


CROWDED = """
    g (float[64, 1024] x, float[64, 64] w) => (float[64, 64] y)
    <int64[2] sizes = {64, 960}, int64[3] wide = {20, 64, 64}> {
        p = Tanh(x)
        a, b = Split <axis = 1> (p, sizes)
        c = Sigmoid(a)
        m = ReduceMax <axes = [1]> (b)
        d = Mul(c, m)
        e = Expand(d, wide)
        f = Exp(e)
        s = ReduceMax <axes = [0, 2], keepdims = 0> (f)
        z = Mul(d, s)
        y = MatMul(z, w)
    }"""
"""When most memory is needed, for f, all of p would still be there for d's sake."""


@pytest.mark.kernels
def test_a_value_lies_by_itself_where_more_memory_would_be_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = {"x": numbers(64, 1024), "w": numbers(64, 64)}
    plan = planned(CROWDED, feeds)
    monkeypatch.setattr(lower, "ATTEMPTS", 1)
    first = planned(CROWDED, feeds)
    assert plan.arena_bytes < first.arena_bytes
    assert plan.saved[REUSED] < first.saved[REUSED]


UNARY, BINARY = ("Sigmoid", "Tanh", "Neg", "Abs", "Softmax"), ("Add", "Sub", "Mul")


def drawn(seed: int) -> str:
    """A graph that cuts what it computes into parts, turns them, joins two with an operator, and cuts again."""
    choose = random.Random(seed)
    lines, shapes, constants = ["p0 = Tanh(x)"], {"p0": (6, 12)}, dict[str, str]()
    for i in range(1, choose.randint(7, 15)):
        name, kind = f"p{i}", choose.random()
        source = choose.choice([*shapes])
        rows, columns = shapes[source]
        if kind < 0.25 and columns % 2 == 0 and columns > 2:
            lines.append(f"{name}a, {name}b = Split <axis = 1> ({source})")
            shapes[f"{name}a"] = shapes[f"{name}b"] = rows, columns // 2
        elif kind < 0.35 and rows % 2 == 0 and rows > 2:
            lines.append(f"{name}a, {name}b = Split <axis = 0> ({source})")
            shapes[f"{name}a"] = shapes[f"{name}b"] = rows // 2, columns
        elif kind < 0.45:
            lines.append(f"{name} = Transpose <perm = [1, 0]> ({source})")
            shapes[name] = columns, rows
        elif kind < 0.5:
            lines.append(f"{name} = Reshape({source}, r{rows})")
            shapes[name] = columns, rows
            constants[f"r{rows}"] = f"int64[2] r{rows} = {{-1, {rows}}}"
        elif kind < 0.62:
            lines.append(f"{name} = {choose.choice(UNARY)}({source})")
            shapes[name] = rows, columns
        else:
            fitting = [s for s, shape in shapes.items() if shape == (rows, columns)]
            inner = [s for s, shape in shapes.items() if shape[0] == columns]
            if kind < 0.85 or not inner:
                lines.append(f"{name} = {choose.choice(BINARY)}({source}, {choose.choice(fitting)})")
                shapes[name] = rows, columns
            else:
                other = choose.choice(inner)
                lines.append(f"{name}m = MatMul({source}, {other})  {name} = Tanh({name}m)")
                shapes[name] = rows, shapes[other][1]
    outputs = choose.sample([s for s in shapes if s != "p0"], min(2, len(shapes) - 1))
    ends = "  ".join(f"y{i} = ReduceSum <keepdims = 0> ({s})" for i, s in enumerate(outputs))
    declared = ", ".join(f"float y{i}" for i in range(len(outputs)))
    known = f"<{', '.join(constants.values())}>" if constants else ""
    return f"g (float[6, 12] x) => ({declared}) {known} {{ {'  '.join(lines)}  {ends} }}"


def test_random_parts_are_read_before_others_are_written_there() -> None:
    reused = sum(bool(planned(drawn(seed), {"x": numbers(6, 12)}).saved[REUSED]) for seed in range(200))
    assert reused > 30

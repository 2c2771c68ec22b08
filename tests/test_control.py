"""Loops, scans and branches over everything a graph can hold, against onnxruntime."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import onnxruntime
import pytest

import infera_gpu
from infera_gpu.errors import InputError, PlanError
from infera_gpu.stages import MAX_STAGES
from tests.test_host_ops import assert_same
from tests.text import parse

NESTED = """
g (float[N] x, int64 n) => (float[N] y, float[n, k, N] each) <int64 two = {2}, bool yes = {1}, float half = {0.5}> {
    doubled = Add(x, x)
    y, each = Loop (n, yes, x) <body = outer (int64 i, bool c, float[N] s) => (bool d, float[N] t, float[k, N] inner) {
        d = Identity(c)
        scaled = Mul(doubled, half)
        t, inner = Loop (two, c, s) <body = nest (int64 j, bool e, float[N] u) => (bool f, float[N] v, float[N] w) {
            f = Identity(e)
            step = CastLike(i, scaled)
            shifted = Add(scaled, step)
            v = Add(u, shifted)
            w = Mul(v, half)
        }>
    }>
}"""
UNTIL = """
g (float[N] x) => (float[N] y, float[k] sums) <int64 many = {1000}, bool yes = {1}, float most = {50.0}> {
    y, sums = Loop (many, yes, x) <body = b (int64 i, bool c, float[N] s) => (bool go, float[N] t, float total) {
        t = Add(s, s)
        total = ReduceSum <keepdims = 0> (t)
        go = Less(total, most)
    }>
}"""
GROWING = """
g (float[N] x, int64 n) => (float[m] y) <bool yes = {1}> {
    y = Loop (n, yes, x) <body = b (int64 i, bool c, float[p] s) => (bool go, float[q] t) {
        go = Identity(c)
        t = Concat <axis = 0> (s, x)
    }>
}"""
COLLECTED = """
g (float[N, 2] x) => (float[M, 2] y, int64 n) <bool yes = {1}, int64 zero = {0}, int64 one = {1}> {
    empty = SequenceEmpty <dtype = 1> ()
    s = Shape(x)
    rows = Gather(s, zero)
    all = Loop (rows, yes, empty) <body = b (int64 i, bool c, seq(float) have) => (bool go, seq(float) more) {
        go = Identity(c)
        row = Gather(x, i)
        positive = ReduceMax <keepdims = 0> (row)
        bound = CastLike(zero, positive)
        keep = Greater(positive, bound)
        more = If (keep) <
            then_branch = yes () => (seq(float) a) { a = SequenceInsert(have, row) },
            else_branch = no () => (seq(float) b) { b = Identity(have) }
        >
    }>
    n = SequenceLength(all)
    first = SequenceAt(all, zero)
    y = ConcatFromSequence <axis = 0, new_axis = 1> (all)
}"""
PREFIX = """
g (float[2] start, float[N, 2] x, float[2] w) => (float[2] last, float[N, 2] y) {
    last, y = Scan <num_scan_inputs = 1, body = b (float[2] s, float[2] e) => (float[2] t, float[2] o) {
        weighted = Mul(e, w)
        t = Add(s, weighted)
        o = Neg(t)
    }> (start, x)
}"""

DECIDED = """
g (float[N] x, int64 n, bool c) => (float[N] y) {
    v, on = Loop (n, c, x, c) <body = b (int64 i, bool go, float[N] a, bool s) => (bool goes, float[N] o, bool t) {
        goes = Identity(go)
        o = Add(a, a)
        t = Identity(s)
    }>
    y = If (on) <
        then_branch = t () => (float[N] p) { p = Neg(v) },
        else_branch = e () => (float[N] q) { q = Mul(v, v) }
    >
}"""


def both(text: str, feeds: dict[str, Any], device: str = "cpu") -> None:
    model = parse(text)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    want = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)
    session = infera_gpu.load(model, device=device)
    for _ in range(2):
        got = session.run(feeds)
        for (name, g), w in zip(got.items(), want, strict=True):
            assert_same(g, w, 1e-6, name)


def floats(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("device", ["cpu", "recording"])
@pytest.mark.parametrize(
    ("text", "feeds"),
    [
        pytest.param(NESTED, {"x": floats(3), "n": np.array(4)}, id="nested"),
        pytest.param(NESTED, {"x": floats(1), "n": np.array(1)}, id="nested_once"),
        pytest.param(UNTIL, {"x": np.abs(floats(3)) + np.float32(0.1)}, id="until"),
        pytest.param(GROWING, {"x": floats(3), "n": np.array(5)}, id="growing"),
        pytest.param(GROWING, {"x": floats(0), "n": np.array(2)}, id="growing_from_nothing"),
        pytest.param(COLLECTED, {"x": floats(9, 2)}, id="collected"),
        pytest.param(PREFIX, {"start": floats(2), "x": floats(5, 2), "w": floats(2)}, id="scan"),
        pytest.param(DECIDED, {"x": floats(3), "n": np.array(2), "c": np.array(True)}, id="decided_by_a_loop"),
        pytest.param(DECIDED, {"x": floats(3), "n": np.array(2), "c": np.array(False)}, id="decided_otherwise"),
    ],
)
def test_as_onnxruntime(text: str, feeds: dict[str, Any], device: str) -> None:
    both(text, feeds, device)


def test_the_shapes_of_a_loop_may_change_from_run_to_run() -> None:
    session = infera_gpu.load(parse(GROWING), device="cpu")
    for n, k in ((2, 3), (1, 1), (2, 0), (4, 3), (2, 3)):
        x = floats(n)
        np.testing.assert_array_equal(session.run({"x": x, "n": np.int64(k)})["y"], np.tile(x, k + 1))


def test_bodies_of_shapes_that_are_gone_are_let_go() -> None:
    """What is planned of a body goes with the plan of the graph around it, and all of them share an arena."""
    with infera_gpu.load(parse(GROWING), device="cpu") as session:
        for rows in range(1, 2 * MAX_STAGES):
            session.run({"x": floats(rows), "n": np.int64(2)})
        gc.collect()
        assert len(session._inner) <= MAX_STAGES
        assert len({id(inner._arena) for inner in session._inner}) == 1


def test_what_a_body_lacks_is_named() -> None:
    text = UNTIL.replace("(int64 i, bool c, float[N] s)", "(int64 i, bool c)").replace("Add(s, s)", "Add(x, x)")
    with pytest.raises(PlanError, match=r"Loop .*its body has 2 inputs and 3 outputs, expected 3 and at least 2"):
        infera_gpu.load(parse(text), device="cpu").run({"x": floats(3)})


def test_sequences_in_and_out() -> None:
    model = parse(
        "g (seq(float) s, int64 i) => (seq(float) t, float[N] x) { t = SequenceErase(s, i) x = SequenceAt(s, i) }"
    )
    session = infera_gpu.load(model, device="cpu")
    got = session.run({"s": [floats(2), floats(0), floats(3)], "i": np.int64(-1)})
    assert [a.shape for a in got["t"]] == [(2,), (0,)]
    np.testing.assert_array_equal(got["x"], floats(3))
    with pytest.raises(InputError, match=r"'s' is ndarray, expected a list"):
        session.run({"s": floats(2), "i": np.int64(0)})
    with pytest.raises(InputError, match=r"s\[1\].*float64"):
        session.run({"s": [floats(2), floats(2).astype(np.float64)], "i": np.int64(0)})
    with pytest.raises(PlanError, match="position 5 is out of range for a sequence of 1"):
        session.run({"s": [floats(2)], "i": np.int64(5)})


def test_strings_are_text() -> None:
    model = parse(
        "g (string[N] s, int64[M] at) => (string[M] t, bool[M] same) { t = Gather(s, at) same = Equal(t, t) }"
    )
    session = infera_gpu.load(model, device="cpu")
    got = session.run({"s": ["a", "ü", b"c"], "at": np.array([2, 0])})
    assert got["t"].tolist() == ["c", "a"]
    assert got["same"].tolist() == [True, True]
    with pytest.raises(InputError, match="'s' has a int among its elements"):
        session.run({"s": ["a", 1], "at": np.array([0])})


def test_a_condition_that_is_no_tensor_is_named() -> None:
    model = parse(
        """g (float[N] x, optional(bool) c) => (float[N] y) {
            y = If (c) <
                then_branch = t () => (float[N] r) { r = Neg(x) },
                else_branch = e () => (float[N] r) { r = Exp(x) }
            >
        }"""
    )
    with pytest.raises(PlanError, match="expected a tensor"):
        infera_gpu.load(model, device="cpu").run({"x": np.ones(2, np.float32), "c": None})

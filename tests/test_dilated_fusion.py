"""Dilated convolutions of unknown sizes, as tf2onnx writes them, of images of every size; and what a size becomes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import infera_gpu
from infera_gpu.loader import load_graph
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.residues import Line, Residue
from tests.text import parse

NETWORK = """
    g (float[B, H, W, 2] image) => (float[B, H, W, 3] y)
    <float[3, 2, 2, 3] w = {1, -2, 3, 0.5, -1, 2, 0.25, 4, 1, -1, 0.5, 2, 1, -2, 3, 0.5, -1, 2,
                           0.25, 4, 1, -1, 0.5, 2, 1, -2, 3, 0.5, -1, 2, 0.25, 4, 1, -1, 0.5, 2},
     float[3, 1, 1, 1] b = {1, -2, 3}, int32[2] parts = {3, 3}, int32[2] reach = {3, 6}, int32[2] before = {1, 3},
     int32[2] behind = {2, 3}, int64[1] none = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3},
     int32[1] no = {0}, int32[1] row = {1}, int32[1] column = {3}, int64[1] rest = {-1}, int64[2] axes = {2, 3},
     int64[1] far = {2147483647}> {
        s = Shape(image)
        sizes = Cast <to = 6> (s)
        n = Slice(sizes, one, three, none)
        a = Add(n, reach)
        d = Div(a, parts)
        m = Mul(d, parts)
        mod = Sub(a, m)
        r = Sub(parts, mod)
        rd = Div(r, parts)
        rm = Mul(rd, parts)
        extra = Sub(r, rm)
        e0 = Slice(extra, none, one, none)
        e1 = Slice(extra, one, two, none)
        end = Add(behind, extra)
        f0 = Slice(end, none, one, none)
        f1 = Slice(end, one, two, none)
        rows = Concat <axis = 0> (row, f0)
        columns = Concat <axis = 0> (column, f1)
        rows2 = Unsqueeze(rows, none)
        columns2 = Unsqueeze(columns, none)
        table = Concat <axis = 0> (rows2, columns2)
        flat = Reshape(table, rest)
        long = Cast <to = 7> (flat)
        q0, q1, q2, q3 = Split <axis = 0> (long)
        pads = Concat <axis = 0> (none, q0, q2, none, none, q1, q3, none)
        p = Pad(image, pads)
        t = Transpose <perm = [3, 0, 1, 2]> (p)
        apart = SpaceToDepth <blocksize = 3> (t)
        u = Transpose <perm = [1, 0, 2, 3]> (apart)
        c = Conv(u, w)
        v = Transpose <perm = [1, 0, 2, 3]> (c)
        together = DepthToSpace <blocksize = 3> (v)
        c0 = Concat <axis = 0> (no, e0)
        c1 = Concat <axis = 0> (no, e1)
        crops = Concat <axis = 0> (c0, c1)
        k = Cast <to = 7> (crops)
        k0, k1, k2, k3 = Split <axis = 0> (k)
        starts = Concat <axis = 0> (k0, k2)
        is1 = Equal(k1, none)
        not1 = Not(is1)
        yes1 = Cast <to = 7> (is1)
        no1 = Cast <to = 7> (not1)
        minus1 = Neg(no1)
        cut1 = Mul(k1, minus1)
        far1 = Mul(far, yes1)
        end1 = Add(cut1, far1)
        is3 = Equal(k3, none)
        not3 = Not(is3)
        yes3 = Cast <to = 7> (is3)
        no3 = Cast <to = 7> (not3)
        minus3 = Neg(no3)
        cut3 = Mul(k3, minus3)
        far3 = Mul(far, yes3)
        end3 = Add(cut3, far3)
        ends = Concat <axis = 0> (end1, end3)
        x = Slice(together, starts, ends, axes)
        z = Add(x, b)
        y = Transpose <perm = [1, 2, 3, 0]> (z)
    }"""


def test_parts_of_an_image_of_any_size_are_one_convolution() -> None:
    model, rng = parse(NETWORK, 17), np.random.default_rng(0)
    with infera_gpu.load(model, device="cpu") as session, infera_gpu.load(model, device="cpu", fuse=False) as parts:
        assert [n.op.removesuffix("NHWC") for n in session.graph.nodes if n.op != "Identity"] == ["FusedConv"]
        for height, width in itertools.product((1, 2, 3, 4, 6), (1, 5, 6, 7)):
            feeds = {"image": rng.standard_normal((2, height, width, 2)).astype(np.float32)}
            got, want = session.run(feeds)["y"], parts.run(feeds)["y"]
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


LINES: dict[str, tuple[str, Line | None]] = {
    "a size": ("y = Identity(n)", (3, 2)),
    "another size": ("y = Slice(s, one, two)", None),
    "a number": ("y = Slice(s, two, three)", (0, 8)),
    "a sum": ("y = Add(n, two)", (3, 4)),
    "a difference": ("y = Sub(two, n)", (-3, 0)),
    "a multiple": ("y = Mul(two, n)", (6, 4)),
    "a square": ("y = Mul(n, n)", None),
    "whole parts": ("y = Div(n, three)", (1, 0)),
    "other parts": ("y = Div(n, two)", None),
    "parts of what may be below zero": ("a = Sub(n, three)  y = Div(a, three)", None),
    "a remainder": ("a = Div(n, three)  b = Mul(a, three)  y = Sub(n, b)", (0, 2)),
    "the larger": ("a = Add(n, one)  y = Max(a, n)", (3, 3)),
    "the larger of what grows otherwise": ("y = Max(two, n)", None),
    "equal": ("a = Add(n, one)  b = Sub(a, one)  e = Equal(b, n)  y = Cast <to = 7> (e)", (0, 1)),
    "unlike": ("a = Add(n, one)  e = Equal(a, n)  f = Not(e)  y = Cast <to = 7> (f)", (0, 1)),
    "equal now and then": ("e = Equal(two, n)  y = Cast <to = 7> (e)", None),
    "joined": ("c = Concat <axis = 0> (two, s, n)  y = Gather(c, one)", (3, 2)),
    "cut backwards": ("c = Slice(s, two, none, none, back)  y = Slice(c, none, one)", (0, 8)),
    "a part": ("a, b, c = Split <axis = 0> (s)  y = Add(c, a)", (3, 10)),
    "fractions": ("f = Cast <to = 1> (n)  g = Exp(f)  y = Cast <to = 7> (g)", None),
}


@pytest.mark.parametrize("form", LINES)
def test_what_a_size_becomes(form: str) -> None:
    """A size of 3 t + 2."""
    text, wanted = LINES[form]
    model = parse(
        f"""
        g (float[S, B, 8] x) => (int64[M] y)
        <int64[1] none = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}},
         int64[1] back = {{-1}}> {{
            s = Shape(x)
            n = Slice(s, none, one)
            {text}
        }}""",
        17,
    )
    assert Residue(Draft(load_graph(model)), "S", 3, 2).line("y", 0) == wanted

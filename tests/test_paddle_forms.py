"""What paddle2onnx makes of a layer becomes the node that it is: several rewrites, one after another."""

from __future__ import annotations

import numpy as np
import pytest

import infera_gpu
from infera_gpu.graph import HostArray
from infera_gpu.spec import DType, tensors_of
from tests.text import parse

FORMS = {
    "a convolution with bias and batch norm": (
        """
        g (float[N, 2, 5, 5] x) => (float[N, 2, 5, 5] y)
        <float[2, 2, 1, 1] w = {1, 2, 3, -4}, float[1, 2, 1, 1] c = {0.5, -1}, float[2] s = {1.5, 0.5},
         float[2] b = {0.1, -3}, float[2] m = {0.3, 0.7}, float[2] v = {1.2, 0.4}> {
            a = Conv(x, w)
            d = Add(a, c)
            e = BatchNormalization(d, s, b, m, v)
            y = Relu(e)
        }""",
        ["infera.FusedConv"],
    ),
    "a transposed convolution with bias and batch norm": (
        """
        g (float[N, 2, 5, 5] x) => (float[N, 2, 10, 10] y)
        <float[2, 2, 1, 1] w = {1, 2, 3, -4}, float[1, 2, 1, 1] c = {0.5, -1}, float[2] s = {1.5, 0.5},
         float[2] b = {0.1, -3}, float[2] m = {0.3, 0.7}, float[2] v = {1.2, 0.4}> {
            a = ConvTranspose <strides = [2, 2], output_padding = [1, 1]> (x, w)
            d = Add(c, a)
            y = BatchNormalization(d, s, b, m, v)
        }""",
        ["ConvTranspose"],
    ),
    "Pad2D, by which images are padded as volumes": (
        """
        g (float[N, 2, 5, 5] x) => (float[N, 2, 2, 2] y)
        <float[2, 2, 3, 3] w = {1, 2, 3, -4, 5, 6, -7, 8, 9, 1, 2, 3, -4, 5, 6, -7, 8, 9, 1, 2, 3, -4, 5, 6, -7, 8, 9,
                                1, 2, 3, -4, 5, 6, -7, 8, 9},
         int64[1] two = {2}, int64[10] p = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1}, float zero = {0}> {
            a = Unsqueeze(x, two)
            b = Pad <mode = "constant"> (a, p, zero)
            c = Squeeze(b, two)
            y = Conv <strides = [2, 2]> (c, w)
        }""",
        ["Conv"],
    ),
    "scaled queries": (
        """
        g (float[N, 3, 4, 5] q, float[N, 3, 6, 5] k, float[N, 3, 6, 5] v) => (float[N, 3, 4, 5] y)
        <float[1] s = {0.25}, float zero = {0}> {
            a = Mul(q, s)
            b = Add(a, zero)
            c = Transpose <perm = [0, 1, 3, 2]> (k)
            d = MatMul(b, c)
            e = Softmax <axis = -1> (d)
            y = MatMul(e, v)
        }""",
        ["Transpose", "infera.Attention"],
    ),
    "rotary tables by position": (
        """
        g (float[N, 5, 2, 8] x, int64[N, 5] at) => (float[N, 5, 2, 8] y)
        <float[2, 8] cos = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
         float[2, 8] sin = {-1, 2, -3, 4, -5, 6, -7, 8, -9, 10, -11, 12, -13, 14, -15, 16},
         int64[1] none = {0}, int64[1] half = {4}, int64[1] far = {2147483647}, int64[1] axis = {3}, int64[1] one = {1},
         int64[1] last = {-1}, int64[1] two = {2}, float[1] minus = {-1}, float zero = {0}> {
            i = Unsqueeze(at, last)
            j = GatherND(cos, i)
            c = Unsqueeze(j, two)
            k = GatherND(sin, i)
            s = Unsqueeze(k, two)
            a = Slice(x, none, half, axis, one)
            b = Slice(x, half, far, axis, one)
            d = Mul(b, minus)
            e = Add(d, zero)
            f = Concat <axis = 3> (e, a)
            t = Mul(x, c)
            u = Mul(f, s)
            y = Add(t, u)
        }""",
        ["Gather", "Gather", "Unsqueeze", "Unsqueeze", "infera.Rotary"],
    ),
    "heads of keys and values for two of queries each": (
        """
        g (float[N, 4, 5, 8] q, float[N, S, 2, 8] k, float[N, S, 2, 8] v) => (float[N, 5, 4, 8] y)
        <int64[1] three = {3}, int64[1] none = {0}, int64[1] two = {2}, int64[1] four = {4}, int64[1] five = {5},
         int64[5] wide = {-1, -1, -1, 2, -1}, int64[1] rest = {-1}, float[1] s = {0.25}, float zero = {0}> {
            a = Mul(q, s)
            b = Add(a, zero)
            c = Unsqueeze(k, three)
            d = Shape(c)
            e = Max(d, wide)
            f = Expand(c, e)
            h = Shape(f)
            i = Slice(h, none, two, none)
            j = Slice(h, four, five, none)
            l = Concat <axis = 0> (i, rest, j)
            m = Reshape(f, l)
            n = Unsqueeze(v, three)
            o = Shape(n)
            p = Max(o, wide)
            r = Expand(n, p)
            t = Shape(r)
            u = Slice(t, none, two, none)
            w = Slice(t, four, five, none)
            z = Concat <axis = 0> (u, rest, w)
            aa = Reshape(r, z)
            ab = Transpose <perm = [0, 2, 1, 3]> (m)
            ac = Transpose <perm = [0, 2, 1, 3]> (aa)
            ad = Transpose <perm = [0, 1, 3, 2]> (ab)
            ae = MatMul(b, ad)
            af = Softmax <axis = -1> (ae)
            ag = MatMul(af, ac)
            y = Transpose <perm = [0, 2, 1, 3]> (ag)
        }""",
        ["Transpose", "Transpose", "infera.Attention"],
    ),
    "a layer norm by var": (
        """
        g (float[N, 3, 8] x) => (float[N, 3, 8] y)
        <int64[1] last = {-1}, float two = {2}, float[1] one = {1}, float e = {0.001}> {
            m = ReduceMean <axes = [-1]> (x)
            c = Sub(x, m)
            n = ReduceMean <axes = [-1]> (x)
            d = Sub(x, n)
            p = Pow(d, two)
            s = ReduceSum(p, last)
            f = Size(x)
            h = Cast <to = 7> (f)
            i = Size(s)
            j = Cast <to = 7> (i)
            k = Cast <to = 1> (h)
            l = Cast <to = 1> (j)
            o = Div(k, l)
            q = Div(s, o)
            r = Mul(q, one)
            t = Add(r, e)
            u = Sqrt(t)
            y = Div(c, u)
        }""",
        ["LayerNormalization"],
    ),
}


def fed(shape: tuple[object, ...], dtype: DType, rng: np.random.Generator) -> HostArray:
    dims = [d if isinstance(d, int) else 3 for d in shape]
    return rng.integers(0, 2, dims) if dtype.kind == "i" else rng.standard_normal(dims, np.float32)


@pytest.mark.parametrize(("text", "nodes"), FORMS.values(), ids=FORMS)
def test_layers_are_one_node(text: str, nodes: list[str]) -> None:
    model, rng = parse(text, 17), np.random.default_rng(0)
    with infera_gpu.load(model, device="cpu", fuse=False) as plain, infera_gpu.load(model, device="cpu") as session:
        feeds = {name: fed(spec.shape, spec.dtype, rng) for name, spec in tensors_of(session.inputs, "input").items()}
        found = [n.qualified.replace("NHWC", "") for n in session.graph.nodes]
        assert sorted(found) == sorted(nodes)
        want, got = plain.run(feeds)["y"], session.run(feeds)["y"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())

"""Channels last in whole networks: where Transposes are left, and that results stay."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, printer

import infera_gpu
from bench import light
from bench.inputs import EXAMPLES
from bench.models import path_of
from infera_gpu.graph import HostArray
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes import layout, optimize
from infera_gpu.passes.layout import convert
from tests import draft_steps, random_graphs
from tests.drafts import FLOAT, Draft
from tests.layout_support import assert_same, check, run, transposes
from tests.test_random_graphs import difference
from tests.text import parse


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution is converted, whatever it gains."""
    monkeypatch.setattr(layout, "gain_of", lambda *given: 1e12)


CONV = "float[4,4,3,3] w = {" + ", ".join(str((7 * i) % 11 - 5) for i in range(144)) + "}"
"""Weights from 4 channels to 4."""

NETWORKS: dict[str, tuple[int, str]] = {
    "a-chain": (
        2,
        """
        a = Conv <pads = [1, 1, 1, 1]> (x, w)
        b = Relu(a)
        y = Conv(b, w)
        """,
    ),
    "a-residual": (
        2,
        """
        a = Conv <pads = [1, 1, 1, 1]> (x, w)
        b = Conv <pads = [1, 1, 1, 1]> (a, w)
        c = Add(b, a)
        y = Relu(c)
        """,
    ),
    "a-residual-inside": (2, 'y = infera.FusedConv <pads = [1, 1, 1, 1], activation = "relu"> (x, w, , x)'),
    "a-residual-that-broadcasts": (
        3,
        """
        g = GlobalAveragePool(x)
        y = infera.FusedConv <activation = \"leaky_relu\", activation_params = [0.1]> (x, w, , g)
        """,
    ),
    "fused-by-another-runtime": (
        2,
        'y = com.microsoft.FusedConv <activation = "LeakyRelu", activation_params = [0.2]> (x, w)',
    ),
    "an-output-inside": (
        3,
        """
        z = Conv <pads = [1, 1, 1, 1]> (x, w)
        y = Conv(z, w)
        """,
    ),
    "read-in-both-layouts": (
        4,
        """
        a = Conv <pads = [1, 1, 1, 1]> (x, w)
        b = InstanceNormalization(a, s4, s4)
        c = Conv <pads = [1, 1, 1, 1]> (b, w)
        y = Mul(c, a)
        """,
    ),
    "squeeze-and-excitation": (
        2,
        """
        a = Conv <pads = [1, 1, 1, 1]> (x, w)
        g = ReduceMean <axes = [2, 3]> (a)
        h = HardSigmoid(g)
        y = Mul(a, h)
        """,
    ),
    "excitation-by-a-matrix": (
        3,
        """
        a = Conv <pads = [1, 1, 1, 1]> (x, w)
        g = ReduceMean <axes = [2, 3], keepdims = 0> (a)
        m = MatMul(g, k)
        h = Reshape(m, n)
        y = Mul(a, h)
        """,
    ),
    "another-rank-broadcasts": (
        3,
        """
        a = Conv <pads = [1, 1, 1, 1]> (x, w)
        g = ReduceMax <axes = [0], keepdims = 0> (x)
        y = Sub(a, g)
        """,
    ),
    "shuffled-channels": (
        3,
        """
        a = Conv <pads = [1, 1, 1, 1]> (x, w)
        s = Reshape(a, split)
        t = Transpose <perm = [0, 2, 1, 3, 4]> (s)
        j = Reshape(t, whole)
        y = Conv(j, w)
        """,
    ),
    "tokens": (
        1,
        """
        a = Conv(x, w)
        r = Reshape(a, flat)
        t = Transpose <perm = [0, 2, 1]> (r)
        y = MatMul(t, k)
        """,
    ),
    "upsampled-like-another": (
        2,
        """
        a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w)
        size = Shape(x)
        b = Resize <mode = \"linear\"> (a, , , size)
        c = Concat <axis = 1> (b, x)
        d, e = Split <axis = 1> (c)
        y = Conv(d, w)
        """,
    ),
}


def network(body: str, batch: str = "2", size: str = "6", outputs: str = "float[?, ?, ?, ?] y") -> str:
    more = ", float[?, ?, ?, ?] z" if " z = " in body else ""
    return f"""
        network (float[{batch}, 4, {size}, 8] x, float p) => ({outputs}{more})
        <{CONV}, float[4,4] k = {{{", ".join(str(i % 7 - 3) for i in range(16))}}}, float[4] s4 = {{1, 2, 3, 4}},
         int64[4] n = {{0, 0, 1, 1}}, int64[5] split = {{0, 2, 2, -1, 8}}, int64[4] whole = {{0, 4, -1, 8}},
         int64[3] flat = {{0, 4, -1}}> {{
            {body}
        }}"""


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("left", "body"), NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize(("batch", "size"), [("2", "6"), ("N", "H")], ids=["static", "symbolic"])
def test_only_the_edges_of_a_network_keep_transposes(left: int, body: str, batch: str, size: str) -> None:
    made = check(network(body, batch, size), left, sizes={"N": 2, "H": 6})
    assert not [n.op for g in made.walk() for n in g.nodes if n.op in ("Conv", "FusedConv")]


@pytest.mark.usefixtures("eager")
def test_branches_are_converted_too() -> None:
    weights = ", ".join(map(str, range(36)))
    text = network(
        f"""
        t = Less(p, p)
        y = If (t) <
            then_branch = g () => (float[?, ?, ?, ?] u) {{ u = Relu(x) }},
            else_branch = h () => (float[?, ?, ?, ?] v) <float[1,4,3,3] k = {{{weights}}}> {{ v = Conv(x, k) }}
        >"""
    )
    graph = load_graph(parse(text))
    made = optimize(graph, registry(), channels_last=True)
    assert [n.op for g in made.walk() for n in g.nodes if "Conv" in n.op] == ["FusedConvNHWC"]
    rng = np.random.default_rng(0)
    assert_same(graph, made, {"x": rng.standard_normal((2, 4, 6, 8)).astype(np.float32), "p": np.array(1, np.float32)})


@pytest.mark.usefixtures("eager")
def test_branches_read_values_under_their_own_names() -> None:
    text = network(
        """
        a = Conv <pads = [1, 1, 1, 1]> (x, w)
        m = ReduceMax <keepdims = 0> (a)
        t = Less(m, p)
        y = If (t) <
            then_branch = g () => (float[?, ?, ?, ?] u) { u = Relu(a) },
            else_branch = h () => (float[?, ?, ?, ?] v) { v = Neg(a) }
        >"""
    )
    check(text, left=2)


def test_a_single_small_convolution_stays_as_it_is() -> None:
    check(network("y = Conv(x, k1)").replace("float[4,4] k", "float[4,4,1,1] k1", 1), left=0)


def test_weights_that_are_computed_stay_as_they_are() -> None:
    check(network("v = Mul(w, p)  a = Conv(x, v)  y = Conv(a, v)"), left=0)


@pytest.mark.parametrize("dtype", ["float", "float16", "double"])
def test_devices_say_what_they_prefer(dtype: str) -> None:
    """Half precision is for Triton's kernels, which do not know double precision."""
    chain = "a = Conv <pads = [1, 1, 1, 1]> (x, w)  b = Conv <pads = [1, 1, 1, 1]> (a, w)  y = Conv(b, w)"
    model = parse(network(chain, size="90").replace("float[", f"{dtype}["))
    for device, without in (("cpu", "float16"), ("recording", "double")):
        with infera_gpu.load(model, device=device) as session:
            converted = any(n.op == "FusedConvNHWC" for n in session.graph.nodes)
            assert session.device.channels_last == (device == "cpu" or "triton" in session.device.kinds)
            assert converted == (session.device.channels_last and dtype != without)


# ---- random networks

STEPS: tuple[Callable[[Draft], None], ...] = (
    *(random_graphs.conv, random_graphs.conv, random_graphs.conv, random_graphs.pool, draft_steps.concat),
    *(draft_steps.unary, draft_steps.binary, draft_steps.split, draft_steps.reduce, draft_steps.transpose),
    *(draft_steps.reshape, draft_steps.slice_, draft_steps.squeeze, draft_steps.unsqueeze, draft_steps.tile_or_pad),
    *(draft_steps.rowwise, draft_steps.clip, draft_steps.where),
)


def draw(seed: int) -> tuple[onnx.ModelProto, dict[str, HostArray]]:
    """A network of convolutions on two images, with what may stand between them."""
    d = Draft(random.Random(seed), STEPS)
    shapes = {"x0": d.rng.choice(((1, 2, 4, 4), (2, 3, 5, 4))), "x1": d.rng.choice(((2, 1, 3, 3), (1, 3, 5, 1)))}
    d.values.update({name: (FLOAT, shape) for name, shape in shapes.items()})
    for _ in range(d.rng.randint(3, 16)):
        d.step()
    inputs = [
        helper.make_tensor_value_info(name, FLOAT, [f"{name}{i}" if d.maybe(0.3) else n for i, n in enumerate(shape)])
        for name, shape in shapes.items()
    ]
    chosen = dict.fromkeys([list(d.values)[-1], *d.rng.sample(list(d.values), min(2, len(d.values)))])
    outputs = [helper.make_tensor_value_info(name, d.kind(name), None) for name in chosen]
    graph = helper.make_graph(d.nodes, f"seed{seed}", inputs, outputs, d.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = {name: d.numbers.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return model, feeds


@settings(max_examples=150)
@given(seed=st.integers(0, 1 << 32), eager=st.booleans())
def test_random_networks_compute_the_same(seed: int, eager: bool) -> None:
    model, feeds = draw(seed)
    graph = load_graph(model)
    with pytest.MonkeyPatch.context() as patch:
        if eager:
            patch.setattr(layout, "gain_of", lambda *given: 1e12)
        made = convert(graph, registry())
    made.check()
    got, want = run(made, feeds), run(graph, feeds)
    for name, expected in want.items():
        wrong = difference(got[name], expected)
        assert not wrong, f"{name} {wrong}\n" + printer.to_text(model.graph)


# ---- models

SENSITIVE = {"u2netp": 1e-4}
"""Tolerances of models that end in small differences of large numbers: see tests/test_models.py."""

MODELS = {
    "mobilenetv2-zoo": 1,
    "yunet": 1,
    "opennsfw": 0,
    "u2netp": 8,
    "ppocrv6-det-small": 2,
    "ppocrv6-rec-small": 9,
    "captcha-crnn": 2,
    "oww-embedding": 1,
}
"""Transposes left at most: one of an image that enters, one of each image that leaves, those that attention needs."""


def assert_converts(source: Any, feeds: Mapping[str, HostArray], left: int, tol: float = 1e-5) -> None:
    graph = load_graph(source)
    before = optimize(graph, registry())
    made = optimize(graph, registry(), channels_last=True)
    assert transposes(made) <= left
    assert not [n for n in made.nodes if n.op in ("Conv", "FusedConv")]
    got, want = run(made, feeds), run(before, feeds)
    for name, expected in want.items():
        scale = np.abs(expected).max(initial=0.0)
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=tol * scale, err_msg=name)


@pytest.mark.large
@pytest.mark.parametrize(("name", "left"), MODELS.items())
def test_models_keep_transposes_at_their_edges(name: str, left: int) -> None:
    assert_converts(path_of(name), EXAMPLES[name][0].feeds(), left, SENSITIVE.get(name, 1e-5))


LIGHT = {"densenet121": 2, "inception_v2": 1, "resnet50": 1, "shufflenet": 17, "squeezenet": 2}
"""Transposes left at most: of the image that enters, of one pixel that leaves, and ShuffleNet's 16 shuffles."""


@pytest.mark.parametrize(("name", "left"), LIGHT.items())
def test_architectures_keep_transposes_at_their_edges(name: str, left: int) -> None:
    model = light.light(name)
    (image,) = model.graph.input
    shape = [d.dim_value for d in image.type.tensor_type.shape.dim]
    feeds = {image.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    assert_converts(model, feeds, left)

"""Networks of which one token is read in the end: what is computed for the others, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import infera_gpu
from bench.build import bert
from bench.build_llama import Sizes, llama, llama_feeds
from bench.build_vit import vit
from infera_gpu.errors import InferaError, PlanError
from infera_gpu.session import Session
from infera_gpu.verify import TOLERANCES, compare
from tests.text import parse

Feeds = Mapping[str, Any]
NARROW = {"layers": 2, "hidden": 64, "heads": 4}


def read_at(model: onnx.ModelProto, index: int, *, alone: bool = True) -> onnx.ModelProto:
    """A model whose first output is a matrix of each token's, of which one token's row is classified."""
    whole, width = model.graph.output[0].name, NARROW["hidden"]
    weights = np.random.default_rng(1).standard_normal((width, 3)).astype(np.float32)
    for name, value in (("index", np.array(index)), ("classes", weights)):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    model.graph.node.append(helper.make_node("Gather", [whole, "index"], ["token"], axis=1))
    model.graph.node.append(helper.make_node("MatMul", ["token", "classes"], ["scores"]))
    if alone:
        del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 3]))
    return model


def tokens(count: int, length: int) -> Feeds:
    rng = np.random.default_rng(length)
    seen = np.ones((count, length), np.int64)
    seen[0, (length + 2) // 2 :] = 0
    ids, kinds = rng.integers(0, 100, (count, length)), rng.integers(0, 2, (count, length))
    return {"input_ids": ids, "attention_mask": seen, "token_type_ids": kinds}


def images(count: int) -> Feeds:
    return {"image": np.random.default_rng(0).standard_normal((count, 3, 32, 32)).astype(np.float32)}


def classifier(index: int = 0, *, alone: bool = True) -> onnx.ModelProto:
    return read_at(bert(**NARROW, inner=128, vocabulary=100), index, alone=alone)


MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], tuple[Feeds, ...], int]] = {
    "bert": (classifier, (tokens(2, 7), tokens(1, 5), tokens(3, 1)), 7),
    "bert_last": (lambda: classifier(-1), (tokens(2, 7), tokens(3, 1)), 7),
    "vit": (lambda: vit(side=32, patch=8, **NARROW), (images(3), images(1)), 17),
}
"""A model, what it is fed, and how many tokens the first of that has."""


PRODUCTS = ("MatMul", "FusedMatMul", "NormalizedMatMul", "MatMulNBits", "FusedMatMulNBits")


def rows(session: Session, feeds: Feeds, op: str) -> list[int]:
    """How many rows the nodes of an operator compute, in order."""
    placed = [s.placed for p in session.plans(feeds) for s in p.steps if s.placed is not None]
    outs = [p.site.outs[0] for p in placed if p.node.op == op]
    return [int(np.prod(out.dims[:-1])) for out in outs if out is not None]


@pytest.mark.parametrize("device", ["cpu", pytest.param("recording", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("name", MODELS)
def test_the_last_layer_is_computed_for_one_token(name: str, device: str) -> None:
    build, examples, length = MODELS[name]
    model, heads, count = build(), NARROW["heads"], len(next(iter(examples[0].values())))
    with infera_gpu.load(model, device=device) as session, infera_gpu.load(model, device="cpu", fuse=False) as written:
        assert rows(session, examples[0], "Attention") == [count * length * heads, count * heads]
        assert rows(session, examples[0], "FusedMatMul")[-4:-1] == [count] * 3
        assert rows(session, examples[0], "LayerNormalization")[-2:] == [count] * 2
        for feeds in examples:
            found = compare(session.run(feeds), written.run(feeds))
            assert found
            assert all(d.within(2e-5) for d in found), [str(d) for d in found]


def test_no_more_kernels_are_launched_than_for_every_token() -> None:
    counts = []
    for alone in (True, False):
        with infera_gpu.load(classifier(alone=alone), device="recording") as session:
            counts.append(sum(len(p.steps) for p in session.plans(tokens(2, 7))))
    assert counts[0] <= counts[1]


def test_all_tokens_are_computed_where_they_are_asked_for() -> None:
    feeds = tokens(2, 7)
    with infera_gpu.load(classifier(alone=False), device="cpu") as session:
        assert rows(session, feeds, "Attention") == [56, 56]
        alone = infera_gpu.load(classifier(), device="cpu").run(feeds)["scores"]
        np.testing.assert_allclose(session.run(feeds)["scores"], alone, rtol=2e-5, atol=2e-5)


def test_strict_sessions_compute_as_it_is_written() -> None:
    with infera_gpu.load(classifier(), device="cpu", accuracy="strict") as session:
        assert not any(
            n.op == "Slice" and n.inputs[0] not in session.graph.constants for n in session.graph.nodes[-20:]
        )


@pytest.mark.kernels
@pytest.mark.parametrize(("precision", "within"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_in_half_precision(precision: Any, within: float) -> None:
    """Of several sequences half are so near, all as near as `infera verify` asks: how far one is depends on how its
    numbers happen to be rounded."""
    model, found = classifier(), []
    with infera_gpu.load(model, device="recording", precision=precision) as session:
        assert rows(session, tokens(2, 7), "Attention") == [56, 8]
        for length in range(2, 13):
            feeds = tokens(3, length)
            want = infera_gpu.load(model, device="cpu", fuse=False).run(feeds)["scores"]
            found.append(np.abs(session.run(feeds)["scores"] - want).max() / np.abs(want).max())
    assert np.median(found) < within
    assert max(found) < TOLERANCES[precision]


def test_a_sequence_longer_than_its_positions_is_refused_as_before() -> None:
    model = classifier()
    for fuse in (True, False):
        with infera_gpu.load(model, device="cpu", fuse=fuse) as session, pytest.raises(InferaError):
            session.run(tokens(1, 513))


def test_a_decoder_computes_what_follows_the_last_keys_for_its_last_token(tmp_path: Path) -> None:
    sizes = Sizes(layers=2, hidden=64, heads=4, groups=2, inner=128, vocabulary=100)
    path, feeds = llama(tmp_path, tokens=8, past=0, sizes=sizes), llama_feeds(2, tokens=8, past=0, sizes=sizes)
    with infera_gpu.load(path, device="cpu", fuse=False) as session:
        want = session.run(feeds)
    for device in ("cpu", "recording"):
        with infera_gpu.load(path, device=device) as session:
            products = 2 * rows(session, feeds, "GatedMatMul")
            for op in PRODUCTS:
                products += rows(session, feeds, op)
            assert sorted(products) == [2] * 5 + [16] * 6
            got = session.run(feeds)
        for name, expected in want.items():
            peak = np.abs(expected.astype(np.float32)).max()
            np.testing.assert_allclose(
                got[name].astype(np.float32), expected.astype(np.float32), rtol=0, atol=3e-3 * peak, err_msg=name
            )


TAIL = """
        g ({inputs}) => (float[B, 4] y)
        <float[4, 4] w = {{1, -2, 3, 0.5, -1, 2, 1, 4, -3, 0.25, 1, 1, 2, -1, 0.5, 2}}, float[4] b = {{1, 2, -3, 0.5}},
         int64 first = {{0}}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}},
         float[1, 4, 4] table = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}},
         uint8[4, 1, 8] bits = {{16, 50, 84, 118, 1, 1, 1, 1, 152, 186, 220, 254, 1, 1, 1, 1,
                                 1, 35, 69, 103, 1, 1, 1, 1, 137, 171, 205, 239, 1, 1, 1, 1}},
         float[4] scales = {{0.5, 0.25, 2, 1}}> {{
            {nodes}
            y = Gather <axis = 1> (t, first)
        }}"""
CORNERS: dict[str, tuple[str, str, dict[str, tuple[int, ...]], int]] = {
    "residual_is_wider": (
        "float[1, 1, 4] x, float[2, 5, 4] r, float[2, 5, 4] z",
        "p = infera.FusedMatMul(x, w, b, r)  q = Add(p, z)  s = MatMul(q, w)  t = MatMul(s, w)",
        {"x": (1, 1, 4), "r": (2, 5, 4), "z": (2, 5, 4)},
        3,
    ),
    "operand_of_one_row": (
        "float[2, 5, 4] x, float[1, 1, 4] r",
        "p = MatMul(x, w)  q = Add(r, p)  t = MatMul(q, w)",
        {"x": (2, 5, 4), "r": (1, 1, 4)},
        2,
    ),
    "operand_of_fewer_axes": (
        "float[2, 5, 4] x, float[5, 4] r",
        "p = MatMul(x, w)  q = Add(r, p)  t = MatMul(q, w)",
        {"x": (2, 5, 4), "r": (5, 4)},
        2,
    ),
    "weights_of_few_bits": (
        "float[2, 5, 4] x, float[2, 5, 4] r",
        """p = com.microsoft.MatMulNBits <K = 4, N = 4, block_size = 16> (x, bits, scales)
           q = Add(p, r)  t = MatMul(q, w)""",
        {"x": (2, 5, 4), "r": (2, 5, 4)},
        2,
    ),
    "operand_that_is_squared": (
        "float[2, 5, 4] x",
        "p = MatMul(x, w)  q = Mul(p, p)  t = MatMul(q, w)",
        {"x": (2, 5, 4)},
        2,
    ),
    "both_operands_of_a_product": (
        "float[2, 4, 4] x",
        "p = MatMul(x, w)  q = MatMul(p, p)  t = MatMul(q, w)",
        {"x": (2, 4, 4)},
        2,
    ),
    "first_transposed": (
        "float[2, 4, 5] x",
        "p = infera.FusedMatMul <transA = 1> (x, w, b)  t = MatMul(p, w)",
        {"x": (2, 4, 5)},
        2,
    ),
    "axes_in_another_order": (
        "float[5, 2, 4] x",
        "p = MatMul(x, w)  q = Transpose <perm = [1, 0, 2]> (p)  t = MatMul(q, w)",
        {"x": (5, 2, 4)},
        2,
    ),
    "weights_of_rows": (
        "float[2, 5, 4] x, float[5, 5] m",
        "p = MatMul(x, w)  q = MatMul(m, p)  t = MatMul(q, w)",
        {"x": (2, 5, 4), "m": (5, 5)},
        2,
    ),
    "rows_split_in_two": (
        "float[2, 5, 4] x, int64[3] to",
        "p = MatMul(x, w)  q = Reshape(p, to)  t = MatMul(q, w)",
        {"x": (2, 5, 4)},
        1,
    ),
    "table_up_to_the_length": (
        "float[B, S, 4] x",
        "n = Shape(x)  m = Slice(n, one, two)  c = Slice(table, zero, m, one)  p = Add(x, c)  t = MatMul(p, w)",
        {"x": (2, 3, 4)},
        1,
    ),
}


"""Inputs, nodes, sizes, and how many products are of one row for each of a batch."""


@pytest.mark.parametrize("device", ["cpu", "recording"])
@pytest.mark.parametrize("name", CORNERS)
def test_rows_are_read_where_they_are(name: str, device: str) -> None:
    inputs, nodes, shapes, count = CORNERS[name]
    model, rng = parse(TAIL.format(inputs=inputs, nodes=nodes)), np.random.default_rng(0)
    feeds: dict[str, Any] = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    if "to" in inputs:
        feeds["to"] = np.array([1, 10, 4])
    with infera_gpu.load(model, device="cpu", fuse=False) as written, infera_gpu.load(model, device=device) as session:
        want, got = (s.run(feeds)["y"] for s in (written, session))
        assert sum(d <= 2 for op in PRODUCTS for d in rows(session, feeds, op)) == count
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("fuse", [True, False])
def test_a_length_that_a_table_has_not_is_refused(fuse: bool) -> None:
    """Though of the sum one row is read, which both have."""
    inputs, nodes, *_ = CORNERS["table_up_to_the_length"]
    model = parse(TAIL.format(inputs=inputs, nodes=nodes))
    with infera_gpu.load(model, device="cpu", fuse=fuse) as session, pytest.raises(PlanError):
        session.run({"x": np.ones((2, 5, 4), np.float32)})

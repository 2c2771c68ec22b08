from __future__ import annotations

from xml.etree import ElementTree

import infera_gpu
from infera_gpu.picture import COLOURS, memory_svg
from tests.text import parse

MODEL = parse(
    """g (float[N, 64] x) => (float[N, 64] y) {
        a = Exp(x)
        b = Transpose <perm = [1, 0]> (a)
        c = MatMul(a, b)
        y = MatMul(c, x)
    }"""
)
SVG = "{http://www.w3.org/2000/svg}"


def test_every_block_is_drawn_where_it_lies() -> None:
    plan = infera_gpu.load(MODEL, device="cpu").plan_for({"x": (50, 64)})
    root = ElementTree.fromstring(memory_svg(plan))
    titles = [t.text or "" for t in root.iter(f"{SVG}title")]
    assert len(titles) == len(plan.blocks) >= 3
    for block in plan.blocks:
        assert any(t.startswith(f"{block.name}: {block.nbytes:,} bytes at {block.offset:,}") for t in titles)
    fills = {r.get("fill") for r in root.iter(f"{SVG}rect")}
    assert {COLOURS["input"], COLOURS["output"]} <= fills
    assert f"{plan.arena_bytes:,} bytes" in (root.find(f"{SVG}text[@font-size='15']").text or "")  # type: ignore[union-attr]


def test_names_from_a_model_are_escaped() -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Exp(x) y = Neg(a) }")
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "<script>&"
    ElementTree.fromstring(memory_svg(infera_gpu.load(model, device="cpu").plan_for({"x": (2,)})))

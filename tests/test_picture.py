from __future__ import annotations

from xml.etree import ElementTree

import pytest

import infera_gpu
from infera_gpu.picture import COLOURS, _ticks, memory_svg
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


def test_the_picture_says_what_it_is_of_and_names_what_is_large() -> None:
    plan = infera_gpu.load(MODEL, device="cpu").plan_for({"x": (500, 64)})
    texts = [t.text or "" for t in ElementTree.fromstring(memory_svg(plan)).iter(f"{SVG}text")]
    assert any("x float32[500, 64]" in t for t in texts)
    assert {"step", "MiB", "0", "0.5", "1"} <= set(texts)
    assert {"a", "c"} <= set(texts)  # and the first letters of others


@pytest.mark.parametrize(
    ("nbytes", "unit", "ticks"),
    [
        (64, "KiB", [0, 0.02, 0.04, 0.06]),
        (3 << 10, "KiB", [0, 1, 2, 3]),
        (700 << 10, "MiB", [0, 0.2, 0.4, 0.6]),
        (12_500_000, "MiB", [0, 5, 10]),
        (1 << 34, "MiB", [0, 5000, 10000, 15000]),
    ],
)
def test_memory_is_told_in_round_numbers(nbytes: int, unit: str, ticks: list[float]) -> None:
    found = _ticks(nbytes)
    assert found[0] == unit
    assert found[1] == pytest.approx(ticks)


def test_names_from_a_model_are_escaped() -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Exp(x) y = Neg(a) }")
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "<script>&"
    ElementTree.fromstring(memory_svg(infera_gpu.load(model, device="cpu").plan_for({"x": (2,)})))

"""What is refused as it is written is refused after the passes, and what is taken gives the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import infera_gpu
from infera_gpu.errors import InferaError
from tests.text import parse

REFUSED = {
    "an Expand to another size": """
        sizes (float[2, 3, 2] x) => (float[2, 3, 3] y) <int64[3] s = {1, 1, 3}> {
            t = Expand(x, s)
            y = Neg(t)
        }""",
    "a Pad of nothing with two numbers": """
        numbers (float[2, 3] x) => (float[2, 3] y) <int64[4] p = {0, 0, 0, 0}, float[2] v = {1, 2}> {
            t = Pad(x, p, v)
            y = Neg(t)
        }""",
    "the shape of a product of other sizes": """
        inner (float[N, 2, 3, 4] x, float[N, 2, 5, 3] k) => (int64[4] y) {
            s = MatMul(x, k)
            y = Shape(s)
        }""",
}


def outcome(text: str, fuse: bool, feeds: Mapping[str, Any]) -> Any:
    """The outputs, or None where it is refused."""
    try:
        with infera_gpu.load(parse(text), device="cpu", fuse=fuse) as session:
            return list(session.run(feeds).values())
    except InferaError:
        return None


def feeds_of(text: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    given = parse(text).graph.input
    return {
        value.name: rng.standard_normal([d.dim_value or 2 for d in value.type.tensor_type.shape.dim], np.float32)
        for value in given
    }


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_and_without_passes(name: str) -> None:
    text = REFUSED[name]
    feeds = feeds_of(text)
    assert outcome(text, False, feeds) is None
    assert outcome(text, True, feeds) is None


def test_valid_windows_have_no_padding_of_their_own() -> None:
    text = """
        valid (float[1, 1, 3, 3] x) => (float[1, 1, 3, 2] y)
        <float[1, 1, 2, 2] w = {1, 2, 3, 4}, int64[8] p = {0, 0, 0, 0, 0, 0, 1, 0}> {
            t = Pad(x, p)
            y = Conv <auto_pad = "VALID", pads = [1, 1, 1, 1]> (t, w)
        }"""
    feeds = feeds_of(text)
    want, got = outcome(text, False, feeds), outcome(text, True, feeds)
    assert want[0].shape == (1, 1, 3, 2)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)


def test_not_makes_booleans_of_integers() -> None:
    text = """
        integers (int64[4] x) => (int64[4] y) {
            b = Not(x)
            c = Cast <to = 7> (b)
            y = Neg(c)
        }"""
    feeds = {"x": np.array([0, 1, 2, 0])}
    want, got = outcome(text, False, feeds), outcome(text, True, feeds)
    np.testing.assert_array_equal(want[0], [-1, 0, 0, -1])
    np.testing.assert_array_equal(got[0], want[0])

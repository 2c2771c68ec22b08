"""Tensors of strings in operators that blank or copy elements, and their refusals; onnx's reference blanks with 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import infera_gpu
from infera_gpu.errors import InferaError, PlanError
from infera_gpu.op import Case
from infera_gpu.ops import registry
from tests.cases import compute, inputs_of, site_of
from tests.text import parse

WORDS = np.array([["a", "b", "c"], ["d", "", "f"]], object)
IMAGE = WORDS.reshape(1, 1, 2, 3)
CORNERS = np.array([[[[-1, -1], [1, 1], [-3, 0]]]], np.float32)


def outcome(name: str, ins: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
    op = registry().find("", name, 20)
    assert op is not None
    case = Case("text", ins, attrs)
    given = inputs_of(op, case)
    site = site_of(op, case, given)
    (got,) = compute(op, site, given)
    assert got.shape == site.outs[0].shape
    return got.tolist()


@pytest.mark.parametrize(
    ("name", "ins", "attrs", "want"),
    [
        ("Pad", (WORDS[:1], np.array([1, 0, 0, 1])), {}, [[""] * 4, ["a", "b", "c", ""]]),
        ("Pad", (WORDS[:1], np.array([0, 0, 0, 1]), np.array("z", object)), {}, [["a", "b", "c", "z"]]),
        ("Pad", (WORDS[:1], np.array([0, 1, 0, 0])), {"mode": "edge"}, [["a", "a", "b", "c"]]),
        ("CenterCropPad", (WORDS, np.array([4, 2])), {}, [["", ""], ["a", "b"], ["d", ""], ["", ""]]),
        ("Trilu", (WORDS,), {}, [["a", "b", "c"], ["", "", "f"]]),
        ("Trilu", (WORDS,), {"upper": 0}, [["a", "", ""], ["d", "", ""]]),
        ("GridSample", (IMAGE, CORNERS), {"mode": "nearest", "align_corners": 1}, [[[["a", "f", ""]]]]),
        ("Resize", (WORDS, None, np.array([1, 2], np.float32)), {}, [list("aabbcc"), ["d", "d", "", "", "f", "f"]]),
        (
            "ScatterElements",
            (WORDS, np.array([[1, 0, 0]]), np.array([["x", "y", "z"]], object)),
            {},
            [["a", "y", "z"], ["x", "", "f"]],
        ),
    ],
)
def test_blanks_are_empty_strings(name: str, ins: tuple[Any, ...], attrs: dict[str, Any], want: Any) -> None:
    assert outcome(name, ins, attrs) == want


@pytest.mark.parametrize(
    ("name", "ins", "attrs", "message"),
    [
        ("GridSample", (IMAGE, CORNERS), {}, "expected mode 'nearest' for strings"),
        (
            "Resize",
            (WORDS, None, np.array([1, 2], np.float32)),
            {"mode": "linear"},
            "expected mode 'nearest' for strings",
        ),
        ("Col2Im", (IMAGE[0], np.array([1, 3]), np.array([1, 2])), {}, "cannot be added up"),
        (
            "ScatterElements",
            (WORDS, np.array([[1]]), WORDS[:1, :1]),
            {"reduction": "add"},
            "expected none, max or min for strings",
        ),
        (
            "ScatterND",
            (WORDS, np.array([[1]]), WORDS[:1]),
            {"reduction": "mul"},
            "expected none, max or min for strings",
        ),
        ("RandomNormalLike", (WORDS,), {}, "expected a `dtype` of floating point"),
        ("RandomUniformLike", (np.array([1, 2]),), {}, "expected a `dtype` of floating point"),
    ],
)
def test_arithmetic_on_what_is_no_number_is_refused(
    name: str, ins: tuple[Any, ...], attrs: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        outcome(name, ins, attrs)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Mod"])
def test_strings_are_no_numbers(op: str) -> None:
    model = parse(f"g (string[N] x, string[N] z) => (string[N] y) {{ y = {op}(x, z) }}")
    with pytest.raises(InferaError, match="expected numbers"):
        infera_gpu.load(model, device="cpu").run({"x": ["a"], "z": ["b"]})

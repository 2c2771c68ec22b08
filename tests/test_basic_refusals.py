"""What elementwise, matrix, reduction, shape, indexing and quantisation operators refuse, and how they say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from infera_gpu.errors import PlanError
from infera_gpu.graph import HostArray
from tests.test_basic_ops import find, site_of

F = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("name", "ins", "attrs", "message"),
    [
        ("Add", (F, np.zeros(2, np.float32)), {}, r"float32\[2, 3\], float32\[2\] do not broadcast"),
        ("MatMul", (F, F), {}, r"cannot multiply \[2, 3\] by \[2, 3\]"),
        ("MatMul", (F, np.float32(1).reshape(())), {}, "at least one dimension"),
        ("Gemm", (F, np.zeros(3, np.float32)), {}, "expected two matrices"),
        ("Gemm", (F, F.T, F[:1, None, :2]), {}, r"C float32\[1, 1, 2\] does not broadcast to float32\[2, 2\]"),
        ("Gemm", (F, F.T, F[0, :2].astype(np.float64)), {}, r"C float64\[2\] and the product .* differ in type"),
        ("Einsum", (F, F), {"equation": "ij,jk->ik"}, "'j' is 3 and 2"),
        ("Einsum", (F,), {"equation": "ij->k"}, "output label 'k'"),
        ("Reshape", (F, np.array([4, -1])), {}, r"cannot reshape float32\[2, 3\] to \[4, -1\]"),
        ("Reshape", (F, np.array([-1, -1])), {}, "one -1 at most"),
        ("Transpose", (F,), {"perm": (0, 0)}, "does not permute"),
        ("Squeeze", (F, np.array([0])), {}, "cannot squeeze axis 0"),
        ("Unsqueeze", (F, np.array([0, 0])), {}, "twice"),
        ("Slice", (F, np.array([0]), np.array([1]), np.array([5])), {}, "axis 5 out of range"),
        ("Slice", (F, np.array([0]), np.array([1]), np.array([0]), np.array([0])), {}, "step is 0"),
        ("Split", (F, np.array([1, 2])), {}, "cannot split axis 0"),
        ("Concat", (F, np.zeros((2, 2), np.float32)), {"axis": 0}, "cannot join"),
        ("Expand", (F, np.array([5])), {}, "cannot expand"),
        ("Tile", (F, np.array([2])), {}, "repeats"),
        ("ReduceSum", (F, np.array([2])), {}, "axis 2 out of range for rank 2"),
        ("TopK", (F, np.array([4])), {}, "k is 4"),
        ("ArgMax", (np.zeros((0, 3), np.float32),), {}, "no elements to choose from"),
        ("Gelu", (F,), {"approximate": "fast"}, "approximate is 'fast'"),
        ("GatherND", (F, np.zeros((1, 3), np.int64)), {}, "do not fit"),
        ("ScatterND", (F, np.zeros((1, 1), np.int64), F), {}, "do not fit"),
        ("ScatterElements", (F, np.zeros((1, 1), np.int64), F[:1, :1]), {"reduction": "sub"}, "reduction is 'sub'"),
        ("QuantizeLinear", (F, np.zeros(2, np.float32)), {}, "scale is float32"),
        ("DepthToSpace", (np.zeros((1, 3, 2, 2), np.float32),), {"blocksize": 2}, "not a multiple"),
        ("Cast", (F,), {"to": 99}, "element type 99"),
        ("Add", (F, np.array([1])), {}, r"float32\[2, 3\], int64\[1\] differ in type"),
        ("Equal", (F, np.array([1])), {}, "differ in type"),
        ("Sum", (F, F, F.astype(np.float64)), {}, "differ in type"),
        ("PRelu", (F, np.array([1])), {}, "differ in type"),
        ("Where", (F, F, F), {}, "expected bool"),
        ("Where", (F > 0, F, np.array([1])), {}, "differ in type"),
        ("BitShift", (np.array([1]), np.array([1])), {"direction": "UP"}, "direction is 'UP'"),
        (
            "Range",
            (np.float32(0).reshape(()), np.array(np.nan, np.float32), np.array(1, np.float32)),
            {},
            "from 0.0 to",
        ),
        ("Range", (np.array(0.0), np.array(np.inf), np.array(1.0)), {}, "from 0.0 to inf"),
        ("Range", (np.array(0), np.array(5), np.array(0)), {}, "a delta that is not 0"),
        ("Range", (np.array(0), np.array(5.0), np.array(1)), {}, "expected one type"),
        ("Gather", (F, np.zeros(1, np.float32)), {}, "expected int32 or int64"),
        ("ScatterElements", (F, np.array([[0]]), np.array([[1]])), {}, "expected the type of"),
        ("OneHot", (np.array([0]), np.array([2, 2]), np.array([0, 1])), {}, "depth .* has 2 values"),
        ("OneHot", (np.array([0]), np.array(-1), np.array([0, 1])), {}, "depth is -1"),
        ("OneHot", (np.array([0]), np.array(2), np.array([0, 1, 2])), {}, "expected two: off and on"),
        ("TopK", (F, np.array([1, 1])), {}, "k .* has 2 values"),
        ("CumSum", (F, np.array([0, 1])), {}, "axis .* has 2 values"),
        ("DepthToSpace", (np.zeros((1, 4, 2, 2), np.float32),), {"blocksize": 0}, "blocksize is 0"),
        ("ConstantOfShape", (np.array([2]),), {"value": np.zeros(0, np.float32)}, "value has 0 elements"),
        ("EyeLike", (F[0],), {}, "expected a matrix"),
        ("ReverseSequence", (F, np.array([1, 2])), {}, "expected 3 for axis 1"),
        ("Einsum", (F, F.astype(np.float64)), {"equation": "ij,ij->ij"}, "differ in type"),
        ("Einsum", (F,), {"equation": "ij->ii"}, "names a label twice"),
        ("Einsum", (F,), {"equation": "i1->i"}, "labels are letters"),
        ("Einsum", (F[0],) * 30, {"equation": ",".join("abcdefghijklmnopqrstuvwxyzABCD")}, "30 labels, at most 26"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    name: str, ins: tuple[HostArray, ...], attrs: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message) as error:
        site_of(find(name, 24), *ins, n_outs=2 if name == "Split" else 1, **attrs)
    assert str(error.value).startswith(f"{name} 'n': ")


@pytest.mark.parametrize(
    ("name", "ins", "index", "size"),
    [
        ("Gather", (F, np.array([0, 2])), 2, 2),
        ("Gather", (F, np.array(-3)), -3, 2),
        ("GatherElements", (F, np.array([[0, 0, 2]])), 2, 2),
        ("GatherND", (F, np.array([[0, 3]])), 3, 3),
        ("ScatterND", (F, np.array([[-3]]), F[:1]), -3, 2),
        ("ScatterElements", (F, np.array([[5]]), F[:1, :1]), 5, 2),
    ],
)
def test_a_known_index_out_of_range_is_refused_while_planning(
    name: str, ins: tuple[HostArray, ...], index: int, size: int
) -> None:
    with pytest.raises(PlanError, match=rf"{name} 'n': index {index} is out of range for an axis of {size}"):
        site_of(find(name), *ins, known=(1,))

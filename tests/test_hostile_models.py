"""Operators' cases made wrong in every way that a file can be wrong: all that may come out is an InferaError."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import infera_gpu
from infera_gpu.errors import InferaError
from infera_gpu.graph import HostArray
from infera_gpu.op import Case, Op
from infera_gpu.ops import registry
from infera_gpu.spec import TensorSpec
from tests.cases import inputs_of, opset_of
from tests.protos import attributes, value_info

CASES = 2
"""Cases of each operator that are made wrong."""

LARGEST = 4000
"""Elements of an input: what is wrong does not get more so with size."""

ATTRIBUTES: tuple[Any, ...] = (
    *("a", b"\xff", 1.5, float("nan"), -7, 0, 1 << 40, [1, 2], [-1], [0, 0, 0, 0], [1.5], ["a"]),
    *(numpy_helper.from_array(np.ones(2, np.float32)), helper.make_graph([], "g", [], [])),
)
DTYPES = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")
VALUES = (-1, 0, 1 << 40, float("nan"), float("inf"))


@dataclass(frozen=True)
class Wrong:
    """A node and its inputs, changed as `how` says."""

    how: str
    arrays: tuple[HostArray | None, ...]
    n_outs: int
    attrs: Mapping[str, Any] = field(default_factory=dict)
    extra: tuple[str, ...] = ()


def changed(x: HostArray | list[HostArray]) -> Iterator[tuple[str, Any]]:
    """The array with another element type, another shape, other values; the sequence with other elements."""
    if isinstance(x, dict):
        return
    if isinstance(x, list):
        yield from (("is empty", []), ("has an element more", [*x, np.zeros((2, 2), np.float32)]))
        return
    for dtype in DTYPES:
        if x.dtype != dtype and x.dtype != object:
            with np.errstate(all="ignore"):
                yield f"is {dtype}", x.astype(dtype)
    shapes = {"has an axis more": x[None], "is flat": x.reshape(-1), "is empty": x.reshape(-1)[:0]}
    if x.ndim:
        shapes |= {"has an entry less": x[1:], "is one number": np.asarray(x.reshape(-1)[:1].reshape(x.size and ()))}
    yield from ((how, y) for how, y in shapes.items() if y.shape != x.shape)
    for value in VALUES:
        if x.dtype.kind == "f" or (x.dtype.kind in "iu" and np.iinfo(x.dtype).min <= value < np.iinfo(x.dtype).max):
            with np.errstate(over="ignore"):
                filled = np.full_like(x, value)
            yield f"is {value} everywhere", filled


def wrongs(op: Op, case: Case) -> Iterator[Wrong]:
    right = as_declared(op, case)
    for i, x in enumerate(right.arrays):
        yield replace(right, how=f"{i} inputs", arrays=right.arrays[:i])
        if x is None or (op.name == "Loop" and i == 0):  # fewer bounds or more turns make a loop that does not end
            continue
        yield replace(right, how=f"input {i} left out", arrays=_with(right.arrays, i, None))
        for how, y in changed(x):
            yield replace(right, how=f"input {i} {how}", arrays=_with(right.arrays, i, y))
    for name in op.attrs:
        for value in ATTRIBUTES:
            yield replace(right, how=f"{name} is {str(value)[:20]!r}", attrs={**right.attrs, name: value})
    yield replace(right, how="unknown attribute", attrs={**right.attrs, "colour": 1})
    if right.arrays:
        yield replace(right, how="an input more", extra=("in0",))
    yield replace(right, how="an output more", n_outs=case.n_outs + 1)
    yield replace(right, how="no outputs", n_outs=0)


def as_declared(op: Op, case: Case) -> Wrong:
    """Nothing changed."""
    return Wrong("", inputs_of(op, case), case.n_outs, case.attrs)


def _with(arrays: Sequence[HostArray | None], i: int, x: HostArray | None) -> tuple[HostArray | None, ...]:
    return (*arrays[:i], x, *arrays[i + 1 :])


def model_of(op: Op, case: Case, wrong: Wrong, *, constant: bool) -> tuple[onnx.ModelProto, dict[str, HostArray]]:
    """The model and what to feed: all inputs constant, or those alone that planning needs."""
    given = {f"in{i}": x for i, x in enumerate(wrong.arrays) if x is not None}
    fixed = {
        name
        for name, x in given.items()
        if not isinstance(x, (list, dict)) and (constant or int(name[2:]) in op.values)
    }
    names = [f"in{i}" if x is not None else "" for i, x in enumerate(wrong.arrays)]
    outs = [f"out{i}" for i in range(wrong.n_outs)]
    graph = helper.make_graph(
        [helper.make_node(op.name, [*names, *wrong.extra], outs, domain=op.domain, **attributes(wrong.attrs))],
        "hostile",
        [value_info(k, x) for k, x in given.items() if k not in fixed],
        [helper.make_tensor_value_info(o, 1, None) for o in outs],
        [numpy_helper.from_array(x, k) for k, x in given.items() if k in fixed],
    )
    opsets = [helper.make_opsetid("", opset_of(op, case) if not op.domain else 17)]
    opsets += [helper.make_opsetid(op.domain, opset_of(op, case))] if op.domain else []
    return helper.make_model(graph, opset_imports=opsets), {k: x for k, x in given.items() if k not in fixed}


def complaint(model: onnx.ModelProto, feeds: Mapping[str, HostArray]) -> str:
    """The exception that is no InferaError, with where it came from, or nothing."""
    try:
        with infera_gpu.load(model, device="cpu") as session:
            session.run(feeds)
    except InferaError:
        return ""
    except Exception as error:
        frame = next(f for f in reversed(traceback.extract_tb(error.__traceback__)) if "infera" in f.filename)
        return f"{type(error).__name__}: {str(error)[:80]} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"
    return ""


def size(x: Any) -> int:
    if isinstance(x, dict):
        return len(x)
    return x.size if isinstance(x, TensorSpec) else sum(np.size(y) for y in (x if isinstance(x, list) else [x]))


def small(case: Case) -> bool:
    return all(x is None or size(x) <= LARGEST for x in case.ins)


@pytest.mark.parametrize("op", [*registry()], ids=lambda op: str(op.qualified))
def test_what_is_wrong_with_an_operator_is_an_infera_error(op: Op) -> None:
    found: dict[str, str] = {}
    tried = 0
    for case in [c for c in op.cases if small(c)][:CASES]:
        model, feeds = model_of(op, case, as_declared(op, case), constant=False)
        infera_gpu.load(model, device="cpu").run(feeds)
        for wrong in wrongs(op, case):
            for constant in (False, True):
                tried += 1
                model, feeds = model_of(op, case, wrong, constant=constant)
                text = complaint(model, feeds)
                if text:
                    found.setdefault(text, f"{case.id}: {wrong.how}{', constant' if constant else ''}")
    assert tried, "no case is small enough"
    assert not found, "\n" + "\n".join(f"{how} -> {text}" for text, how in found.items())

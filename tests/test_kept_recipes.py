"""How a plan was bound is kept with it: followed without kernels, and never trusted where it is damaged or changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import infera_gpu
from infera_gpu import plan_cache
from infera_gpu.bind import Binder
from infera_gpu.graph_codec import Reader, Writer, framed, unframed
from infera_gpu.op import Call
from infera_gpu.plan import Plan, Step
from infera_gpu.plan_codec import decoded
from infera_gpu.recipe import Written
from tests.plan_support import bytes_of, feeds, graph_kept, model_file, plans
from tests.plan_support import kept as kept
from tests.plan_support import planned as planned
from tests.random_graphs import draw
from tests.text import parse


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of what kind each step is that is bound."""
    found: list[str] = []
    calls = Binder.calls

    def counted(self: Binder, step: Step) -> list[Call]:
        found.append(step.kind)
        return calls(self, step)

    monkeypatch.setattr(Binder, "calls", counted)
    return found


def ran(path: Path, fed: Mapping[str, Any], **options: Any) -> list[dict[str, Any]]:
    """Results of a session's first runs, of which workers make some calls from the second on."""
    with infera_gpu.load(path, device="cpu", jit=False, **options) as session:
        return [session.run(fed) for _ in range(3)]


def assert_equal(got: Sequence[Mapping[str, Any]], want: Sequence[Mapping[str, Any]]) -> None:
    for one, other in zip(got, want, strict=True):
        assert all(np.array_equal(one[k], v, equal_nan=v.dtype.kind == "f") for k, v in other.items())


LARGE = """
    g (float[N, 64, 40, 40] x) => (float[N, K] y, float[N, 64, 40, 40] s)
    <float[64, 64, 1, 1] one, float[64, 1, 3, 3] each, float[64, 64, 3, 3] all, float[64, 200] m> {
        a = Conv(x, one)
        r = Relu(a)
        d = Conv<pads = [1, 1, 1, 1], group = 64>(r, each)
        c = Conv<pads = [1, 1, 1, 1]>(d, all)
        p = GlobalAveragePool(c)
        flat = Flatten(p)
        y = MatMul(flat, m)
        s = Sigmoid(c)
    }"""
"""What is packed in several ways, multiplied by OpenBLAS' own loops where these are known, and made in parts."""


def large_file(path: Path) -> Path:
    rng = np.random.default_rng(0)
    model = parse(LARGE, opset=13)
    for name, shape in (("one", (64, 64, 1, 1)), ("each", (64, 1, 3, 3)), ("all", (64, 64, 3, 3)), ("m", (64, 200))):
        value = onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 8, name)
        model.graph.initializer.append(value)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("threads", [1, 2])
def test_what_was_bound_before_is_bound_without_kernels(
    kept: Path, tmp_path: Path, planned: list[int], bound: list[str], threads: int
) -> None:
    path = graph_kept(large_file(tmp_path / "m.onnx"), jit=False)
    fed = {"x": np.random.default_rng(1).standard_normal((2, 64, 40, 40)).astype(np.float32)}
    want = ran(path, fed, threads=threads)
    assert bound
    assert len(planned) == len(plans(kept)) == 1
    bound.clear()
    assert_equal(ran(path, fed, threads=threads), want)
    assert (bound, len(planned)) == ([], 1)
    with infera_gpu.load(path, device="cpu", jit=False, threads=threads) as session:
        once = session.run(fed)
        other = session.run({"x": fed["x"][:1]})  # a plan that is made, with weights that were packed by then
        assert all(np.allclose(other[k], v[:1], atol=1e-4) for k, v in once.items())
        assert session.packed_bytes > 0
    assert bound


def test_the_session_that_keeps_a_graph_keeps_its_plans(
    kept: Path, tmp_path: Path, planned: list[int], bound: list[str]
) -> None:
    path = large_file(tmp_path / "m.onnx")
    fed = {"x": np.random.default_rng(1).standard_normal((2, 64, 40, 40)).astype(np.float32)}
    first = ran(path, fed)
    assert plans(kept) == []
    assert_equal(ran(path, fed), first)
    assert len(plans(kept)) == 1
    planned.clear()
    bound.clear()
    assert_equal(ran(path, fed), first)
    assert (planned, bound) == ([], [])


def test_random_graphs_are_bound_as_before(kept: Path, tmp_path: Path, bound: list[str]) -> None:
    told = 0
    for seed in range(60):
        path, example = tmp_path / f"{seed}.onnx", draw(seed)
        path.write_bytes(example.model.SerializeToString())
        graph_kept(path, jit=False)
        before = len(plans(kept))
        want = ran(path, example.feeds[0])
        if len(plans(kept)) == before:
            continue
        bound.clear()
        assert_equal(ran(path, example.feeds[0]), want)
        assert set(bound) <= {"compute"}
        told += 1
    assert told > 15


@pytest.mark.parametrize(("limit", "most"), [("MAX_RECIPE", 0), ("MAX_CALLS", 3), ("RECIPES", 0)])
def test_a_recipe_is_kept_where_it_is_small_and_of_the_first_plans(
    kept: Path, tmp_path: Path, bound: list[str], monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    path = graph_kept(model_file(tmp_path / "m.onnx"), jit=False)
    monkeypatch.setattr(plan_cache, limit, most)
    want = ran(path, feeds())
    bound.clear()
    assert_equal(ran(path, feeds()), want)
    assert bound


def test_what_was_packed_is_kept_once_for_all_plans(
    kept: Path, tmp_path: Path, planned: list[int], bound: list[str]
) -> None:
    path = graph_kept(large_file(tmp_path / "m.onnx"), jit=False)
    rng = np.random.default_rng(1)
    fed = {n: {"x": rng.standard_normal((n, 64, 40, 40)).astype(np.float32)} for n in (1, 2, 5)}
    want = {n: ran(path, fed[n], threads=1) for n in fed}
    (packed,) = kept.glob("*/*.packed")
    assert all(plan.stat().st_size < 1 << 16 for plan in plans(kept))
    planned.clear()
    bound.clear()
    for n in reversed(fed):
        assert_equal(ran(path, fed[n], threads=1), want[n])
    assert (planned, bound) == ([], [])
    for damaged in (b"", packed.read_bytes()[:-1]):  # its plans are bound by their kernels then
        packed.write_bytes(damaged)
        assert_equal(ran(path, fed[1], threads=1), want[1])
        assert planned == []
        assert bound


def test_who_reserves_keeps_the_plan_too(kept: Path, tmp_path: Path, planned: list[int], bound: list[str]) -> None:
    path = graph_kept(model_file(tmp_path / "m.onnx"), jit=False)
    with infera_gpu.load(path, device="cpu", jit=False) as session:
        session.reserve(feeds())
    assert len(plans(kept)) == 1
    planned.clear()
    bound.clear()
    with infera_gpu.load(path, device="cpu", jit=False) as session:
        session.reserve(feeds())
    assert (planned, bound) == ([], [])


def changed(file: Path, change: Callable[[Any], Any]) -> None:
    """What it says is another, with a checksum that is right."""
    data = bytes_of(file.read_bytes())
    arrays: list[np.ndarray[Any, Any]] = []

    def read(reader: Reader, said: Any) -> Any:
        def walk(value: Any) -> None:
            if isinstance(value, list) and len(value) == 3 and isinstance(value[2], list) and value[0] == len(arrays):
                with suppress(Exception):
                    arrays.append(reader.array(*value))
            for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
                walk(one)

        walk(said)
        return said

    said = unframed(data, read)
    file.write_bytes(framed(change(said), arrays))


def spoilt_name(said: Any) -> Any:
    text, *rest = said["recipe"]
    return {**said, "recipe": [text.replace('"copyto"', '"copyxx"'), *rest]}


def spoilt_shapes(said: Any) -> Any:
    """It is bound, and fails when it runs."""
    text, *rest = said["recipe"]
    blocks, dtypes, tuples, views, values, steps = json.loads(text)
    made = json.dumps([blocks, dtypes, tuples, views, values, [[[-1, [0] * 9]]] * len(steps)])
    return {**said, "recipe": [made, *rest]}


def spoilt_steps(said: Any) -> Any:
    return {**said, "recipe": None, "later": "{"}


def spoilt_depth(said: Any) -> Any:
    return {**said, "recipe": ["[" * 100_000, [], []]}


def spoilt_arena(said: Any) -> Any:
    return {**said, "arenas": {"host": 1 << 60}}


@pytest.mark.parametrize("spoil", [spoilt_name, spoilt_shapes, spoilt_steps, spoilt_depth, spoilt_arena])
def test_a_plan_that_somebody_changed_is_made_anew(
    kept: Path, tmp_path: Path, planned: list[int], spoil: Callable[[Any], Any]
) -> None:
    path = graph_kept(model_file(tmp_path / "m.onnx"), jit=False)
    want = ran(path, feeds())
    (file,) = plans(kept)
    whole = file.read_bytes()
    changed(file, spoil)
    assert file.read_bytes() != whole
    planned.clear()
    assert_equal(ran(path, feeds()), want)
    assert len(planned) == 1
    assert file.read_bytes() == whole
    assert_equal(ran(path, feeds()), want)
    assert len(planned) == 1


def test_what_was_packed_is_not_trusted_when_a_recipe_is_not(
    kept: Path, tmp_path: Path, planned: list[int], bound: list[str]
) -> None:
    path = graph_kept(large_file(tmp_path / "m.onnx"), jit=False)
    fed = {"x": np.random.default_rng(1).standard_normal((2, 64, 40, 40)).astype(np.float32)}
    want = ran(path, fed, threads=1)
    (file,), (packed,) = plans(kept), kept.glob("*/*.packed")
    changed(file, spoilt_name)
    wrong = unframed(bytes_of(packed.read_bytes()), lambda reader, said: [[*f[:2], reader.array(*f[2])] for f in said])
    writer = Writer()
    packed.write_bytes(framed([[n, t, writer.array(np.zeros_like(a))] for n, t, a in wrong], writer.arrays))
    planned.clear()
    assert_equal(ran(path, fed, threads=1), want)
    assert len(planned) == 1
    bound.clear()  # both have been kept anew
    assert_equal(ran(path, fed, threads=1), want)
    assert (len(planned), bound) == (1, [])


def test_folded_constants_are_not_kept_twice(kept: Path, tmp_path: Path) -> None:
    nodes = """g (float[N, 64] x) => (float[N, 64] y)
    <float[64, 64] w, int64[1] i = {0}> {
        shape = Shape(x)
        last = Gather(shape, i)
        size = Cast<to = 1>(last)
        scaled = Div(w, size)
        y = MatMul(x, scaled)
    }"""
    model = parse(nodes, opset=13)
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    graph_kept(path, jit=False)
    fed = {"x": np.ones((1, 64), np.float32)}
    want = ran(path, fed, threads=1)
    (file,) = plans(kept)
    assert weights.nbytes < file.stat().st_size < 2 * weights.nbytes
    assert_equal(ran(path, fed, threads=1), want)


def test_a_recipe_depends_on_the_blas(
    kept: Path, tmp_path: Path, planned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = graph_kept(model_file(tmp_path / "m.onnx"), jit=False)
    ran(path, feeds())
    monkeypatch.setattr(plan_cache, "spoken", lambda: "another")
    ran(path, feeds())
    assert len(planned) == 2


@pytest.mark.parametrize(
    "spoilt",
    [{"values": []}, {"views": [[0, 1 << 40, 0, 0, 0]]}, {"blocks": [["constant", "none"]]}, {"tuples": [[-1]] * 99}],
)
def test_a_recipe_that_does_not_suit_is_not_followed(
    kept: Path, tmp_path: Path, planned: list[int], monkeypatch: pytest.MonkeyPatch, spoilt: dict[str, Any]
) -> None:
    path = graph_kept(model_file(tmp_path / "m.onnx"), jit=False)
    want = ran(path, feeds())

    def other(*args: Any) -> Plan:
        plan = decoded(*args)
        assert plan.recipe is not None
        return replace(plan, recipe=Written.of(plan.recipe.recipe()._replace(**spoilt)))

    monkeypatch.setattr("infera_gpu.plan_cache.decoded", other)
    assert_equal(ran(path, feeds()), want)
    assert len(planned) == 2

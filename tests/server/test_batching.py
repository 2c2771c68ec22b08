"""The batch axis is found where there is one, and refused, with the reason, where rows are not independent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import pytest

import infera_gpu
from infera_gpu.errors import OutOfMemoryError, PlanError
from infera_gpu.graph import Graph, Node
from infera_gpu.spec import Dim, TensorSpec
from infera_server.runtime import LocalSession, Session
from infera_server.scheduling.batching import buckets_to, derive
from infera_server.scheduling.independence import branch_values
from infera_server.scheduling.rows import Arrays, HostArray
from tests.server.support import FakePlan, FakeSession, doubler, spec


def session(inputs: TensorSpec, outputs: TensorSpec, fn: Callable[[Any], Any]) -> FakeSession:
    return FakeSession({"x": inputs}, {"y": outputs}, lambda feeds: {"y": fn(feeds["x"])})


@pytest.mark.parametrize(
    ("most", "buckets"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))]
)
def test_buckets(most: int, buckets: tuple[int, ...]) -> None:
    assert buckets_to(most) == buckets


def test_a_shared_symbol_is_the_batch() -> None:
    found = derive(doubler(), 8)
    assert found.layout is not None
    assert found.layout.inputs == {"x": 0}
    assert found.layout.buckets == (1, 2, 4, 8)
    assert found.arena_bytes == {1: 16, 2: 32, 4: 64, 8: 128}
    assert "'N' occurs once" in found.reason


def test_the_symbol_may_be_on_another_axis() -> None:
    found = derive(session(spec(3, "N"), spec("N"), lambda x: x.sum(0)), 4)
    assert found.layout is not None
    assert (found.layout.inputs, found.layout.outputs) == ({"x": 1}, {"y": 0})


def test_open_leading_axes_are_tried_without_symbols() -> None:
    found = derive(session(spec(None, 3), spec("M", 3), np.abs), 4)
    assert found.layout is not None
    assert "first axis" in found.reason


def test_of_two_shared_symbols_the_leading_one_is_tried_first() -> None:
    found = derive(session(spec("B", "S"), spec("B", "S", 2), lambda x: np.stack([x, x], -1)), 4)
    assert found.layout is not None
    assert found.layout.inputs == {"x": 0}
    assert found.sizes == {"S": 8}


def test_a_sequence_that_looks_like_a_batch_is_found_out() -> None:
    """Softmax over the open axis: shapes fit, rows depend on each other."""

    def softmax(x: Any) -> Any:
        e = np.exp(x)
        return e / e.sum(0)

    found = derive(session(spec("S", 3), spec("S", 3), softmax), 4)
    assert found.layout is None
    assert "differs between 5 rows together and one by one" in found.reason


def test_the_second_symbol_serves_where_the_first_mixes_rows() -> None:
    found = derive(session(spec("S", "B"), spec("S", "B"), lambda x: np.cumsum(x, 0)), 4)
    assert found.layout is not None
    assert found.layout.inputs == {"x": 1}


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        (spec(1, 4), spec(1, 4), "input 'x' is float32[1, 4]: its first axis is fixed"),
        (spec("N", 4), spec(4), "output 'y' is float32[4]: its first axis is fixed"),
        (spec("N", 4), spec(), "output 'y' is a scalar"),
    ],
)
def test_reasons(inputs: TensorSpec, outputs: TensorSpec, why: str) -> None:
    found = derive(session(inputs, outputs, lambda x: x), 4)
    assert found.layout is None
    assert why in found.reason


def test_a_wrong_row_count_is_found_out() -> None:
    found = derive(session(spec("N", 4), spec("M", 4), lambda x: np.concatenate([x, x])), 4)
    assert found.layout is None
    assert "output 'y' is [10, 4] for 5 rows" in found.reason


def test_a_failing_probe_is_a_reason() -> None:
    def fail(x: Any) -> Any:
        raise ValueError("needs at least 300 columns")

    found = derive(session(spec("N", "W"), spec("N", "W"), fail), 4)
    assert found.layout is None
    assert "needs at least 300 columns" in found.reason


def test_open_dimensions_grow_until_the_probe_runs() -> None:
    def convolve(x: Any) -> Any:
        if x.shape[1] < 30:
            raise ValueError("too small")
        return x * 2

    found = derive(session(spec("N", "W"), spec("N", "W"), convolve), 4)
    assert found.sizes == {"W": 32}
    assert found.layout is not None


def test_integers_are_probed_as_small_indices() -> None:
    """Without a table in the graph that says how many there are, 0 and 1 are tried last."""
    table = np.random.default_rng(0).random((2, 5)).astype(np.float32)
    found = derive(session(spec("N", "S", dtype=np.int64), spec("N", "S", 5), lambda x: table[x]), 4)
    assert found.layout is not None


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.bool_, object])
def test_every_kind_of_data_is_probed(dtype: Any) -> None:
    found = derive(session(spec("N", 2, dtype=dtype), spec("N", 2, dtype=dtype), lambda x: x.copy()), 4)
    assert found.layout is not None


def test_max_batch_1_needs_no_probe() -> None:
    model = doubler()
    assert derive(model, 1).layout is None
    assert model.batches == []


def test_buckets_end_where_memory_does() -> None:
    class Small(FakeSession):
        def plan_for(self, shapes: Mapping[str, tuple[int, ...]]) -> FakePlan:
            if shapes["x"][0] > 4:
                raise OutOfMemoryError("the plan", needed=100, available=60)
            return FakePlan(1)

    def fn(feeds: Arrays) -> Arrays:
        return {"y": feeds["x"]}

    found = derive(Small({"x": spec("N", 2)}, {"y": spec("N", 2)}, fn), 64)
    assert found.layout is not None
    assert found.layout.buckets == (1, 2, 4)
    assert "no more than 4 rows, because the plan needs 100 bytes" in found.reason


# --- models of the runtime: what their graphs say ------------------------------------------------------------------


def load(text: str, constants: Mapping[str, HostArray] | None = None) -> Session:
    """A model in ONNX's text syntax with `constants` as initialisers."""
    graph = onnx.parser.parse_graph(text)
    for name, array in (constants or {}).items():
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return LocalSession(infera_gpu.load(model, device="cpu"))


RNG = np.random.default_rng(0)
TABLE = (RNG.standard_normal((50, 4)) * np.geomspace(0.1, 10, 50)[:, None]).astype(np.float32)
WEIGHTS = RNG.integers(0, 255, (4, 3)).astype(np.uint8)

EMBEDDED = """g (int64[N, S] ids) => (int32[N, S, 3] y) {
    e = Gather(table, ids)  q, s, z = DynamicQuantizeLinear(e)  y = MatMulInteger(q, w, z) }"""


def test_a_scale_over_all_rows_is_read_off_the_graph() -> None:
    """Rows 0 and 1 of the table have one range, so that ids of 0 and 1 show no dependence."""
    found = derive(load(EMBEDDED, {"table": TABLE, "w": WEIGHTS}), 8)
    assert found.layout is None
    assert "DynamicQuantizeLinear" in found.reason
    assert "takes one scale from all rows" in found.reason


def test_a_scale_of_constants_mixes_no_rows() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { q, s, z = DynamicQuantizeLinear(c)  y = Mul(x, s) }"
    found = derive(load(text, {"c": TABLE}), 8)
    assert found.layout is not None


@pytest.mark.parametrize("condition", ["m = ReduceMax(x)", "m = ReduceMax(x)  unused = Shape(x)"])
def test_a_branch_that_the_values_choose_mixes_rows(condition: str) -> None:
    branch = "{0} () => (float[N, 2] {0}_y) {{ {0}_y = {1}(x) }}"
    text = f"""g (float[N, 2] x) => (float[N, 2] y) {{
        {condition}  high = Greater(m, most)  flag = Squeeze(high)
        y = If(flag) <then_branch = {branch.format("a", "Neg")}, else_branch = {branch.format("b", "Identity")}> }}"""
    found = derive(load(text, {"most": np.array([[1000.0]], np.float32)}), 8)
    assert found.layout is None
    assert "takes one branch for all rows" in found.reason


def test_ids_are_probed_up_to_the_size_of_their_table() -> None:
    """Only ids from 2 on let one row see another here."""
    text = """g (int64[N, S] ids) => (float[N, S, 4] y) {
        same = Cast<to = 7>(ids)  e = Gather(table, same)  top = ReduceMax<keepdims = 1, axes = [0, 1]>(e)
        y = Max(e, top) }"""
    table = np.maximum(TABLE, 0.0)
    table[:2] = 0
    found = derive(load(text, {"table": table}), 8)
    assert found.layout is None
    assert "differs between 5 rows together" in found.reason


def test_small_rows_show_what_large_rows_hide() -> None:
    """Each row is rounded to a step that the largest of all rows sets, as the smallest of them notice."""
    found = derive(session(spec("N", 4), spec("N", 4), lambda x: np.round(x / (s := abs(x).max() / 2000)) * s), 8)
    assert found.layout is None


def test_results_that_are_nowhere_finite_prove_nothing() -> None:
    found = derive(session(spec("N", 4), spec("N", 4), lambda x: x * np.nan), 8)
    assert found.layout is None
    assert "nowhere finite" in found.reason


def test_an_arena_is_shown_at_an_example_shape_without_a_batch() -> None:
    found = derive(session(spec("N", "M"), spec("K"), lambda x: x.ravel()), 1)
    assert (found.arena_bytes, found.sizes) == ({1: 4}, {"N": 1, "M": 1})


class Unplannable(FakeSession):
    def plan_for(self, shapes: Mapping[str, tuple[int, ...]]) -> FakePlan:
        raise PlanError("Concat 'y': strings are not computed" + f" at {shapes}" * self.closed)


@pytest.mark.parametrize("shape", [("N", 4), (2, 4)])
def test_what_can_never_be_planned_is_raised(shape: tuple[Dim, ...]) -> None:
    with pytest.raises(PlanError, match="strings are not computed"):
        derive(Unplannable({"x": spec(*shape)}, {"y": spec(*shape)}, lambda feeds: {"y": feeds["x"]}), 8)


def test_what_other_sizes_might_make_plannable_is_served() -> None:
    model = Unplannable({"x": spec("N", 4)}, {"y": spec(4)}, lambda feeds: {"y": feeds["x"][0]})
    model.closed = True  # so that the refusals name the sizes
    found = derive(model, 8)
    assert found.arena_bytes == {}
    assert found.refusal == "Concat 'y': strings are not computed at {'x': (1, 4)}"


# --- inputs without a batch axis -------------------------------------------------------------------------------------


def recurrence(fn: Callable[[Arrays], Arrays], nodes: tuple[Node, ...] = (), **scalar: Any) -> FakeSession:
    """x [?, 3], state [2, ?, 3] and a scalar, as exporters without symbols declare them."""
    return FakeSession(
        {"x": spec(None, 3), "state": spec(2, None, 3), "k": spec(**scalar)},
        {"y": spec(None, 3), "next": spec(None, None, 3)},
        fn,
        nodes=nodes,
    )


def scaled(feeds: Arrays) -> Arrays:
    return {"y": feeds["x"] * feeds["k"], "next": feeds["state"] + feeds["x"][None]}


def test_a_scalar_is_shared_and_axes_of_outputs_are_seen() -> None:
    layout = derive(recurrence(scaled), 4).layout
    assert layout is not None
    assert (layout.inputs, layout.shared) == ({"x": 0, "state": 1}, ("k",))
    assert layout.outputs == {"y": 0, "next": 1}


def branching(feeds: Arrays) -> Arrays:
    """Rows depend on each other where k is 7."""
    if feeds["k"] == 7:
        return {"y": np.cumsum(feeds["x"], 0), "next": feeds["state"]}
    return scaled(feeds)


def branches(op: str) -> tuple[Node, ...]:
    """What such a model's graph says of k."""
    compare = Node(op, ("k", "seven"), ("is_seven",))
    then = Graph((), {}, {})
    return compare, Node("If", ("is_seven",), ("y", "next"), {"then_branch": then, "else_branch": then})


@pytest.mark.parametrize(
    ("op", "why"), [("Equal", "differs between 5 rows together and one by one"), ("Mod", "'k' has no batch axis and")]
)
def test_every_branch_that_a_scalar_chooses_is_proven(op: str, why: str) -> None:
    model = recurrence(branching, branches(op), dtype=np.int64)
    model.constants["seven"] = np.array(7)
    found = derive(model, 4)
    assert found.layout is None
    assert why in found.reason
    model.fn = scaled
    assert (derive(model, 4).layout is None) == (op == "Mod")


@pytest.mark.parametrize(
    ("dtype", "points", "tried"),
    [
        (np.int64, (7,), [6, 7, 8]),
        (np.uint8, (0,), [0, 1]),
        (np.float32, (0.25, 0.5), [-0.75, 0.25, 0.375, 0.5, 1.5]),
    ],
)
def test_values_around_and_between_the_constants_are_tried(dtype: Any, points: Any, tried: list[float]) -> None:
    constants = {f"c{i}": np.array(point, dtype) for i, point in enumerate(points)}
    nodes = [Node("Identity", ("k",), ("same",))]
    nodes += [Node("Less", (name, "same"), (f"is_{name}",)) for name in constants]
    nodes += [Node("If", (f"is_{name}",), (f"y_{name}",)) for name in constants]
    k = spec(dtype=dtype)
    found = branch_values(Graph(tuple(nodes), {"k": k}, {}, constants), "k", k)
    assert found is not None
    assert [array.item() for array in found] == tried


def test_a_bool_has_both_values_and_a_scalar_that_decides_nothing_any() -> None:
    for dtype, tried in ((np.bool_, [False, True]), (np.int64, [])):
        k = spec(dtype=dtype)
        graph = Graph((Node("Mul", ("k", "x"), ("y",)),), {"k": k}, {})
        found = branch_values(graph, "k", k)
        assert found is not None
        assert [array.item() for array in found] == tried

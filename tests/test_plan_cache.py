"""Plans on disk: as they were made, found by what they depend on, and never in the way of a run."""

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
from infera_gpu.errors import PlanError
from infera_gpu.graph import Graph
from infera_gpu.graph_codec import Damaged, Reader, Unencodable, Writer, framed, unframed
from infera_gpu.lower import lower
from infera_gpu.op import Call
from infera_gpu.ops import registry
from infera_gpu.plan import Plan, Step
from infera_gpu.plan_codec import decoded, encoded
from infera_gpu.recipe import Written
from infera_gpu.session import Session
from infera_kernels.cpu import caches
from infera_kernels.cpu.aligned import aligned
from tests.random_graphs import draw
from tests.text import parse

NODES = """
    g (float[N, 3, 9, W] x, float[N, 4, 9, W] z) => (float[M, K] y, float[N, 4, 9, W] again)
    <float[4, 3, 3, 3] w = {WEIGHTS}, float[4] b = {0.1, 0.2, 0.3, 0.4}, int64[2] to = {1, -1}> {
        c = Conv<pads = [1, 1, 1, 1]>(x, w, b)
        r = Relu(c)
        joined = Concat<axis = 1>(r, z)
        mean = ReduceMean<axes = [2], keepdims = 0>(joined)
        shape = Shape(x)
        last = Slice<starts = [3], ends = [4]>(shape)
        size = Cast<to = 1>(last)
        y0 = Reshape(mean, to)
        y = Div(y0, size)
        again = Tanh(r)
    }"""
"""A convolution whose output is written where a Concat would copy it, and a size that is known when it is planned."""


def model_file(path: Path, nodes: str = NODES) -> Path:
    weights = ", ".join(f"{v:.3f}" for v in np.sin(np.arange(108)))
    model = parse(nodes.replace("WEIGHTS", weights), opset=9)
    path.write_bytes(model.SerializeToString())
    return path


def feeds(count: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal((count, n, 9, 11)).astype(np.float32) for k, n in (("x", 3), ("z", 4))}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of entries, which are kept during the test."""
    monkeypatch.setenv("INFERA_GRAPH_CACHE", "1")
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever a segment is planned."""
    found: list[int] = []

    def counted(*args: Any) -> Plan:
        found.append(len(args[0].nodes))
        return lower(*args)

    monkeypatch.setattr("infera_gpu.stages.lower", counted)
    return found


def plans(kept: Path) -> list[Path]:
    return sorted(kept.glob("*/*.plan"))


def graph_kept(path: Path, **options: Any) -> Path:
    """The model, whose graph is kept from now on."""
    for _ in range(2):
        infera_gpu.load(path, device="cpu", **options).close()
    return path


def bytes_of(content: bytes) -> np.ndarray[Any, Any]:
    data: np.ndarray[Any, Any] = aligned((len(content),), np.uint8)
    data[:] = np.frombuffer(content, np.uint8)
    return data


def facts(plan: Plan) -> list[Any]:
    """What a plan is, but for the objects of its segment."""
    sites = [p.site for p in plan.segment.nodes]
    return [
        str(plan),
        *(getattr(plan, k) for k in ("inputs", "outputs", "arenas", "lower_bounds", "direct")),
        *(tuple(getattr(plan, k)) for k in ("packed", "placed")),
        [
            (p.op.qualified, s.node, s.attrs, s.ins, s.outs, s.opset)
            for p, s in zip(plan.segment.nodes, sites, strict=True)
        ],
        [[None if v is None else v.tobytes() for v in s.values] for s in sites],
        {k: (a.dtype, a.shape, a.tobytes()) for k, a in plan.constants.items()},
        (plan.segment.inputs, plan.segment.outputs, plan.segment.is_last, plan.saved, plan.bordered),
    ]


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    with infera_gpu.load(model_file(tmp_path / "m.onnx"), device="cpu") as session:
        plan = session.plan_for(feeds())
        made = decoded(bytes_of(encoded(plan, session.graph)), session.graph, registry())
        assert facts(made) == facts(plan)
        graph = session.graph.constants
        assert [k for k, a in plan.constants.items() if graph.get(k) is a] == [
            k for k, a in made.constants.items() if graph.get(k) is a
        ]


def test_whatever_is_damaged_is_said_to_be(tmp_path: Path) -> None:
    with infera_gpu.load(model_file(tmp_path / "m.onnx"), device="cpu") as session:
        content = encoded(session.plan_for(feeds()), session.graph)
        for at in range(0, len(content), 97):
            changed = bytearray(content)
            changed[at] ^= 1
            with pytest.raises(Damaged):
                decoded(bytes_of(bytes(changed)), session.graph, registry())
        with pytest.raises(Damaged):  # of another graph
            decoded(bytes_of(content), Graph((), {}, {}), registry())


def test_what_was_planned_before_is_not_planned_again(kept: Path, tmp_path: Path, planned: list[int]) -> None:
    path = graph_kept(model_file(tmp_path / "m.onnx"))
    assert plans(kept) == []
    with infera_gpu.load(path, device="cpu") as session:
        first, plan = session.run(feeds()), session.plan_for(feeds())
    assert len(planned) == len(plans(kept)) == 1
    with infera_gpu.load(path, device="cpu") as session:
        again = session.run(feeds())
        assert facts(session.plan_for(feeds())) == facts(plan)
        assert all(np.array_equal(again[k], first[k]) for k in first)
        assert len(planned) == 1
        session.run(feeds(3))
    assert len(planned) == len(plans(kept)) == 2


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


def test_what_planning_computed_is_kept_where_it_is_small(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = graph_kept(model_file(tmp_path / "m.onnx"))
    for most, count in ((0, 0), (64, 1)):
        monkeypatch.setattr(plan_cache, "MAX_FOLDED", most)
        with infera_gpu.load(path, device="cpu") as session:
            session.run(feeds())
        assert len(plans(kept)) == count


def test_a_plan_depends_on_the_device_on_its_caches_and_on_sources(
    kept: Path, tmp_path: Path, planned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = graph_kept(model_file(tmp_path / "m.onnx"))

    def run(**options: Any) -> None:
        with infera_gpu.load(path, device="cpu", **options) as session:
            session.run(feeds())

    for count in (1, 2, 3, 1, 2):
        run(threads=count)
    assert len(planned) == len(plans(kept)) == 3
    monkeypatch.setattr(caches, "_times", lambda: 3)
    run(threads=1)
    assert len(planned) == len(plans(kept)) == 4
    monkeypatch.setattr(plan_cache, "_sources", lambda: "others")
    run(threads=1)
    assert len(planned) == len(plans(kept)) == 5
    monkeypatch.setattr(plan_cache, "_sources", lambda: None)
    run(threads=1)
    assert (len(planned), len(plans(kept))) == (6, 5)


def test_a_session_keeps_no_more_than_its_share(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "PLANS", 2)
    with infera_gpu.load(graph_kept(model_file(tmp_path / "m.onnx")), device="cpu") as session:
        for count in range(1, 5):
            session.run(feeds(count))
    assert len(plans(kept)) == 2


def test_what_is_damaged_or_cannot_be_written_is_in_nobodys_way(kept: Path, tmp_path: Path, planned: list[int]) -> None:
    path = graph_kept(model_file(tmp_path / "m.onnx"))
    with infera_gpu.load(path, device="cpu") as session:
        wanted = session.run(feeds())
    (file,) = plans(kept)
    whole = file.read_bytes()
    for content in (b"", whole[:-1], whole[:40] + b"\0" + whole[41:]):
        file.write_bytes(content)
        with infera_gpu.load(path, device="cpu") as session:
            assert all(np.array_equal(v, wanted[k]) for k, v in session.run(feeds()).items())
        assert file.read_bytes() == whole
    assert len(planned) == 4
    file.unlink()
    file.mkdir()  # neither to be read nor to be written
    with infera_gpu.load(path, device="cpu") as session:
        session.run(feeds())
    assert len(planned) == 5


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


def run(session: Session) -> dict[str, Any]:
    return session.run(feeds())


def reserve(session: Session) -> dict[str, Any]:
    session.reserve(feeds())
    return session.run(feeds())


@pytest.mark.parametrize("use", [run, reserve])
def test_a_plan_that_cannot_be_bound_is_made_anew(
    kept: Path,
    tmp_path: Path,
    planned: list[int],
    monkeypatch: pytest.MonkeyPatch,
    use: Callable[[Session], dict[str, Any]],
) -> None:
    """One from another machine, say, whose kernels took less scratch. What is made in its place is kept."""
    path = graph_kept(model_file(tmp_path / "m.onnx"))
    with infera_gpu.load(path, device="cpu") as session:
        wanted = session.run(feeds())
        assert any(step.workspace for step in session.plan_for(feeds()).steps)

    (file,) = plans(kept)
    whole, written = file.read_bytes(), file.stat().st_mtime_ns

    def poorer(*args: Any) -> Plan:
        plan = decoded(*args)
        return replace(plan, recipe=None, packed=tuple((*fields[:7], None, *fields[8:]) for fields in plan.packed))

    monkeypatch.setattr("infera_gpu.plan_cache.decoded", poorer)
    with infera_gpu.load(path, device="cpu") as session:
        assert all(np.array_equal(v, wanted[k]) for k, v in use(session).items())
        assert len(planned) == 2
        assert all(np.array_equal(v, wanted[k]) for k, v in session.run(feeds()).items())
        session.run(feeds(5))  # planned too: nothing is taken any more
        assert len(planned) == 3
    assert file.read_bytes() == whole
    assert file.stat().st_mtime_ns > written


def test_a_plan_that_is_wrong_for_another_reason_is_an_error(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = graph_kept(model_file(tmp_path / "m.onnx"))
    with infera_gpu.load(path, device="cpu") as session:
        monkeypatch.setattr("infera_gpu.lease.bind", lambda *args: (_ for _ in ()).throw(PlanError("no")))
        with pytest.raises(PlanError, match="no"):
            session.run(feeds())


def test_plans_of_several_segments_are_not_kept(kept: Path, tmp_path: Path) -> None:
    nodes = """g (float[N] x) => (float[M] y) {
        found = NonZero(x)
        flat = Squeeze<axes = [0]>(found)
        some = Gather(x, flat)
        y = Exp(some)
    }"""
    path = graph_kept(model_file(tmp_path / "m.onnx", nodes))
    for _ in range(2):
        with infera_gpu.load(path, device="cpu") as session:
            x = np.array([0, 1, 2, 0], np.float32)
            assert np.allclose(session.run({"x": x})["y"], np.exp(x[1:3]))
            with pytest.raises(Unencodable):
                encoded(session.plan_for({"x": x}), session.graph)
    assert plans(kept) == []


def test_plans_for_gpus_are_not_kept(kept: Path, tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.onnx")
    for _ in range(3):
        with infera_gpu.load(path, device="recording") as session:
            plan = session.plan_for(feeds())
            with pytest.raises(Unencodable):
                encoded(plan, session.graph)
    assert plans(kept) == []

"""Plans on disk: as they were made, found by what they depend on, and never in the way of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import infera_gpu
from infera_gpu import plan_cache
from infera_gpu.errors import PlanError
from infera_gpu.graph import Graph
from infera_gpu.graph_codec import Damaged, Unencodable
from infera_gpu.ops import registry
from infera_gpu.plan import Plan
from infera_gpu.plan_codec import decoded, encoded
from infera_gpu.session import Session
from infera_kernels.cpu import caches
from tests.plan_support import bytes_of, feeds, graph_kept, model_file, plans
from tests.plan_support import kept as kept
from tests.plan_support import planned as planned


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

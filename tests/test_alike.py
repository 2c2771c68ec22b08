"""What planning found out about a node holds for those that are like it: plans are those that it would make without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import infera_gpu
from bench.inputs import EXAMPLES
from bench.models import path_of
from bench.shapes import STREAMS
from infera_gpu import alike, measure, site
from infera_gpu.alike import SMALL_FLOATS, AlikeNodes
from infera_gpu.errors import UnreachableError
from infera_gpu.graph import HostArray
from infera_gpu.op import Kernel, Op, Site
from infera_gpu.plan import Plan
from infera_kernels.launch import nominal_target
from infera_kernels.tuning import Family, Problem, Tuned
from tests.cases import covered
from tests.random_graphs import draw
from tests.text import parse

Feeds = Mapping[str, HostArray]

LARGE = 150
"""Nodes of a graph, elements of a constant."""

LAYERS = """
    g (float[N, L, 24] x, int64[2] to) => (float[N, L, 24] y, float[A, B] z)
    <float[24, 24] w0 = {W0}, float[24, 24] w1 = {W1}, float[24] b0 = {B0}, float[24] b1 = {B1}, float[1] two = {2}> {
        m0 = MatMul(x, w0)
        a0 = Add(m0, b0)
        r0 = Relu(a0)
        s0 = Shape(r0)
        f0 = Reshape(r0, s0)
        p0 = Pow(f0, two)
        m1 = MatMul(p0, w1)
        a1 = Add(m1, b1)
        r1 = Relu(a1)
        s1 = Shape(r1)
        f1 = Reshape(r1, s1)
        p1 = Pow(f1, two)
        t1 = Transpose<perm = [0, 2, 1]>(p1)
        y = Transpose<perm = [0, 2, 1]>(t1)
        z = Reshape(p1, to)
    }"""
"""Two layers that differ in their weights alone, and a shape that a run tells."""


def said(plan: Plan) -> tuple[object, ...]:
    """All that a plan says, but for which objects it shares with others."""
    segment = plan.segment
    return (
        str(plan),
        plan.packed,
        plan.placed,
        plan.inputs,
        plan.carried,
        plan.outputs,
        plan.arenas,
        plan.lower_bounds,
        plan.saved,
        plan.direct,
        plan.bordered,
        plan.graphs,
        {k: (a.shape, a.dtype, a.tobytes() if a.size < LARGE else b"") for k, a in plan.constants.items()},
        [
            (p.op.qualified, p.node.outputs, repr(p.site.attrs), p.site.ins, p.site.outs, p.site.opset)
            for p in segment.nodes
        ],
        [[a is not None for a in p.site.values] for p in segment.nodes],
        (
            segment.inputs,
            segment.outputs,
            segment.waits,
            list(map(str, segment.rest)),
            [str(e.node) for e in segment.eager],
        ),
    )


def plans(model: Any, requests: Sequence[Feeds], *, device: str = "cpu", fuse: bool = True) -> list[object]:
    """What one session plans for each of the requests, in their order: of large models what a run begins with."""
    with infera_gpu.load(model, device=device, fuse=fuse) as session:
        if len(session.graph.nodes) > LARGE:
            return [said(session.plan_for(feeds)) for feeds in requests]
        return [said(plan) for feeds in requests for plan in session.plans(feeds)]


def assert_plans_are_the_same(
    monkeypatch: pytest.MonkeyPatch, model: Any, requests: Sequence[Feeds], **options: Any
) -> None:
    """As without any memory."""
    found = plans(model, requests, **options)
    with monkeypatch.context() as patch:
        patch.setattr(AlikeNodes, "add", lambda self, key, alike: None)
        patch.setattr(Site, "told", lambda self, key, ask: ask(self))
        expected = plans(model, requests, **options)
    for got, want in zip(found, expected, strict=True):
        assert got == want


@pytest.mark.parametrize("device", ["cpu", "recording"])
def test_random_graphs_are_planned_as_without_memory(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    for seed in range(100):
        example = draw(seed)
        assert_plans_are_the_same(monkeypatch, example.model, [*example.feeds, *example.feeds], device=device)


def layers() -> Any:
    rng = np.random.default_rng(0)
    text = LAYERS
    for name, count in (("W0", 576), ("W1", 576), ("B0", 24), ("B1", 24)):
        text = text.replace(f"{{{name}}}", "{" + ", ".join(f"{v:.3f}" for v in rng.standard_normal(count)) + "}")
    return parse(text)


def request(n: int, length: int) -> Feeds:
    x = np.random.default_rng(n).standard_normal((n, length, 24)).astype(np.float32)
    return {"x": x, "to": np.array([length, -1], np.int64)}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("device", ["cpu", "recording"])
def test_layers_are_planned_as_without_memory(monkeypatch: pytest.MonkeyPatch, device: str, fuse: bool) -> None:
    requests = [request(n, length) for n, length in ((1, 5), (1, 6), (2, 5), (1, 48), (3, 16), (48, 1), (1, 0), (1, 7))]
    assert_plans_are_the_same(monkeypatch, layers(), requests, device=device, fuse=fuse)


@pytest.mark.models
@pytest.mark.parametrize("name", ["silero-vad", "yunet", *(pytest.param(n, marks=pytest.mark.large) for n in STREAMS)])
def test_models_are_planned_as_without_memory(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    try:
        path = path_of(name)
    except UnreachableError as error:
        pytest.skip(f"{name} is out of reach: {error}")
    examples = [e.feeds() for e in EXAMPLES.get(name, ())]
    assert_plans_are_the_same(monkeypatch, path, STREAMS[name].requests(12) if name in STREAMS else examples)


def test_zeros_of_attributes_are_told_apart_by_their_signs() -> None:
    text = """
        g (float[N] x) => (float[1, 1] p, float[1, 1] q) <int64[1] first = {0}, float one = {1}> {
            s = Shape(x)
            f = Cast<to = 1>(s)
            m = Unsqueeze(f, first)
            zero = Gemm<alpha = 0.0>(m, m)
            below = Gemm<alpha = -0.0>(m, m)
            p = Div(one, zero)
            q = Div(one, below)
        }"""
    with infera_gpu.load(parse(text), device="cpu", fuse=False) as session:
        made = session.run({"x": np.zeros(3, np.float32)})
    assert (made["p"].item(), made["q"].item()) == (np.inf, -np.inf)


# ---- what is alike


def test_one_of_alike_nodes_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    scratch_bytes = measure._scratch_bytes

    def counting(*args: Any) -> tuple[int, int]:
        measured.append(args[3].node.op)
        return scratch_bytes(*args)

    monkeypatch.setattr(measure, "_scratch_bytes", counting)
    with infera_gpu.load(layers(), device="cpu", jit=False) as session:
        session.plan_for(request(2, 5))
        first = list(measured)
        assert len(first) == len(set(first)) > 1
        session.plan_for(request(2, 6))
        assert measured == [*first, *first]
        session.run({**request(2, 5), "to": np.array([5, 48], np.int64)})
        assert len(measured) <= 2 * len(first) + 1


def test_forgetting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request(n, length) for n, length in ((1, 5), (1, 6), (2, 5), (1, 5), (3, 16))]
    expected = plans(layers(), requests, device="cpu")
    for kept in (1, 3, 5):
        monkeypatch.setattr(alike, "KEPT", kept)
        monkeypatch.setattr(site, "TOLD", 1)
        assert plans(layers(), requests, device="cpu") == expected


def test_a_closed_session_remembers_nothing() -> None:
    with infera_gpu.load(layers(), device="cpu") as session:
        session.run(request(2, 5))
        known = session._stages._alike
        assert known._met
        assert known._numbered
    assert not known._met
    assert not known._numbered
    assert not known._sorts


def filled(given: Site, filling: float) -> Site | None:
    """The site with other elements in its large floating-point constants; None where there are none."""
    large = [v is not None and v.dtype.kind == "f" and v.size > SMALL_FLOATS for v in given.values]
    values = tuple(
        np.full_like(v, filling) if yes and v is not None else v for v, yes in zip(given.values, large, strict=True)
    )
    return replace(given, values=values) if any(large) else None


def answers(op: Op, kernel: Kernel, given: Site) -> tuple[object, ...]:
    """What planning asks of a node, but for the scratch that its kernel wants."""
    expanded = op.expand is not None and op.expand(given) is not None
    found: tuple[object, ...] = (tuple(op.infer(given)), expanded, kernel.supports(given))
    if kernel.supports(given):
        asked = (kernel.pays, kernel.border, kernel.rows_out, kernel.slices_out, kernel.strided_in)
        found += tuple(ask and ask(given) for ask in asked)
    return found


NEEDED = {"jit": "numba", "triton": "triton"}
"""What kernels of a kind are made of."""


@pytest.mark.parametrize("kind", ["cpu", "jit", pytest.param("triton", marks=pytest.mark.kernels), "cupy"])
def test_answers_do_not_depend_on_what_large_constants_hold(kind: str) -> None:
    """What Kernel promises of floating-point constants, and planning relies on."""
    if kind in NEEDED:
        pytest.importorskip(NEEDED[kind])
    compared = 0
    for op, case, variants in covered(kind):
        for given, _ in variants:
            for filling in (0.0, 1.0, -1000.0):
                changed = filled(given, filling)
                if changed is not None and all(
                    given.values[i] is changed.values[i] for i in op.values if i < len(given.values)
                ):
                    kernel = op.kernels[kind]
                    with np.errstate(all="ignore"):
                        got, want = answers(op, kernel, changed), answers(op, kernel, given)
                    assert got == want, f"{op.name} {case.id}"
                    compared += 1
    assert compared or kind == "cupy"


class Unread(Tuned):
    """Measurements that nobody may look at."""

    def value(self, family: Family[Any], problem: Problem) -> tuple[int, ...] | None:
        raise AssertionError(f"{family.name} is looked up")


@pytest.mark.kernels
def test_answers_do_not_depend_on_what_was_measured() -> None:
    """Sessions whose constants are overridden, and subgraphs, keep what they were told when another has tuned."""
    pytest.importorskip("triton")
    unread, sized = Unread(nominal_target(90)), 0
    for op, _, variants in covered("triton", 40):
        for given, _ in variants:
            tuned = replace(given, tuned=unread)
            answers(op, op.kernels["triton"], tuned)
            try:
                op.kernels["triton"].workspace(tuned)  # type: ignore[misc]
            except AssertionError:
                sized += 1
    assert sized

"""What whole models become on a GPU: plans of the recording device, which are the CUDA device's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import infera_gpu
from bench.inputs import EXAMPLES
from bench.models import BUILT, path_of
from infera_gpu.dry import least_bytes, missing
from infera_gpu.errors import UnreachableError
from infera_gpu.layout import Operand
from infera_gpu.passes import Precision
from infera_gpu.plan import Plan, Step
from infera_gpu.reuse import overlap
from infera_gpu.slots import same_place
from infera_gpu.verify import TOLERANCES, compare

pytestmark = pytest.mark.kernels

SENSITIVE = {"u2netp": 2e-4}
"""Tolerances of models that end in a small difference of large numbers: see tests/test_models.py."""
ARENA = 1.05
"""How far above the most bytes alive at once an arena may be."""


@dataclass(frozen=True)
class Planned:
    """A model's session on the recording device, and its plans: one a segment, of every example."""

    name: str
    session: infera_gpu.Session
    plans: tuple[Plan, ...]


MODELS = [pytest.param(name, marks=[] if name in BUILT else pytest.mark.models) for name in EXAMPLES]


def _path(name: str) -> Path:
    try:
        return path_of(name)
    except UnreachableError as error:
        pytest.skip(f"{name} is out of reach: {error}")


@pytest.fixture(scope="module", params=MODELS)
def planned(request: pytest.FixtureRequest) -> Iterator[Planned]:
    name: str = request.param
    with infera_gpu.load(_path(name), device="recording") as session:
        plans = [plan for example in EXAMPLES[name] for plan in session.plans(example.feeds())]
        yield Planned(name, session, tuple(plans))


def test_every_step_is_a_kernel_on_the_gpu(planned: Planned) -> None:
    for plan in planned.plans:
        assert not plan.transfers
        assert [s.label for s in plan.steps if s.space == "host"] == []
        assert [s.label for s in plan.steps if s.kind == "compute"] == [], "it runs as CuPy's functions"


def test_what_can_be_captured_is(planned: Planned) -> None:
    for plan in planned.plans:
        assert plan.graphs is not None
        held = {i for span in plan.graphs for i in span}
        alone = [
            i
            for i, step in enumerate(plan.steps)
            if i not in held and not step.uncapturable and _has_neighbour(plan, i)
        ]
        assert alone == []
        assert not any(plan.steps[i].uncapturable for i in held)


def _has_neighbour(plan: Plan, i: int) -> bool:
    """Whether a graph with this step would hold two or more."""
    return any(not plan.steps[j].uncapturable for j in (i - 1, i + 1) if 0 <= j < len(plan.steps))


def test_arenas_are_near_the_lower_bound(planned: Planned) -> None:
    for plan in planned.plans:
        assert plan.arena_bytes <= ARENA * plan.lower_bound


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("name", [m for m in MODELS if m.values != ("vgg19",)])
def test_arenas_of_other_precisions_are_near_the_lower_bound(name: str, precision: Precision) -> None:
    """Of the first segment, which is planned without a run. vgg19 is a chain, and takes long to read."""
    with infera_gpu.load(_path(name), device="recording", precision=precision) as session:
        for example in EXAMPLES[name]:
            plan = session.plan_for(example.feeds())
            assert plan.arena_bytes <= ARENA * plan.lower_bound
            weights = missing(session.device, session._constants, plan) + session._constants.nbytes
            assert not plan.segment.is_last or least_bytes(session.graph) <= weights


def test_no_step_writes_what_it_reads(planned: Planned) -> None:
    """But for the input that a kernel says it may overwrite, which lies exactly where its first output goes."""
    for step in (step for plan in planned.plans for step in plan.steps):
        written = [*step.outs, *([step.workspace] if step.workspace else [])]
        read = [x for x in step.ins if x is not None and not x.constant]
        over = [x for x in read if _share(x, written[0])]
        assert len(over) <= 1, step
        assert all(_may_overwrite(step, x) for x in over), step
        assert not any(_share(x, y) for y in written[1:] for x in read), step
        assert not any(_share(x, y) for i, y in enumerate(written) for x in written[:i]), step


def _share(a: Operand, b: Operand) -> bool:
    (low, high), (other_low, other_high) = a.bounds(), b.bounds()
    return a.space == b.space and low < other_high and other_low < high and overlap(a, b)


def _may_overwrite(step: Step, x: Operand) -> bool:
    inplace = () if step.kernel is None else step.kernel.inplace
    return step.ins.index(x) in inplace and same_place(x._replace(root=step.outs[0].root), step.outs[0])


def test_answers_are_the_cpus(planned: Planned) -> None:
    """The operators' own functions stand for the kernels: what is tested is the plan, and every rewrite behind it."""
    feeds = EXAMPLES[planned.name][0].feeds()
    got = planned.session.run(feeds)
    with infera_gpu.load(path_of(planned.name), device="cpu") as cpu:
        want = cpu.run(feeds)
    integers = any(
        n.op.startswith(("DynamicQuantize", "QuantizeLinear", "Centre")) for n in planned.session.graph.nodes
    )
    # One rounding that falls the other way moves outputs of models that quantise on the way: see verify.
    tolerance = 2 * TOLERANCES["int8"] if integers else SENSITIVE.get(planned.name, TOLERANCES["fp32"])
    for difference in compare(got, want):
        assert difference.within(tolerance), str(difference)
    for name, array in got.items():
        assert np.asarray(array).dtype == want[name].dtype

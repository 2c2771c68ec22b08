"""Portable definitions ask CuPy for nothing that it refuses, and make of its arrays what they make of NumPy's."""

from __future__ import annotations

import inspect
import operator
import re
import sys
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from infera_gpu.agreement import TOLERANCE
from infera_gpu.choice import choose, runs_on_cupy
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.errors import PlanError
from infera_gpu.graph import HostArray
from infera_gpu.op import Case, Op
from infera_gpu.ops import registry
from infera_gpu.spec import TensorSpec
from infera_gpu.specialize import Placed
from infera_kernels.portable import indexing
from tests import strict_cupy
from tests.cases import assert_close, compute, inputs_of, site_of
from tests.strict_cupy import ATTRIBUTES, FUNCTIONS, METHODS, SAME, TYPES, UFUNCS, Refused, signature, xp

PORTABLE = [op for op in registry() if op.portable and op.pure and not op.host]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def special_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupyx.scipy.special", strict_cupy.special())


@pytest.mark.parametrize("op", [pytest.param(op, id=op.qualified) for op in PORTABLE])
def test_every_case_runs_on_cupy(op: Op) -> None:
    """And in bfloat16, where the operator takes it."""
    cases = [*op.cases, *filter(None, map(_in_bfloat16, op.cases))]
    wrong = [f"{case.id}: {found}" for case in cases if (found := _what_is_wrong(op, case))]
    assert not wrong, "\n".join(wrong)


def _in_bfloat16(case: Case) -> Case | None:
    """The case with bfloat16 for float32; None where it has none."""

    def narrowed(given: Any) -> Any:
        if getattr(given, "dtype", None) != np.float32:
            return given
        return replace(given, dtype=BFLOAT16) if isinstance(given, TensorSpec) else given.astype(BFLOAT16)

    ins = tuple(map(narrowed, case.ins))
    same = all(map(operator.is_, ins, case.ins))
    return None if same else replace(case, id=f"{case.id}, in bfloat16", ins=ins, tol=TOLERANCE["bfloat16"])


def _what_is_wrong(op: Op, case: Case) -> str:
    """What CuPy refuses of the case, or how its results differ. Nothing where no plan would compute it on CuPy."""
    ins = inputs_of(op, case)
    try:
        site = site_of(op, case, ins)
    except PlanError:
        return ""
    want = compute(op, site, ins)
    if not runs_on_cupy(Placed(op, site)) or any(a.dtype.name not in TYPES for a in (*ins, *want) if a is not None):
        return ""
    try:
        with np.errstate(all="ignore"):
            got = op.outputs(xp, site, [None if x is None else strict_cupy.ndarray(x.copy()) for x in ins])
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            made: HostArray = np.empty(g.shape, w.dtype)
            np.copyto(made, g.host)  # as a plan does; it rounds
            assert_close(made, w, case.tol, f"output {i}")
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
@pytest.mark.parametrize("dtype", sorted(TYPES - {"complex64", "complex128"}))
def test_updates_of_one_place_meet_in_every_type(dtype: str, reduction: str) -> None:
    """What CuPy's `at` does not take is computed without it."""
    rng = np.random.default_rng(7)
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    x, updates = (rng.integers(1, 4, shape).astype(kind) for shape in ((5, 3), (40, 3)))
    if dtype in TOLERANCE:
        updates[7, 1] = np.nan
    rows = rng.integers(-5, 3, (40, 3))
    with np.errstate(all="ignore"):
        got, want = (
            (
                indexing.scatter_elements(module, array(x), array(rows), array(updates), 0, reduction),
                indexing.scatter_nd(module, array(x), array(rows[:, :1]), array(updates), reduction),
            )
            for module, array in ((xp, strict_cupy.ndarray), (np, np.asarray))
        )
    for g, w in zip(got, want, strict=True):
        assert_close(g.host, w, TOLERANCE.get(dtype, 0), reduction)


def test_types_that_cupy_has_not_are_computed_on_the_host() -> None:
    device, ways = RecordingDevice(), set()
    for op in registry():
        for case in op.cases if op.portable and op.view is None and not op.host else ():
            ins = inputs_of(op, case)
            site = site_of(op, case, ins)
            if {s.dtype.name for s in (*site.ins, *site.outs) if s is not None} - TYPES - {"object"}:
                ways.add(choose(Placed(op, site), device).via)
    assert "numpy" in ways
    assert "portable" not in ways


ON_HOST = np.arange(4.0)
ON_GPU = strict_cupy.ndarray(ON_HOST)


@pytest.mark.parametrize(
    "asked",
    [
        lambda: ON_GPU + ON_HOST,
        lambda: ON_HOST * ON_GPU,
        lambda: xp.maximum(ON_GPU, np.asarray(0.0)),
        lambda: xp.stack([ON_GPU, ON_HOST]),
        lambda: xp.where(ON_GPU > 0, ON_HOST, ON_GPU),
        lambda: np.asarray(ON_GPU),
        lambda: np.add.reduce(ON_GPU),
        lambda: xp.add(ON_GPU, ON_GPU, where=ON_GPU > 0),
        lambda: xp.multiply.at(ON_GPU, 0, 2.0),
        lambda: xp.maximum.at(ON_GPU, 0, 2.0),
        lambda: xp.full((2, 2), ON_HOST),
        lambda: xp.argsort(ON_GPU.astype(BFLOAT16)),
        lambda: ON_GPU.astype(ml_dtypes.float8_e5m2),
        lambda: ON_GPU.sum(where=ON_GPU > 0),
        lambda: ON_GPU.astype(xp.float32, device="gpu"),
    ],
)
def test_the_stand_in_refuses_what_cupy_refuses(asked: Any) -> None:
    with pytest.raises(Refused):
        asked()


@pytest.mark.parametrize("name", ["frompyfunc", "vectorize", "pad", "linalg.solve", "ndarray.flat"])
def test_the_stand_in_knows_no_more_than_is_written_down(name: str) -> None:
    with pytest.raises(AttributeError, match="not written down"):
        operator.attrgetter(name)(ON_GPU if name.startswith("ndarray.") else xp)


# What is written down, compared with CuPy itself.


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy", exc_type=ImportError)


def test_functions_have_cupys_parameters(cupy: Any) -> None:
    for name, written in FUNCTIONS.items():
        real = inspect.signature(operator.attrgetter(name)(cupy))
        assert _parameters(real) == _parameters(signature(written)), name


def test_methods_have_cupys_parameters(cupy: Any) -> None:
    """Compiled methods say theirs in the first line of their documentation, some with types of C."""
    for name, written in METHODS.items():
        method = getattr(cupy.ndarray, name)
        line = re.match(r"\w+\.\w+\(self(?:, )?(.*)\)", method.__doc__ or "")
        text = re.sub(r"(^|, )\w+ (?=\w)", r"\1", line[1]) if line else str(inspect.signature(method))[1:-1]
        assert _parameters(signature(text.removeprefix("self, "))) == _parameters(signature(written)), name


def _parameters(of: inspect.Signature) -> list[tuple[str, object, object]]:
    return [(p.name, p.kind, p.default) for p in of.parameters.values()]


def test_cupy_has_the_other_names(cupy: Any) -> None:
    assert {name for name in ATTRIBUTES if not hasattr(cupy.ndarray, name)} == set()
    assert {name for name in SAME | UFUNCS if not hasattr(cupy, name)} == set()


def test_ufuncs_make_the_types_that_numpys_make(cupy: Any) -> None:
    def typed(code: str) -> np.dtype[Any]:
        return BFLOAT16 if code == BFLOAT16.char else np.dtype(code)

    for name in UFUNCS - {"matmul"}:
        host, loops = getattr(np, name), [loop.split("->") for loop in getattr(cupy, name).types]
        for dtype in map(typed, "bBhHiIlLefdE"):
            try:
                with np.errstate(all="ignore"):
                    want = host(*[np.ones(1, dtype)] * host.nin).dtype
            except TypeError:
                continue
            made = next(out for codes, out in loops if all(np.can_cast(dtype, typed(code)) for code in codes))
            assert typed(made) == want, f"{name} of {dtype}"

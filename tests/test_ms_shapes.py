"""Operators of com.microsoft on inputs of other shapes: refused while planning, or computed as it was inferred."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from infera_gpu.errors import PlanError
from infera_gpu.op import Op, Site
from infera_gpu.ops import registry
from infera_gpu.spec import TensorSpec
from tests.cases import compute, inputs_of, site_of

BY_VALUE = {"MultiHeadAttention", "Attention", "GroupQueryAttention", "RotaryEmbedding"}
"""Attention finds out only while computing; tests/test_ms_attention.py has what it refuses."""

OPS = [op for op in registry() if op.domain == "com.microsoft" and not op.host and op.name not in BY_VALUE]


def others(dims: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Shapes near this one."""
    near = {
        dims[:-1],
        (*dims, 1),
        (*dims, 2),
        tuple(d + 1 for d in dims),
        (),
        (*dims[:-1], 2 * dims[-1] if dims else 2),
    }
    yield from sorted({*near, (0,) * len(dims)} - {dims})


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
def test_other_shapes(op: Op) -> None:
    for case in op.cases:
        ins = list(inputs_of(op, case))
        site = site_of(op, case, ins)
        for i, spec in enumerate(site.ins):
            for dims in others(spec.dims) if spec is not None and i not in op.values else ():
                assert spec is not None
                changed: list[Any] = [np.zeros(dims, spec.dtype) if k == i else x for k, x in enumerate(ins)]
                near = tuple(TensorSpec(dims, spec.dtype) if k == i else s for k, s in enumerate(site.ins))
                agrees(op, replace(site, ins=near, outs=()), changed, f"{case.id}: input {i} is {list(dims)}")


def agrees(op: Op, site: Site, ins: list[Any], what: str) -> None:
    try:
        specs = op.infer(site)
    except PlanError:
        return
    try:
        made = compute(op, replace(site, outs=tuple(s for s in specs if s is not None)), ins)
    except (PlanError, IndexError):
        return  # by its values: a matrix without inverse, an index out of range
    for spec, array in zip(specs, made, strict=True):
        assert spec is None or spec.dims == array.shape, f"{what}: {spec} was inferred, {list(array.shape)} came"


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
def test_inputs_left_out(op: Op) -> None:
    for case in op.cases:
        ins = list(inputs_of(op, case))
        site = site_of(op, case, ins)
        for i in range(len(ins)):
            fewer = tuple(None if k == i else s for k, s in enumerate(site.ins))
            values = tuple(None if k == i else v for k, v in enumerate(site.values))
            left: list[Any] = [None if k == i else x for k, x in enumerate(ins)]
            agrees(op, replace(site, ins=fewer, values=values, outs=()), left, f"{case.id}: without input {i}")

"""com.microsoft: an LSTM with quantised weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site, f32
from infera_gpu.ops._families import integers
from infera_gpu.ops._ms import ms_op
from infera_gpu.ops.recurrent import LSTM_ATTRS, cells, infer, over_directions
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable.quant import dynamic_matmul
from infera_kernels.portable.recurrent import Product

_WEIGHTS = {1: "W", 2: "R"}
_PARAMETERS = {8: "W_scale", 9: "W_zero_point", 10: "R_scale", 11: "R_zero_point"}


def _lstm(site: Site) -> Site:
    """The site of an LSTM with float weights, which are laid out the other way round."""
    turned = {i: site.spec(i) for i in _WEIGHTS}
    for i, spec in turned.items():
        if spec.ndim != 3:
            raise site.fail(f"{_WEIGHTS[i]} is {spec}, expected (directions, inputs, 4 hidden sizes)")
    specs = {i: TensorSpec((*s.dims[:-2], s.dims[-1], s.dims[-2]), site.spec(0).dtype) for i, s in turned.items()}
    ins = tuple(specs.get(i, s) for i, s in enumerate(site.ins[:8]))
    return replace(site, node=replace(site.node, op="LSTM"), ins=ins)


def _infer(site: Site) -> Sequence[TensorSpec]:
    specs = infer(_lstm(site))
    directions, _, columns = site.spec(1).dims
    for i, name in _PARAMETERS.items():
        if site.spec(i).dims not in ((directions,), (directions, columns)):
            raise site.fail(f"{name} is {site.spec(i)}, expected [{directions}] or [{directions}, {columns}]")
    return specs


def _product(scale: Array, zero: Array) -> Product:
    """The product with weights of one direction."""
    return lambda xp, x, w: dynamic_matmul(xp, x, w.T, scale, zero)


def _compute(xp: Any, site: Site, x: Array, w: Array, r: Array, *rest: Array | None) -> Sequence[Array]:
    """The inputs of all steps are quantised together, and so are a step's states: those of the whole batch."""
    lengths = rest[1]
    w_scale, w_zero, r_scale, r_zero = rest[5:]
    assert w_scale is not None
    assert w_zero is not None
    assert r_scale is not None
    assert r_zero is not None
    if lengths is not None:
        x = xp.where((xp.arange(len(x)) < lengths.max())[:, None, None], x, 0)
    lstm = _lstm(site)
    made = cells(lstm, lambda d: (_product(w_scale[d], w_zero[d]), _product(r_scale[d], r_zero[d])))
    return over_directions(xp, lstm, made, x, w.swapaxes(1, 2), r.swapaxes(1, 2), *rest[:5])


# ---- cases


def _case(
    id: str, directions: int, dtype: Any, *, columns: bool = False, more: dict[int, Any] | None = None, **attrs: Any
) -> Case:
    """Five steps of three sequences of six values, four hidden ones."""
    parameters = (directions, 16) if columns else (directions,)
    scale = np.linspace(0.004, 0.012, int(np.prod(parameters)), dtype=np.float32).reshape(parameters)
    zero = np.full(parameters, 120 if dtype == np.uint8 else 0, dtype)
    ins: list[Any] = [f32(5, 3, 6), integers(1, dtype, directions, 6, 16), integers(1, dtype, directions, 4, 16)]
    ins += [f32(directions, 32), None, None, None, None, scale, zero, scale[::-1].copy(), zero]
    for i, value in (more or {}).items():
        ins[i] = value
    return Case(id, tuple(ins), {"hidden_size": 4, **attrs}, n_outs=3)


_LENGTHS = np.array([4, 2, 3], np.int32)
_BOTH: dict[str, Any] = {"direction": "bidirectional"}

OPS: tuple[Op, ...] = (
    ms_op(
        "DynamicQuantizeLSTM",
        _infer,
        _compute,
        (
            _case("signed", 1, np.int8),
            _case("unsigned", 1, np.uint8),
            _case("columns", 2, np.int8, columns=True, **_BOTH),
            _case("reverse", 1, np.uint8, direction="reverse", more={3: None}),
            _case("lengths", 2, np.uint8, more={4: _LENGTHS}, **_BOTH),
            _case("states", 2, np.int8, more={5: f32(2, 3, 4), 6: f32(2, 3, 4)}, **_BOTH),
            _case("peepholes", 1, np.int8, more={7: f32(1, 12)}, clip=1.5),
        ),
        needs=(0, 1, 2, *_PARAMETERS),
        **LSTM_ATTRS,
    ),
)

"""The cases of LSTM, GRU and RNN."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.op import Case, f32
from infera_gpu.ops._families import uniform
from infera_gpu.ops.recurrent import KINDS
from infera_gpu.spec import TensorSpec

_LENGTHS, _H = 4, 5
"""Inputs by number."""


def cases(op: str, since: int) -> tuple[Case, ...]:
    """Those of a version: 7 or 14."""
    return _layout_cases(op) if since == 14 else _cases(op) + _more_cases(op) + _half(op)


def _ins(
    op: str, steps: int, batch: int, features: int, hidden: int, directions: int, *, bias: bool = True
) -> list[TensorSpec | HostArray | None]:
    """X, W, R and B, with four optional inputs left out."""
    rows = KINDS[op].gates * hidden
    weights = (f32(directions, rows, features), f32(directions, rows, hidden))
    return [f32(steps, batch, features), *weights, f32(directions, 2 * rows) if bias else None, *[None] * 4]


def _cases(op: str) -> tuple[Case, ...]:
    kind = KINDS[op]
    n_outs = 1 + kind.states

    def case(
        name: str, steps: int, batch: int, features: int, hidden: int, directions: int = 1, *, bias: bool = True,
        bound: float = 1.0, more: dict[int, TensorSpec | HostArray] | None = None, **attrs: Any,
    ) -> Case:  # fmt: skip
        ins = _ins(op, steps, batch, features, hidden, directions, bias=bias)
        for i, value in (more or {}).items():
            ins[i] = value
        while ins[-1] is None:
            ins.pop()
        return Case(name, tuple(ins), {"hidden_size": hidden, **attrs}, n_outs, low=-bound, high=bound)

    state = {_H + i: f32(2, 2, 4) for i in range(kind.states)}
    lengths = np.array([4, 1, 3], np.int32)
    both = "bidirectional"
    return (
        case("forward", 4, 2, 6, 4),
        case("one", 1, 1, 1, 1),
        case("no-bias", 4, 2, 3, 5, bias=False),
        case("reverse", 4, 2, 6, 4, direction="reverse"),
        case("both-ways", 4, 2, 6, 4, 2, direction=both, more=dict(state)),
        # small weights: large ones make the network chaotic, and rounding errors grow from step to step
        case("large", 3, 5, 40, 33, 2, direction=both, bound=0.2),
        case("lengths", 4, 3, 6, 4, 2, direction=both, more={_LENGTHS: lengths}),
        case("whole-lengths", 4, 2, 6, 4, more={_LENGTHS: np.full(2, 4, np.int32)}),
        case("clip", 4, 2, 6, 4, clip=0.3),
        case(
            "activations", 4, 2, 6, 4,
            activations=("HardSigmoid", "Elu", "LeakyRelu")[: len(kind.defaults)],
            activation_alpha=(0.3, 0.5, 0.1)[: len(kind.defaults)], activation_beta=(0.4,),
        ),
    )  # fmt: skip


def _more_cases(op: str) -> tuple[Case, ...]:
    if op == "LSTM":
        ins = (*_ins(op, 4, 2, 6, 4, 1)[:7], f32(1, 12))
        return (Case("peepholes", ins, {"hidden_size": 4}, 3, low=-1, high=1),)
    if op == "GRU":
        return tuple(
            Case(
                f"linear-before-reset{name}", tuple(_ins(op, 4, 2, 6, 4, 1, bias=bias)[:end]),
                {"linear_before_reset": 1, "hidden_size": 4}, 2, low=-1, high=1,
            )
            for name, bias, end in (("", True, 4), ("-no-bias", False, 3))
        )  # fmt: skip
    return ()


def _half(op: str) -> tuple[Case, ...]:
    """float16 with constant weights."""
    specs = [s for s in _ins(op, 3, 2, 6, 4, 1)[:4] if isinstance(s, TensorSpec)]
    ins = tuple(uniform(i, -1, 1, *s.dims).astype(np.float16) for i, s in enumerate(specs))
    return (Case("half", ins, {"hidden_size": 4}, 1 + KINDS[op].states, tol=2e-3),)


def _layout_cases(op: str) -> tuple[Case, ...]:
    """One as before, and batch first; onnxruntime has it not, and onnx's reference has one direction of it."""
    ins, count = _ins(op, 4, 2, 6, 4, 1)[:4], 1 + KINDS[op].states
    first = Case("batch-first", tuple(ins), {"layout": 1, "hidden_size": 4}, count, low=-1, high=1)
    return (_cases(op)[0], first)

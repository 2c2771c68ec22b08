"""Loops over subgraphs: the host decides after every iteration, the body runs on the device.

`If` has no declaration: specialising replaces it by the branch that is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.op import REQUIRED, Case, GraphText, Op, Site, Subgraph, f32
from infera_gpu.spec import TensorSpec, ValueSpec


def _flag(value: Any) -> bool:
    return bool(np.asarray(value).reshape(-1)[0])


def _shaped_for(value: HostArray, spec: ValueSpec) -> HostArray:
    """A number as the scalar or the vector of one element that the body declares."""
    return value.reshape((1,) * len(spec.shape)) if isinstance(spec, TensorSpec) else value


def _empty(spec: ValueSpec) -> HostArray:
    """What no iteration gives: no element of what the body declares."""
    assert isinstance(spec, TensorSpec)
    return np.empty((0, *(d if isinstance(d, int) else 0 for d in spec.shape)), spec.dtype)


def _stacked(site: Site, slices: Sequence[HostArray], spec: ValueSpec, axis: int = 0) -> HostArray:
    if not slices:
        return _empty(spec)
    if len({s.shape for s in slices}) > 1:
        raise site.fail(f"an iteration gives {list(slices[0].shape)}, another {sorted({s.shape for s in slices})[-1]}")
    return np.stack(slices, axis)


def _loop(xp: Any, site: Site, trips: Any = None, go: Any = None, *state: Any) -> tuple[Any, ...]:
    """`body(iteration, condition, *state) -> condition, *state, *slices`, while the condition holds."""
    body: Subgraph = site.attrs["body"]
    n = len(state)
    if len(body.inputs) != n + 2 or len(body.outputs) < n + 1:
        raise site.fail(
            f"its body has {len(body.inputs)} inputs and {len(body.outputs)} outputs, "
            f"expected {n + 2} and at least {n + 1}"
        )
    most = None if trips is None else int(np.asarray(trips).reshape(-1)[0])
    condition = np.asarray(True if go is None else _flag(go))
    slices: list[list[HostArray]] = [[] for _ in body.outputs[n + 1 :]]
    i = 0
    while _flag(condition) and (most is None or i < most):
        made = body(
            _shaped_for(np.asarray(i, np.int64), body.inputs[0]), _shaped_for(condition, body.inputs[1]), *state
        )
        condition, state = made[0], tuple(made[1 : n + 1])
        for found, each in zip(slices, made[n + 1 :], strict=True):
            found.append(each)
        i += 1
    return (*state, *(_stacked(site, s, spec) for s, spec in zip(slices, body.outputs[n + 1 :], strict=True)))


def _per_value(site: Site, name: str, n: int) -> tuple[int, ...]:
    given = site.attrs[name] or (0,) * n
    if len(given) != n:
        raise site.fail(f"{name} has {len(given)} values, expected {n}")
    return tuple(given)


def _scan(
    site: Site,
    body: Subgraph,
    state: Sequence[Any],
    scanned: Sequence[HostArray],
    backwards: Sequence[int],
    length: int,
) -> tuple[list[Any], list[list[HostArray]]]:
    """Run the body over the first axis of `scanned`; the final state, and the slices of each output in order."""
    n = len(state)
    if len(body.inputs) != n + len(scanned) or len(body.outputs) < n:
        raise site.fail(f"its body has {len(body.inputs)} inputs, expected {n} of state and {len(scanned)} scanned")
    current = list(state)
    slices: list[list[HostArray]] = [[] for _ in body.outputs[n:]]
    for i in range(length):
        made = body(*current, *(x[length - 1 - i if back else i] for x, back in zip(scanned, backwards, strict=True)))
        current = made[:n]
        for found, each in zip(slices, made[n:], strict=True):
            found.append(each)
    return current, slices


def _scan_9(xp: Any, site: Site, *ins: Any) -> tuple[Any, ...]:
    """Scan: the axes that it walks, and those that it stacks on, are attributes."""
    body: Subgraph = site.attrs["body"]
    m = int(site.attrs["num_scan_inputs"])
    if not 0 < m <= len(ins):
        raise site.fail(f"num_scan_inputs is {m}, of {len(ins)} inputs")
    n = len(ins) - m
    axes = _per_value(site, "scan_input_axes", m)
    for x, axis in zip(ins[n:], axes, strict=True):
        if not -x.ndim <= axis < x.ndim:
            raise site.fail(f"scan_input_axes: axis {axis} out of range for {list(x.shape)}")
    scanned = [np.moveaxis(x, axis, 0) for x, axis in zip(ins[n:], axes, strict=True)]
    if len({len(x) for x in scanned}) > 1:
        raise site.fail(
            f"its scanned inputs have {', '.join(str(len(x)) for x in scanned)} elements, expected one length"
        )
    state, slices = _scan(site, body, ins[:n], scanned, _per_value(site, "scan_input_directions", m), len(scanned[0]))
    outs = body.outputs[n:]
    flips = _per_value(site, "scan_output_directions", len(outs))
    places = _per_value(site, "scan_output_axes", len(outs))
    return (
        *state,
        *(
            _stacked(site, found[::-1] if flip else found, spec, axis)
            for found, spec, flip, axis in zip(slices, outs, flips, places, strict=True)
        ),
    )


def _scan_8(xp: Any, site: Site, lengths: Any, *ins: Any) -> tuple[Any, ...]:
    """Scan before opset 9: every input has a batch axis first, and each row may have a length of its own."""
    body: Subgraph = site.attrs["body"]
    m = int(site.attrs["num_scan_inputs"])
    if not 0 < m <= len(ins):
        raise site.fail(f"num_scan_inputs is {m}, of {len(ins)} inputs")
    n = len(ins) - m
    batch, most = ins[-1].shape[:2]
    backwards = _per_value(site, "directions", m)
    rows: list[list[Any]] = []
    for b in range(batch):
        length = most if lengths is None else int(lengths[b])
        if not 0 <= length <= most:
            raise site.fail(f"sequence_lens[{b}] is {length}, of {most} elements")
        state, slices = _scan(site, body, [x[b] for x in ins[:n]], [x[b, :length] for x in ins[n:]], backwards, length)
        padded = []
        for found, spec in zip(slices, body.outputs[n:], strict=True):
            made = _stacked(site, found, spec)
            pad = np.zeros((most - len(made), *made.shape[1:]), made.dtype)
            padded.append(np.concatenate([made, pad]))
        rows.append([*state, *padded])
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


def _sequence_map(xp: Any, site: Site, first: list[Any], *others: Any) -> tuple[list[Any], ...]:
    """The body on the elements of the sequences, one after the other; tensors are given whole."""
    body: Subgraph = site.attrs["body"]
    if any(isinstance(o, list) and len(o) != len(first) for o in others):
        raise site.fail(f"its sequences differ in length from the first, which has {len(first)} elements")
    made = [body(x, *(o[i] if isinstance(o, list) else o for o in others)) for i, x in enumerate(first)]
    return tuple([each[k] for each in made] for k in range(len(body.outputs)))


_SUM = GraphText(
    """body (int64 i, bool c, float[N] s) => (bool go, float[N] t, float[N] each) <float two = {2.0}> {
        go = Identity(c)
        t = Mul(s, two)
        each = Identity(s)
    }"""
)
_RUNNING = GraphText(
    """body (float[N] s, float[N] x) => (float[N] t, float[N] y) {
        t = Add(s, x)
        y = Identity(t)
    }"""
)
_TWICE = GraphText("body (float[N] x) => (float[N] y) { y = Add(x, x) }")
_FEW = [np.arange(3, dtype=np.float32), np.ones(2, np.float32)]

OPS = (
    Op(
        "Loop",
        1,
        infer=lambda site: (None,) * len(site.node.outputs),
        compute=_loop,
        attrs={"body": REQUIRED},
        cases=(
            Case("counted", (np.array(3, np.int64), np.array(True), f32(4)), {"body": _SUM}, n_outs=2),
            Case("never", (np.array(3, np.int64), np.array(False), f32(4)), {"body": _SUM}, n_outs=2),
        ),
        host=True,
        portable=False,
    ),
    Op(
        "Scan",
        8,
        infer=lambda site: (None,) * len(site.node.outputs),
        compute=_scan_8,
        attrs={"body": REQUIRED, "num_scan_inputs": REQUIRED, "directions": None},
        cases=(
            Case("rows", (None, f32(2, 3), f32(2, 5, 3)), {"body": _RUNNING, "num_scan_inputs": 1}, n_outs=2, opset=8),
        ),
        host=True,
        portable=False,
    ),
    Op(
        "Scan",
        9,
        infer=lambda site: (None,) * len(site.node.outputs),
        compute=_scan_9,
        attrs={
            "body": REQUIRED,
            "num_scan_inputs": REQUIRED,
            "scan_input_axes": None,
            "scan_input_directions": None,
            "scan_output_axes": None,
            "scan_output_directions": None,
        },
        cases=(
            Case("forwards", (f32(3), f32(5, 3)), {"body": _RUNNING, "num_scan_inputs": 1}, n_outs=2),
            Case(
                "backwards",
                (f32(3), f32(3, 5)),
                {
                    "body": _RUNNING,
                    "num_scan_inputs": 1,
                    "scan_input_axes": (1,),
                    "scan_input_directions": (1,),
                    "scan_output_axes": (-1,),
                    "scan_output_directions": (1,),
                },
                n_outs=2,
            ),
        ),
        host=True,
        portable=False,
    ),
    Op(
        "SequenceMap",
        17,
        infer=lambda site: (None,) * len(site.node.outputs),
        compute=_sequence_map,
        attrs={"body": REQUIRED},
        cases=(Case("twice", (_FEW,), {"body": _TWICE}),),
        host=True,
        portable=False,
    ),
)

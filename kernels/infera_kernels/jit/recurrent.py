"""LSTM, GRU and RNN with their default activations: one product for the inputs of all steps, then one compiled loop.

The arguments are those of `cpu.recurrent`, in float32. Here rows are sequences: a step is a product of few rows, whose
packed weight is read from cache, and what follows it while it is in registers' reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_kernels.calls import Array, Call, Pack, Scratch
from infera_kernels.cpu.elementwise import contiguous
from infera_kernels.jit import gemm
from infera_kernels.jit.compiling import bound, compiled
from infera_kernels.jit.functions import sigmoid, tanh
from infera_kernels.jit.microkernel import TILE

COLUMNS = TILE.columns
KINDS = ("LSTM", "GRU", "GRU_LINEAR", "RNN")
"""A GRU resets the state or, with linear_before_reset, what is made of it."""
LSTM, GRU, GRU_LINEAR, RNN = range(4)


@compiled
def _multiply(x: Any, offsets: Any, packed: Any, bias: Any, y: Any) -> None:
    """y = x @ packed + bias, matrices of few rows; `offsets` is one 0."""
    source, target = x.ctypes.data, y.ctypes.data
    gemm.multiply_cached(
        x.shape[0], source, x.strides[0], x.shape[1], packed, bias, offsets, target, y.strides[0], y.shape[1]
    )


@compiled
def _add(row: Any, more: Any) -> None:
    for j in range(row.size):
        row[j] += more[j]


@compiled
def _squash(row: Any, sigmoids: int) -> None:
    """row = its sigmoid up to there, its tanh from there on."""
    for j in range(sigmoids):
        row[j] = sigmoid(row[j])
    for j in range(sigmoids, row.size):
        row[j] = tanh(row[j])


@compiled
def _lstm(gates: Any, cell: Any, h: Any) -> None:
    """Cell and state after squashed gates i, o, f, c."""
    size = cell.size
    i, o, f, new = gates[:size], gates[size : 2 * size], gates[2 * size : 3 * size], gates[3 * size :]
    for j in range(size):
        cell[j] = cell[j] * f[j] + i[j] * new[j]
    for j in range(size):
        new[j] = o[j] * tanh(cell[j])
    for j in range(size):
        h[j] = new[j]


@compiled
def _gru(t: Any, given: Any, z: Any, before: Any, h: Any) -> None:
    """The state after update gates z, a new value t, which lacks the inputs' share, and the state before."""
    _add(t, given)
    _squash(t, 0)
    for j in range(t.size):
        t[j] += z[j] * (before[j] - t[j])
    for j in range(t.size):
        h[j] = t[j]


@compiled
def _steps(
    kind: int, reverse: bool, gates: Any, offsets: Any, first: Any, second: Any, nothing: Any, bias: Any, start: Any,
    cell: Any, h: Any, z: Any, t: Any, u: Any,
) -> None:  # fmt: skip
    """The states h (T, B, H) from gates (T, B, gates * H), the inputs' share. `first` is the packed weight of all
    gates, of a GRU that of update and reset, and `second` its other one, with `bias`; z, t and u are scratch."""
    count, batch, size = h.shape
    before = start
    for n in range(count):
        at = count - 1 - n if reverse else n
        _multiply(before, offsets, first, nothing, z)
        for i in range(batch):
            _add(z[i], gates[at, i])
            _squash(z[i], 3 * size if kind == LSTM else 0 if kind == RNN else 2 * size)
            if kind == LSTM:
                _lstm(z[i], cell[i], h[at, i])
            elif kind == RNN:
                for j in range(size):
                    h[at, i, j] = z[i, j]
            elif kind == GRU:
                for j in range(size):
                    u[i, j] = z[i, size + j] * before[i, j]
        if kind in (GRU, GRU_LINEAR):
            _multiply(u if kind == GRU else before, offsets, second, bias, t)
            for i in range(batch):
                if kind == GRU_LINEAR:
                    for j in range(size):
                        t[i, j] *= z[i, size + j]
                _gru(t[i], gates[at, i, 2 * size :], z[i, :size], before[i], h[at, i])
        before = h[at]


def direction(
    kind: int,
    x: Array,
    h: Array | None,
    c: Array | None,
    y: Array,
    scratch: Scratch,
    *,
    reverse: bool,
    last: Sequence[Array | None],
    weight: Pack,
    recurrent: Pack,
    bias: Pack | None,
) -> list[Call]:
    """One direction, gates in ONNX's order. x is (T, B, I), y (T, B, H) of any strides, states (B, H). `weight`,
    `recurrent` and `bias` pack what belongs to this direction: (gates * H, I), (gates * H, H), (2 * gates * H,)."""
    (steps, batch, _), size = x.shape, y.shape[2]
    width = {LSTM: 4, GRU: 3, GRU_LINEAR: 3, RNN: 1}[kind] * size
    ahead = 2 * size if kind in (GRU, GRU_LINEAR) else width
    inputs, calls = contiguous(x, scratch)
    gates = scratch((steps * batch, width), np.float32)

    def added(b: Array) -> Array:
        """The biases that inputs and states share, once."""
        made = b[:width] + b[width:]
        if kind == GRU_LINEAR:
            made[ahead:] = b[ahead:width]
        return gemm.pack_bias(made)

    total = None if bias is None else bias(f"inputs {kind}", added)
    panels = weight("inputs", lambda w: gemm.pack(w.T))
    calls += gemm.product(inputs.reshape(steps * batch, -1), panels, total, gates)[0]
    first = recurrent(f"first {ahead}", lambda r: gemm.pack(r[:ahead].T))
    second = recurrent(f"second {ahead}", lambda r: gemm.pack(r[ahead:].T))
    nothing = np.zeros(len(first) * COLUMNS, np.float32)
    other = nothing
    if kind == GRU_LINEAR and bias is not None:
        other = bias("second", lambda b: gemm.pack_bias(b[width + ahead :]))
    states = y if y.flags.c_contiguous else scratch(y.shape, np.float32)
    start, cell = scratch((batch, size), np.float32), scratch((batch if kind == LSTM else 0, size), np.float32)
    calls += [(np.copyto, (s, 0 if given is None else given)) for s, given in ((start, h), (cell, c)) if s.size]
    rows = [scratch((batch, w), np.float32) for w in (ahead, size, size)]
    weights = (np.zeros(1, np.int64), first, second, nothing, other)
    calls.append(bound(_steps, kind, reverse, gates.reshape(steps, batch, width), *weights, start, cell, states, *rows))
    if states is not y:
        calls.append((np.copyto, (y, states)))
    ends = (states[0 if reverse else -1], cell)
    return calls + [(np.copyto, (target, end)) for target, end in zip(last, ends, strict=False) if target is not None]

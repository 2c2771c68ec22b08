"""LSTM, GRU and RNN on NumPy with their default activations: one GEMM for the inputs of all steps, then steps.

x is (T, B, I) and contiguous or a transpose of (B, T, I); y is (T, B, H) of any strides; w (gates * H, I), r (gates *
H, H), b (2 * gates * H,) or None; states (B, H). Inside, features come first and the batch last: r (gates * H, H) @
state (H, B) is faster than its transpose, and every gate is contiguous. Sigmoids are 0.5 tanh(0.5 x) + 0.5,
so that one tanh serves all gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infera_kernels.calls import Array, Call, Scratch
from infera_kernels.cpu.elementwise import const


def lstm(
    x: Array,
    w: Array,
    r: Array,
    b: Array | None,
    h: Array | None,
    c: Array | None,
    y: Array,
    scratch: Scratch,
    *,
    reverse: bool,
    last: Sequence[Array | None],
    linear_before_reset: bool = False,
) -> list[Call]:
    """One direction, gates in the order i, o, f, c. `h` and `c` are the states before (None is zero), `last` those
    after, where wanted."""
    batch, size = x.shape[1], r.shape[1]
    gates, calls = _project(x, w, b, b, scratch)
    state, cell = (_state(batch, size, s, x.dtype, scratch, calls) for s in (h, c))
    z, t = scratch((4 * size, batch), x.dtype), scratch((size, batch), x.dtype)
    half = const(0.5, x)
    sigmoids = z[: 3 * size]
    i, o, f, g = z.reshape(4, size, batch)
    for step in _steps(len(x), reverse):
        calls += [
            (np.matmul, (r, state, z)),
            (np.add, (z, gates[step], z)),
            (np.multiply, (sigmoids, half, sigmoids)),
            (np.tanh, (z, z)),
            (np.multiply, (sigmoids, half, sigmoids)),
            (np.add, (sigmoids, half, sigmoids)),
            (np.multiply, (cell, f, cell)),
            (np.multiply, (i, g, t)),
            (np.add, (cell, t, cell)),
            (np.tanh, (cell, t)),
            (np.multiply, (o, t, state)),
            (np.copyto, (y[step], state.T)),
        ]
    return calls + _copies(last, (state, cell))


def gru(
    x: Array,
    w: Array,
    r: Array,
    b: Array | None,
    h: Array | None,
    c: None,
    y: Array,
    scratch: Scratch,
    *,
    reverse: bool,
    last: Sequence[Array | None],
    linear_before_reset: bool = False,
) -> list[Call]:
    """One direction, gates in the order z, r, h."""
    batch, size = x.shape[1], r.shape[1]
    two = 2 * size
    linear = linear_before_reset
    recurrent = None if b is None else b[3 * size :]
    gates, calls = _project(x, w, b, None if b is None else (b[: 3 * size + two] if linear else b), scratch)
    state = _state(batch, size, h, x.dtype, scratch, calls)
    zr, t, u = (scratch((n, batch), x.dtype) for n in (two, size, size))
    half = const(0.5, x)
    z, reset = zr.reshape(2, size, batch)
    for step in _steps(len(x), reverse):
        calls += [
            (np.matmul, (r[:two], state, zr)),
            (np.add, (zr, gates[step, :two], zr)),
            (np.multiply, (zr, half, zr)),
            (np.tanh, (zr, zr)),
            (np.multiply, (zr, half, zr)),
            (np.add, (zr, half, zr)),
        ]
        if linear:
            calls.append((np.matmul, (r[two:], state, t)))
            if recurrent is not None:
                calls.append((np.add, (t, recurrent[two:, None], t)))
            calls.append((np.multiply, (t, reset, t)))
        else:
            calls += [(np.multiply, (reset, state, u)), (np.matmul, (r[two:], u, t))]
        calls += [
            (np.add, (t, gates[step, two:], t)),
            (np.tanh, (t, t)),
            (np.subtract, (state, t, u)),
            (np.multiply, (u, z, u)),
            (np.add, (u, t, state)),
            (np.copyto, (y[step], state.T)),
        ]
    return calls + _copies(last, (state,))


def rnn(
    x: Array,
    w: Array,
    r: Array,
    b: Array | None,
    h: Array | None,
    c: None,
    y: Array,
    scratch: Scratch,
    *,
    reverse: bool,
    last: Sequence[Array | None],
    linear_before_reset: bool = False,
) -> list[Call]:
    """One direction of h = tanh(w x + r h + b)."""
    batch, size = x.shape[1], r.shape[1]
    gates, calls = _project(x, w, b, b, scratch)
    state = _state(batch, size, h, x.dtype, scratch, calls)
    z = scratch((size, batch), x.dtype)
    for step in _steps(len(x), reverse):
        calls += [
            (np.matmul, (r, state, z)),
            (np.add, (z, gates[step], z)),
            (np.tanh, (z, state)),
            (np.copyto, (y[step], state.T)),
        ]
    return calls + _copies(last, (state,))


def _project(x: Array, w: Array, b: Array | None, added: Array | None, scratch: Scratch) -> tuple[Array, list[Call]]:
    """(T, gates * H, B) = w x^T + input biases + those recurrent biases that `added`, a head of `b`, still holds."""
    steps, batch, features = x.shape
    width = len(w)
    flat = scratch((width, steps * batch), x.dtype)
    if x.flags.c_contiguous:
        rows, gates = x.reshape(-1, features), flat.reshape(width, steps, batch).transpose(1, 0, 2)
    else:
        rows = x.swapaxes(0, 1).reshape(-1, features)
        gates = flat.reshape(width, batch, steps).transpose(2, 0, 1)
    calls: list[Call] = [(np.matmul, (w, rows.T, flat))]
    if b is not None and added is not None:
        bias = scratch((width,), x.dtype)
        recurrent = added[width:]
        head = bias[: len(recurrent)]
        calls += [
            (np.copyto, (bias, b[:width])),
            (np.add, (head, recurrent, head)),
            (np.add, (flat, bias[:, None], flat)),
        ]
    return gates, calls


def _state(batch: int, size: int, start: Array | None, dtype: Any, scratch: Scratch, calls: list[Call]) -> Array:
    """A state (H, B) of its own, and the call that starts it."""
    state = scratch((size, batch), dtype)
    calls.append((np.copyto, (state, const(0, state) if start is None else start.T)))
    return state


def _copies(targets: Sequence[Array | None], sources: Sequence[Array]) -> list[Call]:
    return [(np.copyto, (t, s.T)) for t, s in zip(targets, sources, strict=False) if t is not None]


def _steps(count: int, reverse: bool) -> range:
    return range(count - 1, -1, -1) if reverse else range(count)

"""LSTM, GRU and RNN cells over time, plainly, for NumPy and CuPy.

Arrays are time-major: x (T, B, I); w (gates * H, I), r (gates * H, H); biases (gates * H,); states (B, H).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from infera_kernels.calls import Array
from infera_kernels.record import Record


class Function(Record):
    """f(xp, x, alpha, beta) and the defaults of the parameters it has (None for one it has not)."""

    apply: Callable[[Any, Array, float, float], Array]
    alpha: float | None = None
    beta: float | None = None


FUNCTIONS: Mapping[str, Function] = MappingProxyType(
    {
        "relu": Function(lambda xp, x, a, b: xp.maximum(x, 0)),
        "tanh": Function(lambda xp, x, a, b: xp.tanh(x)),
        "sigmoid": Function(lambda xp, x, a, b: 0.5 * (1 + xp.tanh(0.5 * x))),
        "affine": Function(lambda xp, x, a, b: a * x + b, 1.0, 0.0),
        "leakyrelu": Function(lambda xp, x, a, b: xp.where(x < 0, a * x, x), 0.01),
        "thresholdedrelu": Function(lambda xp, x, a, b: xp.where(x > a, x, 0), 1.0),
        "scaledtanh": Function(lambda xp, x, a, b: a * xp.tanh(b * x), 1.0, 1.0),
        "hardsigmoid": Function(lambda xp, x, a, b: xp.clip(a * x + b, 0, 1), 0.2, 0.5),
        "elu": Function(lambda xp, x, a, b: xp.where(x < 0, a * xp.expm1(xp.minimum(x, 0)), x), 1.0),
        "softsign": Function(lambda xp, x, a, b: x / (1 + xp.abs(x))),
        "softplus": Function(lambda xp, x, a, b: xp.logaddexp(x, 0)),
    }
)

Activation = Callable[[Any, Array], Array]
Product = Callable[[Any, Array, Array], Array]
"""`f(xp, x, w)`: x (..., K) times w (N, K) transposed."""


def activation(name: str, alpha: float, beta: float) -> Activation:
    """`f(xp, x)` by a lower-case name of `FUNCTIONS`."""
    apply = FUNCTIONS[name].apply
    return lambda xp, x: apply(xp, x, alpha, beta)


def product(xp: Any, x: Array, w: Array) -> Array:
    """The plain `Product`."""
    return x @ w.T


class Cell(Record):
    """What one direction computes with. `clip` bounds what enters an activation; None leaves it.

    `inputs` multiplies the inputs of all steps by w, and `recurrent` a step's states by r, in an LSTM.
    """

    activations: Sequence[Activation]
    inputs: Product
    recurrent: Product
    clip: float | None
    input_forget: bool
    linear_before_reset: bool

    def at(self, i: int, xp: Any, x: Array) -> Array:
        """Activation i of x."""
        return self.activations[i](xp, x if self.clip is None else xp.clip(x, -self.clip, self.clip))


def lstm_step(
    xp: Any, cell: Cell, gates: Array, r: Array, rb: Array, state: tuple[Array, ...], p: Array | None
) -> tuple[Array, ...]:
    """(h, c) after one step; gates in the order i, o, f, c; peepholes p (3 * H,) in the order i, o, f."""
    h, c = state
    size = c.shape[1]
    i, o, f, g = (gates + cell.recurrent(xp, h, r) + rb).reshape(len(h), 4, size).swapaxes(0, 1)
    pi, po, pf = (0, 0, 0) if p is None else p.reshape(3, size)
    i = cell.at(0, xp, i + pi * c)
    f = 1 - i if cell.input_forget else cell.at(0, xp, f + pf * c)
    c = f * c + i * cell.at(1, xp, g)
    return cell.at(0, xp, o + po * c) * cell.activations[2](xp, c), c


def gru_step(
    xp: Any, cell: Cell, gates: Array, r: Array, rb: Array, state: tuple[Array, ...], p: None
) -> tuple[Array, ...]:
    """(h,) after one step; gates in the order z, r, h."""
    (h,) = state
    size = h.shape[1]
    rz, rh = r[: 2 * size], r[2 * size :]
    z, reset = (cell.at(0, xp, gates[:, : 2 * size] + h @ rz.T + rb[: 2 * size])).reshape(-1, 2, size).swapaxes(0, 1)
    if cell.linear_before_reset:
        inner = reset * (h @ rh.T + rb[2 * size :])
    else:
        inner = (reset * h) @ rh.T + rb[2 * size :]
    made = cell.at(1, xp, gates[:, 2 * size :] + inner)
    return ((1 - z) * made + z * h,)


def rnn_step(
    xp: Any, cell: Cell, gates: Array, r: Array, rb: Array, state: tuple[Array, ...], p: None
) -> tuple[Array, ...]:
    """(h,) after one step."""
    return (cell.at(0, xp, gates + state[0] @ r.T + rb),)


def over_time(
    xp: Any,
    step: Callable[..., tuple[Array, ...]],
    cell: Cell,
    x: Array,
    w: Array,
    r: Array,
    b: Array | None,
    lengths: Array | None,
    state: tuple[Array, ...],
    p: Array | None,
    *,
    reverse: bool,
) -> tuple[Array, tuple[Array, ...]]:
    """(h of every step (T, B, H), zero past a sequence's end; the states after its last step).

    `b` is input biases, then recurrent ones. With `reverse` each sequence runs from its end to its beginning, and its
    outputs stay in place. What a cell multiplies of a sequence that has ended is 0, as its outputs are: its range may
    count.
    """
    steps, batch = x.shape[:2]
    wb, rb = (xp.zeros(2 * len(w), x.dtype) if b is None else b).reshape(2, -1)
    if lengths is None:
        lengths = xp.full(batch, steps)
    time = xp.arange(steps)[:, None]
    order = xp.where(time < lengths, lengths - 1 - time, time) if reverse else time + 0 * lengths
    column = xp.arange(batch)
    gates = cell.inputs(xp, x[order, column], w) + wb
    y = xp.zeros((steps, batch, r.shape[1]), x.dtype)
    for t in range(steps):
        alive = (t < lengths)[:, None]
        moved = step(xp, cell, gates[t], r, rb, (xp.where((t <= lengths)[:, None], state[0], 0), *state[1:]), p)
        state = tuple(xp.where(alive, new, old) for new, old in zip(moved, state, strict=True))
        y[order[t], column] = xp.where(alive, moved[0], 0)
    return y, state

"""LSTM, GRU and RNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from infera_gpu.graph import Attrs
from infera_gpu.op import Buffers, Call, Kernel, Op, Site
from infera_gpu.ops._later import Kinds, cases_in
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu import recurrent as cpu
from infera_kernels.portable import recurrent as portable
from infera_kernels.portable.recurrent import FUNCTIONS, Cell, Product
from infera_kernels.record import Record

_X, _W, _R, _B, _LENGTHS, _H, _C, _P = range(8)


class Kind(Record):
    """What tells the three apart: gates, states, default activations, the plain step, the fast direction."""

    gates: int
    states: int
    defaults: tuple[str, ...]
    step: Callable[..., tuple[Array, ...]]
    fast: Callable[..., list[Call]]


KINDS = {
    "LSTM": Kind(4, 2, ("sigmoid", "tanh", "tanh"), portable.lstm_step, cpu.lstm),
    "GRU": Kind(3, 1, ("sigmoid", "tanh"), portable.gru_step, cpu.gru),
    "RNN": Kind(1, 1, ("tanh",), portable.rnn_step, cpu.rnn),
}
_DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
"""Whether each direction runs backwards."""


def _reverses(site: Site) -> tuple[bool, ...]:
    direction = str(site.attrs["direction"]).lower()
    if direction not in _DIRECTIONS:
        raise site.fail(f"direction '{direction}' is not one of {', '.join(_DIRECTIONS)}")
    return _DIRECTIONS[direction]


def _names(site: Site) -> tuple[str, ...]:
    """Activations of all directions, in lower case. Raises PlanError for an unknown one or a wrong number."""
    kind, count = KINDS[site.node.op], len(_reverses(site))
    given = site.attrs["activations"]
    names = kind.defaults * count if not given else tuple(str(n).lower() for n in given)
    if site.node.op == "RNN" and given and len(names) > count:
        names = names[:count]  # the schema's default is for two directions
    unknown = [n for n in names if n not in FUNCTIONS]
    if unknown or len(names) != len(kind.defaults) * count:
        raise site.fail(f"activations {given}: expected {len(kind.defaults) * count} of {', '.join(FUNCTIONS)}")
    return names


def functions(site: Site) -> list[list[tuple[str, float, float]]]:
    """(name, alpha, beta) of every activation, direction by direction; activation_alpha and activation_beta go in turn
    to the activations that take them."""
    names = _names(site)
    alphas, betas = (iter(site.attrs[k] or ()) for k in ("activation_alpha", "activation_beta"))
    made = []
    for name in names:
        function = FUNCTIONS[name]
        alpha = 0.0 if function.alpha is None else float(next(alphas, function.alpha))
        beta = 0.0 if function.beta is None else float(next(betas, function.beta))
        made.append((name, alpha, beta))
    each = len(KINDS[site.node.op].defaults)
    return [made[d * each : (d + 1) * each] for d in range(len(_reverses(site)))]


def _plain(direction: int) -> tuple[Product, Product]:
    return portable.product, portable.product


def cells(site: Site, products: Callable[[int], tuple[Product, Product]] = _plain) -> list[Cell]:
    """One cell a direction. `products` gives what multiplies a direction's inputs, and its states."""
    return [
        Cell(
            [portable.activation(*function) for function in given],
            *products(direction),
            site.attrs["clip"],
            bool(site.attrs.get("input_forget", 0)),
            bool(site.attrs.get("linear_before_reset", 0)),
        )
        for direction, given in enumerate(functions(site))
    ]


def _batch_first(site: Site) -> bool:
    return bool(site.attrs.get("layout", 0))


def _sizes(site: Site) -> tuple[int, int, int, int]:
    """(steps, batch, directions, hidden size). Raises PlanError where the weights do not fit the input."""
    x, w, r = (site.spec(i) for i in (_X, _W, _R))
    if (x.ndim, w.ndim, r.ndim) != (3, 3, 3):
        raise site.fail(f"X, W and R are {x}, {w} and {r}, expected three axes each")
    steps, batch = (x.dims[1], x.dims[0]) if _batch_first(site) else x.dims[:2]
    directions, hidden = len(_reverses(site)), r.dims[2]
    rows = KINDS[site.node.op].gates * hidden
    if w.dims != (directions, rows, x.dims[2]) or r.dims != (directions, rows, hidden):
        raise site.fail(f"W is {w} and R is {r}, expected [{directions}, {rows}, {x.dims[2]} and {hidden}]")
    if site.attrs["hidden_size"] not in (None, hidden):
        raise site.fail(f"hidden_size is {site.attrs['hidden_size']} but R is {r}")
    state = (batch, directions, hidden) if _batch_first(site) else (directions, batch, hidden)
    wanted = {_B: (directions, 2 * rows), _LENGTHS: (batch,), _H: state, _C: state, _P: (directions, 3 * hidden)}
    for i, dims in wanted.items():
        if site.has(i) and site.spec(i).dims != dims:
            raise site.fail(f"input {i} is {site.spec(i)}, expected {list(dims)}")
    return steps, batch, directions, hidden


def infer(site: Site) -> Sequence[TensorSpec]:
    _names(site)
    steps, batch, directions, hidden = _sizes(site)
    dtype = site.spec(_X).dtype
    y: tuple[int, ...] = (steps, directions, batch, hidden)
    state: tuple[int, ...] = (directions, batch, hidden)
    if _batch_first(site):
        y, state = (batch, steps, directions, hidden), (batch, directions, hidden)
    biases, peepholes = 2 * KINDS[site.node.op].gates * hidden, 3 * hidden
    expected = {_B: (directions, biases), _LENGTHS: (batch,), _H: state, _C: state, _P: (directions, peepholes)}
    for i, dims in expected.items():
        if site.has(i) and site.spec(i).dims != dims:
            raise site.fail(f"input {i} is {site.spec(i)}, expected {list(dims)}")
    specs = [TensorSpec(y, dtype), *[TensorSpec(state, dtype)] * KINDS[site.node.op].states]
    return specs[: max(1, len(site.node.outputs))]


def _compute(xp: Any, site: Site, *ins: Array | None) -> Sequence[Array]:
    return over_directions(xp, site, cells(site), *ins)


def over_directions(xp: Any, site: Site, cells: Sequence[Cell], *ins: Array | None) -> Sequence[Array]:
    """The outputs of a site whose directions compute with `cells`.

    Halves are computed in float32: rounding them after every step would let the errors grow with the steps.
    """
    dtype = site.spec(_X).dtype
    kept = dtype.itemsize >= 4
    wide: list[Any] = [a if kept or a is None or i == _LENGTHS else a.astype(np.float32) for i, a in enumerate(ins)]
    x, w, r, b, lengths, h, c, p = (*wide, *[None] * 8)[:8]
    kind, first = KINDS[site.node.op], _batch_first(site)
    _, batch, _, hidden = _sizes(site)
    ys, ends = [], []
    for d, (cell, reverse) in enumerate(zip(cells, _reverses(site), strict=True)):
        start = tuple(
            xp.zeros((batch, hidden), x.dtype) if s is None else (s[:, d] if first else s[d])
            for s in (h, c)[: kind.states]
        )
        y, end = portable.over_time(
            xp, kind.step, cell, x.swapaxes(0, 1) if first else x, w[d], r[d], None if b is None else b[d], lengths,
            start, None if p is None else p[d], reverse=reverse,
        )  # fmt: skip
        ys.append(y)
        ends.append(end)
    y = xp.stack(ys, axis=1)  # (T, D, B, H)
    made = [y.transpose(2, 0, 1, 3) if first else y]
    made += [xp.stack([end[i] for end in ends], axis=1 if first else 0) for i in range(kind.states)]
    return [xp.ascontiguousarray(a, dtype) for a in made[: max(1, len(site.node.outputs))]]


def _supports(site: Site) -> bool:
    """The default cell over whole sequences: no clip, peepholes, coupled gates or other activations."""
    steps, _, directions, _ = _sizes(site)
    lengths = site.value(_LENGTHS)
    whole = not site.has(_LENGTHS) or (lengths is not None and bool((lengths == steps).all()))
    plain = site.attrs["clip"] is None and not site.attrs.get("input_forget", 0) and not site.has(_P)
    dtype = site.spec(_X).dtype
    return (
        whole
        and plain
        and _names(site) == KINDS[site.node.op].defaults * directions
        and dtype in (np.float32, np.float64)
        and site.spec(_X).size > 0
    )


def _all_inputs(io: Buffers) -> tuple[Array, ...]:
    """The eight inputs, None for those left out."""
    return (*io.ins, *(None,) * 8)[:8]


def _directions(site: Site, io: Buffers) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each direction, and its arguments, weights aside."""
    x, *_, h, c, _ = _all_inputs(io)
    first = _batch_first(site)

    def of(state: Array | None, d: int) -> Array | None:
        return None if state is None else state[:, d] if first else state[d]

    for d, reverse in enumerate(_reverses(site)):
        yield (
            d,
            {
                "x": x.swapaxes(0, 1) if first else x,
                "h": of(h, d),
                "c": of(c, d),
                "y": io.outs[0][:, :, d].swapaxes(0, 1) if first else io.outs[0][:, d],
                "scratch": io.scratch,
                "reverse": reverse,
                "last": [of(end, d) for end in io.outs[1:]],
            },
        )


def _bind(site: Site, io: Buffers) -> Sequence[Call]:
    _, w, r, b, *_ = _all_inputs(io)
    linear, calls = bool(site.attrs.get("linear_before_reset", 0)), []
    for d, given in _directions(site, io):
        bias = None if b is None else b[d]
        calls += KINDS[site.node.op].fast(w=w[d], r=r[d], b=bias, linear_before_reset=linear, **given)
    return calls


def _compiled(site: Site) -> bool:
    known = all(site.value(i) is not None for i in (_W, _R, _B) if site.has(i))
    return known and site.spec(_X).dtype == np.float32 and _supports(site)


def _bind_compiled(site: Site, io: Buffers) -> Sequence[Call]:
    from infera_gpu.ops import _jit_recurrent

    steps, batch, *_ = _sizes(site)
    return _jit_recurrent.bind(site, io, [given for _, given in _directions(site, io)], (_W, _R, _B), steps * batch)


_ATTRS: Attrs = {
    "activation_alpha": None,
    "activation_beta": None,
    "activations": None,
    "clip": None,
    "direction": "forward",
    "hidden_size": None,
}
_OWN: dict[str, Attrs] = {"LSTM": {"input_forget": 0}, "GRU": {"linear_before_reset": 0}, "RNN": {}}
LSTM_ATTRS: Attrs = {**_ATTRS, **_OWN["LSTM"]}

_KERNELS = Kinds(
    {"cpu": Kernel(_bind, _supports), "jit": Kernel(_bind_compiled, _compiled)},
    "_triton_recurrent",
    lambda gpu: gpu.recurrent(functions, _sizes),
)


OPS: tuple[Op, ...] = tuple(
    Op(
        op,
        since,
        infer,
        _compute,
        cases_in("_recurrent_cases", op, since),
        {**_ATTRS, **_OWN[op], **more},
        kernels=_KERNELS,
    )
    for op in KINDS
    for since, more in ((7, {}), (14, {"layout": 0}))
)

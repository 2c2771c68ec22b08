"""The "triton" kernels of LSTM, GRU and RNN. Declares no operators itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.calls import Scratch

Functions = Callable[[Site], Sequence[Sequence[tuple[str, float, float]]]]
"""The activations of each direction: name in `portable.recurrent.FUNCTIONS`, alpha, beta."""
Sizes = Callable[[Site], tuple[int, int, int, int]]
"""Steps, batch, directions, hidden size."""

_NAMES = {"leakyrelu": "leaky_relu", "hardsigmoid": "hard_sigmoid"}
"""Activations whose Triton functions have other names."""


def _first(site: Site) -> bool:
    return bool(site.attrs.get("layout", 0))


def _gate_shape(site: Site, sizes: Sizes) -> tuple[int, ...]:
    """What the inputs give to the gates, as it lies in memory: rows of all gates of all directions."""
    from infera_kernels.triton.recurrent import GATES

    steps, batch, directions, hidden = sizes(site)
    return (steps * batch, directions * GATES[site.node.op] * hidden)


def _pieces(site: Site, sizes: Sizes) -> list[tuple[int, ...]]:
    """The shapes of all scratch, float32: the gates, parts of their sums, both states, cells, what a GRU saves, and the
    inputs where they are halves."""
    from infera_kernels.triton.parts import parts_of

    _, batch, directions, hidden = sizes(site)
    rows, columns = _gate_shape(site, sizes)
    depth, dtype = site.spec(0).dims[2], site.spec(0).dtype
    a, b, out = (TensorSpec(s, np.dtype(np.float32)) for s in ((rows, depth), (depth, columns), (rows, columns)))
    parts = parts_of(a, b, out, invariant=site.batch_invariant, tuned=site.tuned)
    state = directions, batch, hidden
    gru = site.node.op == "GRU" and not site.attrs["linear_before_reset"]
    return [
        (rows, columns),
        (parts if parts > 1 else 0, rows * columns),
        (2, *state),
        (int(site.node.op == "LSTM"), *state),
        (2 * int(gru), *state),
        (0,) if dtype == np.float32 else site.spec(0).dims,
    ]


_WEIGHTS = (1, 2, 3, 7)
"""The inputs W, R, B and P."""


def _constant(site: Site) -> bool:
    return all(site.value(i) is not None for i in _WEIGHTS if site.has(i))


def _weight(site: Site, io: Buffers, i: int) -> Array | None:
    """An input in float32; halves are constant, and uploaded as that alone."""
    if not site.has(i):
        return None
    wide = site.spec(i).dtype == np.float32
    return io.ins[i] if wide else io.pack(i, "float32", lambda v: v.astype(np.float32))


def _scratch(shape: tuple[int, ...], scratch: Scratch) -> Array | None:
    return scratch(shape, np.float32) if shape[0] else None


def recurrent(functions: Functions, sizes: Sizes) -> Kernels:
    """The kernels of a recurrent operator, with the same activations in both directions. Halves are computed in
    float32, as by the operator's own function; their weights must be constant."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.layout import FLOATS
        from infera_kernels.triton.recurrent import FUNCTIONS, supports_batch

        steps, batch, directions, hidden = sizes(site)
        given = functions(site)
        known = all(_NAMES.get(name, name) in FUNCTIONS for name, _, _ in given[0])
        dtypes = {s.dtype.name for i, s in enumerate(site.ins) if s is not None and i != 4}
        floats = len(dtypes) == 1 and dtypes <= FLOATS and (dtypes == {"float32"} or _constant(site))
        integers = not site.has(4) or site.spec(4).dtype == np.int32
        same = all(list(g) == list(given[0]) for g in given)
        small = max(batch * directions * hidden, site.spec(2).size) < 2**30
        small = small and supports_batch(site.node.op, batch, directions, hidden, invariant=site.batch_invariant)
        return floats and integers and known and same and small and 0 not in (steps, *site.spec(0).dims, hidden)

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton import elementwise
        from infera_kernels.triton.matmul import matmul
        from infera_kernels.triton.recurrent import Cell, Inputs, States, recurrent

        length, batch, directions, hidden = sizes(site)
        x, lengths, h, c = (io.ins[i] if site.has(i) else None for i in (0, 4, 5, 6))
        w, r, bias, peephole = (_weight(site, io, i) for i in _WEIGHTS)
        gates, partial, states, cells, saved, wide = (_scratch(s, io.scratch) for s in _pieces(site, sizes))
        calls, invariant = list[Call](), site.batch_invariant
        if wide is not None:
            calls, x = elementwise.copy(x, wide, io.launcher), wide
        assert gates is not None
        assert x is not None
        assert w is not None
        weights = w.reshape(-1, w.shape[2]).swapaxes(0, 1)
        how: dict[str, Any] = {"partial": partial, "invariant": invariant, "tuned": site.tuned}
        calls += matmul(x.reshape(-1, x.shape[2]), weights, gates, io.launcher, **how)
        swapped = _first(site)

        def seen(a: Array | None) -> Array | None:
            """A state with its directions first."""
            return a if a is None or not swapped else a.swapaxes(0, 1)

        outer = (batch, length) if swapped else (length, batch)
        by_gate = gates.reshape(*outer, directions, -1, hidden)
        y = io.outs[0]
        ends = [seen(a) for a in (*io.outs[1:], None, None)[:2]]
        direction = str(site.attrs["direction"]).lower()
        made = Cell(
            site.node.op,
            [(_NAMES.get(name, name), alpha, beta) for name, alpha, beta in functions(site)[0]],
            site.attrs["clip"],
            bool(site.attrs.get("input_forget", 0)),
            bool(site.attrs.get("linear_before_reset", 0)),
            direction == "reverse",
        )
        given = Inputs(by_gate.swapaxes(0, 1) if swapped else by_gate, r, bias, lengths, seen(h), seen(c), peephole)
        held = States(states, cells, saved)
        turned: Any = y.transpose(1, 2, 0, 3) if swapped else y
        steps = recurrent(made, given, held, turned, ends[0], ends[1], io.launcher, invariant=invariant)
        return [*calls, *steps]

    def workspace(site: Site) -> int:
        return sum(aligned(4 * int(np.prod(shape))) for shape in _pieces(site, sizes) if shape[0])

    return kernels(bind, supports, inplace=(), strided=False, workspace=workspace)


OPS: tuple[Op, ...] = ()

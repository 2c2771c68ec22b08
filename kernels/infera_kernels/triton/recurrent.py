"""LSTM, GRU and RNN over time: what the inputs give to every gate is one product before; here are the recurrences.

Small networks run all their steps in one launch, a program for every sequence and direction, which reads the weights
from the caches again in each step; states pass from step to step through memory that no other program touches. Of large
ones every step is a launch, a program for some hidden units. Nothing depends on which program is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infera_kernels.calls import Array, Call
from infera_kernels.launch import Launcher
from infera_kernels.launch.types import MAX_GRID
from infera_kernels.triton.elementwise import UNARY
from infera_kernels.triton.invariance import of_batch, rows_seen
from infera_kernels.triton.layout import ceil_div, element_strides, next_power_of_two
from infera_kernels.triton.recurrent_steps import recurrent_kernel, start_kernel

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FUNCTIONS = frozenset({"relu", "tanh", "sigmoid", "leaky_relu", "hard_sigmoid", "elu", "softplus"})
"""The activations that a cell may have, by their names in UNARY."""

_WHOLE_BYTES = 320 * 1024
"""Recurrent weights that one program reads in less time than a launch takes, about."""
_WHOLE_PROGRAMS = 512
"""So many programs of all steps run side by side; more would be run one after the other."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What every direction computes with: LSTM, GRU or RNN, its activations as (name, alpha, beta), and options."""

    kind: str
    activations: Sequence[tuple[str, float, float]]
    clip: float | None = None
    coupled: bool = False
    linear: bool = False
    reverse: bool = False
    """Whether the first direction runs from the end of a sequence to its beginning; the second always does."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a recurrence reads, contiguous, None for what is left out: float32 but for the states.

    What the inputs give to the gates (steps, batch, directions, gates, hidden) is seen that way whichever of steps and
    batch comes first in memory, and so are the states (directions, batch, hidden), of any floating point. Recurrent
    weights are (directions, gates * hidden, hidden), biases (directions, 2 * gates * hidden), int32 lengths (batch,),
    peepholes (directions, 3 * hidden).
    """

    gates: Array
    r: Array
    bias: Array | None = None
    lengths: Array | None = None
    h: Array | None = None
    c: Array | None = None
    peephole: Array | None = None


@dataclass(frozen=True, slots=True)
class States:
    """Scratch of float32 (directions, batch, hidden): two sets of states; in an LSTM the cells, in a GRU that is not
    linear two sets more."""

    h: Array
    c: Array | None
    saved: Array | None


@dataclass(frozen=True, slots=True)
class Tiling:
    """The part of a cell that a program computes: sequences, hidden units, depth of a product; all steps of it?"""

    b: int
    h: int
    k: int
    whole: bool

    @property
    def warps(self) -> int:
        return 8 if self.whole else 4


def pick_tiling(kind: str, batch: int, directions: int, hidden: int) -> Tiling:
    """One program for a sequence where the weights are few and there are not too many sequences; else a step a launch,
    on rows alone where they are few."""
    width = next_power_of_two(hidden)
    deep = max(16, min(width, 512))
    if GATES[kind] * hidden * hidden * 4 <= _WHOLE_BYTES and batch * directions <= _WHOLE_PROGRAMS:
        return Tiling(1, min(width, max(4096 // deep, 1)), deep, whole=True)
    if batch < 8:
        return Tiling(1, min(width, max(1024 // deep, 1)), deep, whole=False)
    return Tiling(16, 16, min(deep, 32), whole=False)


def supports_batch(kind: str, batch: int, directions: int, hidden: int, *, invariant: bool = False) -> bool:
    """Whether a grid has blocks for so many sequences."""
    tiling = pick_tiling(kind, rows_seen(batch, invariant=invariant), directions, hidden)
    return ceil_div(batch, tiling.b) <= MAX_GRID[1]


def recurrent(
    cell: Cell,
    given: Inputs,
    states: States,
    y: Array,
    y_h: Array | None,
    y_c: Array | None,
    launcher: Launcher,
    tiling: Tiling | None = None,
    *,
    invariant: bool = False,
) -> list[Call]:
    """y (steps, directions, batch, hidden) and the last states (directions, batch, hidden), each seen that way, of
    contiguous last axes; what lies past the end of a sequence is 0 in y. `tiling` overrides `pick_tiling`. `invariant`
    sequences are the same bits however many there are."""
    steps, batch, directions, _, hidden = given.gates.shape
    tiling = tiling or pick_tiling(cell.kind, rows_seen(batch, invariant=invariant), directions, hidden)
    size = directions * batch * hidden
    last = y_h if y_h is not None else y_c
    h0 = given.h if given.h is not None else given.c
    end_d, end_b = (0, 0) if last is None else element_strides(last)[:2]
    start_d, start_b = (0, 0) if h0 is None else element_strides(h0)[:2]
    begin = {
        "h0": given.h,
        "c0": given.c,
        "h": states.h,
        "c": states.c,
        "size": size,
        "B": batch,
        "H": hidden,
        "start_b": start_b,
        "start_d": start_d,
    }
    begin = of_batch(begin, "size", "B", "start_d", invariant=invariant)
    calls = [launcher.launch(start_kernel, (ceil_div(size, 1024),), begin, {"BLOCK": 1024}, num_warps=4)]
    padded = [*cell.activations, *[cell.activations[-1]] * (3 - len(cell.activations))]
    args = {
        "gates": given.gates,
        "r": given.r,
        "bias": given.bias,
        "lengths": given.lengths,
        "peephole": given.peephole,
        "h": states.h,
        "c": states.c,
        "saved": states.saved,
        "y": y,
        "y_h": y_h,
        "y_c": y_c,
        "B": batch,
        "H": hidden,
        "steps": steps,
        "swap": size,
        **dict(zip(("gates_t", "gates_b"), element_strides(given.gates), strict=False)),
        **dict(zip(("y_t", "y_d", "y_b"), element_strides(y), strict=False)),
        "end_b": end_b,
        "end_d": end_d,
        "clip": None if cell.clip is None else float(cell.clip),
        "alphas": tuple(float(a) for _, a, _ in padded),
        "betas": tuple(float(b) for _, _, b in padded),
    }
    known = {
        "CELL": cell.kind,
        "G": GATES[cell.kind],
        "LINEAR": cell.linear,
        "COUPLED": cell.coupled,
        "REVERSE": int(cell.reverse),
        **{f"ACT{i}": UNARY[name].fn for i, (name, _, _) in enumerate(padded)},
        "WHOLE": tiling.whole,
        "BB": tiling.b,
        "BH": tiling.h,
        "BK": tiling.k,
    }
    args = of_batch(args, "B", "swap", "gates_t", "y_t", "y_d", "end_d", invariant=invariant)
    blocks = 1 if tiling.whole else ceil_div(hidden, tiling.h)
    grid = (blocks, ceil_div(batch, tiling.b), directions)
    two = cell.kind == "GRU" and not cell.linear and not tiling.whole
    for first in (0,) if tiling.whole else range(steps):
        for phase in (1, 2) if two else (0,):
            calls.append(
                launcher.launch(
                    recurrent_kernel,
                    grid,
                    {**args, "first": first, "count": steps if tiling.whole else 1},
                    {**known, "PHASE": phase},
                    num_warps=tiling.warps,
                    num_stages=1,
                )
            )
    return calls

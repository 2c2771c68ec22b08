"""What a recurrent model carries from one step to the next, and how it is found where nobody says it.

A model returns its state and is fed it again with the next step. Pairs are found by name and type alone where they can
be nothing else, and a run has to show that the output is a state: of the input's shape, finite from a zero state, and
another than the state that was fed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from infera_gpu.spec import TensorSpec
from infera_server.requests import Correlation
from infera_server.runtime import Session
from infera_server.scheduling.proof import PROBE_SIZES, random_array, shape_at
from infera_server.scheduling.rows import Arrays, HostArray, Layout
from infera_server.scheduling.signature import Signature

_FED = (
    ("prev_", "previous_", "past_", "past_key_values.", "past_key_values_", "old_", "in_", "input_", "initial_"),
    ("_in", "_input", "_prev", "_old"),
)
_MADE = (
    ("next_", "new_", "present_", "present.", "present_key_values.", "updated_", "out_", "output_"),
    ("_out", "_output", "_next", "_new", "_n", "n", "_updated"),
)
"""Prefixes and suffixes that tell a state that is fed, and one that is made, from the name of the state."""


@dataclass(frozen=True, slots=True)
class State:
    """An output that is fed to an input of the next step. `initial` is one row of what the first step is fed."""

    input: str
    output: str
    initial: HostArray


@dataclass(frozen=True, slots=True)
class Control:
    """An input that tells the model where in its sequence a step is."""

    input: str
    value: Callable[[Correlation], Any]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The states and control inputs of a model, and how many sequences may be under way; 0: as many as the server's.

    With `needed` every request belongs to a sequence. `idle` is how many seconds a sequence may be silent; None: as
    the server says. `shown` are the states' outputs that clients see.
    """

    states: Sequence[State] = ()
    controls: Sequence[Control] = ()
    needed: bool = False
    slots: int = 0
    idle: float | None = None
    shown: frozenset[str] = field(default_factory=frozenset)
    reason: str = "as sequence_batching says"

    @property
    def hidden(self) -> frozenset[str]:
        """Inputs that no client feeds."""
        controls = {control.input for control in self.controls}
        return frozenset(controls | {state.input for state in self.states} if self.needed else controls)


def seen(model: Signature, recurrence: Recurrence) -> Signature:
    """What clients see of the model: no state where the configuration keeps them, else states that may be left out."""
    states = {state.input for state in recurrence.states}
    made = {state.output for state in recurrence.states} - recurrence.shown if recurrence.needed else set()
    return replace(
        model,
        inputs={
            name: replace(tensor, optional=tensor.optional or name in states)
            for name, tensor in model.inputs.items()
            if name not in recurrence.hidden
        },
        outputs={name: tensor for name, tensor in model.outputs.items() if name not in made},
    )


def find(session: Session, layout: Layout | None, sizes: Mapping[str, int]) -> tuple[Sequence[State], str]:
    """The states of a model, none where they are not certain, and why. `sizes` are those of the open dimensions."""
    found = list(pairs(session, layout))
    if not found:
        return (), "no output has the name and type of an input"
    for side in (0, 1):
        names = [pair[side] for pair in found]
        if doubtful := sorted({name for name in names if names.count(name) > 1}):
            return (), f"'{doubtful[0]}' may belong to several states"
    if len(found) == len(session.inputs) or len(found) == len(session.outputs):
        return (), "nothing but states goes in or comes out"
    states = [State(i, o, _zeros(session.inputs[i], _axis(layout, i))) for i, o in found]
    refusal = _disproof(session, layout, states, sizes)
    return ((), refusal) if refusal else (states, ", ".join(f"'{s.output}' becomes '{s.input}'" for s in states))


def pairs(session: Session, layout: Layout | None, growing: bool = False) -> Iterator[tuple[str, str]]:
    """Inputs and outputs that may be a state, by name and type. What is `growing` has open dimensions."""
    for (i, fed), (o, made) in product(session.inputs.items(), session.outputs.items()):
        axis = _axis(layout, i)
        fixed = growing or all(isinstance(d, int) for at, d in enumerate(fed.shape) if at != axis)
        fits = len(fed.shape) == len(made.shape) and all(
            at == axis
            or not isinstance(d, int)
            or d == fed.shape[at]
            or (growing and not isinstance(fed.shape[at], int))
            for at, d in enumerate(made.shape)
        )
        if fed.shape and fixed and fits and fed.dtype == made.dtype and _stems(i, _FED) & _stems(o, _MADE):
            yield i, o


def _stems(name: str, affixes: tuple[tuple[str, ...], tuple[str, ...]]) -> set[str]:
    """What the name may be short for: itself, and itself without one affix."""
    name, (prefixes, suffixes) = name.lower(), affixes
    found = {name} | {name.removeprefix(prefix) for prefix in prefixes}
    return found | {name.removesuffix(suffix) for suffix in suffixes} - {""}


def _axis(layout: Layout | None, name: str) -> int | None:
    return layout.inputs.get(name) if layout else None


def _zeros(spec: TensorSpec, axis: int | None) -> HostArray:
    return np.zeros(shape_at(spec, {} if axis is None else {axis: 1}, 1), spec.dtype)


def _disproof(session: Session, layout: Layout | None, states: Sequence[State], sizes: Mapping[str, int]) -> str:
    """Why these are no states, as runs show; empty where they are."""
    refusal = ""
    for size in dict.fromkeys((*sizes.values(), *PROBE_SIZES)):
        rng = np.random.default_rng(0)
        feeds = {}
        for name, spec in session.inputs.items():
            axis = _axis(layout, name)
            feeds[name] = random_array(rng, shape_at(spec, {} if axis is None else {axis: 1}, size), spec.dtype)
        try:
            first = session.run(feeds | {s.input: s.initial for s in states})
            second = session.run(feeds)
        except Exception as error:  # whatever the model cannot do with random data, it is not proven
            refusal = f"the probe run failed: {type(error).__name__}: {error}"
            continue
        return next(filter(None, (_no_state(s, feeds, first, second) for s in states)), "")
    return refusal


def _no_state(state: State, feeds: Arrays, first: Arrays, second: Arrays) -> str:
    made, again, fed = first[state.output], second[state.output], feeds[state.input]
    if made.shape != fed.shape or again.shape != fed.shape:
        return f"'{state.output}' is {list(again.shape)} where '{state.input}' is {list(fed.shape)}"
    if made.dtype.kind == "f" and not np.isfinite(made).all():
        return f"'{state.output}' is not finite where '{state.input}' is zero"
    if np.array_equal(again, fed):
        return f"'{state.output}' is '{state.input}' as it was fed"
    return ""

"""Which axis of a model's rows is a length that may be padded, and the proof.

Text comes in every length, and only rows of equal shapes run together. A model that is told by a mask which positions
count gives the same for a row that was made longer: then rows of unequal length share a batch. Like the batch axis this
is never believed unproven: rows of several lengths, padded and run together, must equal the same rows run as they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from infera_gpu.spec import TensorSpec
from infera_server.runtime import Session
from infera_server.scheduling.batching import Batching
from infera_server.scheduling.proof import close, random_array, shape_at
from infera_server.scheduling.rows import (
    Arrays,
    Gatherer,
    HostArray,
    Layout,
    Padding,
    PadRule,
    padded_length,
    split,
    value_of,
)

PROBE_LENGTHS = (16, 32, 224)


@dataclass(frozen=True, slots=True)
class Lengthened:
    """The group of rows that are padded to `length`: `shapes` has all other dimensions."""

    shapes: tuple[object, ...]
    length: int
    padding: Padding = field(compare=False)


def lengthened(feeds: Arrays, layout: Layout, padding: Padding, length: int) -> Lengthened:
    """The group of rows that are made so long."""
    shapes: list[tuple[Hashable, ...]] = []
    for name, array in feeds.items():
        if name in layout.shared:
            shapes.append((name, value_of(array)))
            continue
        left_out = (layout.inputs[name], padding.inputs.get(name))
        shapes.append((name, *(dim for axis, dim in enumerate(array.shape) if axis not in left_out)))
    return Lengthened(tuple(sorted(shapes)), length, padding)


def widens(group: object, into: object) -> bool:
    """Whether rows of one group may be made as long as those of another."""
    return (
        isinstance(group, Lengthened)
        and isinstance(into, Lengthened)
        and group.length < into.length
        and group.shapes == into.shapes
    )


@dataclass(frozen=True, slots=True)
class Guess:
    """An axis that may be a length: where it is in which inputs, which of them is the mask, how it was come by."""

    inputs: Mapping[str, int]
    mask: str
    value: float
    origin: str


def with_padding(session: Session, batching: Batching, rule: PadRule | None = None) -> Batching:
    """The batching, whose layout says what is padded, where the model's rows may be, and why.

    What a `rule` declares is done even where padding changes results, which the reason then says.
    """
    if batching.layout is None or (rule is not None and not rule.axis):
        return batching
    layout, why = derive_padding(session, batching.layout, rule)
    return replace(batching, layout=layout, padding=why)


def derive_padding(session: Session, layout: Layout, rule: PadRule | None = None) -> tuple[Layout, str]:
    """The layout, with padding where it may be; and why it may or may not be. Empty: there is no axis to pad."""
    guesses = [_declared(session, layout, rule)] if rule else list(_derived(session, layout))
    refusals = []
    for guess in guesses:
        if isinstance(guess, str):
            return layout, f"off: {guess}"
        found, refusal = _prove(session, layout, guess)
        if found is not None and not refusal:
            return found, f"on: {guess.origin}, and padded rows equal the rows as they are"
        if found is not None and rule:
            return found, f"on: {guess.origin}, although {refusal}"
        refusals.append(f"{guess.origin}, but {refusal}")
    return layout, f"off: {'; '.join(refusals)}" if refusals else ""


def _axes(session: Session, layout: Layout, symbol: str) -> dict[str, int]:
    """Where a symbol is the one axis of its name, by input; empty where an input has it twice or as its batch."""
    found = {}
    for name, spec in session.inputs.items():
        at = [axis for axis, dim in enumerate(spec.shape) if dim == symbol]
        if len(at) > 1 or layout.inputs[name] in at:
            return {}
        if at:
            found[name] = at[0]
    return found


def _declared(session: Session, layout: Layout, rule: PadRule) -> Guess | str:
    inputs = _axes(session, layout, rule.axis)
    if not inputs:
        return f"declared, but '{rule.axis}' is not one axis besides the batch of any input"
    if rule.mask and rule.mask not in inputs:
        return f"declared, but the mask '{rule.mask}' is no input with an axis '{rule.axis}'"
    return Guess(inputs, rule.mask, rule.value, f"'{rule.axis}' is declared to be padded")


def _derived(session: Session, layout: Layout) -> Iterator[Guess]:
    """The open axis of an input that is named a mask and has nothing but it and the batch.

    Inputs of the same symbol have it too; where no other input has, exporters gave each a symbol of its own, and all
    inputs of this form are as long as the mask.
    """
    for name, spec in session.inputs.items():
        if "mask" not in name.lower() or not _is_flat(spec, layout.inputs[name]):
            continue
        axis = 1 - layout.inputs[name]
        symbol = spec.shape[axis]
        inputs = _axes(session, layout, symbol) if isinstance(symbol, str) else {}
        origin = f"'{symbol}' is the length of mask '{name}'"
        if len(inputs) < 2:
            flat = {n: layout.inputs[n] for n, s in session.inputs.items() if _is_flat(s, layout.inputs[n])}
            inputs = {n: 1 - batch for n, batch in flat.items()}
            origin = f"{', '.join(inputs)} are as long as mask '{name}'"
        yield Guess(inputs, name, 0.0, origin)
        return


def _is_flat(spec: TensorSpec, batch: int) -> bool:
    """Whether it is a number for each position of each row."""
    return len(spec.shape) == 2 and not isinstance(spec.shape[1 - batch], int) and spec.dtype.kind in "biuf"


def _prove(session: Session, layout: Layout, guess: Guess) -> tuple[Layout | None, str]:
    """The layout with this padding, None where it cannot be run; and why padding changes results, or ''."""
    limits = session.facts().id_limits
    refusal = "no length could be run"
    for length, wide in product(PROBE_LENGTHS, (True, False)):
        rng = np.random.default_rng(0)
        feeds = [
            _row(session, layout, guess, own, rng, limits if wide else {})
            for own in (length, length * 3 // 4 - 1, length // 2 + 1)
        ]
        try:
            alone = [session.run(row) for row in feeds]
            cut = _cut([{n: a.shape for n, a in out.items()} for out in alone], layout, length, feeds, guess)
            if isinstance(cut, str):
                return None, cut
            values = dict.fromkeys(guess.inputs, guess.value) | ({guess.mask: 0.0} if guess.mask else {})
            found = replace(layout, padding=Padding(guess.inputs, cut, values))
            together = _together(session, found, feeds, length)
        except Exception as error:  # whatever the model cannot do with random data, it is not proven
            refusal = f"the probe run failed: {type(error).__name__}: {error}"
            continue
        return found, _difference(together, alone)
    return None, refusal


def _row(
    session: Session, layout: Layout, guess: Guess, length: int, rng: np.random.Generator, limits: Mapping[str, int]
) -> dict[str, HostArray]:
    """A random row, all of whose positions count."""
    row = {}
    for name, spec in session.inputs.items():
        fixed = {layout.inputs[name]: 1} | ({guess.inputs[name]: length} if name in guess.inputs else {})
        shape = shape_at(spec, fixed, PROBE_LENGTHS[0])
        if name == guess.mask:
            row[name] = np.ones(shape, spec.dtype)
        else:
            row[name] = random_array(rng, shape, spec.dtype, limit=limits.get(name, 2))
    return row


def _cut(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], layout: Layout, length: int, feeds: Sequence[Arrays], guess: Guess
) -> dict[str, int] | str:
    """The axis of each output that is as long as the row, where it has one; or why that cannot be told."""
    name, axis = next(iter(guess.inputs.items()))
    own = [row[name].shape[axis] for row in feeds]
    cut = {}
    for output in layout.outputs:
        found = [out[output] for out in shapes]
        unequal = [a for a in range(len(found[0])) if len({shape[a] for shape in found}) > 1]
        if not unequal:
            continue
        if len(unequal) > 1 or [shape[unequal[0]] for shape in found] != own:
            return f"output '{output}' is {list(found[-1])} for a row of length {own[-1]}"
        cut[output] = unequal[0]
    return cut


def _together(session: Session, layout: Layout, feeds: Sequence[Arrays], length: int) -> list[Arrays]:
    """The rows run as the server would run them: padded, in one batch, cut apart."""
    assert layout.padding is not None
    lengths = [layout.padding.own_length(row) for row in feeds]
    rows, padded = len(feeds), len(feeds) + 1
    outputs = session.run(Gatherer(layout)(feeds, rows, padded, padded_length(length)))
    return list(split(outputs, layout, [1] * rows, padded, lengths, padded_length(length)))


def _difference(together: Sequence[Arrays], alone: Sequence[Arrays]) -> str:
    for got, want in zip(together, alone, strict=True):
        for name, array in want.items():
            if got[name].shape != array.shape or not close(got[name], array):
                return f"output '{name}' differs between padded rows and rows as they are"
            if array.dtype.kind == "f" and array.size and not np.isfinite(array).any():
                return f"output '{name}' is nowhere finite for random rows, which proves nothing"
    return ""

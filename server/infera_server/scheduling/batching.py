"""Which axis of a model's inputs and outputs is the batch, and the proof.

A wrong guess would answer one caller with another's data, so a guess is never served unproven: the graph must hold no
operator that is known to mix rows, and random rows run together must equal the same rows run one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

import numpy as np

from infera_gpu.errors import OutOfMemoryError
from infera_gpu.spec import TensorSpec
from infera_server.runtime import Session, Specs
from infera_server.scheduling.proof import PROBE_SIZES, ROW_SCALES, SMALL_IDS, Proof, prove, random_array, shape_at
from infera_server.scheduling.rows import HostArray, Layout

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


MAX_PROOFS = 16
"""Values of shared inputs, taken together, that are tried."""


@dataclass(frozen=True, slots=True)
class Batching:
    """What was decided and why. Without a layout each request runs alone.

    `arena_bytes` says what the plan of a bucket needs, at `sizes` for the symbolic dimensions besides the batch; it is
    empty where no plan could be made at the sizes tried, and `refusal` says why then. `padding` says whether rows of
    unequal length share batches, and why; it is empty where their length cannot differ.
    """

    layout: Layout | None
    reason: str
    arena_bytes: Mapping[int, int]
    sizes: Mapping[str, int]
    padding: str = ""
    refusal: str = ""

    def off(self, why: str) -> Batching:
        return replace(self, reason=f"off: {why}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A guess: the batch axis of every input and output, and how it was come by.

    Without `outputs` their axes are seen when it is run. The `shared` inputs have none.
    """

    inputs: Mapping[str, int]
    outputs: Mapping[str, int] | None
    origin: str
    shared: tuple[str, ...] = ()


def derive(session: Session, max_batch: int) -> Batching:
    """Find and prove the batch axis, and size the buckets: powers of two up to `max_batch`, as far as memory goes.

    Raises what planning raises where the model cannot be planned at all.
    """
    alone = _alone(session)
    if max_batch <= 1:
        return alone.off("max_batch is 1")
    found = list(candidates(session.inputs, session.outputs))
    if not found:
        return alone.off(_no_candidate(session))
    facts = session.facts(found[0].shared)
    if facts.mixes_rows:
        return alone.off(f"{found[0].origin}, but {facts.mixes_rows}")
    values = {name: _filled(session.inputs[name], points) for name, points in facts.branches.items()}
    if unknown := [name for name, points in values.items() if points is None]:
        return alone.off(f"input '{unknown[0]}' has no batch axis and chooses a branch")
    refusals = []
    for candidate in found:
        proof = _proven(session, candidate, values)
        if proof.refusal is None:
            return _sized(session, candidate, max_batch, proof)
        refusals.append(f"{candidate.origin}, but {proof.refusal}")
    return alone.off("; ".join(refusals))


def _filled(spec: TensorSpec, points: Sequence[bool | int | float] | None) -> Sequence[HostArray] | None:
    return None if points is None else [np.full(spec.shape, point, spec.dtype) for point in points]


def _proven(session: Session, candidate: Candidate, values: Mapping[str, Sequence[HostArray] | None]) -> Proof:
    """The proof for every branch that the shared inputs can choose; the first that fails."""
    rng = np.random.default_rng(0)
    choices = []
    for name, points in values.items():
        spec = session.inputs[name]
        choices.append(points or [random_array(rng, shape_at(spec, {}, 1), spec.dtype, limit=SMALL_IDS)])
    if math.prod(map(len, choices)) > MAX_PROOFS:
        return Proof({}, {}, f"{', '.join(candidate.shared)} choose among more than {MAX_PROOFS} branches")
    axes = candidate.outputs
    for chosen in product(*choices):
        proof = prove(session, candidate.inputs, axes, dict(zip(values, chosen, strict=True)))
        if proof.refusal is not None:
            break
        axes = proof.outputs
    return proof


def _alone(session: Session) -> Batching:
    """That of one request whose open dimensions all have one size, the smallest that can be planned.

    Raises what planning raises where every size meets the same refusal: then no request can be planned. Refusals that
    differ speak of the sizes, and another may do.
    """
    refusals: list[Exception] = []
    for size in (1, *PROBE_SIZES):
        sizes: dict[str, int] = {}
        shapes = {name: shape_at(spec, {}, size, sizes) for name, spec in session.inputs.items()}
        try:
            return Batching(None, "", {1: arena_of(session, shapes)}, sizes)
        except Exception as error:
            if not sizes or isinstance(error, OutOfMemoryError):
                raise
            refusals.append(error)
    if len({str(error) for error in refusals}) == 1:
        raise refusals[0]
    return Batching(None, "", {}, {}, refusal=str(refusals[0]))


def buckets_to(most: int) -> tuple[int, ...]:
    """Powers of two below `most`, then `most`."""
    sizes = [1]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    return (*sizes, most) if most > 1 else (1,)


def candidates(inputs: Specs, outputs: Specs) -> Iterator[Candidate]:
    """Guesses, likeliest first: a symbol that all inputs and outputs share, leading axes before others."""
    if not inputs or not outputs:
        return
    single = tuple(n for n, s in inputs.items() if all(d == 1 for d in s.shape))
    inputs = {name: spec for name, spec in inputs.items() if name not in single}
    if not inputs:
        return
    specs = [*inputs.values(), *outputs.values()]
    common = [
        s for s in dict.fromkeys(specs[0].shape) if isinstance(s, str) and all(x.shape.count(s) == 1 for x in specs)
    ]
    for symbol in sorted(common, key=lambda s: sum(spec.shape.index(s) for spec in specs)):
        yield Candidate(
            {name: spec.shape.index(symbol) for name, spec in inputs.items()},
            {name: spec.shape.index(symbol) for name, spec in outputs.items()},
            f"'{symbol}' occurs once in every input and output",
            single,
        )
    leading = [spec.shape[0] if spec.shape else 1 for spec in specs]
    are_open = all(not isinstance(d, int) for d in leading)
    if are_open and not (len(set(leading)) == 1 and leading[0] in common):
        yield Candidate(
            dict.fromkeys(inputs, 0),
            dict.fromkeys(outputs, 0),
            "the first axis of every input and output is open",
            single,
        )
    axes = {name: _first_open(spec) for name, spec in inputs.items()}
    if not common and not are_open and None not in (*axes.values(), *map(_first_open, outputs.values())):
        first = {name: axis for name, axis in axes.items() if axis is not None}
        yield Candidate(first, None, "every input and output has an open axis", single)


def _first_open(spec: TensorSpec) -> int | None:
    return next((axis for axis, dim in enumerate(spec.shape) if not isinstance(dim, int)), None)


def _no_candidate(session: Session) -> str:
    for kind, specs in (("input", session.inputs), ("output", session.outputs)):
        if not specs:
            return f"the model has no {kind}s"
        for name, spec in specs.items():
            if kind == "output" and not spec.shape:
                return f"{kind} '{name}' is a scalar"
            if spec.shape and isinstance(spec.shape[0], int):
                return f"{kind} '{name}' is {spec}: its first axis is fixed, and no symbol is in every input and output"
    return "no symbol is in every input and output exactly once"


def _sized(
    session: Session,
    candidate: Candidate,
    max_batch: int,
    proof: Proof,
) -> Batching:
    """The buckets whose plans fit in memory, which a GPU sets aside now, and what each needs."""
    arena: dict[int, int] = {}
    reason = f"on: {candidate.origin}, and {len(ROW_SCALES)} rows together equal the rows one by one"
    sizes, axes = proof.sizes, candidate.inputs
    size = next(iter(sizes.values()), 1)
    for bucket in buckets_to(max_batch):
        shapes = {n: shape_at(spec, {axes[n]: bucket} if n in axes else {}, size) for n, spec in session.inputs.items()}
        try:
            arena[bucket] = arena_of(session, shapes)
        except Exception as error:
            if not arena and isinstance(error, OutOfMemoryError):
                raise  # without memory for one request there is nothing to serve
            if not arena:
                return Batching(None, f"off: no plan for a batch of 1: {error}", {}, sizes)
            reason += f"; no more than {max(arena)} rows, because {error}"
            break
    layout = Layout(axes, proof.outputs, tuple(arena), candidate.shared)
    return Batching(layout, reason, arena, sizes)


def arena_of(session: Session, shapes: Shapes) -> int:
    """What the plan for these shapes needs; on a GPU it, the weights and the code of kernels are loaded now."""
    nbytes = session.plan_for(shapes).arena_bytes
    if session.device.name != "cpu":
        session.reserve(shapes)
    return nbytes

"""Which axis of a model's inputs and outputs is the batch, and the proof.

A wrong guess would answer one caller with another's data, so a guess is never served unproven: three random rows run
together must equal the same rows run one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from infera_gpu.spec import Dim, TensorSpec
from infera_server.rows import Arrays, HostArray, Layout

Specs: TypeAlias = Mapping[str, TensorSpec]

PROBE_ROWS = 3
PROBE_SIZES = (8, 32, 224)
"""Sizes tried for the symbolic dimensions that are not the batch: a sequence, a small image, a large one."""

TOLERANCES = {"float64": 1e-6, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative to the largest magnitude of an output: a batch may sum in another order than a row."""


class Plan(Protocol):
    @property
    def arena_bytes(self) -> int: ...


class Device(Protocol):
    @property
    def name(self) -> str: ...


class Session(Protocol):
    """What the server needs of `infera_gpu.Session`."""

    @property
    def inputs(self) -> Specs: ...
    @property
    def outputs(self) -> Specs: ...
    @property
    def device(self) -> Device: ...
    def run(self, feeds: Arrays) -> Arrays: ...
    def plan_for(self, shapes: Mapping[str, tuple[int, ...]]) -> Plan: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Batching:
    """What was decided and why. Without a layout each request runs alone.

    `arena_bytes` says what the plan of a bucket needs, at `sizes` for the symbolic dimensions besides the batch.
    """

    layout: Layout | None
    reason: str
    arena_bytes: Mapping[int, int]
    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A guess: the batch axis of every input and output, and how it was come by."""

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    origin: str


def derive(session: Session, max_batch: int) -> Batching:
    """Find and prove the batch axis, and size the buckets: powers of two up to `max_batch`, as far as memory goes."""
    static = {name: spec.dims for name, spec in session.inputs.items() if spec.is_static}
    alone = {1: _arena(session, static)} if len(static) == len(session.inputs) else {}
    if max_batch <= 1:
        return Batching(None, "off: max_batch is 1", alone, {})
    refusals = []
    for candidate in candidates(session.inputs, session.outputs):
        sizes, refusal = prove(session, candidate)
        if refusal is None:
            return _sized(session, candidate, max_batch, sizes)
        refusals.append(f"{candidate.origin}, but {refusal}")
    return Batching(None, "off: " + ("; ".join(refusals) or _no_candidate(session)), alone, {})


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
    specs = [*inputs.values(), *outputs.values()]
    shared = [
        s for s in dict.fromkeys(specs[0].shape) if isinstance(s, str) and all(x.shape.count(s) == 1 for x in specs)
    ]
    for symbol in sorted(shared, key=lambda s: sum(spec.shape.index(s) for spec in specs)):
        yield Candidate(
            {name: spec.shape.index(symbol) for name, spec in inputs.items()},
            {name: spec.shape.index(symbol) for name, spec in outputs.items()},
            f"'{symbol}' occurs once in every input and output",
        )
    leading = [spec.shape[0] if spec.shape else 1 for spec in specs]
    if all(not isinstance(d, int) for d in leading) and not (len(set(leading)) == 1 and leading[0] in shared):
        yield Candidate(
            dict.fromkeys(inputs, 0), dict.fromkeys(outputs, 0), "the first axis of every input and output is open"
        )


def _no_candidate(session: Session) -> str:
    for kind, specs in (("input", session.inputs), ("output", session.outputs)):
        if not specs:
            return f"the model has no {kind}s"
        for name, spec in specs.items():
            if not spec.shape:
                return f"{kind} '{name}' is a scalar"
            if isinstance(spec.shape[0], int):
                return f"{kind} '{name}' is {spec}: its first axis is fixed, and no symbol is in every input and output"
    return "no symbol is in every input and output exactly once"


def prove(session: Session, candidate: Candidate) -> tuple[Mapping[str, int], str | None]:
    """Run rows together and one by one. The sizes of the open dimensions, and why the guess is wrong or None."""
    refusal = ""
    for size in PROBE_SIZES:
        rng = np.random.default_rng(0)
        sizes: dict[str, int] = {}
        rows = []
        for _ in range(PROBE_ROWS):
            row = {}
            for name, spec in session.inputs.items():
                axis = candidate.inputs[name]
                row[name] = random_array(rng, _shape(spec, {axis: 1}, size, sizes), spec.dtype)
            rows.append(row)
        together = {n: np.concatenate([r[n] for r in rows], axis=candidate.inputs[n]) for n in session.inputs}
        try:
            whole = session.run(together)
            singles = [session.run(row) for row in rows]
        except Exception as error:  # whatever the model cannot do with random data, it is not proven
            refusal = f"the probe run failed: {type(error).__name__}: {error}"
            if not sizes:
                break
            continue
        return sizes, _difference(whole, singles, candidate.outputs)
    return {}, refusal


def _difference(whole: Arrays, singles: Sequence[Arrays], axes: Mapping[str, int]) -> str | None:
    for name, axis in axes.items():
        got = whole[name]
        parts = [s[name] for s in singles]
        if axis >= got.ndim or got.shape[axis] != len(singles) or any(p.shape[axis] != 1 for p in parts):
            return f"output '{name}' is {list(got.shape)} for {len(singles)} rows and {list(parts[0].shape)} for one"
        want = np.concatenate(parts, axis=axis)
        if want.shape != got.shape or not close(got, want):
            return f"output '{name}' differs between {len(singles)} rows together and one by one"
    return None


def close(got: HostArray, want: HostArray) -> bool:
    """Equal within the dtype's tolerance; exactly where the dtype has none."""
    tolerance = TOLERANCES.get(got.dtype.name)
    if tolerance is None:
        return bool(np.array_equal(got, want))
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = b[np.isfinite(b)]
    scale = float(np.abs(finite).max()) if finite.size else 0.0
    return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True))


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
    """Data any model takes: normal floats; 0 or 1 where indices, lengths and masks may be meant; short strings."""
    bits = rng.integers(0, 2, shape)
    if dtype.hasobject:
        return np.where(bits == 1, "a", "b").astype(object)
    if dtype.kind in "biu":
        return bits.astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _shape(spec: TensorSpec, fixed: Mapping[int, int], size: int, sizes: dict[str, int]) -> tuple[int, ...]:
    """The spec's shape with `fixed` axes set and every other open dimension `size`, noted in `sizes`."""

    def resolve(axis: int, dim: Dim) -> int:
        if axis in fixed:
            return fixed[axis]
        if isinstance(dim, int):
            return dim
        sizes[dim or "?"] = size
        return size

    return tuple(resolve(axis, dim) for axis, dim in enumerate(spec.shape))


def _sized(session: Session, candidate: Candidate, max_batch: int, sizes: Mapping[str, int]) -> Batching:
    """The buckets whose plans fit in memory, and what each needs."""
    arena: dict[int, int] = {}
    reason = f"on: {candidate.origin}, and {PROBE_ROWS} rows together equal the rows one by one"
    size = next(iter(sizes.values()), 1)
    for bucket in buckets_to(max_batch):
        try:
            arena[bucket] = _arena(
                session,
                {n: _shape(spec, {candidate.inputs[n]: bucket}, size, {}) for n, spec in session.inputs.items()},
            )
        except Exception as error:
            if not arena:
                return Batching(None, f"off: no plan for a batch of 1: {error}", {}, sizes)
            reason += f"; no more than {max(arena)} rows, because {error}"
            break
    layout = Layout(candidate.inputs, candidate.outputs, tuple(arena))
    return Batching(layout, reason, arena, sizes)


def _arena(session: Session, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return session.plan_for(shapes).arena_bytes

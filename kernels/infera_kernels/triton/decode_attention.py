"""Attention of few new tokens with a cache that grows: what the kernel covers, and the launches: one, or two where the
keys are cut into parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from infera_kernels.calls import Call, Scratch
from infera_kernels.launch import Launcher, Unhinted, nominal_target
from infera_kernels.launch.types import address_of
from infera_kernels.triton.attention_kernels import combine_kernel
from infera_kernels.triton.attention_tiles import Cut, padded
from infera_kernels.triton.decode_kernel import decode_kernel
from infera_kernels.triton.decode_tiles import MOST_ROWS, SIZES, WIDEST, candidates, cycles, predicted
from infera_kernels.triton.invariance import entries_seen, of_batch
from infera_kernels.triton.layout import (
    FLOATS,
    INDICES,
    INT32_MAX,
    Dims,
    broadcast_strides,
    element_strides,
    fold,
    name_of,
    next_power_of_two,
)
from infera_kernels.triton.units import each_in_units, in_units, unit
from infera_kernels.tuning import Family, Tuned, choose

DECODE = Family(
    *("decode_attention", SIZES, 3, Cut, candidates, predicted, (decode_kernel, combine_kernel)), estimate=cycles
)

NEW_PADDED = 16
"""Rows of the block of new keys, as `tl.dot` takes them: no fewer than MOST_ROWS."""


@dataclass(frozen=True, slots=True)
class Step:
    """q (batch, groups, members, L, D) against keys (batch, groups, N, D) and values (batch, groups, N, E), of which
    the last L are new: k (batch, groups, L, D) and v. `out` is (batch, groups, members, L, E).

    An entry has `before` keys before its first new one, or, where that is None, `lengths` + 1 in all, new ones
    included. Those come from the past as far as it reaches, are zeros beyond, and go to the presents with the new ones
    after them and then zeros. Presents in the very place of the pasts get the new ones, and else keep what they have.
    What is seen ends with the entry's length, where there are lengths, and with `keys`; if `causal`, with the query's
    own key.

    With `cos` and `sin` (rows, width / 2) the first `width` elements of queries and new keys are turned, by the row of
    their position, or of `places` (batch, L), held to the tables'. Pairs are half a width apart, or neighbours where
    `interleaved`.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    past: tuple[Any, Any] | None
    present: tuple[Any, Any]
    keys: int
    before: int | None
    lengths: Any = None
    cos: Any = None
    sin: Any = None
    places: Any = None
    interleaved: bool = False
    causal: bool = True
    scale: float = 1.0

    @property
    def matrices(self) -> tuple[int, int]:
        """Entries of the batch, and groups."""
        batch, groups = self.q.shape[:2]
        return batch, groups

    @property
    def strided(self) -> dict[str, Any]:
        """What the kernel walks by strides, by the names of its parameters."""
        (past_k, past_v), (present_k, present_v) = self.past or (None, None), self.present
        new = {"q": self.q, "k": self.k, "v": self.v, "out": self.out}
        return {**new, "past_k": past_k, "past_v": past_v, "present_k": present_k, "present_v": present_v}

    @property
    def in_place(self) -> tuple[bool, ...]:
        """Whether present keys, and values, lie where the past ones do, as long: then there is nothing to move."""
        pairs = [] if self.past is None else zip(self.past, self.present, strict=True)
        found = [address_of(p) == address_of(q) and p.shape == q.shape and p.strides == q.strides for p, q in pairs]
        return tuple(found) or (False, False)

    @property
    def rows(self) -> int:
        """Of queries that share keys."""
        members, new = self.q.shape[2:4]
        return int(members * new)


def supports_decode(step: Step) -> bool:
    """Shapes as `Step` says, nothing empty; up to 16 rows of queries to the same keys, D and E up to 256. Floats of one
    type out of float32, float16 and bfloat16; lengths and places of int32 or int64. A past wherever there may be
    something before the new keys."""
    given = {name: x for name, x in step.strided.items() if x is not None}
    tables = [] if step.cos is None else [step.cos, step.sin]
    floats = [*given.values(), *tables]
    if len({name_of(x) for x in floats}) != 1 or name_of(step.q) not in FLOATS or len(step.q.shape) != 5:
        return False
    (batch, groups, members, new, d), e = tuple(step.q.shape), step.v.shape[-1]
    total, past = step.present[0].shape[-2], 0 if step.past is None else step.past[0].shape[-2]
    rows = {"q": new, "k": new, "v": new, "out": new, "past": past, "present": total}
    for name, x in given.items():
        which, width = name.split("_")[0], e if name == "out" or name.endswith("v") else d
        lead = (batch, groups, members) if which in ("q", "out") else (batch, groups)
        if tuple(x.shape) != (*lead, rows[which], width):
            return False
    if any(0 in x.shape for x in floats) or step.rows > MOST_ROWS or max(d, e) > WIDEST or total > INT32_MAX - 1024:
        return False
    if (step.before is None and step.lengths is None) or (step.past is None) != (step.before == 0):
        return False
    if step.lengths is not None and (tuple(step.lengths.shape) != (batch,) or name_of(step.lengths) not in INDICES):
        return False
    if tables and (tuple(step.cos.shape) != tuple(step.sin.shape) or len(step.cos.shape) != 2):
        return False
    if tables and 2 * step.cos.shape[1] > d:
        return False
    at = step.places if tables else None
    return at is None or (name_of(at) in INDICES and tuple(at.shape) in {(batch, new), (batch, 1), (1, new), (1, 1)})


def _cut(step: Step, *, invariant: bool, tuned: Tuned | None) -> Cut:
    batch, groups = step.matrices
    sizes = {
        "rows": step.rows,
        "matrices": entries_seen(batch, invariant=invariant) * groups,
        "keys": 1 if step.past is None else step.present[0].shape[2],
        "size": max(step.q.shape[-1], step.v.shape[-1]),
    }
    kind = "ieee" if name_of(step.q) == "float32" else "half"
    target = nominal_target(90) if tuned is None else tuned.target
    return choose(DECODE, DECODE.problem(kind, sizes), target, None if invariant else tuned)


def decode_scratch(step: Step, *, invariant: bool = False, tuned: Tuned | None = None) -> tuple[Dims, ...]:
    """The shapes of the float32 scratch that `decode` asks for."""
    splits = _cut(step, invariant=invariant, tuned=tuned).splits
    rows = math.prod(step.matrices), splits, step.rows
    return ((*rows, step.v.shape[-1]), rows, rows) if splits > 1 else ()


def _walk(x: Any, *, invariant: bool) -> tuple[tuple[Any, ...], Dims]:
    """Strides in units, and the units. What a batch of one has for its own stride is any number: `invariant` kernels
    are told no more of it than that it is one of whole rows."""
    if x is None:
        return fold((0,) * 4), (1,) * 4
    strides = element_strides(x)
    steps, units = each_in_units(strides)
    if not invariant:
        return steps, units
    common = math.gcd(unit(strides[:1]), x.shape[-1])
    return (Unhinted(strides[0] // common), *steps[1:]), (common, *units[1:])


def decode(
    step: Step, launcher: Launcher, scratch: Scratch, *, invariant: bool = False, tuned: Tuned | None = None
) -> list[Call]:
    """out = softmax(scale q kᵀ) v with sums and weights in float32, rows that see nothing 0, and the presents. Any
    strides; nothing overlaps what is written, but for pasts and presents in one place.

    `invariant` entries are the same bits however many there are; nothing is tuned for them.
    """
    if not supports_decode(step):
        given = ", ".join(f"{name_of(x)}{list(x.shape)}" for x in step.strided.values() if x is not None)
        raise ValueError(f"decode: no kernel for {given}, {step.keys} keys")
    batch, groups = step.matrices
    members, new, d = step.q.shape[2:]
    e, cut = step.v.shape[-1], _cut(step, invariant=invariant, tuned=tuned)
    args: dict[str, Any] = {name: getattr(step, name) for name in ("lengths", "cos", "sin", "places")}
    units: dict[str, Dims] = {}
    for name, x in step.strided.items():
        args[name] = x
        args[f"{name}_steps"], units[f"{name.upper()}_UNITS"] = _walk(x, invariant=invariant)
    for name, x in (("cos_steps", step.cos), ("sin_steps", step.sin)):
        args[name] = fold((0, 0) if x is None else element_strides(x))
    args |= {
        "peaks": None,
        "totals": None,
        "lengths_step": fold((0,) if step.lengths is None else element_strides(step.lengths))[0],
        "place_steps": fold((0, 0) if step.places is None else broadcast_strides(step.places, (batch, new))),
        "groups": groups,
        "members": members,
        "before": step.before or 0,
        "keys": step.keys,
        "kept": 0 if step.past is None else step.past[0].shape[2],
        "rows": step.present[0].shape[2],
        "table_rows": 1 if step.cos is None else step.cos.shape[0],
        "scale": float(step.scale * math.log2(math.e)),
    }
    shared = {"E": e, "E_PADDED": padded(e), "SPLITS": cut.splits}
    constexprs = {
        **shared,
        **units,
        "D": d,
        "D_PADDED": padded(d),
        "NEW": new,
        "NEW_PADDED": NEW_PADDED,
        "BM": cut.rows,
        "BN": cut.keys,
        "HALF": 0 if step.cos is None else step.cos.shape[1],
        "INTERLEAVED": step.interleaved,
        "FROM_END": step.before is None,
        "CAUSAL": step.causal,
        "KEYS_IN_PLACE": step.in_place[0],
        "VALUES_IN_PLACE": step.in_place[1],
    }
    how = {"num_warps": cut.warps, "num_stages": cut.stages}
    grid = (batch * groups * cut.splits,)
    if cut.splits == 1:
        return [launcher.launch(decode_kernel, grid, args, constexprs, **how)]
    shapes = decode_scratch(step, invariant=invariant, tuned=tuned)
    parts, peaks, totals = (scratch(shape, np.float32) for shape in shapes)
    of_batches, of_groups, *inner = element_strides(step.out)
    (lead, common), (steps, each) = in_units((of_groups, of_batches)), each_in_units(inner)
    joined = {"out": step.out, "M": new, "rows": step.rows, "lead": (groups, batch), "out_lead": lead}
    joined |= {"out_steps": steps, "parts": parts, "peaks": peaks, "totals": totals}
    joining = {
        **shared,
        "SPLITS_PADDED": next_power_of_two(cut.splits),
        "OUT_UNITS": (common, *each),
        "PACKED": True,
        "EXP2": True,
        "ZERO": "unseen",
    }
    args |= {"out": parts, "peaks": peaks, "totals": totals}
    # Left alone, the assembler saves registers for more blocks than there are and spills a few (sm_86, heads of 256).
    combining = {"num_warps": 4, "maxnreg": 128}
    joined = of_batch(joined, "lead", "out_lead", invariant=invariant)
    return [
        launcher.launch(decode_kernel, grid, args, constexprs, **how),
        launcher.launch(combine_kernel, (batch * groups * step.rows,), joined, joining, **combining),
    ]

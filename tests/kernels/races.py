"""Races that the interpreter cannot run into, found in the addresses of what it loads and stores.

It runs program after program, and all lanes of a tile at once. On a GPU programs run side by side, and so do the
threads of one, in no order but that of barriers, and Triton makes none for global memory. Which thread has a lane is
chosen for each access apart; of a tile with fewer lanes than the program has threads several load each, and one of them
stores it. So within a launch these are findings:

- between programs: memory that one writes and another reads or writes, unless all do so by atomics;
- within a program, where no `tl.debug_barrier` lies between: memory read after it was written, by whatever lane;
  written after another lane has read it, which a thread may do later; written twice. Where the lane that reads it is
  the one that writes it, other threads may still read it later, as they have that lane too. That matters where they
  store something else: it is a finding if the program stores more before the next barrier. If it does not, what passes
  between threads passes before, through shared memory and its barriers.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import reduce
from operator import or_
from typing import NamedTuple

import numpy as np

from tests.kernels.accesses import ATOMIC, LOAD, STORE, Access, Array, Program, Record


class Kind(StrEnum):
    SHARED = "written by one program and read by another"
    WRITTEN = "written by several programs"
    ALIKE = "written by several programs, with the same value"
    BACK = "read after its program wrote it, without a barrier"
    LATER = "written after another lane of its program read it, without a barrier"
    INPLACE = "written after the same lane read it, and more after that, without a barrier"
    TWICE = "written twice by its program, without a barrier"
    TWICE_ALIKE = "written twice by its program, without a barrier, with the same value"


class Race(NamedTuple):
    """A finding: which addresses, ascending, and the programs that touch the first of them, the first and the last."""

    kind: Kind
    addresses: Array
    programs: tuple[Program, Program]


class Cells(NamedTuple):
    """Accesses taken apart: a row for each lane and each cell of memory that it touches, sorted by cell; those of one
    cell in the order of the interpreter."""

    cell: Array
    mode: Array
    program: Array
    section: Array
    number: Array
    """Of the access."""
    lane: Array
    """Another one in a tile of another shape."""
    bits: Array
    """What is stored."""

    def at(self, rows: Array) -> Cells:
        return Cells(*(column[rows] for column in self))


class Groups:
    """Rows that are equal in some columns, group by group: those of several rows, of which some write, not all of them
    atomics."""

    def __init__(self, cells: Cells, *columns: Array) -> None:
        starts = np.flatnonzero(np.any([np.diff(column, prepend=-1) != 0 for column in columns], axis=0))
        sizes = np.diff(starts, append=len(cells.cell))
        low, high = np.minimum.reduceat(cells.mode, starts), np.maximum.reduceat(cells.mode, starts)
        kept = (sizes > 1) & (high != LOAD) & (low != ATOMIC)
        self.rows = cells.at(np.repeat(kept, sizes))
        self.starts = np.cumsum(sizes[kept]) - sizes[kept]

    def bounds(self, values: Array, of: Array | None = None) -> tuple[Array, Array]:
        """The least and the greatest value of each group, of the rows that are named. Of none: greatest, least int."""
        kept = np.True_ if of is None else of
        least, greatest = np.iinfo(values.dtype).min, np.iinfo(values.dtype).max
        low = np.minimum.reduceat(np.where(kept, values, greatest), self.starts)
        return low, np.maximum.reduceat(np.where(kept, values, least), self.starts)

    def some(self, rows: Array) -> Array:
        """Whether some of each group's rows are among those that are named."""
        found: Array = np.logical_or.reduceat(rows, self.starts)
        return found

    def differ(self, values: Array, of: Array | None = None) -> Array:
        low, high = self.bounds(values, of)
        return low < high


def races(record: Record) -> list[Race]:
    """What is found in a launch, one kind after another."""
    accesses = _meeting(record.accesses)
    if not accesses:
        return []
    bits = reduce(or_, (a.size | int(np.bitwise_or.reduce(a.addresses)) for a in accesses))
    unit = bits & -bits
    cells = _cells(accesses, unit)
    between = Groups(cells, cells.cell)
    within = Groups(between.rows, between.rows.cell, between.rows.section)
    made = []
    for groups, found in (between, _between(between)), (within, _within(within, _final_writes(record))):
        for kind, where in found.items():
            if where.any():
                first, last = (programs[where][0] for programs in groups.bounds(groups.rows.program))
                addresses = np.unique(groups.rows.cell[groups.starts[where]]) * unit
                made.append(Race(kind, addresses, (record.programs[first], record.programs[last])))
    return made


def _meeting(accesses: Sequence[Access]) -> list[Access]:
    """Those that may touch what another one writes, in their order; none where that is certain to be nothing."""
    writes = [a.addresses for a in accesses if a.mode != LOAD]
    if not writes:
        return []
    written = np.unique(np.concatenate(writes))
    bounds = np.array([(a.addresses.min() - 8, a.addresses.max() + 8) for a in accesses])
    first, last = np.searchsorted(written, bounds.T)
    met = [a for a, inside in zip(accesses, first < last, strict=True) if inside]
    once = all(a.mode != LOAD for a in met) and len(written) == sum(map(len, writes))
    return [] if once and len({a.size for a in met}) == 1 else met


def _cells(accesses: Sequence[Access], unit: int) -> Cells:
    """Of so many bytes each."""
    shapes: dict[tuple[int, ...], int] = {}
    parts = []
    for a in accesses:
        each = a.size // unit
        cell = (a.addresses[:, None] // unit + np.arange(each, dtype=np.uint64)).reshape(-1).astype(np.int64)
        same = (np.full(cell.size, n) for n in (a.mode, a.program, a.section, a.number))
        lane = np.repeat(a.lanes + (shapes.setdefault(a.shape, len(shapes)) << 40), each)
        bits = np.zeros(cell.size, np.int64) if a.values is None else a.values.view(f"i{unit}").astype(np.int64)
        parts.append((cell, *same, lane, bits))
    joined = Cells(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return joined.at(np.argsort(joined.cell, kind="stable"))


def _between(groups: Groups) -> dict[Kind, Array]:
    """Of which groups, the rows of a cell each, each kind of finding is one."""
    rows = groups.rows
    several = groups.differ(rows.program, rows.mode != LOAD) & groups.some(rows.mode == STORE)
    alike = _alike(groups)
    return {
        Kind.SHARED: groups.differ(rows.program) & groups.some(rows.mode == LOAD),
        Kind.WRITTEN: several & ~alike,
        Kind.ALIKE: several & alike,
    }


def _within(groups: Groups, final: Array) -> dict[Kind, Array]:
    """The same of groups that are the rows of a cell in a section; `final` is what `_final_writes` gives."""
    rows = groups.rows
    load, place = rows.mode == LOAD, np.arange(len(rows.mode))
    first_load, last_load = groups.bounds(place, load)
    first_write, last_write = groups.bounds(place, ~load)
    later = first_load < last_write
    other = groups.differ(rows.lane)
    more = groups.bounds(rows.number, ~load)[0] < final[rows.section[groups.starts]]
    twice = (first_write < last_write) & groups.some(rows.mode == STORE)
    alike = _alike(groups)
    return {
        Kind.BACK: first_write < last_load,
        Kind.LATER: later & other,
        Kind.INPLACE: later & ~other & more,
        Kind.TWICE: twice & ~alike,
        Kind.TWICE_ALIKE: twice & alike,
    }


def _alike(groups: Groups) -> Array:
    """Where all that is written is known to be the same: there are no atomics."""
    rows = groups.rows
    return ~groups.differ(rows.bits, rows.mode == STORE) & ~groups.some(rows.mode == ATOMIC)


def _final_writes(record: Record) -> Array:
    """The number of the last write of each section, 0 where there is none."""
    final = np.zeros(record.accesses[-1].section + 1, np.int64)
    for access in record.accesses:
        if access.mode != LOAD:
            final[access.section] = access.number
    return final

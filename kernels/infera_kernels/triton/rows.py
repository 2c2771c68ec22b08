"""The tile of a kernel that works on whole rows: many short ones, or one long one, in the registers of a block."""

from __future__ import annotations

from dataclasses import dataclass

from infera_kernels.triton.layout import next_power_of_two

LONGEST_ROW = 16384
"""Longer rows do not fit in registers (32 float32 a thread at 16 warps); they are walked in blocks of LONG_BLOCK."""

LONG_BLOCK = 4096
_TILE = 1024


@dataclass(frozen=True, slots=True)
class RowTile:
    rows: int
    cols: int
    warps: int


def row_tile(rows: int, cols: int) -> RowTile | None:
    """The tile for rows of `cols` elements; None where a row is too long for one."""
    width = next_power_of_two(cols)
    if width > LONGEST_ROW:
        return None
    height = max(1, min(_TILE // width, next_power_of_two(rows)))
    return RowTile(height, width, max(4, min(16, height * width // 512)))

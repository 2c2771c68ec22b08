"""What work is taken to be when results may not depend on the batch.

Which tile, path or number of parts is fastest depends on how much there is to do, and the order in which a kernel adds
depends on those. `invariant` work is always cut up as if it had the sizes below: every row, or entry of the leading
axis, then gets the same bits in every batch, and takes longer where there are far more or far fewer. Its kernels are
the same binaries, too: what a compiler knows of alignment decides how lanes lie along rows, and so in which order they
add.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infera_kernels.launch import Unhinted

ROWS = 256
"""Of a product, a reduction, a normalisation."""

ENTRIES = 4
"""Along the leading axis: images of a convolution or pool, sequences of attention."""


def rows_seen(rows: int, *, invariant: bool) -> int:
    """How many rows the choice of a kernel goes by."""
    return ROWS if invariant else rows


def entries_seen(entries: int, *, invariant: bool) -> int:
    """How many entries of the leading axis the choice of a kernel goes by."""
    return ENTRIES if invariant else entries


def of_batch(args: Mapping[str, Any], *names: str, invariant: bool) -> dict[str, Any]:
    """The arguments of a kernel; where it is `invariant`, with no hint at the alignment of those that follow from the
    size of the batch. Of dimensions, innermost first, that is the last."""
    if not invariant:
        return dict(args)
    return {**args, **{name: _unhinted(args[name]) for name in names if args.get(name) is not None}}


def _unhinted(value: Any) -> Any:
    if isinstance(value, tuple):
        return (*value[:-1], *map(_unhinted, value[-1:]))
    return Unhinted(value) if isinstance(value, int) else value

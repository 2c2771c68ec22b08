"""What work is taken to be when results may not depend on the batch.

Which tile, path or number of parts is fastest depends on how much there is to do, and the order in which a kernel adds
depends on those. `invariant` work is always cut up as if it had the sizes below: every row, or entry of the leading
axis, then gets the same bits in every batch, and takes longer where there are far more or far fewer.
"""

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

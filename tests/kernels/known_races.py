"""What `races` finds in kernels that are right, and why they are."""

from __future__ import annotations

from collections.abc import Mapping

from tests.kernels.races import Kind

Known = Mapping[tuple[str, Kind], str]

KNOWN: Known = {
    ("recurrent_kernel", Kind.INPLACE): "A program that computes a cell block after block writes the states `c` of a "
    "block last, after all that is made of them; what it writes afterwards is of other blocks, which read others.",
}
"""Kernel and kind -> the reason."""

"""What becomes of exact sums of products of 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from infera_kernels.triton.layout import element_strides, fold_one
from infera_kernels.triton.quantise import saturated

BYTES = frozenset({"int8", "uint8"})


@triton.jit
def scaled_sums(acc, factor, added, out_scale, out_zero, LOW: tl.constexpr, HIGH: tl.constexpr):
    """int32 sums times `factor`, over the output's scale where there is one, plus what is added, in float32; with LOW
    and HIGH quantised again, int32."""
    if out_scale is not None:
        factor = tl.div_rn(factor, tl.load(out_scale).to(tl.float32))
    y = acc.to(tl.float32) * factor
    if added is not None:
        y += added.to(tl.float32)
    if LOW is not None:
        y = saturated(y, tl.load(out_zero).to(tl.float32), LOW, HIGH).to(tl.int32)
    return y


@dataclass(frozen=True, slots=True)
class Scaling:
    """What becomes of the sums: times alpha, `left`, one or one a row, and `right`, one or one a column, in float32.

    With `scale` and `zero` they are quantised to the zero point's type. A bias of int32 broadcasts to the sums and is
    added to them, one of floats, one a column, to the products.
    """

    left: Any
    right: Any
    scale: Any = None
    zero: Any = None
    alpha: float = 1.0


def step_of(parameter: Any) -> Any:
    """The stride of a parameter of one value, or of one for each row or column."""
    if parameter is None or parameter.size == 1:
        return fold_one(0)
    return fold_one(element_strides(parameter)[-1])

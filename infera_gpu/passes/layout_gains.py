"""What convolutions with channels last are for, and what they save, by the kind of the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from infera_gpu.graph import HostArray, Node
from infera_gpu.spec import DType


@dataclass(frozen=True, slots=True)
class Convolutions:
    """What those of a kind are for, and save for an element of output, in elements moved by a Transpose."""

    floats: frozenset[DType]
    ranks: frozenset[int]
    depthwise: float
    pointwise: float
    other: float


def _types(*types: Any) -> frozenset[DType]:
    return frozenset(map(np.dtype, types))


KINDS: Mapping[str, Convolutions] = MappingProxyType(
    {
        "cpu": Convolutions(_types(np.float32, np.float64), frozenset((3, 4)), 3.0, 0.25, 1.0),
        "triton": Convolutions(
            _types(np.float32, np.float16, ml_dtypes.bfloat16), frozenset((3, 4, 5)), 1.0, 0.25, 4.0
        ),
    }
)
"""What is known of the CPU was measured. On a GPU a tile reads its input once a tap, with channels first a few bytes of
every 32 at a time; depthwise convolutions and products read whole lines in either order."""


def gain_of(kind: Convolutions, node: Node, weight: HostArray, elements: int) -> float:
    """What a convolution with channels last saves where it makes so many elements, in elements moved by a Transpose."""
    if int(node.attrs.get("group", 1)) > 1 and weight.shape[1] == 1:
        return kind.depthwise * elements
    return (kind.pointwise if all(k == 1 for k in weight.shape[2:]) else kind.other) * elements

"""Every family of launches that a choice is tuned for, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from infera_kernels.triton import dnn, dnn_attention
from infera_kernels.triton.attention import ATTENTION
from infera_kernels.triton.conv import CONV, SPLITS
from infera_kernels.triton.decode_attention import DECODE
from infera_kernels.triton.gated import GATED, GATED_ROW
from infera_kernels.triton.integer_conv import INTEGER_CONV
from infera_kernels.triton.integer_matmul import INTEGER_MATMUL
from infera_kernels.triton.matmul import MATMUL
from infera_kernels.triton.parts import PARTS
from infera_kernels.triton.quantized_conv import QUANTIZED_CONV
from infera_kernels.triton.skinny import MATVEC
from infera_kernels.tuning import Family

FAMILIES: Mapping[str, Family[Any]] = MappingProxyType(
    {
        f.name: f
        for f in (
            *(MATMUL, PARTS, MATVEC, CONV, SPLITS, INTEGER_MATMUL, INTEGER_CONV, QUANTIZED_CONV, ATTENTION, DECODE),
            *(GATED, GATED_ROW, dnn.WAY, dnn_attention.WAY),
        )
    }
)

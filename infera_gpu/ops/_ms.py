"""What the declarations of com.microsoft share. Declares no operators itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from infera_gpu.op import Case, Compute, Expansion, Infer, Kernel, Op, Site
from infera_gpu.ops._families import plain, requiring
from infera_gpu.spec import Array

F32 = np.dtype(np.float32)


def ms_op(
    name: str,
    infer: Infer,
    compute: Any,
    cases: tuple[Case, ...],
    domain: str = "com.microsoft",
    needs: tuple[int, ...] = (),
    kernels: Mapping[str, Kernel] | None = None,
    expand: Callable[[Site], Expansion | None] | None = None,
    **attrs: Any,
) -> Op:
    """A declaration of version 1. `needs` are the inputs that must be present."""
    wrapped: Compute = plain(compute)
    wanting = requiring(infer, *needs)
    return Op(name, 1, wanting, wrapped, cases, attrs, domain=domain, kernels=kernels or {}, expand=expand)


def wide(x: Array) -> Array:
    """Halves in float32."""
    return x.astype(np.float32) if x.dtype.itemsize < 4 else x


OPS: tuple[Op, ...] = ()

"""The operators' "triton" kernels. What wraps them says which shapes and types it covers; this only translates.

Triton is imported when a kernel is asked whether it supports a site, or bound: only devices that run it ask. What
scratch a kernel takes it says by `workspace`: binding to dummies on the host would tell nothing on a GPU. Declares no
operators itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infera_gpu.op import Bind, Kernel, Op, Site

Kernels = dict[str, Kernel]


def _none(site: Site) -> int:
    return 0


def kernels(
    bind: Bind,
    supports: Callable[[Site], bool],
    *,
    inplace: tuple[int, ...],
    strided: bool,
    strided_out: bool | None = None,
    workspace: Callable[[Site], int] = _none,
    **more: Any,
) -> Kernels:
    """A kernel of the kind "triton". One that is `strided` writes any strides too, unless `strided_out` says otherwise.

    `workspace` gives the bytes of all its scratch, each piece `memory.aligned`; `more` are fields of Kernel.
    """
    writes = strided if strided_out is None else strided_out
    made = Kernel(bind, supports, workspace, inplace=inplace, strided=strided, strided_out=writes, **more)
    return {"triton": made}


OPS: tuple[Op, ...] = ()

"""The operators' declarations: one file a family, each ending with its `OPS`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from infera_gpu.op import Op, Registry


@cache
def registry() -> Registry:
    """Every operator declared in this package. The modules are imported on the first call."""
    ops: list[Op] = []
    for module in pkgutil.iter_modules(__path__):
        ops += getattr(importlib.import_module(f"{__name__}.{module.name}"), "OPS", ())
    return Registry(ops)

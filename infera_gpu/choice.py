"""What runs a node: the first kernel that the device prefers and that fits, or the operator's own function."""

from __future__ import annotations

from typing import NamedTuple

from infera_gpu.devices.base import Device
from infera_gpu.errors import InvarianceError
from infera_gpu.layout import Space
from infera_gpu.op import Kernel, Site
from infera_gpu.spec import DType
from infera_gpu.specialize import Placed


class Choice(NamedTuple):
    """How a node will run: a kernel of some kind, or the operator's own function through an array library."""

    via: str
    space: Space
    kernel: Kernel | None


def choose(placed: Placed, device: Device) -> Choice:
    """The first kernel that the device prefers, that supports the site and pays, else the operator's `compute`.

    Raises InvarianceError naming the node where a device that is `batch_invariant` would compute floats by another
    library, which adds in an order of its own.
    """
    spare: Choice | None = None
    for kind in device.kinds:
        kernel = placed.op.kernels.get(kind)
        if kernel is not None and kernel.supports(placed.site):
            found = Choice(kind, device.space, kernel)
            if kernel.pays(placed.site):
                return found
            spare = spare or found
    if spare is not None:
        return spare
    if device.batch_invariant and placed.op.view is None and placed.op.windows is None and _has_floats(placed.site):
        raise InvarianceError(
            f"{placed.site.node}: it has no kernel that gives the same bits in every batch, which "
            "batch_invariant=True asks for"
        )
    if device.space == "device" and device.runs_portable and runs_on_cupy(placed):
        return Choice("portable", "device", None)
    if device.space == "device":
        kernel = placed.op.kernels.get("cpu")
        if kernel is not None and kernel.supports(placed.site):
            return Choice("cpu", "host", kernel)
    return Choice("numpy", "host", None)


def runs_on_cupy(placed: Placed) -> bool:
    """Whether the operator's own function can be called with CuPy's arrays.

    CuPy holds elements of any type, but computes with none of those that ml_dtypes adds to NumPy's, bfloat16 excepted.
    """
    known = (dtype.isbuiltin == 1 or dtype.name == "bfloat16" for dtype in _types(placed.site))
    return placed.op.portable and (placed.op.view is not None or all(known))


def _has_floats(site: Site) -> bool:
    return any(dtype.kind not in "biuO" for dtype in _types(site))


def _types(site: Site) -> list[DType]:
    """Of all operands."""
    return [s.dtype for s in (*site.ins, *site.outs) if s is not None]

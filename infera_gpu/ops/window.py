"""The geometry that convolutions and pools share: kernel, strides, dilations, padding, and the output they give.

Declares no operators itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

from infera_gpu.op import Op, Site
from infera_gpu.spec import Array, TensorSpec

ATTRS: dict[str, Any] = {"auto_pad": "NOTSET", "dilations": None, "kernel_shape": None, "pads": None, "strides": None}
"""The attributes that `window` reads."""


@dataclass(frozen=True, slots=True)
class Window:
    """A window's geometry; every field has one entry a spatial axis. `pads` are (before, after)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    out: tuple[int, ...]

    @property
    def extents(self) -> tuple[int, ...]:
        """Input elements that the dilated kernel spans."""
        return extents(self.kernel, self.dilations)

    @property
    def params(self) -> dict[str, Any]:
        """Strides, dilations and pads, as the kernels take them."""
        return {"strides": self.strides, "dilations": self.dilations, "pads": self.pads}


def extents(kernel: Sequence[int], dilations: Sequence[int]) -> tuple[int, ...]:
    """Elements that a dilated kernel spans."""
    return tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))


def per_axis(site: Site, name: str, count: int, default: int) -> tuple[int, ...]:
    """Attribute `name` as `count` integers. Raises PlanError where it has another length."""
    value = site.attrs.get(name)
    if value is None:
        return (default,) * count
    if len(value) != count:
        raise site.fail(f"{name} has {len(value)} values {list(value)}, expected {count}")
    return tuple(map(int, value))


def pad_pairs(site: Site, rank: int) -> tuple[tuple[int, int], ...]:
    """The attribute `pads`, all begins then all ends, as (before, after) of each axis."""
    flat = per_axis(site, "pads", 2 * rank, 0)
    return tuple(zip(flat[:rank], flat[rank:], strict=True))


def window(site: Site, kernel: Sequence[int] | None = None) -> Window:
    """The window over the spatial axes of input 0; `kernel` is the weights' where the attribute may be left out.

    Raises PlanError for lengths that do not match, negative padding, or an input smaller than the window.
    """
    x = site.spec(0)
    size = x.dims[2:]
    rank = len(size)
    if rank < 1:
        raise site.fail(f"input 0 is {x}, expected at least one spatial axis after (batch, channels)")
    declared, *written = _written(site, rank)
    if kernel is None and declared is None:
        raise site.fail("attribute 'kernel_shape' is required")
    shape = tuple(kernel or ()) if declared is None else declared
    if kernel is not None and tuple(kernel) != shape:
        raise site.fail(f"kernel_shape is {list(shape)} but the weights' kernel is {list(kernel)}")
    try:
        return _window(size, shape, *written)
    except ValueError as error:
        raise site.fail(str(error)) from None


_Written: TypeAlias = tuple[
    tuple[int, ...] | None, tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...], str, bool
]


def _written(site: Site, rank: int) -> _Written:
    """The kernel, if the attributes give it, strides, dilations, padding, `auto_pad` and `ceil_mode`; remembered with
    the node, like the attributes, since the same node meets many shapes."""
    attrs = site.attrs
    known: tuple[Any, int, _Written] | None = site.node.__dict__.get("_written")
    if known is not None and known[0] is attrs and known[1] == rank:
        return known[2]
    made: _Written = (
        None if attrs.get("kernel_shape") is None else per_axis(site, "kernel_shape", rank, 1),
        per_axis(site, "strides", rank, 1),
        per_axis(site, "dilations", rank, 1),
        pad_pairs(site, rank) if attrs["auto_pad"] == "NOTSET" else ((0, 0),) * rank,
        attrs["auto_pad"],
        bool(attrs.get("ceil_mode", 0)),
    )
    site.node.__dict__["_written"] = attrs, rank, made
    return made


@lru_cache(maxsize=1024)
def _window(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    mode: str,
    ceil: bool,
) -> Window:
    """The window over axes of `size`, remembered: layers repeat. Raises ValueError where there is none."""
    if min(*strides, *dilations, *kernel) < 1:
        raise ValueError(f"kernel {kernel}, strides {strides} and dilations {dilations} must be at least 1")
    spans = extents(kernel, dilations)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        out = tuple(-(-n // s) for n, s in zip(size, strides, strict=True))
        totals = [max(0, (o - 1) * s + e - n) for o, s, e, n in zip(out, strides, spans, size, strict=True)]
        return Window(kernel, strides, dilations, split_pads(totals, extra_after=mode == "SAME_UPPER"), out)
    if mode not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad '{mode}' is not one of NOTSET, SAME_UPPER, SAME_LOWER, VALID")
    if min(map(min, pads)) < 0:
        raise ValueError(f"pads {pads} must not be negative")
    out = tuple(_steps(n, e, s, p, ceil) for n, e, s, p in zip(size, spans, strides, pads, strict=True))
    if min(out) < 1 and min(size) > 0:
        shape = ", ".join(map(str, size))
        raise ValueError(f"a window of {spans} does not fit into an image of {shape} padded by {pads}")
    return Window(kernel, strides, dilations, pads, tuple(max(o, 0) for o in out))


def split_pads(totals: Sequence[int], *, extra_after: bool) -> tuple[tuple[int, int], ...]:
    """Totals split into (before, after), the odd element after or before."""
    halves = [(total // 2, total - total // 2) for total in totals]
    return tuple(halves if extra_after else ((after, before) for before, after in halves))


def _steps(size: int, span: int, stride: int, pads: tuple[int, int], ceil: bool) -> int:
    """Positions of a window; with `ceil` a last one may hang over the end, but it starts inside input or padding."""
    free = size + sum(pads) - span
    if not ceil:
        return free // stride + 1
    steps = -(-free // stride) + 1
    return steps - 1 if (steps - 1) * stride >= size + pads[0] else steps


Specs: TypeAlias = Callable[[Site], Sequence[TensorSpec]]


def channels_first(site: Site) -> Site:
    """The site as it would be if input 0 were (batch, channels, spatial...) and not channels last."""
    x = site.spec(0)
    if x.ndim < 3:
        raise site.fail(f"input 0 is {x}, expected (batch, spatial..., channels)")
    return replace(site, ins=(TensorSpec((x.dims[0], x.dims[-1], *x.dims[1:-1]), x.dtype), *site.ins[1:]))


def channels_last(
    infer: Specs, compute: Callable[..., Array], wanted: Callable[[Site], Any]
) -> tuple[Specs, Callable[..., Array]]:
    """Shape rule and function of an operator whose input 0 and only output have channels last where `wanted`."""

    def inferred(site: Site) -> Sequence[TensorSpec]:
        if not wanted(site):
            return infer(site)
        (made,) = infer(channels_first(site))
        return (TensorSpec((made.dims[0], *made.dims[2:], made.dims[1]), made.dtype),)

    def computed(xp: Any, site: Site, x: Array, *rest: Array | None) -> Array:
        if not wanted(site):
            return compute(xp, site, x, *rest)
        made = compute(xp, channels_first(site), xp.moveaxis(x, -1, 1), *rest)
        return xp.ascontiguousarray(xp.moveaxis(made, 1, -1))

    return inferred, computed


OPS: tuple[Op, ...] = ()

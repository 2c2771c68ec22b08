"""The "triton" kernels of rotary embedding: the fused operator's, ONNX's and onnxruntime's. Declares no operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.ops._triton_attention import stand_in
from infera_gpu.spec import Array


@dataclass(frozen=True)
class Turned:
    """The first elements of every head, what turns them, and (from, to) of elements that stay."""

    x: Array
    cos: Array
    sin: Array
    out: Array
    interleaved: bool
    places: Array | None = None
    along: int | None = None
    kept: Sequence[tuple[Array, Array]] = field(default_factory=tuple)


Arrange = Callable[[Site, Sequence[Any], Sequence[Any]], Turned | None]
"""The operands of a site, of which arrays or stand-ins are given; None where there is no kernel for it."""


def _turning(arrange: Arrange, *, strided_out: bool = False) -> Kernels:
    def supports(site: Site) -> bool:
        from infera_kernels.triton.elementwise import supports_copy
        from infera_kernels.triton.rotary import supports_rotary

        given = arrange(site, [*map(stand_in, site.ins)], [*map(stand_in, site.outs)])
        if given is None or not supports_rotary(given.x, given.cos, given.sin, given.out, given.places):
            return False
        return all(supports_copy(a, b) for a, b in given.kept)

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton import elementwise, rotary

        given = arrange(site, io.ins, io.outs)
        assert given is not None
        kept = [call for a, b in given.kept for call in elementwise.copy(a, b, io.launcher)]
        how = {"interleaved": given.interleaved, "places": given.places, "along": given.along}
        return [*rotary.rotary(given.x, given.cos, given.sin, given.out, io.launcher, **how), *kept]  # type: ignore[arg-type]

    return kernels(bind, supports, inplace=(), strided=True, strided_out=strided_out)


def _arrange_fused(site: Site, ins: Sequence[Any], outs: Sequence[Any]) -> Turned | None:
    x, cos, sin = ins[:3]
    size = x.shape[-1] // 2 if site.attrs["per_pair"] else x.shape[-1]
    if any(t.ndim < 1 or t.shape[-1] != size for t in (cos, sin)):
        return None
    return Turned(x, cos, sin, outs[0], bool(site.attrs["interleaved"]))


def _in_heads(
    site: Site, x: Array, out: Array, width: int, cos: Array, sin: Array, places: Array | None, along: int | None = None
) -> Turned | None:
    """Heads of (batch, heads, sequence, size) or (batch, sequence, heads x size) turned up to `width`.

    Tables (batch, sequence, width / 2), or (positions, width / 2) with places (batch, sequence).
    """
    if x.ndim == 3:
        heads = int(site.attrs["num_heads"])
        size = x.shape[2] // heads if heads > 0 else width if site.node.domain else 0
        if not size or x.shape[2] % size:
            return None
        x, out = (a.reshape(*a.shape[:2], -1, size).swapaxes(1, 2) for a in (x, out))
    if x.ndim != 4 or width % 2 or not 0 < width <= x.shape[3] or 2 * cos.shape[-1] != width:
        return None
    if places is None:
        cos, sin = cos[:, None], sin[:, None]
    else:
        places = places[:, None]
    kept = [(x[..., width:], out[..., width:])] if width < x.shape[3] else []
    x, out = x[..., :width], out[..., :width]
    return Turned(x, cos, sin, out, bool(site.attrs["interleaved"]), places, along, kept)


def _arrange_onnx(site: Site, ins: Sequence[Any], outs: Sequence[Any]) -> Turned | None:
    x, cos, sin = ins[:3]
    places, width = ins[3] if site.has(3) else None, int(site.attrs["rotary_embedding_dim"]) or 2 * cos.shape[-1]
    if {cos.ndim, sin.ndim} != {3 if places is None else 2} or (places is not None and places.ndim != 2):
        return None
    return _in_heads(site, x, outs[0], width, cos, sin, places)


def _arrange_ms(site: Site, ins: Sequence[Any], outs: Sequence[Any]) -> Turned | None:
    """The place of every token, or of the first of all."""
    x, places, cos, sin = ins
    if site.attrs["is_packed_batching"] or site.attrs["scale"] != 1.0 or cos.ndim != 2 or x.ndim not in (3, 4):
        return None
    width = int(site.attrs["rotary_embedding_dim"]) or 2 * cos.shape[1]
    first = places.size == 1
    if not first and places.ndim != 2:
        return None
    places = places.reshape(1, 1) if first else places
    return _in_heads(site, x, outs[0], width, cos, sin, places, 2 if first else None)


FUSED = _turning(_arrange_fused, strided_out=True)
ROTARY = _turning(_arrange_onnx)
MS_ROTARY = _turning(_arrange_ms)

OPS: tuple[Op, ...] = ()

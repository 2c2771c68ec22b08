"""com.microsoft: rotary embedding by three positions, of language models that see."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Op, Site, f32
from infera_gpu.ops._families import integers
from infera_gpu.ops._ms import ms_op
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable.attention import rotary


def _width(site: Site) -> int:
    """How many elements of a head are turned."""
    return int(site.attrs["rotary_embedding_dim"]) or 2 * site.spec(2).dims[1]


def _infer(site: Site) -> tuple[TensorSpec]:
    x, at, cos, sin = (site.spec(i) for i in range(4))
    if x.ndim not in (3, 4) or cos.ndim != 2 or sin != cos:
        raise site.fail(f"input {x}, cos_cache {cos} and sin_cache {sin}: expected 3 or 4 axes, and two twice the same")
    width, heads, steps = _width(site), int(site.attrs["num_heads"]), x.dims[1 if x.ndim == 3 else 2]
    if at.dims != (3, x.dims[0], steps):
        raise site.fail(f"position_ids are {at}, expected [3, {x.dims[0]}, {steps}]")
    if x.ndim == 3 and (heads < 1 or x.dims[2] % heads):
        raise site.fail(f"num_heads is {heads}, expected a divisor of the last axis of {x}")
    size = x.dims[3] if x.ndim == 4 else x.dims[2] // heads
    if width < 2 or width % 2 or width > size or cos.dims[1] < width // 2:
        raise site.fail(f"{width} elements to turn do not fit heads of {size} in {x} and cos_cache {cos}")
    sections = tuple(site.attrs["mrope_section"])
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != width // 2:
        raise site.fail(f"mrope_section is {list(sections)}, expected three numbers that add up to {width // 2}")
    if site.attrs["is_packed_batching"] or site.attrs["scale"] != 1.0 or site.attrs["mrope_layout"] not in (0, 1):
        raise site.fail("is_packed_batching, scale and layouts other than 0 and 1 are not supported")
    return (x,)


def _streams(site: Site) -> Array:
    """Which of the three positions turns each pair of elements."""
    sections, half = [int(n) for n in site.attrs["mrope_section"]], _width(site) // 2
    if not site.attrs["mrope_layout"]:
        return np.repeat(np.arange(3), sections)
    streams = np.zeros(half, np.int64)
    for stream in (1, 2):
        streams[stream : 3 * sections[stream] : 3] = stream
    return streams


def _compute(xp: Any, site: Site, x: Array, at: Array, cos: Array, sin: Array) -> Array:
    width, heads = _width(site), int(site.attrs["num_heads"])
    if xp is np and at.size and not 0 <= at.min() <= at.max() < len(cos):
        raise IndexError(f"a position is out of range for {len(cos)} in the caches")
    streams = xp.asarray(_streams(site))
    angles = []
    for cache in (cos, sin):
        time, height, along = cache[at][..., : width // 2]
        angles.append(xp.where(streams == 0, time, xp.where(streams == 1, height, along)))
    if x.ndim == 4:
        split = x.transpose(0, 2, 1, 3)
    else:
        split = x.reshape(*x.shape[:2], heads, x.shape[2] // heads)
    made = rotary(xp, split, *angles, width=width, interleaved=bool(site.attrs["interleaved"]))
    return xp.ascontiguousarray(made.transpose(0, 2, 1, 3)) if x.ndim == 4 else made.reshape(x.shape)


_AT = integers(1, np.int64, 3, 2, 5, low=0, high=8)
_CACHES = (f32(9, 8), f32(9, 8))

OPS: tuple[Op, ...] = (
    ms_op(
        "MRotaryEmbedding",
        _infer,
        _compute,
        (
            Case("sections", (f32(2, 5, 32), _AT, *_CACHES), {"mrope_section": (4, 3, 1), "num_heads": 2}),
            Case(
                "interleaved_sections",
                (f32(2, 5, 32), _AT, *_CACHES),
                {"mrope_section": (3, 3, 2), "mrope_layout": 1, "num_heads": 2},
            ),
            Case("interleaved", (f32(2, 3, 5, 16), _AT, *_CACHES), {"mrope_section": (2, 2, 4), "interleaved": 1}),
            Case(
                "part",
                (f32(2, 5, 40), _AT, f32(9, 4), f32(9, 4)),
                {"mrope_section": (2, 1, 1), "rotary_embedding_dim": 8, "num_heads": 2},
            ),
        ),
        interleaved=0,
        is_packed_batching=0,
        mrope_layout=0,
        mrope_section=REQUIRED,
        num_heads=0,
        rotary_embedding_dim=0,
        scale=1.0,
        needs=(0, 1, 2, 3),
    ),
)

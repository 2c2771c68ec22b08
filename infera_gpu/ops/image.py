"""Compressed images to pixels, through Pillow (the extra `images`)."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from infera_gpu.errors import InputError
from infera_gpu.op import Case, Op, Site
from infera_gpu.spec import Array, TensorSpec

LARGEST = 1 << 27
"""Pixels. A few bytes of a compressed image can ask for any number."""

_MODES = {"RGB": "RGB", "BGR": "RGB", "Grayscale": "L"}


def _decode(xp: Any, site: Site, encoded: Array) -> Array:
    """(bytes,) -> (height, width, channels), uint8. Raises InputError for what is no image, or a huge one."""
    try:
        from PIL import Image
    except ImportError:
        raise site.fail("decoding images needs Pillow: pip install 'infera-gpu[images]'") from None
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(np.asarray(encoded, np.uint8).tobytes())) as image:
            warnings.simplefilter("error")
            if image.width * image.height > LARGEST:
                raise InputError(f"{site.node}: the image has {image.width} x {image.height} pixels, too many")
            pixels = np.asarray(image.convert(_MODES[site.attrs["pixel_format"]]))
    except InputError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes lead to
        raise InputError(f"{site.node}: no image that can be decoded: {error}") from None
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.ascontiguousarray(pixels[:, :, ::-1] if site.attrs["pixel_format"] == "BGR" else pixels)


def _infer(site: Site) -> tuple[TensorSpec | None]:
    if site.spec(0).dtype != np.uint8 or site.spec(0).ndim != 1:
        raise site.fail(f"its input is {site.spec(0)}, expected the bytes of a file: uint8[N]")
    if site.attrs["pixel_format"] not in _MODES:
        raise site.fail(f"pixel_format is '{site.attrs['pixel_format']}', expected one of {', '.join(_MODES)}")
    return (None,)


_HEADER = b"P6 3 2 255\n"
_PPM = np.frombuffer(_HEADER + bytes(range(0, 180, 10)), np.uint8)

OPS = (
    Op(
        "ImageDecoder",
        20,
        infer=_infer,
        compute=_decode,
        attrs={"pixel_format": "RGB"},
        cases=tuple(Case(f, (_PPM,), {"pixel_format": f}) for f in _MODES),
        portable=False,
    ),
)

"""Where are the faces? Before and after YuNet, whose answers are offsets on three grids.

Decoding follows OpenCV's FaceDetectorYN (modules/objdetect/src/face_detect.cpp).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.v2client import Array, Infer

SIDE = 640
"""The model takes pictures of this width and height; smaller ones are padded on the right and below."""

STRIDES = (8, 16, 32)
"""Pixels a cell of each grid."""


class Face(NamedTuple):
    """A box in pixels from the upper left corner, its score in 0..1, and ten numbers: x, y of the eyes, the tip of the
    nose and the corners of the mouth, the person's right before the left."""

    x: float
    y: float
    width: float
    height: float
    score: float
    landmarks: tuple[float, ...]


def detect(image: Array, infer: Infer, *, threshold: float = 0.6, overlap: float = 0.3) -> list[Face]:
    """Faces in uint8[height, width, 3] (RGB), best first; of boxes overlapping more than `overlap`, the best."""
    found = decode(infer({"input": prepare(image)}))
    found = found[found[:, 4] >= threshold]
    kept = found[suppress(found, overlap)].tolist()
    return [Face(x, y, width, height, score, tuple(points)) for x, y, width, height, score, *points in kept]


def prepare(image: Array) -> Array:
    """float32[1, 3, SIDE, SIDE] in BGR, 0..255. Raises ValueError for a picture larger than that."""
    height, width, _ = image.shape
    if max(height, width) > SIDE:
        raise ValueError(f"the picture is {width} x {height} pixels; the model takes at most {SIDE} x {SIDE}")
    blob = np.zeros((1, 3, SIDE, SIDE), np.float32)
    blob[0, :, :height, :width] = image[:, :, ::-1].transpose(2, 0, 1)
    return blob


def decode(outputs: Mapping[str, Array]) -> Array:
    """float32[cells, 15]: x, y, width, height, score and ten landmark coordinates for each cell of the three grids."""
    grids = []
    for stride in STRIDES:
        cells = SIDE // stride
        rows, columns = np.divmod(np.arange(cells * cells, dtype=np.int32), cells)
        corner = np.stack((columns, rows), axis=1).astype(np.float32)
        box, points = outputs[f"bbox_{stride}"][0], outputs[f"kps_{stride}"][0]
        size = np.exp(box[:, 2:]) * stride
        centre = (box[:, :2] + corner) * stride
        likely = np.clip(outputs[f"cls_{stride}"][0], 0, 1) * np.clip(outputs[f"obj_{stride}"][0], 0, 1)
        grids.append(
            np.concatenate((centre - size / 2, size, np.sqrt(likely), (points + np.tile(corner, 5)) * stride), axis=1)
        )
    return np.concatenate(grids)


def suppress(found: Array, overlap: float) -> list[int]:
    """Indices of the rows to keep, best score first: non-maximum suppression by intersection over union."""
    low, high = found[:, :2], found[:, :2] + found[:, 2:4]
    area = found[:, 2] * found[:, 3]
    order, kept = list(np.argsort(-found[:, 4], kind="stable")), []
    while order:
        best = order.pop(0)
        kept.append(int(best))
        others = np.array(order, np.intp)
        sides = np.minimum(high[best], high[others]) - np.maximum(low[best], low[others])
        common = np.prod(np.maximum(sides, 0), axis=1)
        order = list(others[common <= overlap * (area[best] + area[others] - common)])
    return kept


def read_png(path: Path) -> Array:
    """uint8[height, width, 3]. Raises ValueError for anything but 8-bit RGB without interlacing."""
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{path.name} is not a PNG file")
    at, packed, header = 8, b"", b""
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        data = content[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            header = data
        elif kind == b"IDAT":
            packed += data
        at += length + 12
    width, height, *form = struct.unpack(">IIBBBBB", header)
    if form != [8, 2, 0, 0, 0]:
        raise ValueError(f"{path.name} is not an 8-bit RGB picture without interlacing")
    return _unfilter(zlib.decompress(packed), width, height)


def _unfilter(packed: bytes, width: int, height: int) -> Array:
    """Undoes PNG's row filters (ISO/IEC 15948, clause 9) for three bytes a pixel."""
    rows = np.frombuffer(packed, np.uint8).reshape(height, 1 + 3 * width)
    image = np.zeros((height, width + 1, 3), np.int32)  # a column of zeros on the left
    above = np.zeros_like(image[0])
    for row, line, coded in zip(image, rows[:, 1:].reshape(height, width, 3).astype(np.int32), rows[:, 0], strict=True):
        if coded in (0, 2):
            row[1:] = line if coded == 0 else line + above[1:] & 255
        elif coded == 1:
            row[1:] = np.cumsum(line, axis=0) & 255
        else:
            for x in range(width):
                a, b, c = row[x], above[x + 1], above[x]
                row[x + 1] = line[x] + ((a + b) // 2 if coded == 3 else _paeth(a, b, c)) & 255
        above = row
    return image[:, 1:].astype(np.uint8)


def _paeth(a: Array, b: Array, c: Array) -> Array:
    """Of left, above and upper left, the one nearest to a + b - c; ties in that order."""
    near_a, near_b, near_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
    return np.where((near_a <= near_b) & (near_a <= near_c), a, np.where(near_b <= near_c, b, c))

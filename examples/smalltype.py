"""The small file-type model that needs no download: what it is asked and what it answers.

`train_smalltype.py` makes `data/smalltype.onnx`; the two agree on what is said here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from examples.v2client import Array, Infer

LENGTH = 1024
"""Tokens the model sees: one for the start of the file, then its first bytes."""

START, PADDING, TOKENS = 256, 257, 258
"""Before the first byte, after the last, and how many tokens there are."""

TYPES = {
    "c": "C or C++ source",
    "css": "style sheet",
    "csv": "comma-separated values",
    "elf": "ELF executable or library",
    "gzip": "gzip archive",
    "html": "HTML document",
    "javascript": "JavaScript source",
    "json": "JSON document",
    "markdown": "Markdown document",
    "png": "PNG image",
    "python": "Python source",
    "svg": "SVG image",
    "text": "plain text",
    "wav": "WAV audio",
    "zip": "zip archive",
}
"""Every answer, in the order of the model's outputs, in words."""


class Guess(NamedTuple):
    """A label of TYPES, its words, and the model's probability."""

    label: str
    description: str
    score: float


def features(contents: list[bytes]) -> Array:
    """int32[files, LENGTH]: the start token and the first bytes of each file."""
    tokens = np.full((len(contents), LENGTH), PADDING, np.int32)
    tokens[:, 0] = START
    for row, content in zip(tokens, contents, strict=True):
        first = np.frombuffer(content[: LENGTH - 1], np.uint8)
        row[1 : 1 + len(first)] = first
    return tokens


def identify(contents: list[bytes], infer: Infer) -> list[Guess]:
    """The likeliest type of each file, all in one request."""
    found = infer({"bytes": features(contents)})["probabilities"]
    labels = list(TYPES)
    return [
        Guess(labels[int(i)], TYPES[labels[int(i)]], float(row[i]))
        for i, row in zip(found.argmax(1), found, strict=True)
    ]

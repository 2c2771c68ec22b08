"""JSON requests that came before, but for their id and their tensors' values.

A client sends the same document again and again with other numbers in it. What lies between the numbers is compared as
bytes with what was read and checked once; only the numbers are read. A list of numbers in the place of a list of
numbers leaves a document what it was, so nothing else has to be looked at.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import orjson

from infera_server.codec import Buffer
from infera_server.models.servable import Servable
from infera_server.requests import Common, Request
from infera_server.scheduling.rows import HostArray
from infera_server.scheduling.signature import Tensor

MAX_TARGETS, MAX_TEMPLATES = 256, 8
"""How many targets have templates, and how many each."""

MAX_FIXED = 2048
"""Bytes between the numbers that are worth keeping."""

PATIENCE, RETRY = 32, 64
"""Misses in a row after which documents are taken for always new, and every how manieth is a template even then."""

_HOLES = re.compile(rb'"data"\s*:\s*\[([^\[\]"]*)\]|"id"\s*:\s*"([^"\\]*)"')
_CODES = dict(zip(("f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"), "fdbhiqBHIQ", strict=True))


@dataclass(frozen=True, slots=True)
class Numbers:
    """The place of a tensor's values, in row-major order."""

    tensor: Tensor
    shape: tuple[int, ...]
    layout: struct.Struct

    @classmethod
    def of(cls, tensor: Tensor, shape: tuple[int, ...]) -> Numbers:
        code = _CODES[tensor.dtype.str[1:]]
        return cls(tensor, shape, struct.Struct(f"={math.prod(shape)}{code}"))

    def read(self, text: bytes) -> HostArray | None:
        """The values in `[text]`; None where it is no flat list of that many numbers that fit the datatype."""
        if b"t" in text or b"f" in text:  # booleans would pass for numbers
            return None
        try:
            packed = self.layout.pack(*orjson.loads(b"[%b]" % text))
        except (ValueError, struct.error, OverflowError):
            return None
        return np.frombuffer(packed, self.tensor.dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Template:
    """A document: `pieces`, and between them `places` of numbers, or of the request's id where that is None.

    `request` is what it asks for, checked against a model, which is not kept from being unloaded.
    """

    pieces: Sequence[bytes]
    places: Sequence[Numbers | None]
    model: ref[Servable]
    request: Request

    def read(self, body: bytes) -> Request | None:
        """The request, where the body is this document."""
        if not (body.startswith(self.pieces[0]) and body.endswith(self.pieces[-1])):
            return None
        start, identity = len(self.pieces[0]), self.request.id
        feeds: dict[str, HostArray] = {}
        for i, place in enumerate(self.places, 1):
            piece = self.pieces[i]
            if i == len(self.places):  # the end: what lies before it is values only if the piece is not among them
                end = len(body) - len(piece)
            else:
                end = body.find(piece, start)
            if end < start:
                return None
            text = body[start:end]
            start = end + len(piece)
            if place is None:
                if b'"' in text or b"\\" in text or not text.isascii() or not text.decode().isprintable():
                    return None
                identity = text.decode()
                continue
            values = place.read(text)
            if values is None:
                return None
            feeds[place.tensor.name] = values
        return self.request.again(feeds, identity) if start == len(body) else None


def template_of(body: bytes, model: Servable, request: Request) -> Template | None:
    """What other bodies can be recognised by; None where the request's tensors are not all flat lists of numbers.

    The places are looked for in the text; that these are the ones which count is seen by putting other values there.
    """
    if any(output.region is not None for output in request.outputs):
        return None
    inputs = model.signature.inputs
    if not all(inputs[name].dtype.str[1:] in _CODES for name in request.feeds):
        return None
    pieces: list[bytes] = []
    places: list[Numbers | None] = []
    probes: list[bytes] = []
    start, names = 0, iter(request.feeds)
    for found in _HOLES.finditer(body):
        numbers = found[1] is not None
        first, last = found.span(1 if numbers else 2)
        name = next(names, None) if numbers else None
        if numbers and name is None:
            return None
        pieces.append(body[start:first])
        places.append(None if name is None else Numbers.of(inputs[name], request.feeds[name].shape))
        probes.append(b"%d" % len(probes))
        start = last
    pieces.append(body[start:])
    if next(names, None) is not None or sum(map(len, pieces)) > MAX_FIXED:
        return None
    joined = b"".join(part for pair in zip(pieces, [*probes, b""], strict=True) for part in pair)
    try:
        original, probed = orjson.loads(body), orjson.loads(joined)
        given = [_take(probed, place, request) for place in places]
        for place in places:
            _take(original, place, request)
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    expected = [probe.decode() if place is None else [int(probe)] for probe, place in zip(probes, places, strict=True)]
    if given != expected or original != probed:
        return None
    return Template(pieces, places, ref(model), request.for_again(Common()))


def _take(document: dict[str, Any], place: Numbers | None, request: Request) -> Any:
    """Take out of a document what is at a place."""
    if place is None:
        return document.pop("id")
    return document["inputs"][list(request.feeds).index(place.tensor.name)].pop("data")


class Templates:
    """The templates of each target."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str | None], list[Template]] = {}
        self._misses = 0

    def find(self, target: tuple[str, str | None], model: Servable, body: Buffer) -> Request | None:
        """The request in a body, where a document like it came before for this model."""
        known = self._known.get(target)
        if known is None:
            return None
        body = bytes(body)
        for template in known:
            if template.model() is model and (request := template.read(body)) is not None:
                self._misses = 0
                return request
        return None

    def keep(self, target: tuple[str, str | None], model: Servable, body: Buffer, request: Request) -> None:
        """Keep what the body is like, if that can be done."""
        self._misses += 1
        if self._misses > PATIENCE and self._misses % RETRY:
            return
        template = template_of(bytes(body), model, request)
        if template is None:
            return
        if len(self._known) >= MAX_TARGETS:
            self._known.clear()
        known = self._known.setdefault(target, [])
        current = [kept for kept in known if kept.model() is model]
        known[:] = [*current[1 - MAX_TEMPLATES :], template]

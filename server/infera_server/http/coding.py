"""HTTP content codings: gzip and deflate, with a limit on what a body may grow to."""

from __future__ import annotations

import zlib
from contextlib import suppress
from typing import Literal, TypeAlias

from infera_server.codec import Buffer, short
from infera_server.errors import BadRequest, TooLarge, UnknownCoding

Coding: TypeAlias = Literal["gzip", "deflate"]

# zlib's name for a container: 16 + 15 is gzip, 15 zlib (what HTTP calls deflate), -15 the bare stream some send for it.
_WBITS: dict[Coding, int] = {"gzip": 31, "deflate": 15}
_BARE = -15
_LEVEL = 1
_MAX_MEMBERS = 64


def coding_of(value: bytes) -> Coding | None:
    """The Content-Encoding of a request; None for identity. Raises UnknownCoding."""
    name = value.strip().lower().decode("latin-1")
    if name in ("", "identity"):
        return None
    if name == "gzip" or name == "x-gzip":
        return "gzip"
    if name == "deflate":
        return "deflate"
    raise UnknownCoding(f"Content-Encoding '{short(name)}' is not supported, send gzip, deflate or none")


def opened(body: Buffer, coded: Coding, limit: int) -> tuple[Buffer, Coding | None]:
    """The body without its coding, where that has up to `limit` bytes; else as it is. Raises BadRequest."""
    with suppress(TooLarge):
        return decompress(body, coded, limit), None
    return body, coded


def preferred(accept: bytes) -> Coding | None:
    """The coding of the reply to a request with this Accept-Encoding: the best liked of ours, the first of equals.

    None, the identity, where that is liked better by name (RFC 9110, section 12.5.3).
    """
    best: Coding | None = None
    best_quality = identity = 0.0
    for part in accept.decode("latin-1").lower().split(","):
        name, *parameters = (text.strip() for text in part.split(";"))
        quality = _quality(parameters)
        if name == "identity":
            identity = quality
        elif quality > best_quality and (coding := _named(name)):
            best, best_quality = coding, quality
    return best if best_quality >= identity else None


def _named(name: str) -> Coding | None:
    return "gzip" if name in ("gzip", "x-gzip") else "deflate" if name == "deflate" else None


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def decompress(body: Buffer, coding: Coding, limit: int) -> bytes:
    """The decoded body. Raises BadRequest where it is damaged or cut short, TooLarge past `limit` bytes."""
    wbits = _WBITS[coding]
    if coding == "deflate" and (len(body) < 2 or body[0] & 15 != 8 or int.from_bytes(body[:2], "big") % 31):
        wbits = _BARE
    whole: list[bytes] = []
    size, left = 0, bytes(body)
    while left or not whole:
        stream = zlib.decompressobj(wbits)
        try:
            part = stream.decompress(left, limit - size + 1)
        except zlib.error as error:
            raise BadRequest(f"the request body is not valid {coding}: {error}") from None
        size += len(part)
        if size > limit:
            raise TooLarge(f"the request body is more than {limit:,} bytes after {coding} decoding")
        if not stream.eof:
            raise BadRequest(f"the request body's {coding} data is cut short")
        whole.append(part)
        left = stream.unused_data  # gzip data may be several members in a row
        if left and (coding != "gzip" or len(whole) == _MAX_MEMBERS):
            raise BadRequest(f"{len(left)} bytes follow the request body's {coding} data")
    return whole[0] if len(whole) == 1 else b"".join(whole)


def compress(parts: list[Buffer], coding: Coding) -> bytes:
    """The coded whole of `parts`."""
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WBITS[coding])
    return b"".join([*map(stream.compress, parts), stream.flush()])

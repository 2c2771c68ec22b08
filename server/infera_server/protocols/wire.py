"""The wire format of protocol buffers, as far as large fields are to be read and written without copying them.

https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Mapping

from infera_server.errors import BadRequest

MAX_FIELDS = 1 << 14
"""Fields of a message outside of other messages; every one takes a microsecond."""

UNREADABLE = "Unable to parse request"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}


def cut(data: bytes, fields: Mapping[int, list[memoryview]]) -> bytes:
    """The message without some of its fields of bytes, whose values are put in the lists: views, in their order.

    Raises BadRequest for what is no message.
    """
    view, end = memoryview(data), len(data)
    kept: list[bytes] = []
    position = begin = 0
    for _ in range(MAX_FIELDS):
        if position >= end:
            break
        start = position
        tag = data[position]
        position += 1
        if tag > 0x7F:
            tag, position = _varint(data, start)
        kind = tag & 7
        if kind == _BYTES:
            size, position = _varint(data, position)
            position += size
            if position > end:
                break
            if tag >> 3 in fields:
                fields[tag >> 3].append(view[position - size : position])
                kept.append(data[begin:start])
                begin = position
        elif kind == _VARINT:
            position = _varint(data, position)[1]
        else:
            position += _SIZES.get(kind, end + 1)
    else:
        raise BadRequest(f"the request has more than {MAX_FIELDS:,} fields")
    if position > end:
        raise BadRequest(UNREADABLE)
    kept.append(data[begin:])
    return b"".join(kept)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    try:
        while shift < 64:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
    except IndexError:
        pass
    raise BadRequest(UNREADABLE)


def head(field: int, size: int) -> bytes:
    """What stands before the `size` bytes of a field of bytes, text or a message."""
    encoded = bytearray()
    for value in (field << 3 | _BYTES, size):
        while value > 0x7F:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
    return bytes(encoded)

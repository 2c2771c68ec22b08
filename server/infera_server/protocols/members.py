"""Reading JSON documents member by member. What is missing or of the wrong kind is a BadRequest with Triton's text."""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from typing import Any

import orjson

from infera_server.codec import Buffer
from infera_server.errors import BadRequest
from infera_server.scheduling.explanation import PARAMETER

NO_PARAMETER = "parameter '{}' has invalid type. It should be either 'int', 'bool', or 'string'."
"""Triton's text for a parameter that is none of these."""


def load(text: Buffer) -> tuple[dict[str, Any], bool]:
    """The JSON object, and whether anything followed it."""
    rest = False
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        document, rest = _load_leniently(bytes(text), error)
    if type(document) is not dict:
        raise missing("inputs")
    return document, rest


def body(text: bytes) -> dict[str, Any]:
    """The JSON object of a management request; one without members where it is another value, as Triton sees it."""
    if not text.strip():
        raise BadRequest("failed to parse the request JSON buffer: The document is empty. at 0")
    try:
        document = orjson.loads(text.removeprefix(BOM_UTF8))
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"failed to parse the request JSON buffer: {error}") from None
    return document if type(document) is dict else {}


def _load_leniently(text: bytes, error: orjson.JSONDecodeError) -> tuple[Any, bool]:
    """As Triton reads: NaN and Infinity are numbers, a byte order mark may come first, and what follows the document is
    somebody else's to refuse.

    Bytes that are not UTF-8 become surrogate escapes, which nothing that takes text from the document accepts.
    """
    decoded = text.removeprefix(BOM_UTF8).decode("utf-8", "surrogateescape")
    start = len(decoded) - len(decoded.lstrip(" \t\r\n"))
    try:
        document, end = json.JSONDecoder(parse_float=_finite).raw_decode(decoded, start)
    except (ValueError, RecursionError):
        raise BadRequest(f"failed to parse the request JSON buffer: {error}") from None
    return document, bool(decoded[end:].strip(" \t\r\n"))


def _finite(digits: str) -> float:
    """A number with a fraction or exponent; ValueError where a double has no room for it."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits} is too big for a double")
    return value


def missing(member: str) -> BadRequest:
    """The refusal of a document without a member it must have."""
    return BadRequest(f"Unable to parse '{member}': attempt to access non-existing object member '{member}'")


def list_of(value: object, member: str) -> list[Any]:
    """The value, which must be an array."""
    if type(value) is not list:
        raise BadRequest(f"Unable to parse '{member}': attempt to access JSON non-array as array")
    return value


def text(entry: dict[str, Any], member: str) -> str:
    """A member that must be there and be a string."""
    value = entry.get(member)
    if type(value) is not str:
        if member not in entry:
            raise missing(member)
        raise BadRequest(f"Unable to parse '{member}': attempt to access JSON non-string as string")
    return value


def natural(value: object, member: str, verb: str = "parse") -> int:
    """The value, which must be a non-negative integer."""
    if type(value) is not int or value < 0:
        raise BadRequest(
            f"Unable to {verb} '{member}': attempt to access JSON non-unsigned-integer as unsigned-integer"
        )
    return value


def identity(document: dict[str, Any]) -> str:
    """Take a request's id out of its document; empty where it has none."""
    value = document.pop("id", "")
    if type(value) is not str or not is_utf8(value):
        raise BadRequest("Unable to parse 'id': attempt to access JSON non-string as string")
    return value


def traces(parameters: object) -> bool:
    """Whether these parameters, whatever they are, ask where the request's time went."""
    return type(parameters) is dict and parameters.get(PARAMETER) is True


def flag(value: object, member: str) -> bool:
    """The value, which must be true or false."""
    if type(value) is not bool:
        raise BadRequest(f"Unable to parse '{member}': attempt to access JSON non-boolean as boolean")
    return value


def is_utf8(text: str) -> bool:
    """Whether the text can be sent: JSON's escapes can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parameters_of(entry: dict[str, Any], what: str) -> dict[str, Any]:
    """The parameters of an input or an output, which may be null, as writers of JSON put it that have none."""
    value = entry.get("parameters")
    return {} if value is None else object_of(value, what)


def object_of(value: object, what: str) -> dict[str, Any]:
    """The value, which must be an object."""
    if type(value) is not dict:
        raise BadRequest(f"failed to get {what}: attempt to get members for non-object")
    return value

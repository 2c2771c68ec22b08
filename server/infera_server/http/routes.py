"""What a management route is: the application makes endpoints and their documentation of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from infera_server.service import Service


@dataclass(frozen=True, slots=True)
class Call:
    """A request to a route: the variables of its path, and its body."""

    service: Service
    path: Mapping[str, str]
    body: bytes = b""


Handler: TypeAlias = Callable[[Call], Any | Awaitable[Any]]
"""Returns the document of the reply, None for an empty one. Raises RequestError."""


@dataclass(frozen=True, slots=True)
class Route:
    """`path` has variables in braces. `body` is the JSON Schema of the request's document, empty where it has none.

    With `large` a body may hold the files of a load, in base64.
    """

    verb: str
    path: str
    handler: Handler
    summary: str
    body: Mapping[str, Any] = field(default_factory=dict)
    large: bool = False


def document(required: tuple[str, ...] = (), /, **properties: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Schema of an object."""
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema | ({"required": list(required)} if required else {})

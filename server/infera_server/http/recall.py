"""Requests that came before, byte for byte but for their tensors.

A client sends the same head and the same JSON again and again, and only other tensors after them. What was read and
checked once is looked up by those bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from weakref import ref

from infera_server.access import Key
from infera_server.http.coding import Coding
from infera_server.models.servable import Servable
from infera_server.requests import Request

MAX_HEAD, MAX_DOCUMENT = 2048, 2048
"""Bytes of a head, and of a document, that are worth keeping."""

MAX_HEADS, MAX_DOCUMENTS = 256, 16
"""How many heads are kept, and documents of each: 9 MB at most."""

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?([0-9]{1,15})(?:\r\n|\Z)")


@dataclass(frozen=True, slots=True)
class Head:
    """What a head says that was read before: an HTTP/1.1 POST that keeps its connection, with a body of `size` bytes.

    The same head with another size is another one, of which all else holds.

    `requests` are those seen with it, by their documents, without their tensors; each with the model that it was
    checked against, which is not kept from being unloaded.
    """

    target: tuple[str, str | None]
    size: int
    coding: Coding | None
    accept: bytes
    header: int | None
    trace: bool = False
    key: Key | None = None
    requests: dict[bytes, tuple[ref[Servable], Request]] = field(default_factory=dict)

    def keep(self, document: bytes, model: Servable, request: Request) -> None:
        """Keep a request that was sent with this document."""
        if request.common is not None and len(document) <= MAX_DOCUMENT:
            if len(self.requests) >= MAX_DOCUMENTS:
                self.requests.clear()
            self.requests[document] = ref(model), request.for_again(request.common)


class Heads:
    """The heads that were read, by their bytes without the blank line at the end and without the body's size."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}

    def find(self, data: bytes) -> tuple[Head, int] | None:
        """The known head that `data` begins with, if its body and nothing else follows, and where that begins."""
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD + 4)
        if end < 0:
            return None
        key, size = _without_size(data[:end])
        head = self._known.get(key)
        if head is None or len(data) != end + 4 + size:
            return None
        return head if head.size == size else replace(head, size=size), end + 4

    def keep(self, data: bytes, head: Head) -> Head:
        """Keep what was read in the head that `data` begins with, if it is all there and not too long.

        Returns what was kept of it before, if it was.

        A line that ends without a carriage return could have ended the head for the parser, and keeps it out; so does
        a size in other words than are looked for.
        """
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD + 4)
        if end < 0 or data.count(b"\n", 0, end) != data.count(b"\r\n", 0, end):
            return head
        text = data[:end]
        key, size = _without_size(text)
        if size != head.size or text.lower().count(b"\r\ncontent-length") != 1:
            return head
        if len(self._known) >= MAX_HEADS:
            self._known.clear()
        return self._known.setdefault(key, head)

    def forget(self) -> None:
        """Forget all, where what was decided by a head may be decided otherwise now."""
        self._known.clear()


def _without_size(head: bytes) -> tuple[bytes, int]:
    """The head without the digits of its Content-Length, and what they say; -1 where there are none."""
    found = _LENGTH.search(head)
    if found is None:
        return head, -1
    first, last = found.span(1)
    return head[:first] + head[last:], int(found[1])

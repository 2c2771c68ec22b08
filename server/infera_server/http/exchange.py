"""One inference request on a connection: which model it is for, how far it is."""

from __future__ import annotations

import time
from urllib.parse import unquote_to_bytes

from infera_server.access import Key
from infera_server.codec import Buffer
from infera_server.errors import RequestError, TooLarge
from infera_server.http import coding
from infera_server.http.coding import Coding
from infera_server.http.intake import Intake
from infera_server.http.recall import Head
from infera_server.http.templates import Templates
from infera_server.models.servable import Servable
from infera_server.models.traffic import LABEL
from infera_server.protocols import v2_rest
from infera_server.requests import Request
from infera_server.scheduling.jobs import Job
from infera_server.settings import Settings
from infera_server.shared_memory import Regions

INLINE_BYTES, INLINE_CODED_BYTES = 1 << 18, 1 << 14
"""Bodies up to the first size without their coding, and the second with it, are read at once: in a millisecond or two.
Replies up to the first are written at once. Others take a thread."""


def infer_target(url: bytes) -> tuple[str, str | None] | None:
    """The (model, version) of an inference URL; None for any other. A version is decimal, or a label."""
    path = url.partition(b"?")[0]
    if not path.endswith(b"/infer"):
        return None
    if not path.startswith(b"/"):  # the absolute form, which proxies are sent
        path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
    parts = path.split(b"/")
    if parts[1:3] != [b"v2", b"models"] or len(parts) not in (5, 7):
        return None
    name, version = parts[3], None
    if len(parts) == 7:
        version = parts[5].decode("latin-1")
        if parts[4] != b"versions" or not (parts[5].isdigit() or LABEL.fullmatch(version)):
            return None
    if b"%" in name:
        name = unquote_to_bytes(name)
    return (name.decode("utf-8", "replace"), version) if name else None


class Exchange:
    """One inference request and its reply. `keep_alive` and `response_complete` are what uvicorn asks of a cycle."""

    __slots__ = (
        "accept",
        "body",
        "coding",
        "expects_continue",
        "header",
        "held",
        "is_1_1",
        "is_refused_again",
        "job",
        "keep_alive",
        "key",
        "known",
        "model",
        "received",
        "refusal",
        "request",
        "response_complete",
        "size",
        "started_at",
        "target",
        "trace",
        "turn",
    )  # fmt: skip

    def __init__(self, keep_alive: bool, expects_continue: bool, is_1_1: bool = True) -> None:
        self.keep_alive = keep_alive
        self.is_1_1 = is_1_1
        self.expects_continue = expects_continue
        self.response_complete = False
        self.received = False
        self.turn = False
        self.body: list[Buffer] = []
        self.size = 0
        self.held = 0
        self.coding: Coding | None = None
        self.accept = b""
        self.header: int | None = None
        self.key: Key | None = None
        self.known: Head | None = None
        self.target: tuple[str, str | None] = "", None
        self.model: Servable | None = None
        self.refusal: RequestError | None = None
        self.is_refused_again = False
        """Whether its refusal is that of every request like it, as long as the model's queue stays as long."""

        self.trace = False
        self.job: Job | None = None
        self.request: Request | None = None
        self.started_at = time.monotonic()

    def hold(self, nbytes: int, intake: Intake) -> None:
        """Account for a part of the body that is kept. Raises Overloaded where too much is being received."""
        intake.take(nbytes)
        self.held += nbytes

    def let_go(self, intake: Intake) -> None:
        """Forget the body."""
        intake.held -= self.held
        self.held = 0
        self.body = []

    def opened(self, body: Buffer, limit: int) -> Buffer:
        """The body without its coding, where that has up to `limit` bytes; else as it is. Raises BadRequest."""
        assert self.coding is not None
        body, self.coding = coding.opened(body, self.coding, limit)
        return body


def decode(
    body: Buffer, exchange: Exchange, model: Servable, settings: Settings, regions: Regions
) -> tuple[Request, int]:
    """The request in a body, and the bytes that it keeps in memory. Raises RequestError; may run in any thread."""
    if exchange.coding is not None:
        body = coding.decompress(body, exchange.coding, settings.max_body_bytes)
    size = len(body) if exchange.header is None else min(exchange.header, len(body))
    if size > settings.max_json_bytes:
        raise TooLarge(
            f"the request's JSON has {size:,} bytes, at most {settings.max_json_bytes:,} are accepted; "
            "send large tensors in binary (Inference-Header-Content-Length)"
        )
    return v2_rest.parse(body, exchange.header, model.signature, regions), len(body)


def keep(exchange: Exchange, model: Servable, body: Buffer, request: Request, templates: Templates) -> None:
    """Keep what will be known of the same document with other values."""
    if exchange.header is None:
        templates.keep(exchange.target, model, body, request)
    elif exchange.header and exchange.known is not None:
        exchange.known.keep(bytes(body[: exchange.header]), model, request)


def again(exchange: Exchange, model: Servable, body: Buffer, templates: Templates, max_json: int) -> Request | None:
    """The request, where one with the same document came before and reading the rest takes no time."""
    if exchange.coding is not None:
        return None
    known, header = exchange.known, exchange.header
    if header is None:
        if len(body) > min(INLINE_BYTES, max_json):
            return None
        return templates.find(exchange.target, model, body)
    if known is None:
        return None
    found = known.requests.get(bytes(body[:header]))
    if found is None or found[0]() is not model:
        return None
    _, request = found
    assert request.common is not None
    if len(body) - header != request.common.nbytes:
        return None
    if len(body) > INLINE_BYTES and not request.common.are_views:
        return None
    try:
        return request.again(request.common.feeds(body, header), request.id)
    except RequestError as error:
        error.trace = request.trace
        raise

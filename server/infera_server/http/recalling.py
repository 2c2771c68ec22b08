"""Requests whose head came before, taken past the parser: all of one, and nothing else, received in one piece."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from infera_server.errors import QUEUE_FULL, Overloaded, RequestError
from infera_server.http.exchange import Exchange
from infera_server.http.recall import Head
from infera_server.http.replying import Replying
from infera_server.models.servable import Servable


class Recalling(Replying):
    """A connection that knows heads again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_body = self.service.settings.max_body_bytes
        self.last_head: tuple[bytes, Head | None] = b"", None
        """The last one that was recalled here, most likely that of the next request too."""

    def recall(self, data: bytes) -> bool:
        """Take a request whose head came before, with all of its body. Returns whether `data` is one, and no more."""
        if not self.is_idle or self.flow.write_paused or self.lingering or self.only_metrics:
            return False
        if self.transport.is_closing():
            return False
        text, head = self.last_head
        if head is None or len(data) != len(text) + head.size or not data.startswith(text):
            found = self.service.heads.find(data)
            if found is None or found[0].size > self.max_body:
                return False
            head, start = found
            self.last_head = data[:start], head
        else:
            start = len(text)
        now, model, refusal = time.monotonic(), None, None
        try:
            if head.key is not None:
                self.service.access.spend(head.key, now)
            model = self.service.model(*head.target)
        except RequestError as error:
            refusal = error
        if model is not None and refusal is None and not head.trace:
            headers = self.server_state.default_headers
            reply = self.service.refusals.find(head.target, model, head.size, now, headers)
            if reply is not None:
                self._refuse_again(model, reply, now)
                return True
        self.cycle = exchange = Exchange(keep_alive=True, expects_continue=False)
        exchange.received = exchange.turn = True
        exchange.known, exchange.target = head, head.target
        exchange.coding, exchange.accept, exchange.header = head.coding, head.accept, head.header
        exchange.trace, exchange.key = head.trace, head.key
        exchange.body, exchange.size = [data[start:]], head.size
        self.waiting_since = exchange.started_at
        exchange.model, exchange.refusal = model, refusal
        if model is not None and refusal is None:
            try:
                model.check_room(head.size)
            except RequestError as error:
                exchange.refusal = error
                exchange.is_refused_again = error.reason == QUEUE_FULL
        self._proceed(exchange)
        return True

    def _refuse_again(self, model: Servable, reply: bytes, now: float) -> None:
        """Send what others were refused with, since the queue is as long as it was then."""
        self.waiting_since = now
        model.stats.refused[QUEUE_FULL] += 1
        model.stats.replied(Overloaded.status, 0.0)
        self.server_state.total_requests += 1
        with suppress(RuntimeError):  # of uvloop: its client has reset it, which `connection_lost` has yet to say
            self.transport.write(reply)

"""Where the engine takes a worker's requests: from shared memory to the models, and back.

A worker's requests are read where the worker has put them, and results are written where it reads them. When a worker
is gone its requests are cancelled, and its memory goes with what is left of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial

from infera_server.errors import QUEUE_FULL, RequestError, Unavailable, request_error
from infera_server.models.servable import Servable
from infera_server.processes.arena import Blocks, Lent
from infera_server.processes.engine_wire import error_out
from infera_server.processes.front_wire import Entry, entry, kind_of, put, read, request_in, run_out
from infera_server.processes.ring import Reader, Signs, Writer
from infera_server.requests import Output
from infera_server.scheduling.jobs import Batch, Job
from infera_server.scheduling.rows import Arrays

log = logging.getLogger(__name__)

LEAST_LEFT = 1e-6
"""Seconds that a request has whose deadline has passed: its model then says so."""


class Desk:
    """One worker's. Used in the event loop's thread.

    `models` finds what the worker was told of, by number. `full` shows the numbers of those whose queues are full, from
    a refusal until a request leaves: workers refuse for themselves meanwhile.
    """

    def __init__(
        self,
        models: Mapping[int, Servable],
        full: Signs,
        requests: Lent,
        results: Blocks,
        inbox: Reader,
        outbox: Writer,
    ) -> None:
        self._models, self._full = models, full
        self._requests, self._results = requests, results
        self._inbox, self._outbox = inbox, outbox
        self._under_way: dict[int, tuple[int, Servable, Job | None]] = {}
        self._will_flush = self._closed = False

    def open(self) -> None:
        """From now on take requests in the running event loop."""
        asyncio.get_running_loop().add_reader(self._inbox.event, self.receive)

    def close(self) -> None:
        """The worker is gone: forget what it has asked for."""
        asyncio.get_running_loop().remove_reader(self._inbox.event)
        self._closed = True
        under_way, self._under_way = self._under_way, {}
        for uid, model, job in under_way.values():
            self._cancel(uid, model, job)
        for end in (self._requests, self._results, self._inbox, self._outbox):
            end.close()

    def receive(self) -> None:
        """Take what the worker has sent."""
        if self._closed:
            return
        for number in self._inbox.take():
            kind, value = kind_of(number)
            if kind == Entry.MESSAGE:
                try:
                    self._submit(value)
                except Exception:
                    log.exception("a worker's message cannot be read")
            elif kind == Entry.RETURNED:
                self._results.give_back(value)
            elif (found := self._under_way.pop(value, None)) is not None:
                self._cancel(*found)

    def flush(self) -> None:
        """Let the worker see what was answered, and have the memory of its requests again."""
        self._will_flush = False
        if self._closed:
            return
        returned = self._requests.returned
        while returned:
            self._outbox.put(entry(Entry.RETURNED, returned.popleft()))
        self._outbox.flush()

    def _submit(self, offset: int) -> None:
        (number, uid, nbytes, deadline, explained, *told), feeds = read(self._requests, offset)
        model = self._models.get(uid)
        if model is None:
            self._refuse(number, Unavailable("the model was unloaded; send the request again"))
            return
        timeout = None if deadline is None else max(deadline - time.monotonic(), LEAST_LEFT)
        request = request_in(told, feeds, timeout)
        self._under_way[number] = uid, model, None
        done = partial(self._done, number, request.outputs, explained)
        if model.signature.decoupled:
            request.each = partial(self._part, number, request.outputs, explained)
        try:
            job = model.submit(request, nbytes, done)
        except Exception as error:
            self._not_taken(number, error)
            return
        if number in self._under_way:
            self._under_way[number] = uid, model, job

    def _not_taken(self, number: int, error: Exception) -> None:
        """A request was refused. (Not in the frame that the error leads to, which has the tensors.)"""
        uid, model, _ = self._under_way.pop(number)
        refusal = request_error(error, model.signature.name)
        if refusal.reason == QUEUE_FULL:
            self._full.show(uid)
        self._refuse(number, refusal)

    def _cancel(self, uid: int, model: Servable, job: Job | None) -> None:
        self._full.hide(uid)
        if job is not None:
            model.cancel(job)

    def _part(
        self, number: int, wanted: Sequence[Output], explained: bool, outputs: Arrays, batch: Batch | None, job: Job
    ) -> None:
        """A response that others follow."""
        if number not in self._under_way or self._closed:
            return
        run = run_out(batch, job) if explained else None
        try:
            offset = put(self._results, [number, None, run, True], _of(wanted, outputs))
        except RequestError:
            self._cancel(*self._under_way.pop(number))
            self._put(entry(Entry.LOST, number))
        else:
            self._put(entry(Entry.MESSAGE, offset))

    def _done(
        self, number: int, wanted: Sequence[Output], explained: bool, result: Arrays | Exception, batch: Batch | None
    ) -> None:
        found = self._under_way.pop(number, None)
        if found is None or self._closed:
            return
        uid, model, job = found
        self._full.hide(uid)
        if isinstance(result, Exception):
            self._refuse(number, request_error(result, model.signature.name))
            return
        run = run_out(batch, job) if explained and job is not None else None
        try:
            offset = put(self._results, [number, None, run, False], _of(wanted, result))
        except RequestError:
            self._put(entry(Entry.LOST, number))
        except Exception as error:
            self._refuse(number, request_error(error, model.signature.name))
        else:
            self._put(entry(Entry.MESSAGE, offset))

    def _refuse(self, number: int, error: RequestError) -> None:
        try:
            self._put(entry(Entry.MESSAGE, put(self._results, [number, error_out(error), None, False])))
        except RequestError:
            self._put(entry(Entry.LOST, number))

    def _put(self, number: int) -> None:
        self._outbox.put(number)
        if not self._will_flush:
            self._will_flush = True
            asyncio.get_running_loop().call_soon(self.flush)


def _of(wanted: Sequence[Output], outputs: Arrays) -> Arrays:
    """Those that are asked for; none where a response has none."""
    return {output.name: outputs[output.name] for output in wanted} if outputs else {}

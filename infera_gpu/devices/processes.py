"""Worker processes: they make the calls of some parts of a step at the same time, see `infera_kernels.cpu.process`."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any
from weakref import finalize

from infera_gpu.devices.sending import Region, Unsendable, message
from infera_gpu.devices.shared import SharedMemory
from infera_gpu.devices.worker_process import VARIABLE, Sharing, WorkerProcess
from infera_kernels.cpu.process import LINE, RUNNING, WORD, WORDS, semaphores

LEAST_NS = 30_000.0
"""Nanoseconds of work below which a part is not worth a process: it costs a few microseconds to hand it over and to
wait for it."""

MOST = 8
"""Processes, this one among them, beyond which threads are taken: each worker is a Python with NumPy, some
30 MiB."""

DEATHS = 3
"""After so many deaths of workers no more are started."""

NOT_WAITING = (False,)
"""What a lock is asked with."""


def unavailable(threads: int = 2) -> str:
    """Why worker processes make no parts where there are so many threads; empty where they do."""
    if threads > MOST:
        return f"{threads} threads are more than {MOST}"
    if os.environ.get(VARIABLE, "") == "0":
        return f"{VARIABLE} is 0"
    if not Path(sys.executable or "").name.startswith("python"):
        return f"the program that runs is no Python to start others with: '{sys.executable}'"
    if POOL.memory is None:
        return "the system has no nameless files (memfd_create), limits them (ulimit -f), or lacks semaphores"
    return ""


class Processes:
    """A pool of workers, started when regions are run again, and for one region at a time: others do without.

    A region's first run is without them too: what is run once is not worth being told.
    """

    def __init__(self) -> None:
        self._memory: SharedMemory | None = None
        self._no_memory = False
        self._forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._keep, after_in_child=self._forget)

    def _forget(self) -> None:
        """No workers yet, and no memory; in the child of a fork, which has its parent's, none any more."""
        for worker in getattr(self, "workers", ()):
            worker.forget()
        if self._memory is not None:
            os.close(self._memory.file)
        self._memory = None
        self._busy = threading.Lock()
        self._counting = threading.Lock()
        self.workers: list[WorkerProcess] = []
        self._words: memoryview | None = None
        self._running = 0
        self._used = self._recent = self._missed = False
        self._deaths = 0
        self._names = count()

    def _keep(self) -> None:
        if self._memory is not None:
            self._memory.keep()

    @property
    def memory(self) -> SharedMemory | None:
        """What arrays have to lie in; None where the system has no such memory, or no semaphores."""
        if self._memory is None and not self._no_memory:
            try:
                semaphores()
                self._memory = SharedMemory()
            except (OSError, AttributeError, TypeError):
                self._no_memory = True
        return self._memory

    # ---- runs

    def enter(self) -> None:
        """A run begins: workers that the last one needed are woken before this one needs them."""
        self._count(1)
        if self._recent:
            self._if_free(self._rouse)

    def _rouse(self) -> None:
        if self._missed:  # one that was killed awake never says that it sleeps
            self._missed = False
            self._look_after()
        if any(w.asleep for w in self.workers):
            self._wake()

    def leave(self) -> None:
        """A run has ended."""
        self._count(-1)
        self._recent, self._used = self._used, False

    def _count(self, more: int) -> None:
        with self._counting:
            self._running += more
            if (words := self._words) is not None:
                words[RUNNING] = self._running

    def _wake(self) -> None:
        self._look_after()
        try:
            for worker in self.workers:
                worker.wake()
        except OSError:
            self._died()

    def _look_after(self) -> None:
        """End all workers where one has died, or does not understand any more."""
        if any(w.broken for w in self.workers):
            self._end()
        elif not all(w.alive for w in self.workers):
            self._died()

    # ---- regions

    def run(self, region: Region) -> None:
        """Make the calls of every part. Raises what a call raises, after all have ended."""
        region.runs += 1
        if region.runs == 1 or region.sent is False or not self._if_free(self._with_workers, region):
            region.alone()

    def _if_free(self, work: Callable[..., object], *args: Any) -> bool:
        """Whether `work(*args)` made something true, which it is asked only where nobody else has the workers.

        The lock's answer goes to a list in the call that asks it: an interrupt afterwards finds it there.
        """
        held = list[bool]()
        try:
            held.extend(map(self._busy.acquire, NOT_WAITING))
            return held[0] and bool(work(*args))
        finally:
            if True in held:
                self._busy.release()

    def _with_workers(self, region: Region) -> bool:
        """Whether there were any to make the region with."""
        workers = self._knowing(region)
        if workers:
            self._together(region, workers)
        return bool(workers)

    def _together(self, region: Region, workers: Sequence[WorkerProcess]) -> None:
        self._used = True
        shared = Sharing(region, workers)
        try:
            shared.offer()
            region.make(0, shared.number)
        except BaseException as raised:
            shared.error = raised
        while True:  # memory that workers write to must not be given away, whatever interrupts this
            try:
                shared.settle()
                break
            except BaseException as raised:
                shared.error = shared.error or raised
        self._missed = self._missed or shared.missed
        if shared.error is not None:
            self._look_after()
            raise shared.error

    def _knowing(self, region: Region) -> Sequence[WorkerProcess]:
        """The workers that make parts of a region and know them; none where there are not enough that are ready."""
        wanted = region.workers
        if region.sent is not self.workers and len(self.workers) < wanted:
            self._start(wanted)
        workers = self.workers[:wanted]
        if not all(w.ready for w in workers):  # they start, or load functions
            self._look_after()
            return ()
        if region.sent is self.workers:
            return workers
        try:
            self._send(region, workers)
        except (Unsendable, pickle.PicklingError):
            region.sent = False
            return ()
        except OSError:
            self._died()
            return ()
        except BaseException:
            self._look_after()
            raise
        region.sent = self.workers
        return workers

    def _send(self, region: Region, workers: Sequence[WorkerProcess]) -> None:
        assert self._memory is not None
        if region.name < 0:
            region.name = next(self._names)
            finalize(region, self._forgotten, region.name).atexit = False
        number = len(workers) + 1
        for i, worker in enumerate(workers, 1):
            gone = list(worker.gone)
            worker.send(message(self._memory, gone, region, i, number))
            for _ in gone:
                worker.gone.popleft()

    def _forgotten(self, name: int) -> None:
        for worker in self.workers:
            worker.gone.append(name)

    # ---- workers

    def _start(self, number: int) -> None:
        """Have so many workers, unless too many died."""
        memory = self.memory
        if memory is None or self._deaths >= DEATHS:
            return
        self._end()
        block = memory.block((LINE + WORDS * number) * WORD)
        self._words = block.data.cast("q")
        self._count(0)
        try:
            for i in range(number):
                self.workers.append(WorkerProcess(memory, block, LINE + WORDS * i))
        except OSError:  # no more processes
            self._deaths = DEATHS
            self._end()

    def _died(self) -> None:
        self._deaths += 1
        self._end()

    def end(self) -> None:
        """End the workers, unless they are at work; they are started again when there is need."""
        self._if_free(self._end)

    def _end(self) -> None:
        self._words = None
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.end()


POOL = Processes()
"""Of all sessions of the process."""

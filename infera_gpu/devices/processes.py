"""Worker processes: they make the calls of some parts of a step at the same time, see `infera_kernels.cpu.process`."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from itertools import count
from pathlib import Path
from types import BuiltinMethodType, MethodDescriptorType
from typing import Any
from weakref import finalize

import numpy as np

from infera_gpu.devices.base import UFUNC_BUFFER
from infera_gpu.devices.shared import SharedMemory
from infera_gpu.errors import DeviceError
from infera_gpu.graph import HostArray
from infera_gpu.op import Call
from infera_kernels.cpu.aligned import address
from infera_kernels.cpu.process import (
    ANSWER,
    ASLEEP,
    DONE,
    FAILED,
    LINE,
    MESSAGES,
    OFFER,
    READY,
    REGION,
    RUNNING,
    WANTED,
    WORD,
    WORDS,
    semaphores,
    ufunc,
)

VARIABLE = "INFERA_PROCESSES"
"""An environment variable: "0" leaves all calls to threads."""

LEAST_NS = 30_000.0
"""Nanoseconds of work below which a part is not worth a process: it costs a few microseconds to hand it over and to
wait for it."""

SHARED_ABOVE = 1 << 16
"""Bytes of a constant from which on it lies in shared memory; smaller ones are sent."""

MOST = 8
"""Processes, this one among them, beyond which threads are taken: each worker has 26 MB of its own."""

FEW_CALLS = 8
"""Threads make the parts of a region that no process knows yet, where each is of so few calls: more of them meet at the
interpreter's lock too often to gain anything."""

SPINS = 200
"""How often the caller looks whether a worker is done before it lets other threads run in between."""

POLITE_S = 1e-3
"""Seconds after which it sleeps between looks: there may be no processor for the worker."""

ALIVE_S = 0.02
"""Seconds between looks whether a worker is alive meanwhile."""

DEATHS = 3
"""After so many deaths of workers no more are started."""

NOT_WAITING = (False,)
"""What a lock is asked with. Its answer goes to a list in the same call: an interrupt afterwards finds it there."""

_START = """import sys
sys.path[:] = sys.argv[7:]
from infera_kernels.cpu.process import main
main(*map(int, sys.argv[1:7]))
"""
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_NUMPYS = type(np.copyto)
"""Of functions of NumPy's that are written in C."""


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


class _Unsendable(Exception):
    """What no process can be told."""


class _Writer(pickle.Pickler):
    """Writes calls; arrays in shared memory are named by where they lie. Others are taken for constants: large ones are
    copied there, small ones go along, and workers cannot write to either."""

    def __init__(self, memory: SharedMemory) -> None:
        self.data = BytesIO()
        super().__init__(self.data, pickle.HIGHEST_PROTOCOL)
        self._memory = memory

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return None
        place = self._memory.place_of(value)
        if place is not None:
            return place, value.shape, value.dtype, value.strides, value.flags.writeable
        if value.dtype.hasobject:
            raise _Unsendable
        if value.nbytes >= SHARED_ABOVE:
            place = self._memory.place_of_copy(value)
            return place, value.shape, value.dtype, value.strides, False
        return value.tobytes(), value.shape, value.dtype, None, False

    def reducer_override(self, value: Any) -> Any:
        """A ufunc by its name in NumPy: pickle would take the first module that has one of this name."""
        if not isinstance(value, np.ufunc):
            return NotImplemented
        name = str(value.__name__)
        if getattr(np, name, None) is not value:
            raise _Unsendable
        return ufunc, (name,)


def _sendable(fn: Callable[..., object]) -> bool:
    """Whether a process may be told to call it: a function of NumPy's, or one that says so."""
    if isinstance(fn, partial):
        return _sendable(fn.func)
    if isinstance(fn, BuiltinMethodType):
        return isinstance(fn.__self__, np.ufunc)
    return isinstance(fn, np.ufunc | MethodDescriptorType | _NUMPYS) or getattr(fn, "sendable", False)


class Region:
    """The parts of a step, at most `threads` of which are made at a time; `otherwise(parts, threads)` has threads make
    them."""

    __slots__ = ("__weakref__", "few", "name", "otherwise", "parts", "runs", "sent", "workers")

    def __init__(self, parts: Sequence[Sequence[Call]], threads: int, otherwise: Callable[..., None]) -> None:
        self.parts, self.otherwise = parts, otherwise
        self.workers = min(len(parts), threads) - 1
        self.few = max(map(len, parts)) <= FEW_CALLS
        self.runs = 0
        self.name = -1
        self.sent: object = None
        """The workers that know it; False where they cannot."""

    def alone(self) -> None:
        """Make the calls in this process."""
        if self.few:
            self.otherwise(self.parts, self.workers + 1)
            return
        self.make(0, 1)

    def make(self, i: int, step: int) -> None:
        """Every `step`-th part from the i-th on."""
        for part in self.parts[i::step]:
            for fn, args in part:
                fn(*args)


class _Worker:
    """One process, and what this one shares with it."""

    def __init__(self, memory: SharedMemory, block: HostArray, at: int) -> None:
        from multiprocessing.connection import Pipe
        from subprocess import DEVNULL, Popen

        place = memory.place_of(block)
        assert place is not None
        self._words, self._at = block.data.cast("q"), at
        self.offer, self._answer = (address(block) + WORD * (at + which) for which in (OFFER, ANSWER))
        for semaphore in (self.offer, self._answer):
            semaphores().init(semaphore, 1, 0)
        self.broken = False
        """Whether an interrupt may have cut off a message."""
        self.gone: deque[int] = deque()
        """Regions that it may forget."""
        self._connection, theirs = Pipe()
        with theirs:
            numbers = (theirs.fileno(), memory.file, place[0], block.nbytes, at, UFUNC_BUFFER)
            self._process = Popen(
                [sys.executable, "-c", _START, *map(str, numbers), *sys.path],
                stdin=DEVNULL,
                stdout=DEVNULL,
                pass_fds=numbers[:2],
                env={**os.environ, **_ONE_THREAD},
            )

    @property
    def process(self) -> int:
        return self._process.pid

    @property
    def ready(self) -> bool:
        return bool(self._words[self._at + READY])

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def asleep(self) -> bool:
        return bool(self._words[self._at + ASLEEP])

    def wake(self) -> None:
        """Let it look at what there is. Raises OSError where it is gone."""
        self._connection.send_bytes(b"")

    def send(self, message: bytes) -> None:
        self.broken = True  # unless this comes to its end
        self._words[self._at + MESSAGES] += 1
        self._connection.send_bytes(message)
        self.broken = False

    def name(self, region: int) -> None:
        """What will be offered."""
        self._words[self._at + REGION] = region
        self._words[self._at + WANTED] += 1

    def wait(self) -> None:
        """Until the calls that it has taken are made. Raises what they raise; DeviceError where it has ended."""
        words, wanted, done = self._words, self._at + WANTED, self._at + DONE
        spins = 0
        while words[wanted] != words[done]:
            spins += 1
            if spins > SPINS:
                self._patiently(wanted, done)
        semaphores().take(self._answer)
        if words[self._at + FAILED]:
            self.broken = True
            words[self._at + FAILED] = 0
            error: BaseException = pickle.loads(self._connection.recv_bytes())
            self.broken = False
            raise error

    def _patiently(self, wanted: int, done: int) -> None:
        from select import poll

        others, words = poll(), self._words
        began = time.monotonic()
        look = began + ALIVE_S
        while words[wanted] != words[done]:
            others.poll(0)  # gives the interpreter's lock away for a moment
            os.sched_yield()
            now = time.monotonic()
            if now > began + POLITE_S:
                time.sleep(POLITE_S / 10)
            if now > look:
                look = now + ALIVE_S
                if not self.alive and words[wanted] != words[done]:
                    raise DeviceError(
                        f"a worker process ended in the middle of a step (exit status {self._process.returncode}; "
                        f"-9: killed, perhaps for memory); {VARIABLE}=0 lets threads compute instead"
                    )

    def end(self) -> None:
        from subprocess import TimeoutExpired

        self._connection.close()
        try:
            self._process.wait(1)
        except TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """It is another process's: of the one that forked this one."""
        self._connection.close()
        self._process.returncode = 0


class _Sharing:
    """One run of a region by this process and workers.

    Parts that no worker has begun when this process has made its own, it makes as well: nobody waits for a worker to
    come. An interrupt finds either all or nothing done by a call that fills a list.
    """

    def __init__(self, region: Region, workers: Sequence[_Worker]) -> None:
        self.error: BaseException | None = None
        """The first one."""
        self.number = len(workers) + 1
        self._region, self._workers = region, workers
        self._offers = [w.offer for w in workers]
        self._offered, self._left = list[int](), list[int]()
        self._made: set[int] = set()

    @property
    def missed(self) -> bool:
        """Whether a worker did not come: it slept, was late, or has ended."""
        return bool(self._made)

    def offer(self) -> None:
        """Each worker a part. Raises OSError where one is gone."""
        for worker in self._workers:
            worker.name(self._region.name)
        self._offered.extend(map(semaphores().post, self._offers))
        for worker in self._workers:
            if worker.asleep:
                worker.wake()

    def settle(self) -> None:
        """Until every part that was begun has ended, and after an error nothing else is. May be called again."""
        if len(self._left) < len(self._offered):
            self._left.extend(map(semaphores().take, self._offers))
        for i, taken in enumerate(self._left):
            if taken:
                try:
                    self._workers[i].wait()
                except Exception as error:
                    self.error = self.error or error
            elif self.error is None and i not in self._made:
                self._made.add(i)
                self._region.make(i + 1, self.number)


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
        self.workers: list[_Worker] = []
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
            held = list[bool]()
            try:
                held.extend(map(self._busy.acquire, NOT_WAITING))
                if held[0]:
                    if self._missed:  # one that was killed awake never says that it sleeps
                        self._missed = False
                        self._look_after()
                    if any(w.asleep for w in self.workers):
                        self._wake()
            finally:
                if True in held:
                    self._busy.release()

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
        if region.runs > 1 and region.sent is not False:
            held = list[bool]()
            try:
                held.extend(map(self._busy.acquire, NOT_WAITING))
                if held[0] and (workers := self._knowing(region)):
                    self._together(region, workers)
                    return
            finally:
                if True in held:
                    self._busy.release()
        region.alone()

    def _together(self, region: Region, workers: Sequence[_Worker]) -> None:
        self._used = True
        shared = _Sharing(region, workers)
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

    def _knowing(self, region: Region) -> Sequence[_Worker]:
        """The workers that make parts of a region and know them; none where there are not enough that are ready."""
        wanted = region.workers
        if region.sent is self.workers:
            return self.workers[:wanted]
        if len(self.workers) < wanted:
            self._start(wanted)
        workers = self.workers[:wanted]
        if not all(w.ready for w in workers):
            self._look_after()
            return ()
        try:
            self._send(region, workers)
        except (_Unsendable, pickle.PicklingError):
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

    def _send(self, region: Region, workers: Sequence[_Worker]) -> None:
        if not all(_sendable(fn) for part in region.parts for fn, _ in part):
            raise _Unsendable
        assert self._memory is not None
        if region.name < 0:
            region.name = next(self._names)
            finalize(region, self._forgotten, region.name).atexit = False
        number = len(workers) + 1
        for i, worker in enumerate(workers, 1):
            gone = list(worker.gone)
            writer = _Writer(self._memory)
            writer.dump((gone, region.name, [call for part in region.parts[i::number] for call in part]))
            worker.send(writer.data.getvalue())
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
                self.workers.append(_Worker(memory, block, LINE + WORDS * i))
        except OSError:  # no more processes
            self._deaths = DEATHS
            self._end()

    def _died(self) -> None:
        self._deaths += 1
        self._end()

    def end(self) -> None:
        """End the workers, unless they are at work; they are started again when there is need."""
        held = list[bool]()
        try:
            held.extend(map(self._busy.acquire, NOT_WAITING))
            if held[0]:
                self._end()
        finally:
            if True in held:
                self._busy.release()

    def _end(self) -> None:
        self._words = None
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.end()


POOL = Processes()
"""Of all sessions of the process."""

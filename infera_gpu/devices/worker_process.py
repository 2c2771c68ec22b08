"""A worker process as the one that started it sees it, and one step that they make together."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from infera_gpu.devices.base import UFUNC_BUFFER
from infera_gpu.devices.sending import Region
from infera_gpu.devices.shared import SharedMemory
from infera_gpu.errors import DeviceError
from infera_gpu.graph import HostArray
from infera_kernels.cpu.aligned import address
from infera_kernels.cpu.process import (
    ANSWER,
    ASLEEP,
    DONE,
    FAILED,
    MESSAGES,
    OFFER,
    READY,
    REGION,
    WANTED,
    WORD,
    semaphores,
)

VARIABLE = "INFERA_PROCESSES"
"""An environment variable: "0" leaves all calls to threads."""

SPINS = 200
"""How often the caller looks whether a worker is done before it lets other threads run in between."""

POLITE_S = 1e-3
"""Seconds after which it sleeps between looks: there may be no processor for the worker."""

ALIVE_S = 0.02
"""Seconds between looks whether a worker is alive meanwhile."""

_START = """import sys
sys.path[:] = sys.argv[7:]
from infera_kernels.cpu.process import main
main(*map(int, sys.argv[1:7]))
"""
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class WorkerProcess:
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
        self._woken = 0
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
        """Let it look at what there is, where it sleeps. Raises OSError where it is gone.

        Once for each time that it falls asleep: one that is stopped reads nothing, and a full socket would be waited
        for.
        """
        asleep = self._words[self._at + ASLEEP]
        if asleep and asleep != self._woken:
            self._connection.send_bytes(b"")
            self._woken = asleep  # only now: an interrupt before costs a message, and not the sleeper

    @property
    def messages(self) -> int:
        """How many it was sent."""
        return int(self._words[self._at + MESSAGES])

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


class Sharing:
    """One run of a region by this process and workers.

    Parts that no worker has begun when this process has made its own, it makes as well: nobody waits for a worker to
    come. An interrupt finds either all or nothing done by a call that fills a list.
    """

    def __init__(self, region: Region, workers: Sequence[WorkerProcess]) -> None:
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
        """Each worker a part; one that is gone does not come."""
        for worker in self._workers:
            worker.name(self._region.name)
        self._offered.extend(map(semaphores().post, self._offers))
        for worker in self._workers:
            with suppress(OSError):
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

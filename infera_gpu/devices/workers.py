"""Threads that run the parts of a step at the same time: one pool a process, shared by its CPU devices.

Nobody waits for a worker to come: whoever enters a region runs its parts, and workers that are awake take some of them.
A region therefore ends where there are no workers at all (they are busy with another run, or lost in a fork), and no
run waits for another's region, only for parts that a worker has begun.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary, finalize

from infera_gpu.devices.base import quiet_numpy
from infera_gpu.devices.processes import POOL
from infera_gpu.op import Call
from infera_kernels.cpu.blas import on_one_thread


class Region:
    """The parts of one step during one run, at most `seats` of which workers run beside the caller's."""

    __slots__ = ("_done", "_error", "_lock", "_seats", "_unfinished", "_waiting")

    def __init__(self, parts: Sequence[Sequence[Call]], seats: int) -> None:
        self._waiting = list(reversed(parts))
        self._unfinished = len(parts)
        self._seats = seats
        self._lock = threading.Lock()
        self._done = threading.Lock()
        self._done.acquire()
        self._error: BaseException | None = None

    def sit(self) -> bool:
        """Take a seat, if one is left and there is still a part to run."""
        with self._lock:
            if not self._waiting or not self._seats:
                return False
            self._seats -= 1
            return True

    def work(self) -> None:
        """Run parts until none is left to begin. After an error the others are dropped."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                part = self._waiting.pop()
            error: BaseException | None = None
            try:
                for fn, args in part:
                    fn(*args)
            except BaseException as raised:
                error = raised
            with self._lock:
                self._unfinished -= 1
                if error is not None:
                    self._error = self._error or error
                    self._unfinished -= len(self._waiting)
                    self._waiting.clear()
                if not self._unfinished:
                    self._done.release()

    def wait(self) -> None:
        """Return when every part has ended. Raises the first error; an interrupt only after the end."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self._done.acquire()
                break
            except KeyboardInterrupt as raised:  # memory that parts write to must not be given away
                interrupt = raised
        if error := interrupt or self._error:
            raise error


class Workers:
    """Daemon threads, one fewer than the most threads that a user asked for; started when first needed.

    While there are users, BLAS runs on one thread, in the whole process: its own threads would compete with these for
    the same cores, and they wait actively. The last user to leave, or to be collected, ends the threads and gives BLAS
    back its own; `ended` is called then.
    """

    def __init__(self, ended: Callable[[], None] = lambda: None) -> None:
        self._ended = ended
        self._users: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self._restore: Callable[[], object] | None = None
        self._forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """No threads yet; in the child of a fork, where only the thread that forked lives on, none any more."""
        self._lock = threading.Lock()
        self._open: list[Region] = []
        self._idle: list[threading.Lock] = []
        self._running = 0

    @property
    def running(self) -> int:
        """How many threads there are."""
        return self._running

    def enter(self, user: object, threads: int) -> None:
        """From now on `user` runs regions of up to so many threads. No effect where it does already."""
        with self._lock:
            if self._restore is None:
                self._restore = on_one_thread()
            if user not in self._users:
                finalize(user, self._collected).atexit = False
            self._users[user] = threads

    def _collected(self) -> None:
        """A user is garbage. This may happen anywhere, in here too: where the lock is taken, the next one tells."""
        if self._lock.acquire(blocking=False):
            try:
                self._release_blas()
                idle, self._idle = self._idle, []
            finally:
                self._lock.release()
            for wake in idle:
                wake.release()

    def _release_blas(self) -> None:
        if self._restore is not None and not any(True for _ in self._users):
            self._restore()
            self._restore = None
            self._ended()

    def leave(self, user: object) -> None:
        """`user` runs no more regions. No effect where it is no user."""
        with self._lock:
            self._users.pop(user, None)
            idle, self._idle = self._idle, []
            self._release_blas()
        for wake in idle:
            wake.release()

    def run(self, parts: Sequence[Sequence[Call]], threads: int) -> None:
        """Make the calls of every part, on up to `threads` threads, this one among them. Raises what a call raises."""
        region = Region(parts, threads - 1)
        with self._lock:
            while self._running < self._wanted and self._start():
                pass
            self._open.append(region)
            woken, self._idle[:] = self._idle[1 - threads :], self._idle[: 1 - threads]
        for wake in woken:
            wake.release()
        try:
            region.work()
        finally:
            with self._lock:
                self._open.remove(region)
        region.wait()

    @property
    def _wanted(self) -> int:
        return max(self._users.values(), default=1) - 1

    def _start(self) -> bool:
        """Whether the system gave another thread."""
        try:
            threading.Thread(target=self._serve, name=f"infera-{self._running}", daemon=True).start()
        except RuntimeError:
            return False
        self._running += 1
        return True

    def _serve(self) -> None:
        wake = threading.Lock()
        wake.acquire()
        with quiet_numpy():
            while True:
                with self._lock:
                    if self._running > self._wanted:
                        self._running -= 1
                        return
                    region = next((r for r in self._open if r.sit()), None)
                    if region is None:
                        self._idle.append(wake)
                if region is None:
                    wake.acquire()
                else:
                    region.work()


WORKERS = Workers(POOL.end)

"""A process that makes the calls of some parts of a step, while the one that started it makes the others.

Threads of one process meet at the interpreter's lock, which every call into NumPy gives away and takes again: where a
call takes a few microseconds, and waking a thread tens of them, two threads are slower than one. Two processes have a
lock each. What they compute on lies in a file in memory that both have mapped; who waits for the other looks again and
again, for a while, whether a semaphore there has been posted.
"""

from __future__ import annotations

import ctypes
import os
import pickle
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import numpy as np

from infera_kernels.calls import Array, Call
from infera_kernels.cpu.aligned import LARGE_PAGE, address

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

WORD, LINE = 8, 8
"""Bytes of a word, and words of a cache line: what two processes write never lies in the same one."""

WANTED, REGION, MESSAGES = 0, 1, 2
"""Words of a worker that the other process writes: how many regions it was offered, the name of the last, how many
messages it was sent."""

DONE, FAILED, ASLEEP, READY = LINE, LINE + 1, LINE + 2, LINE + 3
"""Words that the worker writes: which offer is the last that it has dealt with, whether that failed and a message
says why, how often it fell asleep where only a message wakes it and else 0, whether it has started and has all
functions that it was told."""

OFFER, ANSWER = 2 * LINE, 3 * LINE
"""Where semaphores lie: the first is for who makes the calls of the offered region, the worker or the other process,
the second is posted by the worker when it has made them."""

WORDS = 4 * LINE
"""Of a worker. The words of the first one lie behind a cache line of the whole pool's."""

RUNNING = 0
"""Word of the pool: how many runs go on."""

SPINS, IDLE_SPINS = 10_000, 1_000
"""How often a worker looks whether there is something to do before it sleeps, during a run and after it: for about
four milliseconds, and four hundred microseconds."""

POLITE = 8
"""After so many looks it lets others have the processor who wait for it, the other process perhaps."""

Place: TypeAlias = tuple[int, int, int]
"""Where in the file a block begins, its bytes, and where in it an array begins."""

Sent: TypeAlias = "tuple[Place | bytes, tuple[int, ...], np.dtype[Any], tuple[int, ...] | None, bool]"
"""An array: where it lies in shared memory, or else its elements, which nobody may write to; its shape, dtype and
strides, and whether it may be written to."""


class Told:
    """A function that takes time to have, as what numba compiled does: pickled, and had once by a worker."""

    def __init__(self, function: bytes) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        raise TypeError("a function that was not sent")


class Semaphores(NamedTuple):
    """The C library's, called with their address, by who keeps the interpreter's lock meanwhile.

    Memory that one process wrote before it posted is seen by the one that has taken what was posted (POSIX.1-2017,
    4.12 Memory Synchronization).
    """

    init: Callable[[int, int, int], int]
    """(address, 1 for several processes, value)"""
    post: Callable[[int], int]
    take: Callable[[int], int]
    """0, or -1 where there is nothing to take."""


@cache
def semaphores() -> Semaphores:
    """Raises AttributeError where the C library has none."""
    library = ctypes.PyDLL(None)
    init, post, take = library.sem_init, library.sem_post, library.sem_trywait
    init.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
    post.argtypes = take.argtypes = (ctypes.c_void_p,)
    return Semaphores(init, post, take)


def ufunc(name: str) -> np.ufunc:
    """NumPy's of this name."""
    found: np.ufunc = getattr(np, name)
    return found


MAP_FIXED, MADV_COLLAPSE = 0x10, 25
"""Of Linux, and not in Python's `mmap`: see mmap(2) and madvise(2)."""


class Mapping:
    """Part of a file, mapped until this is let go of; an array of its bytes is `np.asarray` of it.

    The system needs no descriptor for it. Python's own `mmap` keeps one each, of which a process has a thousand (its
    `trackfd` came with 3.13). What begins with a large page of the file begins with one of addresses, unless these are
    scarce. Raises MemoryError where the system maps no more.
    """

    def __init__(self, file: int, nbytes: int, begin: int) -> None:
        from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE

        library = ctypes.CDLL(None, use_errno=True)
        library.mmap.restype = ctypes.c_void_p
        self._unmap, self._advise = library.munmap, library.madvise
        self._at, self._nbytes = 0, nbytes

        def mapped(at: int | None, size: int, access: int, kind: int, *rest: Any) -> int | None:
            found: int = library.mmap(ctypes.c_void_p(at), ctypes.c_size_t(size), access, kind, *rest)
            return None if found == ctypes.c_void_p(-1).value else found

        access, of_file = PROT_READ | PROT_WRITE, (file, ctypes.c_long(begin))
        found = room = None
        if nbytes >= LARGE_PAGE and not begin % LARGE_PAGE:  # of more addresses those which lie as the file does
            room = mapped(None, nbytes + LARGE_PAGE, 0, MAP_PRIVATE | MAP_ANONYMOUS, -1, ctypes.c_long(0))
        if room is None:
            found = mapped(None, nbytes, access, MAP_SHARED, *of_file)
        else:
            at, end = room + -room % LARGE_PAGE, room + nbytes + LARGE_PAGE
            found = mapped(at, nbytes, access, MAP_SHARED | MAP_FIXED, *of_file)
            self._free(room, end if found is None else at)
            self._free(end if found is None else at + nbytes, end)
        if found is None:
            raise MemoryError(f"{nbytes:,} bytes cannot be mapped: {os.strerror(ctypes.get_errno())}")
        self._at = found
        self.__array_interface__ = {"data": (found, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}

    def _free(self, start: int, stop: int) -> None:
        """Give the addresses [start, stop) back."""
        if start < stop:
            self._unmap(ctypes.c_void_p(start), ctypes.c_size_t(stop - start))

    def advise(self, what: int, start: int = 0, stop: int | None = None) -> None:
        """One of `mmap`'s MADV_..., about bytes [start, stop)."""
        end = self._nbytes if stop is None else stop
        self._advise(ctypes.c_void_p(self._at + start), ctypes.c_size_t(end - start), what)

    def enlarge(self, start: int, stop: int) -> None:
        """Have bytes [start, stop), which are whole large pages, lie on large pages, now, with what they hold.

        They stay on small ones where the system has no large ones left, or cannot (Linux can from 6.1 on). It makes
        none of its own accord of memory that processes share, unless /sys/kernel/mm/transparent_hugepage says so.
        """
        if start == stop:
            return
        data = np.asarray(self)
        for page in range(start, stop, LARGE_PAGE):
            data[page]  # one that has nothing at all yet is passed over
        self.advise(MADV_COLLAPSE, start, stop)

    def __del__(self) -> None:
        if self._at:
            self._free(self._at, self._at + self._nbytes)


class _Reader(pickle.Unpickler):
    """Reads calls and their arrays."""

    def __init__(self, data: bytes, blocks: _Blocks, function: Callable[[bytes], object]) -> None:
        super().__init__(BytesIO(data))
        self._blocks, self._function = blocks, function

    def persistent_load(self, sent: Sent | bytes) -> object:
        if isinstance(sent, bytes):
            return self._function(sent)
        place, shape, dtype, strides, writeable = sent
        if isinstance(place, bytes):
            return np.ndarray(shape, dtype, place)
        begin, nbytes, start = place
        array: Array = np.ndarray(shape, dtype, self._blocks.at(begin, nbytes), start, strides)
        array.flags.writeable = writeable
        return array


class _Blocks:
    """Parts of the file that this process has mapped: as long as an array lies in them."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._mapped: WeakValueDictionary[int, Array] = WeakValueDictionary()

    def at(self, begin: int, nbytes: int) -> Array:
        found = self._mapped.get(begin)
        if found is None:
            found = np.asarray(Mapping(self._file, nbytes, begin))
            self._mapped[begin] = found
        return found


class Worker:
    """Serves the process at the other end of `connection`; the pool's words lie in `block`, the worker's from `at`."""

    def __init__(self, connection: Connection, file: int, block: Array, at: int) -> None:
        self._connection, self._blocks = connection, _Blocks(file)
        self._words, self._at = memoryview(block).cast("q"), at
        self._offer, self._answer = (address(block) + WORD * (at + which) for which in (OFFER, ANSWER))
        self._regions: dict[int, Sequence[Call]] = {}
        self._functions: dict[bytes, object] = {}
        self._received = 0

    def serve(self) -> None:
        """Make calls as they are offered. Raises EOFError when the other process is gone, or wants no more."""
        words, at, offer, answer = self._words, self._at, self._offer, self._answer
        _, post, take = semaphores()
        words[at + READY] = 1
        sleeps = 0
        while True:
            spins = 0
            while take(offer):
                spins += 1
                if not spins % POLITE:
                    os.sched_yield()
                if words[at + MESSAGES] != self._received:
                    self._receive()
                elif spins > (SPINS if words[RUNNING] else IDLE_SPINS):
                    sleeps += 1
                    words[at + ASLEEP] = sleeps
                    if not take(offer):  # by who could not see yet that it had to wake this process
                        break
                    self._receive()
                    words[at + ASLEEP] = 0
                    spins = 0
            words[at + ASLEEP] = 0
            while words[at + MESSAGES] != self._received:
                self._receive()
            self._make(self._regions[words[at + REGION]])
            post(answer)
            words[at + DONE] = words[at + WANTED]

    def _receive(self) -> None:
        """Wait for a message, be it an empty one, which only wakes."""
        message = self._connection.recv_bytes()
        if message:
            self._received += 1
            gone, name, calls = _Reader(message, self._blocks, self._function).load()
            for old in gone:
                self._regions.pop(old, None)
            self._regions[name] = calls
            self._words[self._at + READY] = 1

    def _function(self, told: bytes) -> object:
        """What was `Told`. The first one imports numba: who has more to tell need not wait, and does without."""
        if told not in self._functions:
            self._words[self._at + READY] = 0
            self._functions[told] = pickle.loads(told)
        return self._functions[told]

    def _make(self, calls: Sequence[Call]) -> None:
        try:
            for fn, args in calls:
                fn(*args)
        except BaseException as error:
            self._connection.send_bytes(_portable(error))
            self._words[self._at + FAILED] = 1


def _portable(error: BaseException) -> bytes:
    try:
        found = pickle.dumps(error)
        pickle.loads(found)
    except Exception:  # of a class that does not travel
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return found


def main(socket: int, file: int, begin: int, size: int, at: int, buffer: int) -> None:
    """Serve over a socket until its other end is closed.

    The pool's words are in `size` bytes of the file from `begin` on, the worker's at the word `at` of them. `buffer` is
    the size of ufuncs' buffers.
    """
    import signal
    from multiprocessing.connection import Connection

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the other process ends this one, after its runs
        signal.signal(number, signal.SIG_IGN)
    np.seterr(all="ignore")
    np.setbufsize(buffer)
    block = np.asarray(Mapping(file, size, begin))
    try:
        Worker(Connection(socket), file, block, at).serve()
    except (EOFError, OSError, MemoryError):
        os._exit(0)

"""Numbers from one process to another, in order: through shared memory, with an eventfd that counts them.

The eventfd is what synchronizes: the kernel's lock around its counter makes what was written before it was written to
visible to who has read it, on every processor.
"""

from __future__ import annotations

import mmap
import os
from collections import deque

ENTRY_BYTES = 8

SIGNS = 512
"""Numbers that can be shown at a time."""


def ring_fds(name: str, entries: int) -> tuple[int, int]:
    """A file for so many entries, and an eventfd. Raises OSError."""
    memory = os.memfd_create(name, os.MFD_CLOEXEC)
    os.posix_fallocate(memory, 0, (entries + 1) * ENTRY_BYTES)  # the last one says how many were read
    return memory, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


class _End:
    """`_passed` counts what this end has written, or read."""

    def __init__(self, memory: int, event: int) -> None:
        self.event = event
        self._file = memory
        numbers = memoryview(mmap.mmap(memory, 0)).cast("Q")
        self._entries, self._read = numbers[:-1], numbers[-1:]
        self._count = len(self._entries)
        self._passed = 0

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self._file)
        os.close(self.event)


class Writer(_End):
    """Who puts numbers in. What finds no room waits here until the next `flush`."""

    def __init__(self, memory: int, event: int) -> None:
        super().__init__(memory, event)
        self._room = self._count
        self._unseen = 0
        self._waiting: deque[int] = deque()

    def put(self, entry: int) -> None:
        """Write a number, which the reader sees after `flush`."""
        if not self._room or self._waiting:
            self._waiting.append(entry)
            return
        self._room -= 1
        self._entries[self._passed % self._count] = entry
        self._passed += 1
        self._unseen += 1

    def flush(self) -> None:
        """Wake the reader."""
        if self._waiting:
            self._room = self._count - (self._passed - self._read[0])
            waiting, self._waiting = self._waiting, deque()
            for entry in waiting:
                self.put(entry)
        if self._unseen:
            unseen, self._unseen = self._unseen, 0
            os.eventfd_write(self.event, unseen)


class Reader(_End):
    """Who takes them out, whenever `event` is readable."""

    def take(self) -> list[int]:
        """All numbers that are there. What the last call has taken may be written over from now on."""
        self._read[0] = self._passed
        try:
            count = os.eventfd_read(self.event)
        except BlockingIOError:
            return []
        at = self._passed % self._count
        end = at + count
        self._passed += count
        if end <= self._count:
            return self._entries[at:end].tolist()
        return self._entries[at:].tolist() + self._entries[: end - self._count].tolist()


class Signs:
    """Numbers that one process shows and others look up: a hint, seen at some time."""

    def __init__(self, file: int) -> None:
        self._shown = memoryview(mmap.mmap(file, 0)).cast("Q")

    @staticmethod
    def create(name: str) -> int:
        """A file for them. Raises OSError."""
        file = os.memfd_create(name, os.MFD_CLOEXEC)
        os.posix_fallocate(file, 0, SIGNS * ENTRY_BYTES)
        return file

    def show(self, number: int) -> None:
        """Show a number above 0; another that had its place is shown no more."""
        self._shown[number % SIGNS] = number

    def hide(self, number: int) -> None:
        """Show it no more."""
        self._shown[number % SIGNS] = 0

    def hide_all(self) -> None:
        """Show nothing."""
        for place in range(SIGNS):
            self._shown[place] = 0

    def shows(self, number: int) -> bool:
        """Whether a number is shown."""
        return self._shown[number % SIGNS] == number

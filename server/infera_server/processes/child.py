"""Processes that a server starts: how, and how they end."""

from __future__ import annotations

import ctypes
import faulthandler
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

PR_SET_PDEATHSIG = 1

EXIT_PATIENCE = 1.0
"""Seconds that a process has to exit when it is asked to."""

_SPAWNER = ThreadPoolExecutor(1, "infera-spawn")
"""The system ends a process with the thread that started it (PR_SET_PDEATHSIG): this one lives to the end."""


class Child:
    """A module run as a process of its own. Its arguments are the descriptors that it inherits."""

    def __init__(self, module: str, fds: Sequence[int]) -> None:
        """Raises OSError where it cannot be started."""
        command = [sys.executable, "-P", "-m", module, *map(str, fds)]
        self._process: subprocess.Popen[bytes] = _SPAWNER.submit(
            subprocess.Popen, command, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
        ).result()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self) -> str:
        """How it ended, once it has."""
        code = self._process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def kill(self) -> None:
        """End it now, whatever it does."""
        self._process.kill()

    def end(self, patience: float = EXIT_PATIENCE) -> None:
        """Wait for it, and end it where it does not end by itself."""
        try:
            self._process.wait(max(0.0, patience))
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()


def prepare() -> None:
    """In a child: the server alone says when it ends, not the terminal; a crash says where it happened."""
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, signal.SIG_IGN)
    faulthandler.enable()


def die_with_parent(oom_score: int) -> None:
    """In a child: end with the server, at once. Out of memory, the system ends what has a high score first."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(str(oom_score))

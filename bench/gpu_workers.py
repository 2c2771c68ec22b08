"""GPU sections in a process that is replaced: what faults, dies or hangs loses its case or its section, not the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Literal, NoReturn

from bench.gpu_journal import Journal, JournalledCases, State
from bench.gpu_report import OUT_OF_TIME, Context, Outcome, Section, Tried, outcome_of

NO_GPU = 3
LOST = 4
"""Exit codes of a worker: there is no GPU, and what it ran has lost it to its process."""

POLL = 0.2
"""Seconds between looks at what a worker does."""


END = 30.0
"""Seconds in which a killed worker is gone."""


@dataclass(frozen=True)
class Limits:
    """How much is put up with."""

    grace: float = 30.0
    """Seconds that a section may take beyond those that it was given; it is ended then."""
    start: float = 120.0
    """Seconds in which a worker begins a section: a driver that a fault has wedged may not let it start."""
    replaced: int = 8
    """How often a worker is replaced while cases of one section go on."""


def work(
    sections: Mapping[str, Section],
    context_of: Callable[[str, float], Context],
    journal: Journal,
    lost: Callable[[], bool],
) -> int:
    """In the worker: runs what has no outcome yet, and returns the exit code. Cases go on behind those that ran.

    `context_of` gives the context of a section that has taken so many seconds, in processes before this one.
    """
    state = journal.state()
    for name, section in sections.items():
        if name in state.outcomes:
            continue
        resumed = name == state.section
        cases = JournalledCases(journal, state.tried if resumed else {})
        context = replace(context_of(name, time.time() - state.begun if resumed else 0.0), cases=cases)
        journal.write("section", section=name, left=context.left())
        outcome = outcome_of(name, section, context, resumed=resumed)
        gone = lost()
        if gone and cases.some:
            return LOST
        journal.write("outcome", outcome=outcome.record())
        if gone:
            return LOST
    return 0


def end_with_parent() -> None:
    """In the worker: it ends, with what it has started, when nobody holds the other end of its input any more."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    Thread(target=wait, daemon=True).start()


@contextmanager
def ending_in_order() -> Iterator[None]:
    """A request to end, SIGTERM or SIGHUP, raises SystemExit meanwhile, so that workers and files are cleared away."""

    def end(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Worker:
    """A started process, and the file that its standard error goes to."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, command: Sequence[str], log: Path) -> Worker:
        """In a session of its own, whose processes `end` ends. Its standard input is a pipe that this process holds the
        other end of: it is at its end when this process is, however that came about."""
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=file, stdout=file, start_new_session=True)
        return cls(process, log)

    def end(self) -> None:
        """It, and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # what waits within a driver cannot be ended
            self.process.wait(END)
        if self.process.stdin:
            self.process.stdin.close()

    def said(self) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-4000:]


class Supervisor:
    """Starts workers until every section has an outcome, none after the deadline.

    `start(left)` starts one that has so many seconds.
    """

    def __init__(
        self,
        names: Sequence[str],
        journal: Journal,
        start: Callable[[float], Worker],
        deadline: float,
        limits: Limits,
    ) -> None:
        self._names, self._journal, self._start, self._deadline = names, journal, start, deadline
        self._limits = limits
        self._told: set[str] = set()

    def outcomes(self) -> Iterator[Outcome]:
        """As they come."""
        replaced = 0
        while self._left(state := self._journal.state()):
            if time.monotonic() >= self._deadline:
                self._skip(state)
                yield from self._new(self._journal.state())
                return
            started = time.time()
            worker = self._start(self._deadline - time.monotonic())
            hung = ""
            try:
                while worker.process.poll() is None and not hung:
                    time.sleep(POLL)
                    state = self._journal.state()
                    yield from self._new(state)
                    hung = self._hung(state, started)
            finally:
                worker.end()
            state = self._journal.state()
            yield from self._new(state)
            replaced = replaced + 1 if state.section else 0
            self._account_for(state, worker, hung, again=replaced <= self._limits.replaced)
            yield from self._new(self._journal.state())

    def _left(self, state: State) -> list[str]:
        """Sections without an outcome."""
        return [name for name in self._names if name not in state.outcomes]

    def _skip(self, state: State) -> None:
        """Writes down that there is no time for what is left; a section that was begun keeps what it has."""
        for name in self._left(state):
            begun = name == state.section
            self._close(name, OUT_OF_TIME, "", "failed" if begun else "skipped", state if begun else None)

    def _new(self, state: State) -> Iterator[Outcome]:
        for name, outcome in state.outcomes.items():
            if name not in self._told:
                self._told.add(name)
                yield outcome

    def _hung(self, state: State, started: float) -> str:
        """Why what goes on is to be ended; empty while it may go on."""
        now = time.time()
        if not state.section:
            waited, over = now - max(state.at, started), time.monotonic() - self._deadline
            late = waited > self._limits.start or over > self._limits.grace
            return f"no section begun after {waited:.0f} s" if late else ""
        limit = max(state.left, 0.0) + self._limits.grace
        taken, over = now - state.since, time.monotonic() - self._deadline
        if taken > limit or over > self._limits.grace:  # a worker's own deadline is later by what it took to start
            return f"no end after {min(taken, limit):.0f} s"
        if state.case and now > state.case_until:
            return "no answer in time"
        return ""

    def _account_for(self, state: State, worker: Worker, hung: str, *, again: bool) -> None:
        """Writes down what an ended worker has left open."""
        code = worker.process.returncode
        left = self._left(state)
        if not left or (code == LOST and (again or not state.section)):
            return
        if code == NO_GPU:
            for name in left:
                self._close(name, "the GPU is gone", worker.said(), "skipped" if name != left[0] else "failed")
            return
        problem = hung or _ending(code)
        if state.case:
            self._journal.write("tried", case=state.case, **asdict(Tried(problem, lost=True)))
            if again and not hung.startswith("no end"):
                return
        self._close(state.section or left[0], problem, worker.said(), "failed", state)

    def _close(
        self,
        name: str,
        problem: str,
        said: str,
        status: Literal["failed", "skipped"],
        state: State | None = None,
    ) -> None:
        facts: dict[str, object] = {"said": said}
        if state is not None and state.tried:
            facts["failed"] = {case: tried.problem for case, tried in state.tried.items() if tried.problem}
            facts["rows"] = [tried.found for tried in state.tried.values() if isinstance(tried.found, dict)]
        if state is not None and state.case:
            problem = f"{state.case}: {problem}"
        outcome = Outcome(name, status, 0.0 if state is None else time.time() - state.since, problem, facts)
        self._journal.write("outcome", outcome=replace(outcome, seconds=round(outcome.seconds, 2)).record())


def _ending(code: int) -> str:
    """What an exit code says."""
    if code == LOST:
        return "it lost the GPU again and again"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"


def worker_command(prog: str, journal: Path, *options: str) -> list[str]:
    """What starts a worker of `python -m prog`."""
    return [sys.executable, "-X", "faulthandler", "-m", prog, "--worker", str(journal), *options]

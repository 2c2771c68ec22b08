"""What a run of the GPU sections has come to, line by line in a file, for the process that takes over after a fault."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_report import CASE_SECONDS, Outcome, Tried, loses_the_gpu, plain


class Journal:
    """A file of JSON lines: a section begins, a case begins, a case has come to something, a section has an outcome.

    One process writes at a time. A line that a process was killed over is cut short: it counts as not written, and the
    next one begins anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, **content: Any) -> None:
        line = json.dumps({"kind": kind, "at": time.time(), **plain(content)}).encode()
        with self.path.open("a+b") as file:
            if size := file.seek(0, os.SEEK_END):
                file.seek(size - 1)
                line = line if file.read() == b"\n" else b"\n" + line
            file.write(line + b"\n")

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is there so far; a last line that is still being written is left out, and lines that were cut short."""
        if not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                with suppress(json.JSONDecodeError):
                    yield json.loads(line)

    def state(self) -> State:
        """Where the run is."""
        state = State()
        for line in self.lines():
            state.follow(line)
        return state


@dataclass
class State:
    """Where a run is: outcomes; the section that goes on, what its cases came to, and the case that goes on.

    `begun`, `since` and `case_until` are times of the clock: when the section began, when the process that goes on with
    it did so, and when the case is to be over. `left` are the seconds that the section had at `since`, `at` is the
    time of the last line.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    section: str = ""
    begun: float = 0.0
    since: float = 0.0
    left: float = 0.0
    tried: dict[str, Tried] = field(default_factory=dict)
    case: str = ""
    case_until: float = 0.0
    at: float = 0.0

    def follow(self, line: Mapping[str, Any]) -> None:
        """Takes in one more line of the journal."""
        self.at = line["at"]
        match line["kind"]:
            case "section":
                if line["section"] != self.section:
                    self.tried, self.begun = {}, line["at"]
                self.section, self.since, self.left, self.case = line["section"], line["at"], line["left"], ""
            case "case":
                self.case, self.case_until = line["case"], line["at"] + line["seconds"]
            case "tried":
                self.tried[line["case"]] = Tried(line["problem"], line["found"], line["lost"])
                self.case = ""
            case _:
                outcome = Outcome(**line["outcome"])
                self.outcomes[outcome.section] = outcome
                self.section, self.case, self.tried = "", "", {}


class JournalledCases:
    """`bench.gpu_report.Cases` of one section: what came of a case is in the journal before the next one begins."""

    def __init__(self, journal: Journal, tried: Mapping[str, Tried]) -> None:
        self._journal, self._tried = journal, tried
        self.some = False
        """Whether a case was run here."""

    def known(self, name: str) -> Tried | None:
        return self._tried.get(name)

    def run(self, name: str, check: Callable[[], Any], seconds: float = CASE_SECONDS) -> Tried:
        self._journal.write("case", case=name, seconds=seconds)
        self.some = True
        try:
            tried = Tried.of(check)
        except Exception as error:
            if loses_the_gpu(error):
                self._journal.write("tried", case=name, **asdict(Tried.failed(error)))
            raise
        self._journal.write("tried", case=name, **asdict(tried))
        return tried

"""Tiles measured where a plan's own launches are: every candidate of every choice, on the values of a run.

A step is bound again for each candidate, to outputs of its own; a candidate whose results differ from those of the
predicted choice never wins. What is slow to begin with gets most of the time.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from infera_gpu.agreement import agree
from infera_gpu.bind import Binder, Bound
from infera_gpu.devices.base import Device
from infera_gpu.devices.timing import Timer
from infera_gpu.errors import OutOfMemoryError
from infera_gpu.op import Call
from infera_gpu.plan import Step
from infera_gpu.spec import Array
from infera_gpu.telemetry import snapshot
from infera_kernels.launch import LaunchError, Target, cublaslt, cudnn
from infera_kernels.tuning import Family, Measured, Problem, Trial, Tuned, numbers, source_of

ROUNDS = 15
"""Measurements of each candidate that is not far behind, interleaved: the median counts."""

FIRST = 3
"""Measurements after which a candidate may be far behind, ..."""

BEHIND = 1.25
"""... by so many times the least."""

GAIN = 0.02
"""Less than that of the predicted choice's time is no reason to leave it."""

METHOD = "CUDA events, L2 flushed before each run, median of interleaved rounds"
PACKAGES = ("infera-gpu", "triton", "cupy-cuda12x", "cupy-cuda13x")

_log = logging.getLogger(__name__)


Progress = Callable[[str, float], None]
"""Told what is measured, and how much of all is done, from 0 to 1."""

Rejected = Callable[[Problem, tuple[int, ...]], None]
"""Told of a candidate whose results were wrong."""


@dataclass(slots=True)
class _Work:
    """Steps that ask for the same choices: how many there are, and the seconds of one."""

    seconds: float
    count: int = 1

    @property
    def all(self) -> float:
        return self.seconds * self.count


class Tuner:
    """Measures the choices of the plans of one run, made twice: first `survey`, then `measure`, for every plan.

    `base` is what was measured before; it is measured `again`, or stays. No candidate is begun after `seconds`.
    `found` are the measurements.
    """

    def __init__(
        self,
        base: Tuned,
        timer: Timer,
        seconds: float,
        *,
        again: bool = False,
        progress: Progress | None = None,
        rejected: Rejected | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.base = Tuned(base.target) if again else base
        self.found: dict[Problem, Measured] = {}
        self._timer, self._clock = timer, clock or time.monotonic
        self._progress = progress or (lambda what, done: None)
        self._rejected = rejected or (lambda known, value: None)
        self._until = self._clock() + seconds
        self._works: dict[tuple[Problem, ...], _Work] = {}
        self._total = 0.0

    def survey(self, bound: Bound) -> None:
        """Run a plan; note which choices its steps ask for, and how long they take."""
        self._each(bound, self._look)
        self._total = sum(work.all for work in self._works.values())

    def measure(self, bound: Bound) -> None:
        """Run a plan, measuring the choices of its steps on the way."""
        self._each(bound, self._tune)

    def _each(self, bound: Bound, do: Callable[[Binder, Step], None]) -> None:
        calls = bound.calls
        for step, (start, stop) in zip(bound.plan.steps, pairwise(bound.starts), strict=True):
            if _chooses(step) and stop > start:
                try:
                    do(bound.binder, step)
                except OutOfMemoryError as error:
                    _log.warning("%s is not tuned: %s", step.label, error)
            for fn, args in calls[start:stop]:
                fn(*args)

    def _asked(self, binder: Binder, step: Step, outs: tuple[Array, ...]) -> tuple[Trial, list[Call]]:
        """The step bound with what is known by now, and the choices that this asks for. A choice between the best of
        others is set aside while one of those is open: they are measured where they count."""
        known = self._known()
        trial = Trial(self.base, known)
        calls = binder.apart(step, trial, outs)
        usual = {p: numbers(f.predict(q, trial.target)) for p, (f, q, _) in trial.asked.items() if f.last}
        aside = {p: choice for p, choice in usual.items() if choice != numbers(trial.asked[p][2])}
        if aside and any(not trial.asked[p][0].last for p in _open(trial)):
            trial = Trial(self.base, known | aside)
            calls = binder.apart(step, trial, outs)
        return trial, calls

    def _known(self) -> dict[Problem, tuple[int, ...]]:
        return {p: m.choice for p, m in self.found.items()}

    def _look(self, binder: Binder, step: Step) -> None:
        trial, calls = self._asked(binder, step, binder.room(step))
        key = tuple(trial.asked)
        if key in self._works:
            self._works[key].count += 1
        elif _open(trial):
            self._works[key] = _Work(self._least(calls))

    def _tune(self, binder: Binder, step: Step) -> None:
        outs = binder.room(step)
        trial, calls = self._asked(binder, step, outs)
        work = self._works.pop(tuple(trial.asked), None)
        if work is None:
            return
        rest = work.all + sum(w.all for w in self._works.values())
        now = self._clock()
        until = now + (self._until - now) * work.all / rest
        other = binder.room(step)
        while (todo := _open(trial)) and self._clock() < until:
            self._progress(f"{step.label} {trial.asked[todo[0]][0].name}", 1 - rest / self._total)
            self._compare(binder, step, todo[0], (trial, calls, outs), other, until)
            trial, calls = self._asked(binder, step, outs)

    def _compare(
        self,
        binder: Binder,
        step: Step,
        known: Problem,
        first: tuple[Trial, list[Call], tuple[Array, ...]],
        outs: tuple[Array, ...],
        until: float,
    ) -> None:
        """Measure the candidates for one choice of a step: the predicted one, and those that come close to it."""
        begun, calls, want = first
        family, problem, predicted = begun.asked[known]
        _make(calls)
        times = {numbers(predicted): [self._least(calls)]}
        made = {numbers(predicted): calls}
        complete = True
        for candidate in _ordered(family, problem, self.base.target):
            value = numbers(candidate)
            if value in made:
                continue
            if self._clock() >= until:
                complete = False
                break
            trial = Trial(self.base, {**begun.replaced, known: value}, family.name)
            try:
                calls = binder.apart(step, trial, outs)
                _spoil(outs)
                _make(calls)
            except (LaunchError, OutOfMemoryError) as error:
                _log.debug("%s: %s of %s: %s", step.label, value, family.name, error)
                continue
            if not agree(outs, want):
                self._rejected(known, value)
                _log.warning("%s: %s of %s gives other results and is out", step.label, candidate, family.name)
                continue
            times[value] = [self._least(calls)]
            made[value] = calls
            best = min(t[0] for t in times.values())
            for slow in [v for v, t in times.items() if t[0] > BEHIND * best and v != numbers(predicted)]:
                del times[slow]
                made[slow] = []
        measured = self._best(known, family, predicted, {v: made[v] for v in times}, times)
        if complete or measured.choice != measured.predicted:
            self.found[known] = measured

    def _best(
        self,
        known: Problem,
        family: Family[Any],
        predicted: Any,
        made: Mapping[tuple[int, ...], list[Call]],
        times: dict[tuple[int, ...], list[float]],
    ) -> Measured:
        if len(made) > 1:
            times = {value: [] for value in made}
            for _ in range(ROUNDS):
                for value, calls in made.items():
                    times[value].append(self._timer(calls))
        median = {value: statistics.median(seconds) for value, seconds in times.items()}
        usual = numbers(predicted)
        best = min(median, key=lambda value: median[value])
        if median[best] > (1 - GAIN) * median[usual]:
            best = usual
        return Measured(known, best, median[best], usual, median[usual], source_of(family))

    def _least(self, calls: Sequence[Call]) -> float:
        return min(self._timer(calls) for _ in range(FIRST))


def _chooses(step: Step) -> bool:
    """Whether a step may have launches between whose tiles there is a choice."""
    return step.kernel is not None and step.via == "triton" and any(o.nbytes for o in step.outs)


def _open(trial: Trial) -> list[Problem]:
    """Those of its choices that are neither known nor without alternative, in the order of measuring."""
    found = [
        known
        for known, (family, problem, _) in trial.asked.items()
        if trial.value(family, problem) is None and len(family.candidates(problem, trial.target)) > 1
    ]
    return sorted(found, key=lambda known: trial.asked[known][0].last)


def _ordered(family: Family[Any], problem: Problem, target: Target) -> list[Any]:
    """The candidates, by what they are estimated to take."""
    estimate, candidates = family.estimate, list(family.candidates(problem, target))
    return sorted(candidates, key=lambda c: estimate(problem, c, target)) if estimate else candidates


def bind_candidates(bound: Bound, base: Tuned) -> int:
    """Bind the steps of a plan for every candidate that a Tuner which begins with `base` may try, as far as each can be
    bound, the most promising first. Nothing is launched. Returns how many there are."""
    seen: set[Problem] = set()
    count = 0
    for step in filter(_chooses, bound.plan.steps):
        outs = bound.binder.room(step)
        ways: list[dict[Problem, tuple[int, ...]]] = [{}]
        for way in ways:  # which grows: some choices are asked for only after others
            trial = Trial(base, way)
            with suppress(LaunchError, OutOfMemoryError):
                bound.binder.apart(step, trial, outs)
            for known in _open(trial):
                if known in seen:
                    continue
                seen.add(known)
                family, problem, made = trial.asked[known]
                others = [v for v in map(numbers, _ordered(family, problem, base.target)) if v != numbers(made)]
                ways += [{**way, known: value} for value in others]
        count += len(ways) - 1
    return count


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice of some steps of a plan: for which class of problems, and how it is made now. `measured` is what that
    goes by; without it, it is predicted."""

    family: Family[Any]
    problem: Problem
    numbers: tuple[int, ...]
    predicted: tuple[int, ...]
    measured: Measured | None
    steps: int


def choices(plan: Bound, tuned: Tuned) -> dict[Problem, Choice]:
    """What a plan's kernels choose where there is an alternative; nothing is launched."""
    found: dict[Problem, Choice] = {}
    for step in filter(_chooses, plan.plan.steps):
        trial = Trial(tuned, {})
        plan.binder.apart(step, trial, plan.binder.room(step))
        for known, (family, problem, made) in trial.asked.items():
            if len(family.candidates(problem, trial.target)) < 2:
                continue
            usual = numbers(family.predict(problem, trial.target))
            measured = tuned.measured.get(known) if tuned.value(family, problem) else None
            steps = found[known].steps + 1 if known in found else 1
            found[known] = Choice(family, known, numbers(made), usual, measured, steps)
    return found


def facts(device: Device) -> dict[str, str]:
    """What goes beside measurements: the card, its driver, versions, commit, and how they were made."""
    target = getattr(device.launcher, "target", None)
    readings, _ = snapshot()
    index = getattr(device, "index", 0)
    found = {
        "card": getattr(target, "name", ""),
        "driver": next((r.driver for r in readings if r.index == index), None) or "",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "method": METHOD,
        "cublaslt": cublaslt.installed(),
        "cudnn": cudnn.installed(),
    }
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return {name: value for name, value in found.items() if value}


def _commit() -> str:
    """What INFERA_COMMIT says, else of the checkout that this file is in, where it is in one."""
    if named := os.environ.get("INFERA_COMMIT"):
        return named
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _spoil(outs: Sequence[Array]) -> None:
    """So that what a candidate leaves out shows."""
    for out in outs:
        out[...] = math.nan if out.dtype.kind not in "iub" else 85


def _make(calls: Sequence[Call]) -> None:
    for fn, args in calls:
        fn(*args)

"""Load once, plan once a shape, run many times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

from infera_gpu.bind import Bound
from infera_gpu.devices import tiles_of
from infera_gpu.errors import DeviceError, InputError, OutOfMemoryError, PlanError
from infera_gpu.feeds import shape_of
from infera_gpu.lease import Lease, largest
from infera_gpu.plan import Plan, Step
from infera_gpu.running import Running
from infera_gpu.spec import Array
from infera_gpu.stages import Stage

if TYPE_CHECKING:
    from infera_gpu.devices.timing import Timer
    from infera_gpu.tuning import Choice, Progress, Rejected
    from infera_kernels.tuning import DeviceTiles, Measured, Problem


TUNING_SECONDS = 60.0
"""Of tuning, where nobody says."""


@dataclass(frozen=True, slots=True)
class Timing:
    """A step and the seconds it took."""

    step: Step
    seconds: float

    def __repr__(self) -> str:
        return f"<{self.step.label}: {self.seconds * 1e6:.1f} µs>"


class Session(Running):
    """A loaded model: its runs, which several threads may make (`Running`), its plans, the tuning of its kernels."""

    # ---- planning

    def plan_for(self, inputs: Mapping[str, Sequence[int] | Array]) -> Plan:
        """The plan for these inputs, given as shapes or as arrays: its first segment, where there are several.

        `print(session.plan_for({"x": (1, 3)}))` shows every step. Raises InputError or PlanError.
        """
        if not isinstance(inputs, Mapping):
            raise InputError(
                f"inputs are a {type(inputs).__name__}, expected a mapping from input names to shapes or arrays"
            )
        shapes = {name: shape_of(name, value) for name, value in inputs.items()}
        if (session := self._for(shapes)) is not self:
            return session.plan_for(inputs)
        self._entry.check_names(shapes)
        ordered = tuple(shapes[name] for name in self.inputs)
        self._entry.check_shapes(ordered)
        self._refuse_closed()
        return self._stages.first(ordered).plan

    def plans(self, feeds: Mapping[str, Any]) -> tuple[Plan, ...]:
        """The plans of a run with these feeds: one a segment. Runs the model."""
        if (session := self._for(feeds)) is not self:
            with self._hosting():
                return session.plans(feeds)
        found: list[Plan] = []

        def note(stage: Stage, bound: Bound) -> None:
            bound.run()
            self.device.synchronize()
            found.append(stage.plan)

        self._run(self._check(feeds), note)
        return tuple(found)

    def reserve(self, *inputs: Mapping[str, Sequence[int] | Array], final: bool = False) -> int:
        """Plan for each of these inputs, given as for `plan_for`, and get the memory that the largest of them takes.

        Runs with such inputs, one at a time, then neither plan nor ask for memory, and smaller ones do not either but
        plan: what a server does for its batches before it is ready. With `final` the arena is not to grow any more, and
        a run that needs more is an OutOfMemoryError, until more is reserved. Of a model whose shapes depend on data
        all this is about the first part. Returns the bytes of the arena. Raises InputError, PlanError or
        OutOfMemoryError, and then no arena was taken.
        """
        plans: dict[Session, list[Plan]] = {self: []}
        for given in inputs:
            plan = self.plan_for(given)
            plans.setdefault(self._for(given), []).append(plan)
        nbytes = 0
        try:
            with self._hosting():
                for session, own in plans.items():
                    nbytes = session._with_lease(Lease.reserve, own)
        except (PlanError, OutOfMemoryError):
            if not sum(session._stages.distrust() for session in plans):
                raise
            return self.reserve(*inputs, final=final)
        for session, own in plans.items():
            if final or session.most:
                session.most = largest(session.most, *(plan.memory for plan in own))
        return nbytes

    def __reduce__(self) -> NoReturn:
        """Raises TypeError: memory, threads and devices belong to one process."""
        raise TypeError(
            f"a {type(self).__name__} is neither pickled nor copied; load '{self.name}' again, "
            "in each process that runs it: in the initializer of a multiprocessing.Pool, for one"
        )

    def profile(self, feeds: Mapping[str, Any]) -> list[Timing]:
        """Run once, timing every step of every segment; the device is synchronised after each."""
        if (session := self._for(feeds)) is not self:
            with self._hosting():
                return session.profile(feeds)
        timings: list[Timing] = []

        def timed(_: Stage, bound: Bound) -> None:
            self.device.synchronize()
            calls = bound.calls
            for step, (start, stop) in zip(bound.plan.steps, pairwise(bound.starts), strict=True):
                began = time.perf_counter()
                for fn, args in calls[start:stop]:
                    fn(*args)
                self.device.synchronize()
                timings.append(Timing(step, time.perf_counter() - began))

        self._run(self._check(feeds), timed)
        return timings

    # ---- tuning

    def tunable(self) -> DeviceTiles:
        """What is measured on the session's device. Raises DeviceError where nothing may be."""
        if self.device.batch_invariant:
            raise DeviceError("batch_invariant=True fixes tiles, whatever is faster: there is nothing to tune")
        return tiles_of(self.device)

    def tune(
        self,
        feeds: Mapping[str, Any],
        *,
        seconds: float = TUNING_SECONDS,
        again: bool = False,
        timer: Timer | None = None,
        progress: Progress | None = None,
        rejected: Rejected | None = None,
    ) -> tuple[Measured, ...]:
        """Run a few times with these feeds, measuring tiles of kernels on the way, and go by what is fastest from then
        on: in this session after it has planned anew, in others on the device's kind when they are loaded.

        No measurement is begun after `seconds`. What was measured before stays, unless `again`. A run may give other
        last bits afterwards. Other work on the GPU meanwhile spoils the measurements. `rejected` is told of candidates
        whose results were wrong. Returns what was measured now; what is slow is first. Raises DeviceError where there
        is nothing to measure or to tune.
        """
        if (session := self._for(feeds)) is not self:
            with self._hosting():
                return session.tune(
                    feeds, seconds=seconds, again=again, timer=timer, progress=progress, rejected=rejected
                )
        from infera_gpu.tuning import Tuner, facts

        tiles = self.tunable()
        with self._measuring:
            with self.device.running():
                chosen = timer or self.device.timer()
            tuner = Tuner(tiles.tuned, chosen, seconds, again=again, progress=progress, rejected=rejected)
            for look in (tuner.survey, tuner.measure):
                self._run(self._check(feeds), partial(self._looked, look))
            found = sorted(tuner.found.values(), key=lambda m: -m.predicted_seconds)
            tiles.learn(found, facts(self.device))
            self._stages = self._planning()
            self._with_lease(Lease.forget)
        return tuple(found)

    def _looked(self, look: Callable[[Bound], None], stage: Stage, bound: Bound) -> None:
        """A run that `look` makes of a plan, done when this returns: see `_run`."""
        look(bound)
        self.device.synchronize()

    def choices(self, feeds: Mapping[str, Any]) -> tuple[Choice, ...]:
        """How kernels choose tiles in a run with these feeds, measured or predicted. Raises DeviceError as `tune`."""
        from infera_gpu.tuning import choices

        if (session := self._for(feeds)) is not self:
            with self._hosting():
                return session.choices(feeds)
        tuned = self.tunable().tuned
        found: dict[Problem, Choice] = {}

        def look(stage: Stage, bound: Bound) -> None:
            found.update(choices(bound, tuned))
            if not stage.is_last:  # what follows depends on values
                bound.run()

        self._run(self._check(feeds), look)
        return tuple(found.values())

    def _tune_first(self, feeds: Mapping[str, Any]) -> None:
        began = time.monotonic()
        self.tune(feeds, seconds=self.tuning_left)
        self.tuning_left -= time.monotonic() - began

"""How kernels choose what has no bearing on results but rounding: tiles, and the number of parts of a sum.

A family of launches says what a choice depends on (a `Problem`), which choices there are and which one is predicted to
be best. What has been measured on the device goes before the prediction.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import cache
from typing import Any, Generic, TypeVar

from infera_kernels.launch import Target

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """A launch as far as a choice depends on it. `sizes` are those that the family names, `kind` is how it computes,
    `layout` how operands lie in memory."""

    family: str
    kind: str
    sizes: tuple[int, ...]
    layout: str = ""


@dataclass(frozen=True, slots=True)
class Family(Generic[T]):
    """Launches between whose choices one table decides. Choices are dataclasses of integers, `form`.

    `sizes` names the sizes of a problem, `varying` how many of them, the first, follow from batches and lengths of
    sequences: what is measured for one such size goes for those near it. `kernels` are those whose source a measurement
    depends on. `estimate`, where there is one, gives the cycles of a choice; it is compared, not believed. A choice of
    `zeros` alone is called so. One between the best of others is measured `last`.
    """

    name: str
    sizes: tuple[str, ...]
    varying: int
    form: Callable[..., T]
    candidates: Callable[[Problem, Target], Sequence[T]]
    predict: Callable[[Problem, Target], T]
    kernels: tuple[Any, ...]
    estimate: Callable[[Problem, T, Target], float] | None = None
    zeros: str = "library"
    last: bool = False

    def problem(self, kind: str, sizes: Mapping[str, int], layout: str = "") -> Problem:
        return Problem(self.name, kind, tuple(sizes[name] for name in self.sizes), layout)

    def described(self, choice: Sequence[int]) -> str:
        """The numbers of a choice with their names, of which `form` has the most."""
        if not any(choice):
            return self.zeros
        return " ".join(f"{name} {value}" for name, value in zip(_names(self.form), choice, strict=False))

    def class_of(self, problem: Problem) -> Problem:
        """The problem that stands for all near it: the same for every one of them, itself included."""
        near = tuple(rounded(n) if i < self.varying else n for i, n in enumerate(problem.sizes))
        return Problem(problem.family, problem.kind, near, problem.layout)


def _names(form: Any) -> list[str]:
    return [f.name for f in fields(form)]


REMEMBERED = 4096
"""Predictions that a family remembers: layers of a model ask for the same ones, while a user waits for a plan."""

EXACT = 16
"""Sizes up to which each is a class of its own."""


def rounded(size: int) -> int:
    """The size rounded up to a multiple of an eighth of the power of two below it; small ones as they are."""
    if size <= EXACT:
        return size
    step = 1 << (size.bit_length() - 4)
    return -(-size // step) * step


@dataclass(frozen=True, slots=True)
class Measured:
    """The fastest choice for a class of problems, and what was predicted, with their times. `source` is that of the
    family's kernels: see `source_of`."""

    problem: Problem
    choice: tuple[int, ...]
    seconds: float
    predicted: tuple[int, ...]
    predicted_seconds: float
    source: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.problem), **{f.name: getattr(self, f.name) for f in fields(self)[1:]}}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Measured:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not write."""
        sizes, choice, predicted = (tuple(map(int, entry[name])) for name in ("sizes", "choice", "predicted"))
        family, kind, layout, source = (str(entry[name]) for name in ("family", "kind", "layout", "source"))
        times = float(entry["seconds"]), float(entry["predicted_seconds"])
        return cls(Problem(family, kind, sizes, layout), choice, times[0], predicted, times[1], source)


def source_of(family: Family[Any]) -> str:
    """A name for the source of a family's kernels, with all they call, and the version of Triton: the one by which
    compiled kernels are kept. Empty where they are interpreted."""
    return _source(family.kernels)


@cache
def _source(kernels: tuple[Any, ...]) -> str:
    keys = [getattr(kernel, "cache_key", None) for kernel in kernels]
    if None in keys:
        return ""
    version = getattr(sys.modules.get("triton"), "__version__", "")
    return hashlib.sha256(json.dumps([version, *keys]).encode()).hexdigest()[:16]


class Tuned:
    """What was measured on a device, by class of problem. `target` is the device. Nobody changes one."""

    def __init__(self, target: Target, measured: Mapping[Problem, Measured] | None = None) -> None:
        self.target = target
        self.measured: Mapping[Problem, Measured] = dict(measured or {})
        self._stale: set[str] = set()

    def value(self, family: Family[Any], problem: Problem) -> tuple[int, ...] | None:
        """The numbers of the choice for a problem, where its kernels have been measured as they are now."""
        found = self.measured.get(family.class_of(problem)) if self.measured else None
        if found is None:
            return None
        if found.source != source_of(family):
            if family.name not in self._stale:
                self._stale.add(family.name)
                _log.info("tiles of %s were measured with other kernels and are passed by: tune again", family.name)
            return None
        return found.choice


class Trial(Tuned):
    """A device's choices, some of them `replaced`; `asked` notes every choice that is asked for, and what was given. A
    choice of the family `trying` is there to be tried: who would do something else instead raises LaunchError."""

    def __init__(self, base: Tuned, replaced: Mapping[Problem, tuple[int, ...]], trying: str = "") -> None:
        super().__init__(base.target, base.measured)
        self.replaced, self.trying = replaced, trying
        self.asked: dict[Problem, tuple[Family[Any], Problem, Any]] = {}

    def value(self, family: Family[Any], problem: Problem) -> tuple[int, ...] | None:
        found = self.replaced.get(family.class_of(problem))
        return super().value(family, problem) if found is None else found


def choose(family: Family[T], problem: Problem, target: Target, tuned: Tuned | None = None) -> T:
    """The measured choice where it is one of the family's for `target`, else the predicted one."""
    value = None if tuned is None else tuned.value(family, problem)
    made: T | None = None
    if value is not None:
        made = next((c for c in family.candidates(problem, target) if numbers(c) == value), None)
    if made is None:
        made = family.predict(problem, target)
    if isinstance(tuned, Trial):
        tuned.asked[family.class_of(problem)] = (family, problem, made)
    return made


def tries(tuned: Tuned | None, family: Family[Any]) -> bool:
    """Whether a choice of the family is there to be tried."""
    return isinstance(tuned, Trial) and tuned.trying == family.name


def numbers(choice: Any) -> tuple[int, ...]:
    """A choice as the integers that it is made of."""
    return tuple(astuple(choice))

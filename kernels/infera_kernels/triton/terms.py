"""What kernels are told as data: expressions of elementwise operations, tables of positions. Does not load Triton."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from infera_kernels.calls import Array

CAST, WHERE = "cast", "where"


@dataclass(frozen=True, slots=True)
class Term:
    """A step of an expression: the operation `name` on `args`, which count the inputs and after them the terms before.

    Names are those of `elementwise`. `alpha` and `beta` replace the operation's defaults. `dtype` names the type that a
    cast makes.
    """

    name: str
    args: tuple[int, ...]
    alpha: float | None = None
    beta: float | None = None
    dtype: str | None = None


def trimmed(terms: Sequence[Term], inputs: int) -> tuple[tuple[int, ...], tuple[Term, ...]]:
    """The inputs that the terms use, of so many, and the terms over these alone."""
    used = sorted({a for term in terms for a in term.args if a < inputs})
    place = {a: i for i, a in enumerate(used)}
    moved = [tuple(place.get(a, a - inputs + len(used)) for a in term.args) for term in terms]
    return tuple(used), tuple(replace(term, args=args) for term, args in zip(terms, moved, strict=True))


def joined(parts: Iterable[tuple[Sequence[Term], Sequence[int]]], inputs: int) -> tuple[Term, ...]:
    """One expression of several: each is its terms and its own inputs, which count `inputs` and the parts before."""
    values, made = list(range(inputs)), list[Term]()
    for terms, args in parts:
        place = [values[a] for a in args]
        for term in terms:
            made.append(replace(term, args=tuple(place[a] for a in term.args)))
            place.append(inputs + len(made) - 1)
        values.append(place[-1])
    return tuple(made)


@dataclass(frozen=True, slots=True)
class AxisMap:
    """Along `axis`, output element i is the sum over k of weights[i, k] times input element index[i, k]; (out, taps).

    A negative index stands for what is outside of the input. Without weights there is one tap.
    """

    axis: int
    index: Array
    weights: Array | None = None

    @property
    def taps(self) -> int:
        return int(self.index.shape[1])

"""Sequences, optionals and what takes them apart: lists and None at run time, on the host between two plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Op, Site, f32
from infera_gpu.ops._families import INT64


def _at(site: Site, sequence: list[Any], position: Any, *, end: bool = False) -> int:
    """`position` as an index into the sequence, from the end where negative; with `end`, one past it is allowed."""
    at, n = int(np.asarray(position).reshape(-1)[0]), len(sequence)
    if not -n <= at < n + end:
        raise site.fail(f"position {at} is out of range for a sequence of {n}")
    return at + n if at < 0 else at


def _at_position(xp: Any, site: Site, sequence: list[Any], position: Any) -> tuple[Any]:
    return (sequence[_at(site, sequence, position)],)


def _insert(xp: Any, site: Site, sequence: list[Any], tensor: Any, position: Any = None) -> tuple[list[Any]]:
    at = len(sequence) if position is None else _at(site, sequence, position, end=True)
    return ([*sequence[:at], tensor, *sequence[at:]],)


def _erase(xp: Any, site: Site, sequence: list[Any], position: Any = None) -> tuple[list[Any]]:
    at = len(sequence) - 1 if position is None else _at(site, sequence, position)
    if not sequence:
        raise site.fail("nothing can be erased from an empty sequence")
    return ([*sequence[:at], *sequence[at + 1 :]],)


def _axis(site: Site, rank: int) -> int:
    axis = int(site.attrs["axis"])
    if not -rank <= axis < rank:
        raise site.fail(f"axis {axis} out of range for rank {rank}")
    return axis % rank


def _split(xp: Any, site: Site, x: Any, split: Any = None) -> tuple[list[Any]]:
    """Pieces of `split` elements along the axis, or of the sizes that it lists; one by one where it is left out."""
    axis = _axis(site, x.ndim)
    n = x.shape[axis]
    if split is None:
        pieces = [x.take([i], axis) for i in range(n)]
        return ([p if site.attrs["keepdims"] else p.squeeze(axis) for p in pieces],)
    sizes = [int(s) for s in split.reshape(-1)]
    if split.ndim == 0:
        if sizes[0] <= 0:
            raise site.fail(f"split {sizes[0]} is not positive")
        ends = [*range(sizes[0], n, sizes[0])]
    else:
        if sum(sizes) != n or min(sizes, default=0) < 0:
            raise site.fail(f"split {sizes} does not add up to {n}, the size of axis {axis}")
        ends = [*np.cumsum(sizes[:-1])] if sizes else []
    return (list(np.split(x, ends, axis)),)


def _concat(xp: Any, site: Site, sequence: list[Any]) -> tuple[Any]:
    if not sequence:
        raise site.fail("an empty sequence cannot be concatenated")
    new = bool(site.attrs["new_axis"])
    axis = _axis(site, sequence[0].ndim + new)
    return ((np.stack if new else np.concatenate)(sequence, axis),)


def _empty(xp: Any, site: Site) -> tuple[list[Any]]:
    return ([],)


def _get(xp: Any, site: Site, value: Any) -> tuple[Any]:
    if value is None:
        raise site.fail("the optional value is absent")
    return (value,)


def _has(xp: Any, site: Site, value: Any = None) -> tuple[Any]:
    return (np.asarray(value is not None),)


def _optional(xp: Any, site: Site, value: Any = None) -> tuple[Any]:
    return (value,)


THREE = [np.arange(3, dtype=np.float32), np.ones(2, np.float32), np.zeros((0,), np.float32)]
EQUAL = [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 3), np.float32)]


def _op(name: str, compute: Callable[..., Any], cases: Sequence[Case], since: int = 11, **attrs: Any) -> Op:
    return Op(
        name,
        since,
        infer=lambda site: (None,),
        compute=compute,
        cases=tuple(cases),
        attrs=attrs,
        host=True,
        portable=False,
    )


def _number(*value: int) -> Any:
    return np.array(value[0] if len(value) == 1 else value, np.int64)


OPS = (
    _op("SequenceEmpty", _empty, [Case("float", ())], dtype=1),
    _op(
        "SequenceConstruct",
        lambda xp, site, *ins: (list(ins),),
        [Case("one", (f32(2, 3),)), Case("three", (f32(2), f32(0), f32(1, 2)))],
    ),
    _op(
        "SequenceLength",
        lambda xp, site, s: (np.asarray(len(s), INT64),),
        [Case("three", (THREE,)), Case("none", ([],))],
    ),
    _op(
        "SequenceAt",
        _at_position,
        [
            Case("first", (THREE, _number(0))),
            Case("last", (THREE, _number(-1))),
            Case("int32", (THREE, np.array(1, np.int32))),
        ],
    ),
    _op(
        "SequenceInsert",
        _insert,
        [
            Case("end", (THREE, f32(4))),
            Case("front", (THREE, f32(4), _number(0))),
            Case("before_last", (THREE, f32(4), _number(-1))),
            Case("past_last", (THREE, f32(4), _number(3))),
        ],
    ),
    _op(
        "SequenceErase",
        _erase,
        [Case("end", (THREE,)), Case("front", (THREE, _number(0))), Case("back", (THREE, _number(-2)))],
    ),
    _op(
        "SplitToSequence",
        _split,
        [
            Case("each", (f32(3, 2),)),
            Case("squeezed", (f32(3, 2),), {"keepdims": 0, "axis": 1}),
            Case("equal", (f32(7, 2), _number(3))),
            Case("sizes", (f32(2, 6), _number(1, 0, 5)), {"axis": -1}),
        ],
        axis=0,
        keepdims=1,
    ),
    _op(
        "ConcatFromSequence",
        _concat,
        [Case("joined", (EQUAL,), {"axis": 1}), Case("stacked", (EQUAL,), {"axis": -1, "new_axis": 1})],
        axis=REQUIRED,
        new_axis=0,
    ),
    _op("Optional", _optional, [Case("tensor", (f32(2),)), Case("sequence", (THREE,))], 15, type=None),
    _op("OptionalGetElement", _get, [Case("tensor", (f32(2),)), Case("sequence", (THREE,))], 15),
    _op("OptionalHasElement", _has, [Case("tensor", (f32(2),)), Case("sequence", (THREE,))], 15),
)

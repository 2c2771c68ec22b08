"""A decoder's step over arrays with nothing behind their addresses, to compile. Imports kernels."""

from __future__ import annotations

from typing import Any

from infera_kernels.triton.decode_attention import Step
from tests.kernels.support import FakeArray


def step_of(
    dtype: str,
    size: int,
    past: int,
    *,
    batch: int = 1,
    groups: int = 8,
    members: int = 4,
    new: int = 1,
    values: int = 0,
    width: int | None = None,
    uneven: bool = True,
    places: bool = False,
    **how: Any,
) -> Step:
    """A step of `new` tokens after `past` keys, which turns all of a head unless `width` says otherwise. Entries have
    lengths of their own where they are `uneven`."""

    def array(*shape: int) -> FakeArray:
        return FakeArray(shape, dtype)

    both, total = (size, values or size), past + new
    q, k, v = (
        array(batch, groups, *lead, d) for lead, d in (((members, new), size), ((new,), size), ((new,), both[1]))
    )
    pasts, presents = ([array(batch, groups, n, d) for d in both] for n in (past, total))
    turning: dict[str, Any] = {}
    if (half := (size if width is None else width) // 2) > 0:
        turning = {"cos": array(total, half), "sin": array(total, half)}
        turning["places"] = FakeArray((batch, new), "int64") if places else None
    return Step(
        q,
        k,
        v,
        array(batch, groups, members, new, both[1]),
        (pasts[0], pasts[1]) if past else None,
        (presents[0], presents[1]),
        keys=total,
        before=None if uneven and past else past,
        lengths=FakeArray((batch,), "int32") if uneven else None,
        scale=size**-0.5,
        **turning,
        **how,
    )

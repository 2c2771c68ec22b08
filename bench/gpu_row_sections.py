"""Rows of the GPU benchmarks as sections: each row is a case, as many as there is time for."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench.gpu_report import CASE_SECONDS, CheckFailed, Context, Section
from bench.gpu_rows import Row, against_roofline, measure
from bench.gpu_timings import gpu_seconds
from bench.gpu_work import Work

LEAST_SECONDS = 8
"""Left, without which no row is begun."""
COMPILING_SECONDS = 600.0
"""That a row with torch.compile may take."""
NETWORK_SECONDS = 2 * CASE_SECONDS
"""That a row may take whose model is made, or compared with the CPU, for some of that."""


Case = tuple[Callable[[], Any], float]
"""What is made of a row, and the seconds that it may take."""


def usual_seconds(row: Row) -> float:
    """That a row may take, whatever is made of it."""
    return NETWORK_SECONDS if row.network or row.exact is not None else CASE_SECONDS


def each(
    context: Context, rows: Sequence[Row], case: Callable[[Row, int], Case], least: float = LEAST_SECONDS
) -> tuple[list[dict[str, Any]], list[str]]:
    """What comes of every row that there is time for, wrong ones included, and what is wrong. None is begun with less
    than `least` left. `case` is told how many rows are left."""
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    for i, row in enumerate(rows):
        tried = context.cases.known(row.label)
        if tried is None:
            if context.left() < least:
                break
            tried = context.cases.run(row.label, *case(row, len(rows) - i))
        if tried.problem:
            wrong.append(tried.problem if row.label in tried.problem else f"{row.label}: {tried.problem}")
        if isinstance(tried.found, dict):
            found.append(tried.found)
    return found, wrong


def measured(
    context: Context, rows: Sequence[Row], compile_mode: str = "", least: float = LEAST_SECONDS
) -> tuple[list[dict[str, Any]], list[str]]:
    """The columns of every row: see `each`."""

    def case(row: Row, left: int) -> Case:
        seconds = COMPILING_SECONDS if compile_mode else usual_seconds(row)
        return partial(measure, context, row, compile_mode), seconds

    return each(context, rows, case, least)


def summary(found: Sequence[Mapping[str, Any]], of: int) -> str:
    """A line: how many rows, the least share of the roofline, against each peer the least and the mean ratio, and how
    many peers failed."""
    right = [row for row in found if "wrong" not in row]
    parts = [f"{len(right)} of {of} rows" + (f", {len(found) - len(right)} wrong" if len(right) < len(found) else "")]
    fractions = [row["fraction"] for row in right if "fraction" in row]
    if fractions:
        parts.append(f"{min(fractions):.0%} to {max(fractions):.0%} of the roofline")
    for peer in sorted({name for row in right for name in row["peers"]}):
        ratios = [row["peers"][peer] / row["seconds"] for row in right if peer in row["peers"]]
        parts.append(f"{min(ratios):.2f}x to {max(ratios):.2f}x {peer}, mean {statistics.geometric_mean(ratios):.2f}x")
    if failed := [f"{row['name']}: {name}" for row in found for name in row.get("peers_failed", ())]:
        parts.append(f"{len(failed)} peers failed: {failed[0]}, ...")
    return "; ".join(parts)


def copies(context: Context, nbytes: int = 1 << 29) -> dict[str, Any]:
    """A row: what the driver's copy inside of the GPU reaches, which bounds all that memory bounds."""
    device = context.open()
    with device.running():
        source, target = (device.xp.empty((nbytes,), np.uint8) for _ in range(2))
        call = partial(device.xp.copyto, target, source)
        seconds = gpu_seconds(device, call)
    work = Work("copy", "", 0, 2 * nbytes)
    made = {
        "set": "bandwidth",
        "name": f"copy of {nbytes >> 20} MiB",
        "precision": "",
        "seconds": seconds,
        "peers": {},
        "steps": 1,
        "launches": work.launches,
        "operations": work.operations,
        "bytes": work.nbytes,
    }
    return made | against_roofline(made, [work], context.card)


def section(
    rows: Callable[[], Sequence[Row]],
    compile_mode: str = "",
    *,
    before: Callable[[Context], dict[str, Any]] | None = None,
    least: float = LEAST_SECONDS,
) -> Section:
    """A section that measures rows, `before` another one. It fails where one is wrong, or there was time for none."""

    def run(context: Context) -> tuple[str, Mapping[str, Any]]:
        wanted = rows()
        first = [before(context)] if before else []
        found, wrong = measured(context, wanted, compile_mode, least)
        facts = {"rows": [*first, *found]}
        if wrong or not found:
            raise CheckFailed("; ".join(wrong) or "no time for any row", facts)
        return summary(found, len(wanted)), facts

    return run

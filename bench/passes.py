"""Several passes over the same work, each in processes of its own, as one.

Where the system lays a process's memory moves a ratio by some percent, whatever the samples within it: medians over
processes tell more than more samples in one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from bench.environment import CHANGED

Row: TypeAlias = Mapping[str, Any]


def combined(passes: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """The rows of the first pass with medians over all of them; a row that failed in any is that failure.

    Raises ValueError where a pass lacks a row.
    """
    found = [{_key(row): row for row in rows} for rows in passes]
    failed = {_key(r)[:2]: r for rows in passes for r in rows if r["failure"]}
    made: list[dict[str, Any]] = []
    for key in found[0]:
        if key[:2] in failed:
            continue
        if missing := [n for n, rows in enumerate(found) if key not in rows]:
            raise ValueError(f"pass {missing[0] + 1} of {len(passes)} lacks {key}")
        made.append(_median([rows[key] for rows in found]))
    return [*made, *map(dict, failed.values())]


def merged(paths: Sequence[Path]) -> tuple[Mapping[str, Any], Mapping[str, Any], list[dict[str, Any]]]:
    """Environment and options of some results files, and their rows as one: where any was measured with changes to the
    commit, the environment says so.

    Raises ValueError where they are not of one commit and one kind of machine, or were measured differently.
    """
    results = [json.loads(path.read_text()) for path in paths]
    environments = [r["environment"] for r in results]
    _require_one("commit", [e["commit"].removesuffix(CHANGED) for e in environments])
    _require_one("kind of machine", [e["host_class"] for e in environments])
    _require_one("set of options", [str(r["options"]) for r in results])
    told = max(environments, key=lambda e: len(e["commit"]))
    return told, results[0]["options"], combined([r["rows"] for r in results])


def _require_one(what: str, values: Sequence[str]) -> None:
    if len(set(values)) > 1:
        raise ValueError(f"results of more than one {what}: {', '.join(sorted(set(values)))}")


def _key(row: Row) -> tuple[str, int, str]:
    return str(row["model"]), int(row["threads"]), str(row["example"])


def _median(rows: Sequence[Row]) -> dict[str, Any]:
    """One row of several passes. `wall_ratios` are those of the passes."""
    names = rows[0]["summaries"]
    return {
        **rows[0],
        "error": max(r["error"] for r in rows),
        "summaries": {name: _summary([r["summaries"][name] for r in rows]) for name in names},
        "ratios": {k: statistics.median(r["ratios"][k] for r in rows) for k in rows[0]["ratios"]},
        "wall_ratios": sorted(r["ratios"]["wall"] for r in rows),
    }


def _summary(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts are summed, times are medians."""
    first = summaries[0]
    made: dict[str, Any] = {}
    for name, value in first.items():
        values = [s[name] for s in summaries]
        if isinstance(value, bool):
            made[name] = any(values)
        else:
            made[name] = sum(values) if isinstance(value, int) else statistics.median(values)
    return made

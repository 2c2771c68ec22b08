"""`python -m bench.soak`: everything at once for a long time, and what becomes of a server meanwhile.

JSON, binary and large requests on connections that stay; requests that their clients leave; malformed ones; metadata,
statistics and metrics; a model that is unloaded and loaded again while it is asked. A row is a minute (or --window):
requests by status, how long those took that are to be answered with 200, the server's memory, file descriptors and
threads. It ends with status 1 where an answer was wrong, a client's mistake was the server's, or something grew.
Writes bench/results/<host class>-soak-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.environment import environment, write_results
from bench.servers import CACHE, infera
from bench.soak_traffic import save_model, soaked

NOT_SPOKEN = (501, 505)
"""Statuses that are a client's fault though they say 5xx."""

MOST_GROWTH = 0.1
"""Of memory, from the second quarter of the time to the last, beside 8 MB."""

GRACE = 90.0
"""Seconds after which a soak that does not end is given up."""

LEFT = "the handler is closed"
"""In what uvicorn logs of a client that resets its connection while the reply is written."""


def faults(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is not as it should be."""
    found = []
    statuses: Counter[str] = Counter()
    for row in rows:
        statuses.update(row["statuses"])
    for key, count in statuses.items():
        kind, _, text = key.rpartition(" ")
        status = int(text)
        allowed = {"malformed": {*range(500), *NOT_SPOKEN}, "left": {0}, "reloaded": {200, 404, 503}}
        if status not in allowed.get(kind, {200}):
            found.append(f"{kind}: {count} answers of {status}")
    if wrong := sum(row["wrong"] for row in rows):
        found.append(f"{wrong} wrong answers")
    for name, least in (("rss_mb", 8.0), ("files", 16), ("threads", 4)):
        values = [row[name] for row in rows]
        quarter = max(1, len(values) // 4)
        before, after = statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:])
        if after - before > least + (MOST_GROWTH * before if name == "rss_mb" else 0):
            found.append(f"{name} grew from {before:.0f} to {after:.0f}")
    return found


def run(minutes: float, window: float, look: Callable[[dict[str, Any]], None]) -> list[str]:
    """Start a server, load it, and say what was wrong."""
    folder = CACHE / f"soak-{os.getpid()}"
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        look(row)

    try:
        for name in ("steady", "reloaded"):
            save_model(folder / f"{name}.onnx")
        broken: list[str] = []
        with infera(folder, "infera", "steady", str(folder / "reloaded.onnx")) as server:
            try:
                asyncio.run(asyncio.wait_for(soaked(server, minutes, window, keep), minutes * 60 + GRACE))
            except ExceptionGroup as group:
                broken = [f"the traffic ended early: {error!r}" for error in group.exceptions]
            except TimeoutError:
                broken = [f"the traffic did not end {GRACE:g} s after its time"]
        raised = (folder / "infera.log").read_text(errors="replace").split("Traceback")[1:]
        raised = [text for text in raised if LEFT not in text]
        found = [*broken, *(faults(rows) if rows else ())]
        return [*found, *(f"the server's log has a traceback: {text[-1000:]}" for text in raised[:1])]
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--window", type=float, default=60.0, help="seconds of a row")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    before, rows = environment(), list[dict[str, Any]]()
    console = Console(stderr=True)
    columns = ("requests", "p50_ms", "p99_ms", "wrong", "rss_mb", "files", "threads")
    console.print(*columns, sep="\t")

    def look(row: dict[str, Any]) -> None:
        rows.append(row)
        console.print(*(f"{row[name]:,.2f}".removesuffix(".00") for name in columns), sep="\t")

    found = run(asked.minutes, asked.window, look)
    table = Table("kind and status", "answers")
    total: Counter[str] = sum((Counter(row["statuses"]) for row in rows), Counter())
    for name, count in sorted(total.items()):
        table.add_row(name, f"{count:,}")
    console.print(table)
    for fault in found:
        console.print(fault, style="red")
    console.print(f"written: {write_results(before, {'minutes': asked.minutes}, rows, asked.out, 'soak')}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())

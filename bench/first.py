"""`python -m bench.first`: how long a user waits for a model to load and for its first inference.

Each load is in a fresh process with one thread, infera's and onnxruntime's in turn; medians. infera loads each model
twice with NumPy's kernels: as one that was loaded on this machine before, whose optimised graph and plan it has kept
where it is small, and without that; and, where numba is installed, once more with what that compiled before. Imports
are timed apart: the package, and the modules that its first load imports. Model files and byte code are in the
system's cache. Writes bench/results/<host class>-first-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.environment import environment, thread_environment, write_results
from bench.first_worker import STAGES
from bench.inputs import EXAMPLES, Feeds
from bench.models import path_of
from bench.worker import COMPILED, OURS, PEER
from infera_kernels.jit import installed

TIMEOUT_S = 600
GOAL = 1.5
"""Load and first inference over onnxruntime's, at most."""

NEW = f"{OURS}, no graph kept"
CONTENDERS: Mapping[str, tuple[str, bool]] = {
    OURS: (OURS, True),
    NEW: (OURS, False),
    **({COMPILED: (COMPILED, True)} if installed() else {}),
    PEER: (PEER, True),
}
"""What `bench.first_worker` calls each, and whether optimised graphs are kept."""

Times = Mapping[str, float]
"""Seconds by stage."""


def child_environment(cache: Path, *, graphs: bool = True) -> dict[str, str]:
    """One thread, and byte code kept in `cache`: installed packages have theirs. `graphs`: keep optimised graphs."""
    kept = {k: v for k, v in thread_environment(1).items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(cache), "INFERA_GRAPH_CACHE": str(int(graphs))}


def stages_of(contender: str, model: Path, feeds: Path, cache: Path) -> Times:
    """Seconds by stage in one fresh process. Raises RuntimeError with the last line of what it said."""
    called, graphs = CONTENDERS[contender]
    command = [sys.executable, "-m", "bench.first_worker", called, str(model), str(feeds)]
    done = subprocess.run(
        command,
        env=child_environment(cache, graphs=graphs),
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"{contender}: {done.stderr.strip().rpartition(os.linesep)[2]}")
    found: Times = json.loads(done.stdout)
    return found


def summarize(samples: Sequence[Times]) -> dict[str, float]:
    """Medians in milliseconds, stage by stage, and of `first`, what a user waits for: load and first inference."""
    made = {stage: 1e3 * statistics.median(s[stage] for s in samples) for stage in STAGES}
    return {**made, "first": 1e3 * statistics.median(s["load"] + s["run"] for s in samples)}


def measure(model: Path, feeds: Feeds, rounds: int, cache: Path) -> dict[str, Any]:
    """The medians of all contenders; infera's over onnxruntime's without imports, with them, and of a new model."""
    taken: dict[str, list[Times]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "feeds.npz"
        np.savez(given, **feeds)  # type: ignore[arg-type]
        for n in range(rounds + 3):
            for name in list(CONTENDERS)[:: 1 if n % 2 else -1]:
                times = stages_of(name, model, given, cache)
                if n > 2:  # the first three fill the caches
                    taken[name].append(times)
    found = {name: summarize(samples) for name, samples in taken.items()}
    ours, peer = found[OURS], found[PEER]
    whole = {name: s["import"] + s["modules"] + s["first"] for name, s in found.items()}
    ratios = {"ratio": ours["first"] / peer["first"], "new_ratio": found[NEW]["first"] / peer["first"]}
    ratios["with_imports"] = whole[OURS] / whole[PEER]
    if COMPILED in found:
        ratios["compiled_ratio"] = found[COMPILED]["first"] / peer["first"]
        ratios["compiled_with_imports"] = whole[COMPILED] / whole[PEER]
    return {"milliseconds": found, **ratios}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table(title="load and first inference, ms; imports are not in the ratios, unless it says so")
    shown.add_column("model", no_wrap=True)
    for column in (
        "import",
        "modules",
        "load",
        "run",
        "again",
        "peer import",
        "load",
        "run",
        "ratio",
        "new",
        "with imports",
        "numba",
        "with imports",
    ):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in (r for r in rows if not r["failure"]):
        ours, peer = row["milliseconds"][OURS], row["milliseconds"][PEER]
        times = (*(ours[s] for s in STAGES), *(peer[s] for s in ("import", "load", "run")))
        mark = "" if row["ratio"] <= GOAL else " !"
        others = ("new_ratio", "with_imports", "compiled_ratio", "compiled_with_imports")
        ratios = [f"{row[k]:.2f}" if k in row else "" for k in others]
        shown.add_row(row["model"], *(f"{t:.1f}" for t in times), f"{row['ratio']:.2f}{mark}", *ratios)
    return shown


def main() -> int:
    """0 when every model was measured."""
    parser = argparse.ArgumentParser("python -m bench.first", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(EXAMPLES), default=list(EXAMPLES), metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the results file (bench/results/<host class>-first-<date>.json)")
    options = parser.parse_args()
    console = Console(width=160)
    measured = environment()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        for name in track(options.models, "", console=console, transient=True):
            example = EXAMPLES[name][0]
            row: dict[str, Any] = {"model": name, "example": example.label, "failure": ""}
            try:
                row |= measure(path_of(name), example.feeds(), options.rounds, Path(cache))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                row["failure"] = str(error)
            rows.append(row)
    out = write_results(measured, {"rounds": options.rounds}, rows, options.out, "first")
    console.print(table(rows))
    failures = [f"{row['model']}: {row['failure']}" for row in rows if row["failure"]]
    for failure in failures:
        console.print(f"failed: {failure}", markup=False, highlight=False)
    console.print(f"written to {out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

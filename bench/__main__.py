"""`python -m bench`: every model against onnxruntime, each number of threads in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.environment import environment, thread_environment, write_results
from bench.inputs import EXAMPLES
from bench.passes import combined, merged
from bench.report_cpu import means
from bench.worker import Job

TIMEOUT_S = 1800
"""For one model with one number of threads; a worker that takes longer hangs."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(EXAMPLES), default=list(EXAMPLES), metavar="MODEL")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="quiet samples wanted of each contender (9)")
    parser.add_argument("--quick", action="store_true", help="3 short rounds of each model's first example")
    parser.add_argument("--passes", type=int, default=1, help="all of it so many times, medians over processes (1)")
    parser.add_argument(
        "--merge", nargs="+", type=Path, metavar="FILE", help="measure nothing: results of one commit as passes"
    )
    parser.add_argument("--out", type=Path, help="the results file (bench/results/<host class>-[quick-]<date>.json)")
    options = parser.parse_args(argv)
    if options.passes < 1:
        parser.error("--passes is at least 1")
    return options


def jobs(options: argparse.Namespace) -> list[Job]:
    """One for each model and number of threads. --quick lowers the rounds."""
    quick: dict[str, Any] = {"block_s": 0.1, "examples": 1} if options.quick else {}
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    return [Job(model, threads, rounds, **quick) for model in options.models for threads in options.threads]


def run(job: Job) -> Iterator[dict[str, Any]]:
    """The rows of one worker. A worker that dies gives a row that says so."""
    command = [sys.executable, "-m", "bench.worker"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(job)),
            env=thread_environment(job.threads),
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        yield failed(job, f"took more than {TIMEOUT_S} s")
        return
    yield from (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        yield failed(job, f"the worker ended with status {done.returncode}: {last}")


def failed(job: Job, reason: str) -> dict[str, Any]:
    return {"model": job.model, "example": "", "threads": job.threads, "failure": reason, "summaries": {}}


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Ratios infera / onnxruntime of the rows that were measured, and the reasons of those that were not."""
    shown = Table(title="time infera / time onnxruntime, below 1 is faster; jit: compiled; ~ taken on a busy machine")
    for column in ("model", "input"):
        shown.add_column(column, no_wrap=True)
    for column in ("threads", "infera ms", "onnxruntime ms", "wall", "cpu", "jit", "error"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in (row for row in rows if not row["failure"]):
        ours, peer = row["summaries"]["infera"], row["summaries"]["onnxruntime"]
        mark = "~" if ours["disturbed"] or peer["disturbed"] else ""
        times = (f"{s['wall_ms']:.2f} ±{(s['wall_q3_ms'] - s['wall_q1_ms']) / 2:.2f}" for s in (ours, peer))
        shown.add_row(
            row["model"],
            row["example"],
            str(row["threads"]),
            *times,
            f"{mark}{row['ratios']['wall']:.2f}",
            f"{row['ratios']['cpu']:.2f}",
            f"{row['ratios']['compiled_wall']:.2f}" if "compiled_wall" in row["ratios"] else "",
            f"{row['error']:.0e}",
        )
    if shown.row_count:
        console.print(shown)
    for line in means(rows):
        console.print(line, highlight=False)
    for row in (row for row in rows if row["failure"]):
        where = f"{row['model']} {row['example']}, threads {row['threads']}"
        console.print(f"failed: {where}: {row['failure'][:500]}", markup=False, highlight=False)


def main() -> int:
    """0 when every row was measured and agreed with the peer, else 1."""
    options = parse()
    console = Console()
    if not console.is_terminal:
        console.width = 120
    too_many = [t for t in options.threads if t > (os.cpu_count() or 1)]
    if too_many:
        console.print(f"warning: {too_many} threads on {os.cpu_count()} processors measure contention, not scaling")
    if options.merge:
        try:
            measured, told, rows = merged(options.merge)
        except (OSError, ValueError) as error:
            console.print(f"[red]{error}[/red]")
            return 2
        return finish(measured, told, rows, options.out, console)
    measured = environment()
    passes: list[list[dict[str, Any]]] = [[] for _ in range(options.passes)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        todo = jobs(options)
        task = progress.add_task("", total=len(todo) * len(passes))
        for rows in passes:
            for job in todo:
                progress.update(task, description=f"{job.model}, {job.threads} thread{'s' if job.threads > 1 else ''}")
                rows.extend(run(job))
                progress.advance(task)
    rows = combined(passes) if len(passes) > 1 else passes[0]
    return finish(measured, {"quick": options.quick}, rows, options.out, console)


def finish(
    measured: Mapping[str, Any],
    told: Mapping[str, Any],
    rows: Sequence[dict[str, Any]],
    out: Path | None,
    console: Console,
) -> int:
    """Write the results and show them; 0 where every row was measured."""
    path = write_results(measured, told, rows, out, "quick" if told.get("quick") else "")
    show(rows, console)
    console.print(f"written to {path}")
    return 1 if any(row["failure"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

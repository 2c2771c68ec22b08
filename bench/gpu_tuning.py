"""Rows tuned on a GPU, into the store on its machine that later sections and processes go by; `python -m
bench.gpu_tuning RESULTS.json` makes of a results file one that comes with the package."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu_report import CheckFailed, Context, Section, first_line
from bench.gpu_row_sections import Case, each, usual_seconds
from bench.gpu_rows import Row
from bench.gpu_targets import mean_gain
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from infera_kernels.tuning import Measured, Problem, Store
from infera_kernels.tuning.store import SHIPPED, import_file

SPARE = 3.0
"""Seconds left of a section in which no candidate is begun any more: what has begun is finished."""


def share(left: float, rows: int) -> float:
    """The seconds of the first of so many rows: twice an even share, and of the last all. What a row does not take is
    for those behind it."""
    return 2 * left / (rows + 1)


def tuned(context: Context, row: Row, seconds: float) -> dict[str, Any]:
    """Measures a row's choices, those that are not in the store, for so many seconds, which begin when it is loaded,
    and never after the section's; what that came to."""
    device = context.open()
    device.tf32 = row.precision == "tf32"
    rejected: list[str] = []

    def reject(problem: Problem, choice: tuple[int, ...]) -> None:
        rejected.append(f"{list(choice)} of {problem}")

    source, feeds = row.make()
    with Session(load_graph(source), device, precision=row.precision) as session:
        choices = session.choices(feeds)
        left = max(min(seconds, context.left() - SPARE), 0.0)
        began = time.monotonic()
        made = session.tune(feeds, seconds=left, rejected=reject)
        taken = time.monotonic() - began
    return {
        "row": row.label,
        "set": row.set,
        "choices": len(choices),
        "measured_before": sum(c.measured is not None for c in choices),
        **gains(made),
        "rejected": rejected,
        "tuning_seconds": taken,
        "allowed_seconds": left,
    }


def gains(made: Sequence[Measured]) -> dict[str, Any]:
    """How many choices were measured, of how many another than the predicted one is better, and how many times as fast
    as predicted ones they are, in the mean."""
    ratios = [m.predicted_seconds / m.seconds for m in made]
    return {
        "measured": len(made),
        "better_than_predicted": sum(m.choice != m.predicted for m in made),
        "mean_gain": math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0,
    }


def section(rows: Callable[[], Sequence[Row]], least: float) -> Section:
    """Tunes rows, the first with the largest share of the time; none is begun with less than `least` seconds left. The
    facts have the store's content, whatever failed."""

    def run(context: Context) -> tuple[str, Mapping[str, Any]]:
        device = context.open()
        if device.tiles is None:
            raise CheckFailed("Triton is not installed: there are no tiles", {})
        wanted = rows()

        def case(row: Row, left: int) -> Case:
            seconds = share(context.left() - SPARE, left)
            return partial(tuned, context, row, seconds), seconds + usual_seconds(row)

        found, wrong = each(context, wanted, case, least)
        store: Store | None = device.tiles.store
        facts = {"tuned": found, "failed": wrong, "file": store.content().decode() if store else ""}
        line = summary(found, len(wanted)) if found else "no row was tuned"
        if wrong or not found:
            raise CheckFailed("; ".join([line, *wrong]), facts)
        return line, facts

    return run


def summary(found: Sequence[Mapping[str, Any]], of: int) -> str:
    """A line of all rows."""
    measured, better, rejected = (
        sum(row[name] if isinstance(row[name], int) else len(row[name]) for row in found)
        for name in ("measured", "better_than_predicted", "rejected")
    )
    line = f"{len(found)} of {of} rows: {measured} choices measured, {better} better than predicted"
    return f"{line}, mean gain {mean_gain(found):.2f}x" + (f", {rejected} candidates rejected" if rejected else "")


def ship(results: Path, folder: Path = SHIPPED) -> list[Path]:
    """Write the measurements of a results file, all that its sections have, to where those of the package are."""
    contents = [s["facts"]["file"] for s in json.loads(results.read_text())["sections"] if s["facts"].get("file")]
    with tempfile.TemporaryDirectory() as temporary:
        return list(dict.fromkeys(_shipped(content, Path(temporary) / "tiles", folder) for content in contents))


def _shipped(content: str, temporary: Path, folder: Path) -> Path:
    head = json.loads(content)
    store = Store(head["device"], head["triton"], shipped=None, own=folder)
    temporary.write_text(content)
    import_file(temporary, store)
    store.path.with_suffix(".lock").unlink(missing_ok=True)
    return store.path


def main(argv: Sequence[str] | None = None, folder: Path = SHIPPED) -> int:
    """0: all files were read; 1: some were not, which are named."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_tuning",
        description="Write the tiles that results files hold to where those of the package are. Needs no GPU.",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json", help="what bench.gpu_speed wrote")
    failed = False
    for path in parser.parse_args(argv).results:
        try:
            shipped = ", ".join(map(str, ship(path, folder)))
        except OSError as error:
            print(f"{error.filename or path}: {error.strerror}", file=sys.stderr)
            failed = True
        except (KeyError, TypeError, ValueError) as error:
            print(f"{path} holds no results: {first_line(error)}", file=sys.stderr)
            failed = True
        else:
            print(f"{path}: {shipped or 'no measured tiles'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

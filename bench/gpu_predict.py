"""`python -m bench.gpu_predict`: what the roofline says of every row of `bench.gpu_speed`, without a GPU.

Plans are the recording device's, which are the CUDA device's. Writes bench/results/predictions-<card>.json for each
card. Predictions are no measurements: no results file has both.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import track

from bench.environment import RESULTS, SCHEMA, commit
from bench.gpu_roofline import ASSUMED, CARDS, bound, card_named, constants_of, limit, predicted
from bench.gpu_rows import Row, described, planned
from bench.gpu_selections import SETS
from bench.gpu_work import Work
from infera_gpu.devices.recording import RecordingDevice

PREFIX = "predictions-"

Planned = tuple[dict[str, Any], tuple[Work, ...]]


def plans_of(rows: Sequence[Row]) -> Iterator[Planned]:
    """The columns that need no time, and what the steps do."""
    for row in rows:
        feeds, works = planned(row, RecordingDevice())
        yield {**described(row.set, row.name, row.precision, feeds, works), **row.facts}, works


def predictions(plans: Sequence[Planned], card_name: str) -> dict[str, Any]:
    """The contents of a card's file."""
    card = card_named(card_name)
    rows = [
        {
            **columns,
            "bound_seconds": bound(works, card),
            "predicted_seconds": predicted(works, card),
            "limit": limit(works, card),
        }
        for columns, works in plans
    ]
    return {
        "schema": SCHEMA,
        "predicted": True,
        "commit": commit(),
        "card": constants_of(card),
        "assumed": asdict(ASSUMED),
        "rows": rows,
    }


def path_for(card: str, directory: Path = RESULTS) -> Path:
    return directory / f"{PREFIX}{re.sub(r'[^a-z0-9]+', '-', card.lower())}.json"


def main(sets: Mapping[str, Callable[[], Sequence[Row]]] = SETS, argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench.gpu_predict", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the JSON files go")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = [row for make in sets.values() for row in make()]
    plans = list(track(plans_of(rows), "planning", total=len(rows), transient=True))
    for card in CARDS:
        path = path_for(card, options.output)
        path.write_text(json.dumps(predictions(plans, card), indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()

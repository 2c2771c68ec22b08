"""The command line of what runs on a GPU: sections one after the other, a table, one JSON file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.environment import RESULTS
from bench.gpu_report import Context, Section, check, gpu_of, table, write
from infera_gpu.devices import open_device
from infera_gpu.devices.cuda import why_unavailable
from infera_kernels.launch.devices import device_called

NO_GPU = 3


def command(
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    sections: Mapping[str, Section],
    minutes: float,
    topic: str = "",
    unavailable: Callable[[], str | None] = why_unavailable,
    describe: Callable[[int], dict[str, Any]] = gpu_of,
) -> int:
    """0: nothing failed; 1: something did, or there was time for nothing; NO_GPU: nothing was run.

    `unavailable` (why there is no GPU) and `describe` are replaced in tests.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU (default: 0)")
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="begin nothing after that (default: %(default)g)"
    )
    parser.add_argument("--only", nargs="+", choices=list(sections), metavar="SECTION", help=", ".join(sections))
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the JSON file goes")
    options = parser.parse_args(argv)

    reason = unavailable()
    if reason:
        print(f"no GPU, nothing was checked: {reason}")
        return NO_GPU
    chosen = {name: section for name, section in sections.items() if not options.only or name in options.only}
    gpu = describe(options.device)
    card = device_called(str(gpu.get("name")))
    context = Context(lambda: open_device(f"cuda:{options.device}"), time.monotonic() + 60 * options.minutes, card)
    outcomes = check(chosen, context)
    path = write(options.output, gpu, outcomes, datetime.now(UTC), topic)
    print(f"{gpu.get('name')}, driver {gpu.get('driver')}\n{table(outcomes)}\n{path}")
    states = {o.status for o in outcomes}
    return int("failed" in states or "ok" not in states)

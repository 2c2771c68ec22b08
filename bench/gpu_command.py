"""The command line of what runs on a GPU: sections one after the other, a table, one JSON file."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from bench.environment import RESULTS
from bench.gpu_journal import Journal
from bench.gpu_report import Context, Outcome, Section, gpu_of, loses_the_gpu, outcome_of, reading_of, table, write
from bench.gpu_workers import NO_GPU, Limits, Supervisor, Worker, end_with_parent, ending_in_order, work, worker_command
from infera_gpu.devices import open_device
from infera_gpu.devices.cuda import why_unavailable
from infera_kernels.launch.devices import device_called

LIMITS = Limits()


def command(
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    sections: Mapping[str, Section],
    minutes: float,
    topic: str = "",
    seconds: Mapping[str, float] | None = None,
    measured: bool = True,
    unavailable: Callable[[], str | None] = why_unavailable,
    describe: Callable[[int], dict[str, Any]] = gpu_of,
    reading: Callable[[int], dict[str, Any]] = reading_of,
    lost: Callable[[int], bool] | None = None,
    limits: Limits = LIMITS,
) -> int:
    """0: nothing failed; 1: something did, or there was time for nothing; NO_GPU: nothing was run.

    Sections are run by `python -m prog` once more, which is replaced where one takes it down. `seconds` is what
    sections may take, all that is left where it does not say; what they leave is for those that follow. Devices go by
    what has been measured on the machine if `measured`, else by predicted tiles alone. The file is written anew after
    each section, where INFERA_RESULTS or --output says. `unavailable` (why there is no GPU), `describe`,
    `reading` (of the GPU now), `lost` (whether this process has lost a GPU) and `limits` are replaced in tests.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU (default: 0)")
    parser.add_argument(
        "--minutes", type=_minutes, default=minutes, help="begin nothing after that (default: %(default)g)"
    )
    parser.add_argument("--only", nargs="+", choices=list(sections), metavar="SECTION", help=", ".join(sections))
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("INFERA_RESULTS") or RESULTS),
        metavar="DIR",
        help="where the JSON file goes (default: $INFERA_RESULTS, or bench/results)",
    )
    parser.add_argument("--in-process", action="store_true", help="run the sections in this process, for a debugger")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)

    if options.worker:
        end_with_parent()
    reason = unavailable()
    if reason:
        print(f"no GPU, nothing was run and no results were written: {reason}")
        return NO_GPU
    try:  # not only when the first section has taken its minutes
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"results cannot go to {options.output}: {error.strerror}")
    chosen = {name: section for name, section in sections.items() if not options.only or name in options.only}
    deadline = time.monotonic() + 60 * options.minutes
    gpu = describe(options.device)

    def context_of(name: str, taken: float = 0.0) -> Context:
        until = min(deadline, time.monotonic() + (seconds or {}).get(name, float("inf")) - taken)
        card = device_called(str(gpu.get("name")))
        return Context(
            partial(opened, f"cuda:{options.device}", measured=measured),
            until,
            card,
            reading=partial(reading, options.device),
        )

    if options.worker:
        return work(chosen, context_of, Journal(options.worker), lambda: (lost or _lost)(options.device))

    def outcomes() -> Generator[Outcome]:
        if options.in_process:
            for name, section in chosen.items():
                yield outcome_of(name, section, context_of(name))
            return
        with tempfile.TemporaryDirectory() as folder:
            journal, log = Path(folder) / "journal", Path(folder) / "log"

            def start(left: float) -> Worker:
                given = ("--device", str(options.device), "--minutes", str(max(left, 0.0) / 60), "--only", *chosen)
                return Worker.start(worker_command(prog, journal, *given), log)

            yield from Supervisor(list(chosen), Journal(journal), start, deadline, limits).outcomes()

    found: list[Outcome] = []
    began, path = datetime.now(UTC), Path()
    with ending_in_order(), closing(outcomes()) as coming:
        for outcome in coming:
            found.append(outcome)
            print(table([outcome], len(max(chosen, key=len))), file=sys.stderr, flush=True)
            path = write(options.output, gpu, found, list(chosen), began, topic)
    print(f"{gpu.get('name')}, driver {gpu.get('driver')}\n{table(found)}\n{path}")
    states = {o.status for o in found}
    return int("failed" in states or "ok" not in states)


def _minutes(text: str) -> float:
    """What --minutes says. Raises ArgumentTypeError for what is no time."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not found >= 0:  # nan neither
        raise argparse.ArgumentTypeError(f"'{text}' is no number of minutes, expected 0 or more")
    return found


def opened(name: str, *, measured: bool, batch_invariant: bool = False) -> Any:
    """A device, whose kernels go by what has been `measured` or by predicted tiles alone."""
    device: Any = open_device(name, batch_invariant=batch_invariant)
    if not measured and device.tiles is not None:
        device.tiles = device.tiles.unmeasured()
    return device


def _lost(index: int) -> bool:
    """Whether CUDA works no more in this process."""
    import cupy

    try:
        with cupy.cuda.Device(index):
            cupy.cuda.runtime.deviceSynchronize()
    except Exception as error:
        return loses_the_gpu(error)
    return False

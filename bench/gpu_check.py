"""`python -m bench.gpu_check`: what can only be checked on a GPU, in one run of a few minutes.

Every Triton kernel and every portable operator on the device against NumPy, whole models against the CPU, memory, and
first timings. Prints a table and writes bench/results/<gpu>-<time>.json. Exit code 0: nothing failed; 1: something did,
or there was time for nothing; 3: there is no GPU, nothing was checked. Needs NumPy, CuPy, Triton and onnx; timings are
compared with torch's where it is installed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import gpu_batches, gpu_convolutions, gpu_models, gpu_networks, gpu_operators, gpu_timings
from bench.gpu_report import Context, Section, check, gpu_of, table, write
from infera_gpu.devices import open_device
from infera_gpu.devices.cuda import why_unavailable

NO_GPU = 3
MINUTES = 8.0
RESULTS = Path(__file__).parent / "results"
_MODULES = (gpu_operators, gpu_models, gpu_networks, gpu_timings, gpu_convolutions, gpu_batches)
_ALL: Mapping[str, Section] = {name: section for module in _MODULES for name, section in module.SECTIONS.items()}
_ORDER = (
    *("facts", "kernels", "models", "memory", "replays", "precisions", "faults", "networks", "batches", "launches"),
    *("products", "rows", "convolutions", "latency", "portable"),
)
SECTIONS: Mapping[str, Section] = {name: _ALL[name] for name in _ORDER}
"""The most important first: what there is no time for is at the end."""


def main(
    argv: Sequence[str] | None = None,
    *,
    sections: Mapping[str, Section] = SECTIONS,
    unavailable: Callable[[], str | None] = why_unavailable,
    describe: Callable[[int], dict[str, Any]] = gpu_of,
) -> int:
    """The command. `sections`, `unavailable` (why there is no GPU) and `describe` are replaced in tests."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description="check and time infera on a GPU")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU (default: 0)")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="begin nothing after that (default: %(default)g)"
    )
    parser.add_argument("--only", nargs="+", choices=list(sections), metavar="SECTION", help=", ".join(sections))
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the JSON file goes")
    options = parser.parse_args(argv)

    reason = unavailable()
    if reason:
        print(f"no GPU, nothing was checked: {reason}")
        return NO_GPU
    chosen = {name: section for name, section in sections.items() if not options.only or name in options.only}
    context = Context(lambda: open_device(f"cuda:{options.device}"), time.monotonic() + 60 * options.minutes)
    gpu = describe(options.device)
    outcomes = check(chosen, context)
    path = write(options.output, gpu, outcomes, datetime.now(UTC))
    print(f"{gpu.get('name')}, driver {gpu.get('driver')}\n{table(outcomes)}\n{path}")
    states = {o.status for o in outcomes}
    return int("failed" in states or "ok" not in states)


if __name__ == "__main__":
    sys.exit(main())

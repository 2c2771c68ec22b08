"""`python -m bench.gpu_speed`: every row that a claim of speed rests on, against PyTorch.

Needs what `bench.gpu_check` needs, which times a short selection of these rows; PyTorch is compared with where it is
installed. All of it takes longer than one call has, see --minutes: operators, networks and what torch.compile makes of
networks, with max-autotune, in a fixed order and with minutes each, have a call of their own in docs/gpu.md. Rows are
tuned first, into the store that sessions on this machine go by, as PyTorch searches for its own; peers are not timed
meanwhile. Writes <gpu>-speed-<time>.json; `make report` renders docs/performance.md from all such files in
bench/results.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from bench import gpu_tuning
from bench.gpu_ahead import ahead
from bench.gpu_command import command
from bench.gpu_first import first_run
from bench.gpu_peers import torch_on_gpu
from bench.gpu_report import Context, Section
from bench.gpu_row_sections import LEAST_SECONDS, copies, section
from bench.gpu_rows import Row
from bench.gpu_selections import (
    NETWORKS,
    OPERATORS,
    SETS,
    SHORT,
    in_order,
    selected,
    tuned_networks,
    tuned_operators,
)

MINUTES = 8.5
COMPILE = "torch.compile"
NETWORK_SECONDS = 30
"""Left, without which no network is begun."""


def torch_compile(rows: Sequence[Row], mode: str, least: float, context: Context) -> tuple[str, Mapping[str, Any]]:
    """Networks once more, beside torch.compile; none is begun with less than `least` seconds left."""
    if torch_on_gpu() is None:
        return "PyTorch is not installed here", {"rows": []}
    return section(lambda: in_order(rows), mode, least=least)(context)


def measuring(name: str) -> Section:
    """A network takes up to half a minute, an operator seconds."""
    least = NETWORK_SECONDS if name in NETWORKS else LEAST_SECONDS
    return section(SETS[name], before=copies if name == "bandwidth" else None, least=least)


def all_compiled(context: Context) -> tuple[str, Mapping[str, Any]]:
    """The networks and the decoder."""
    rows = [row for name in ("networks", "decoder") for row in SETS[name]()]
    return torch_compile(rows, "max-autotune", 90, context)


def short_compiled(context: Context) -> tuple[str, Mapping[str, Any]]:
    """The networks of the short selection, without the search, for half a minute each."""
    return torch_compile(selected("networks"), "reduce-overhead", 40, context)


SECTIONS: Mapping[str, Section] = {
    "compiling operators": partial(ahead, "operators"),
    "operator candidates": partial(ahead, "operator candidates"),
    "tuning operators": gpu_tuning.section(tuned_operators, LEAST_SECONDS),
    **{name: measuring(name) for name in OPERATORS},
    "first run": first_run,
    "compiling networks": partial(ahead, "networks"),
    "network candidates": partial(ahead, "network candidates"),
    "tuning networks": gpu_tuning.section(tuned_networks, NETWORK_SECONDS),
    "compiling tuned networks": partial(ahead, "networks"),
    **{name: measuring(name) for name in NETWORKS},
    COMPILE: all_compiled,
}

SECONDS: Mapping[str, float] = {
    "compiling operators": 45,
    "operator candidates": 75,
    "tuning operators": 100,
    "first run": 50,
    "compiling networks": 75,
    "network candidates": 75,
    "tuning networks": 110,
    "compiling tuned networks": 20,
}
"""What sections may take that are to leave time for those behind them."""

SHORT_SECTIONS: Mapping[str, Section] = {
    **{name: section(partial(selected, name), before=copies if name == "bandwidth" else None) for name in SHORT},
    COMPILE: short_compiled,
}

main = partial(
    command,
    prog="bench.gpu_speed",
    description="time infera on a GPU against its roofline and PyTorch",
    topic="speed",
    minutes=MINUTES,
    seconds=SECONDS,
    sections=SECTIONS,
)

if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.gpu_speed`: every row that a claim of speed rests on, against PyTorch, in under 20 minutes.

Needs what `bench.gpu_check` needs, which times a short selection of these rows; PyTorch is compared with where it is
installed. Networks are compiled with max-autotune, which takes minutes each, and come last: for those that there was
no time for there is `--only networks decoder --minutes 60`. Writes bench/results/<gpu>-speed-<time>.json, from which
`make report` renders docs/performance.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from bench.gpu_command import command
from bench.gpu_first import first_run
from bench.gpu_network_sets import decoder, integers, networks
from bench.gpu_peers import torch_on_gpu
from bench.gpu_report import Context, Section
from bench.gpu_row_sections import copies, section
from bench.gpu_rows import Row
from bench.gpu_sets import attentions, bandwidth, convolutions, products

MINUTES = 20.0

SETS: Mapping[str, Callable[[], Sequence[Row]]] = {
    "bandwidth": bandwidth,
    "products": products,
    "attention": attentions,
    "convolutions": convolutions,
    "int8": integers,
    "networks": networks,
    "decoder": decoder,
}
"""All rows."""

SECTIONS: Mapping[str, Section] = {
    "first run": first_run,
    **{
        name: section(
            rows,
            "max-autotune" if name in ("networks", "decoder") else "",
            before=copies if name == "bandwidth" else None,
        )
        for name, rows in SETS.items()
    },
}

SHORT: Mapping[str, frozenset[str]] = {
    "bandwidth": frozenset(("softmax 16384x4096", "layer norm 65536x768", "chain 16384x4096")),
    "products": frozenset(("1024x1024x1024", "4096x4096x4096", "4096x3072x768", "1x8192x2048")),
    "attention": frozenset(("d64 8x2048", "d64 8x2048 causal")),
    "convolutions": frozenset(("32x56x56x64 3x3/1 -> 64 relu", "32x14x14x256 3x3/1 -> 256 relu")),
    "networks": frozenset(
        f"{name} b{batch}" for name in ("resnet50", "bert-base s128", "gpt2-step") for batch in (1, 32)
    ),
}
"""What `bench.gpu_check` times, by name."""

COMPILED = (
    *(
        "resnet50 b32 fp16",
        "bert-base s128 b32 fp16",
        "gpt2-step b1 fp16",
        "resnet50 b1 fp16",
        "bert-base s128 b1 fp16",
    ),
    *("gpt2-step b32 fp16", "resnet50 b32 fp32", "bert-base s128 b32 fp32", "gpt2-step b1 fp32"),
    *("resnet50 b1 fp32", "bert-base s128 b1 fp32", "gpt2-step b32 fp32"),
)
"""Rows of networks that it compares with torch.compile, each of which takes half a minute: the first ones first."""


def selected(name: str) -> list[Row]:
    """The rows of a set that are in the short selection."""
    return [row for row in SETS[name]() if row.name in SHORT[name]]


def compiled_rows() -> list[Row]:
    """The networks of the short selection, in the order of COMPILED."""
    rows = {f"{row.name} {row.precision}": row for row in selected("networks")}
    return [rows[name] for name in COMPILED]


def torch_compile(context: Context) -> tuple[str, Mapping[str, Any]]:
    """The networks once more, beside torch.compile."""
    if torch_on_gpu() is None:
        return "PyTorch is not installed here", {"rows": []}
    return section(compiled_rows, "reduce-overhead", least=40)(context)


SHORT_SECTIONS: Mapping[str, Section] = {
    **{name: section(partial(selected, name), before=copies if name == "bandwidth" else None) for name in SHORT},
    "torch.compile": torch_compile,
}

main = partial(
    command,
    prog="bench.gpu_speed",
    description="time infera on a GPU against its roofline and PyTorch",
    topic="speed",
    minutes=MINUTES,
    sections=SECTIONS,
)

if __name__ == "__main__":
    sys.exit(main())

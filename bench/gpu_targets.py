"""What the GPU rows are to reach, as data, and whether measured rows do."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Measured = Mapping[str, Any]
"""A row with its time."""
Value = Callable[[Measured, Sequence[Measured]], float | None]
"""A number of a row, given all rows; None where what it needs was not measured."""

COMPILED, EAGER, TORCH = "torch.compile max-autotune", "torch eager", "torch"
ATTENTIONS = "torch flash", "torch cuDNN"


def against(*peers: str) -> Value:
    """How many times as fast as the fastest of the peers, all of which must have been measured; with a flushed L2 cache
    too where the row has such times: the less of both."""

    def value(row: Measured, everything: Sequence[Measured]) -> float | None:
        measured = [(row["peers"], row["seconds"])]
        if "cold" in row:
            measured.append((row["cold"], row["cold"].get("infera")))
        if not all(ours and all(peer in theirs for peer in peers) for theirs, ours in measured):
            return None
        ratios: list[float] = [min(theirs[peer] for peer in peers) / ours for theirs, ours in measured]
        return min(ratios)

    return value


def of_copies(row: Measured, everything: Sequence[Measured]) -> float | None:
    """The share of the bandwidth that a copy was measured to have."""
    copied = [r["bytes_per_s"] for r in everything if r["set"] == "bandwidth" and r["name"].startswith("copy")]
    return row["bytes_per_s"] / copied[-1] if copied else None


def of_roofline(row: Measured, everything: Sequence[Measured]) -> float | None:
    """The share of what the card's peaks allow."""
    return row.get("fraction")


def of_halves(row: Measured, everything: Sequence[Measured]) -> float | None:
    """How many times as fast as the same network in float16."""
    name = row["name"].replace(" int8", "")
    halves = [
        r["seconds"]
        for r in everything
        if (r["set"], r["name"], r["precision"]) == ("networks", name, "fp16") and "wrong" not in r
    ]
    return halves[-1] / row["seconds"] if halves else None


def mean_gain(rows: Sequence[Measured]) -> float:
    """How many times as fast as predicted ones the choices are that tuning has measured in rows."""
    measured = sum(row["measured"] for row in rows)
    return math.exp(sum(row["measured"] * math.log(row["mean_gain"]) for row in rows) / max(measured, 1))


def column(name: str) -> Value:
    return lambda row, everything: row.get(name)


@dataclass(frozen=True)
class Reached:
    """What was measured of a target: the number, None where there is none, and of how many of its rows it is."""

    value: float | None
    rows: int
    tuned: int = 0
    """Of those, the ones that went by measured tiles."""


@dataclass(frozen=True)
class Target:
    """Rows of a set, `count` of them, whose name, with the precision, matches; each has a `value`.

    `how` makes one number of them, the worst unless it says otherwise, which is to be at least `goal`, or where it is a
    time `at_most` that. `unit` follows the number.
    """

    work: str
    set: str
    pattern: str
    count: int
    value: Value
    goal: float
    unit: str = "x"
    at_most: bool = False
    how: Callable[[Sequence[float]], float] | None = None

    def rows(self, everything: Sequence[Measured]) -> list[Measured]:
        """Those of the target's set that it is about."""
        return [
            r for r in everything if r["set"] == self.set and re.search(self.pattern, f"{r['name']} {r['precision']}")
        ]

    def reached(self, everything: Sequence[Measured]) -> Reached:
        """Of the rows whose answers are right and which have what it takes."""
        right = [row for row in self.rows(everything) if "wrong" not in row]
        known = {i: value for i, row in enumerate(right) if (value := self.value(row, everything)) is not None}
        worst = max if self.at_most else min
        tuned = sum(bool(right[i].get("tuned")) for i in known)
        return Reached((self.how or worst)(list(known.values())) if known else None, len(known), tuned)

    def verdict(self, reached: Reached) -> str:
        """ "met" by all rows, "missed" by all or by one that alone is too bad, else how many there are; empty: none."""
        if reached.value is None:
            return ""
        short = reached.value > self.goal if self.at_most else reached.value < self.goal
        if short and (self.how is None or reached.rows == self.count):
            return "missed"
        return "met" if reached.rows == self.count else f"{reached.rows} of {self.count} rows"


TARGETS = (
    Target("ResNet-50, against torch.compile", "networks", "^resnet50 .* fp16", 3, against(COMPILED), 1.15),
    Target("ResNet-50, batch 1, against eager PyTorch", "networks", "^resnet50 b1 fp16", 1, against(EAGER), 2.0),
    Target("BERT-base, against torch.compile", "networks", "^bert-base .* fp16", 3, against(COMPILED), 1.15),
    Target("ViT-B/16, against torch.compile", "networks", "^vit-b16 .* fp16", 2, against(COMPILED), 1.1),
    Target("Llama 1B, prefill and steps, against torch.compile", "decoder", "", 4, against(COMPILED), 1.1),
    Target("Llama 1B, steps, share of the roofline", "decoder", "step", 3, of_roofline, 0.8, ""),
    Target("products, against cuBLAS", "products", "fp16", 19, against(TORCH), 0.95),
    Target("products with bias and ReLU, against cuBLASLt", "products, fused", "fp16", 5, against(TORCH), 1.0),
    Target(
        "attention, against the faster of flash and cuDNN attention", "attention", "", 20, against(*ATTENTIONS), 0.9
    ),
    Target(
        "ResNet-50's convolutions, geometric mean against cuDNN",
        "convolutions",
        "",
        24,
        against(TORCH),
        0.9,
        how=statistics.geometric_mean,
    ),
    Target("softmax, norms, chains, transposes, share of a copy", "bandwidth", "^(?!copy)", 14, of_copies, 0.85, ""),
    Target(
        "the host's time for a replayed run", "networks", "fp16", 10, column("host_seconds"), 15e-6, " s", at_most=True
    ),
    Target("load and first run, kernels on disk", "first run", "", 1, column("seconds"), 2.0, " s", at_most=True),
    Target("int8 ResNet-50 and BERT-base, batch 32, against float16", "int8", " b32 ", 2, of_halves, 1.3),
)

"""What the GPU rows are to reach, as data, and whether measured rows do."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Measured = Mapping[str, Any]
"""A row with its time."""
Judge = Callable[[Sequence[Measured], Sequence[Measured]], float | None]
"""One number of the rows of a target, given those and all rows; None where what it needs was not measured."""

COMPILED, EAGER, TORCH = "torch.compile max-autotune", "torch eager", "torch"


def _ratios(rows: Sequence[Measured], peer: str) -> list[float]:
    return [row["peers"][peer] / row["seconds"] for row in rows if peer in row["peers"]]


def against(peer: str, how: Callable[[Sequence[float]], float] = min) -> Judge:
    """How many times as fast as a peer: the least, or another mean of all rows."""

    def judge(rows: Sequence[Measured], everything: Sequence[Measured]) -> float | None:
        found = _ratios(rows, peer)
        return how(found) if found else None

    return judge


def of_copies(rows: Sequence[Measured], everything: Sequence[Measured]) -> float | None:
    """The least share of the bandwidth that a copy was measured to have."""
    copied = [r["bytes_per_s"] for r in everything if r["set"] == "bandwidth" and r["name"].startswith("copy")]
    return min(r["bytes_per_s"] for r in rows) / copied[-1] if copied else None


def of_roofline(rows: Sequence[Measured], everything: Sequence[Measured]) -> float | None:
    """The least share of what the card's peaks allow."""
    found = [r["fraction"] for r in rows if "fraction" in r]
    return min(found) if found else None


def of_halves(rows: Sequence[Measured], everything: Sequence[Measured]) -> float | None:
    """How many times as fast as the same network in float16: the least."""
    halves = {r["name"]: r["seconds"] for r in everything if r["set"] == "networks" and r["precision"] == "fp16"}
    found = [halves[n] / r["seconds"] for r in rows if (n := r["name"].replace(" int8", "")) in halves]
    return min(found) if found else None


def longest(column: str) -> Judge:
    """The largest value of a column."""
    return lambda rows, everything: max(r[column] for r in rows)


@dataclass(frozen=True)
class Target:
    """Rows of a set whose name, with the precision, matches; `judge` makes one number of them.

    It is to be at least `goal`, or where it is a time `at_most` that. `unit` follows the number.
    """

    work: str
    set: str
    pattern: str
    judge: Judge
    goal: float
    unit: str = "x"
    at_most: bool = False

    def rows(self, everything: Sequence[Measured]) -> list[Measured]:
        """Those of the target's set that it is about."""
        return [
            r for r in everything if r["set"] == self.set and re.search(self.pattern, f"{r['name']} {r['precision']}")
        ]

    def reached(self, everything: Sequence[Measured]) -> float | None:
        """The number; None where it is not measured."""
        rows = self.rows(everything)
        return self.judge(rows, everything) if rows else None

    def met(self, value: float) -> bool:
        return value <= self.goal if self.at_most else value >= self.goal


TARGETS = (
    Target("ResNet-50, against torch.compile", "networks", "^resnet50 .* fp16", against(COMPILED), 1.15),
    Target("ResNet-50, batch 1, against eager PyTorch", "networks", "^resnet50 b1 fp16", against(EAGER), 2.0),
    Target("BERT-base, against torch.compile", "networks", "^bert-base .* fp16", against(COMPILED), 1.15),
    Target("ViT-B/16, against torch.compile", "networks", "^vit-b16 .* fp16", against(COMPILED), 1.1),
    Target("Llama 1B, prefill and steps, against torch.compile", "decoder", "", against(COMPILED), 1.1),
    Target("Llama 1B, steps, share of the roofline", "decoder", "step", of_roofline, 0.8, ""),
    Target("products, against cuBLAS", "products", "fp16", against(TORCH), 0.95),
    Target("products with bias and ReLU, against cuBLASLt", "products, fused", "fp16", against(TORCH), 1.0),
    Target("attention, against flash attention", "attention", "", against(TORCH), 0.9),
    Target(
        "ResNet-50's convolutions, geometric mean against cuDNN",
        "convolutions",
        "",
        against(TORCH, statistics.geometric_mean),
        0.9,
    ),
    Target("softmax, norms, chains, transposes, share of a copy", "bandwidth", "^(?!copy)", of_copies, 0.85, ""),
    Target(
        "the host's time for a replayed run", "networks", "fp16", longest("host_seconds"), 15e-6, " s", at_most=True
    ),
    Target("load and first run, kernels on disk", "first run", "", longest("seconds"), 2.0, " s", at_most=True),
    Target("int8 ResNet-50 and BERT-base, batch 32, against float16", "int8", " b32 ", of_halves, 1.3),
)

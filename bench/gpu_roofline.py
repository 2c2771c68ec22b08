"""The roofline: what a card's peaks allow, and what is predicted with the shares of them that kernels reach.

The bound of a step is the larger of two times, its operations at the peak rate of what multiplies and its bytes at the
bandwidth of memory; the bound of a plan is the sum over its steps. A network whose activations stay in the L2 cache may
beat it. The prediction takes the shares below for reached and adds what every launch costs at least. Nothing in this
module is measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench.gpu_work import Work
from infera_kernels.launch.devices import DEVICES, Device
from infera_kernels.tuning.cost import LAUNCH

CARDS = ("H200", "H100 SXM", "A100 80GB", "L4")
"""Those that rows are predicted for."""


@dataclass(frozen=True)
class Assumed:
    """What a prediction takes for reached of a card's peaks."""

    operations: float = 0.75
    """Large products by cuBLAS reach about so much at the clocks that a card keeps up."""
    memory: float = 0.9
    """Copies on an H200 reach 4.3 of 4.8 TB/s."""
    launch_seconds: float = LAUNCH
    """From one kernel of a CUDA graph to the next that waits for it, and the ends of both."""


ASSUMED = Assumed()


def card_named(name: str) -> Device:
    """Raises KeyError for a card that is not listed."""
    found = next((d for d in DEVICES if d.name == name), None)
    if found is None:
        raise KeyError(name)
    return found


def seconds_of(work: Work, card: Device) -> tuple[float, float]:
    """The two times of one step at the card's peaks: of its operations, and of its bytes."""
    computing = work.operations / card.flops_per_s(work.arithmetic) if work.operations else 0.0
    return computing, work.nbytes / card.dram_bytes_per_s


def bound(works: Iterable[Work], card: Device) -> float:
    """Seconds that the card's peaks allow."""
    return sum(max(seconds_of(work, card)) for work in works)


def predicted(works: Iterable[Work], card: Device, assumed: Assumed = ASSUMED) -> float:
    """Seconds, as far as the model knows."""
    total = 0.0
    for work in works:
        computing, moving = seconds_of(work, card)
        before = work.before / card.dram_bytes_per_s
        busy = max(computing / assumed.operations, (moving - before) / assumed.memory)
        total += work.launches * assumed.launch_seconds + before / assumed.memory + busy
    return total


def limit(works: Iterable[Work], card: Device) -> str:
    """What most of the bound comes from: "operations" or "memory"."""
    sums = {"operations": 0.0, "memory": 0.0}
    for work in works:
        computing, moving = seconds_of(work, card)
        sums["operations" if computing > moving else "memory"] += max(computing, moving)
    return max(sums, key=sums.__getitem__)


def constants_of(card: Device) -> dict[str, Any]:
    """The card's numbers that a bound is made of, for a results file."""
    kinds = ("half", "tf32", "ieee", "int8")
    return {
        "name": card.name,
        "operations_per_s": {kind: card.flops_per_s(kind) for kind in kinds},
        "bytes_per_s": card.dram_bytes_per_s,
        "source": card.source,
    }

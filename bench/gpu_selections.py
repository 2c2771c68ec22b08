"""Which rows the GPU benchmarks time: all of them, the short selection, and those that torch.compile compiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, zip_longest

from bench.gpu_network_sets import decoder, integers, networks
from bench.gpu_rows import Row
from bench.gpu_sets import attentions, bandwidth, convolutions, products

OPERATORS: Mapping[str, Callable[[], Sequence[Row]]] = {
    "bandwidth": bandwidth,
    "products": products,
    "attention": attentions,
    "convolutions": convolutions,
}
NETWORKS: Mapping[str, Callable[[], Sequence[Row]]] = {"networks": networks, "decoder": decoder, "int8": integers}
SETS = {**OPERATORS, **NETWORKS}
"""All rows."""

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

FIRST = (
    *("resnet50 b32 fp16", "bert-base s128 b32 fp16", "vit-b16 b32 fp16", "llama-1b step after 511 b1 fp16"),
    *("llama-1b prefill 512 b1 fp16", "resnet50 b1 fp16"),
)
"""The rows that torch.compile compiles first, each of which takes minutes: there may be time for no other."""


def selected(name: str) -> list[Row]:
    """The rows of a set that are in the short selection."""
    return [row for row in SETS[name]() if row.name in SHORT[name]]


def in_order(rows: Sequence[Row]) -> list[Row]:
    """For torch.compile: those of FIRST, then the others, in half precision before float32."""
    named = {f"{row.name} {row.precision}": row for row in rows}
    first = [named[name] for name in FIRST if name in named]
    return first + sorted((row for row in rows if row not in first), key=lambda row: row.precision != "fp16")


TUNED = ("convolutions", "products", "attention")
"""Sets of operators that have tiles."""


def tuned_operators() -> list[Row]:
    """Rows of operators in the order of tuning: the sets in turn, the short selection before others."""
    sets = [sorted(OPERATORS[name](), key=lambda row, of=SHORT[name]: row.name not in of) for name in TUNED]  # type: ignore[misc]
    return [row for row in chain.from_iterable(zip_longest(*sets)) if row is not None]


def tuned_networks() -> list[Row]:
    """Networks in the order of tuning."""
    return in_order([row for rows in NETWORKS.values() for row in rows()])

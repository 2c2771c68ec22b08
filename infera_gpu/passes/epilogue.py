"""Activations by the names that the epilogues of products have for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import TypeAlias

from infera_gpu.graph import Node
from infera_gpu.passes.activation import bounds
from infera_gpu.passes.pattern import Arg, Match, P, node

Activation: TypeAlias = tuple[str, tuple[float, ...]]
"""A name, and its parameters in order."""


def _plain(name: str) -> Callable[[Match, Node], Activation]:
    return lambda match, n: (name, ())


def _gelu(match: Match, n: Node) -> Activation:
    return "gelu_tanh" if n.attrs.get("approximate", "none") == "tanh" else "gelu", ()


def _swish(match: Match, n: Node) -> Activation | None:
    return ("swish", ()) if float(n.attrs.get("alpha", 1.0)) == 1 else None


def _clip(match: Match, n: Node) -> Activation | None:
    limits = bounds(match.graph.constants, n)
    return None if limits is None else ("clip", limits)


def _leaky(match: Match, n: Node) -> Activation:
    return "leaky_relu", (float(n.attrs.get("alpha", 0.01)),)


def _hard_sigmoid(match: Match, n: Node) -> Activation:
    return "hard_sigmoid", (float(n.attrs.get("alpha", 0.2)), float(n.attrs.get("beta", 0.5)))


_NAMED: Mapping[str, Callable[[Match, Node], Activation | None]] = MappingProxyType(
    {
        "Relu": _plain("relu"),
        "Sigmoid": _plain("sigmoid"),
        "Tanh": _plain("tanh"),
        "HardSwish": _plain("hard_swish"),
        "Softplus": _plain("softplus"),
        "Mish": _plain("mish"),
        "Gelu": _gelu,
        "infera.Gelu": _gelu,
        "Swish": _swish,
        "LeakyRelu": _leaky,
        "HardSigmoid": _hard_sigmoid,
        "Clip": _clip,
    }
)


ALL = tuple(_NAMED)
"""The operators that are activations."""


def activation_of(match: Match, n: Node) -> Activation | None:
    """What a node computes; None where no epilogue has it, or its parameters are not known."""
    return _NAMED[n.qualified](match, n)


def activated(product: Arg, ops: Collection[str] = ALL) -> tuple[P, ...]:
    """Patterns of an activation of these, the root, over a product."""
    plain = tuple(op for op in ops if op != "Clip")
    clipped = (node("Clip", product, "?#low", "?#high"),) if "Clip" in ops else ()
    return (node(plain, product), *clipped)

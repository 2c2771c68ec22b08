"""The activations that compiled functions know. Imports no numba: whoever plans asks what there is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

NONE, CLIP, LEAKY, GELU, GELU_TANH, SIGMOID, SWISH, TANH, HARD_SIGMOID, HARD_SWISH, ERF = range(11)

CODES: Mapping[str, tuple[int, tuple[float, ...]]] = MappingProxyType(
    {
        "": (NONE, ()),
        "relu": (CLIP, (0.0, math.inf)),
        "clip": (CLIP, ()),
        "leaky_relu": (LEAKY, ()),
        "gelu": (GELU, ()),
        "gelu_tanh": (GELU_TANH, ()),
        "sigmoid": (SIGMOID, ()),
        "swish": (SWISH, (1.0,)),
        "tanh": (TANH, ()),
        "hard_sigmoid": (HARD_SIGMOID, ()),
        "hard_swish": (HARD_SWISH, ()),
        "erf": (ERF, ()),
    }
)
"""Activation -> its code, and its parameters where the name says them."""

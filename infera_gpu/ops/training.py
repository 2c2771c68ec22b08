"""Optimiser steps: one declaration for any number of tensors, which come as all x, all gradients, all states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Op, Site, f32
from infera_gpu.ops._families import plain
from infera_gpu.spec import Array, TensorSpec

Step = Callable[..., tuple[Array, ...]]


def _momentum(xp: Any, a: Any, r: Array, t: Array, x: Array, g: Array, v: Array) -> tuple[Array, ...]:
    g = a["norm_coefficient"] * x + g
    v = a["alpha"] * v + xp.where(t > 0, a["beta"], 1.0) * g
    return x - r * (g + a["alpha"] * v if a["mode"] == "nesterov" else v), v


def _adagrad(xp: Any, a: Any, r: Array, t: Array, x: Array, g: Array, h: Array) -> tuple[Array, ...]:
    g = a["norm_coefficient"] * x + g
    h = h + g * g
    return x - r / (1 + t * a["decay_factor"]) * g / (xp.sqrt(h) + a["epsilon"]), h


def _adam(xp: Any, a: Any, r: Array, t: Array, x: Array, g: Array, v: Array, h: Array) -> tuple[Array, ...]:
    """arXiv 1412.6980, with the bias corrections in the learning rate."""
    g = a["norm_coefficient"] * x + g
    v = a["alpha"] * v + (1 - a["alpha"]) * g
    h = a["beta"] * h + (1 - a["beta"]) * g * g
    at = xp.maximum(t, 1)
    corrected = r * xp.sqrt(1 - a["beta"] ** at) / (1 - a["alpha"] ** at)
    x = x - xp.where(t > 0, corrected, r) * v / (xp.sqrt(h) + a["epsilon"])
    return (1 - a["norm_coefficient_post"]) * x, v, h


def _groups(site: Site, states: int) -> int:
    """How many tensors are optimised."""
    count, rest = divmod(len(site.ins) - 2, states + 2)
    if rest or count < 1:
        raise site.fail(f"{len(site.ins)} inputs, expected R, T and {states + 2} for each tensor")
    return count


def _optimizer(name: str, step: Step, states: int, attrs: dict[str, Any], case: dict[str, Any]) -> Op:
    def infer(site: Site) -> tuple[TensorSpec, ...]:
        n = _groups(site, states)
        for i in range(n):
            x = site.spec(2 + i)
            for k in range(1, states + 2):
                if site.spec(2 + i + k * n) != x:
                    raise site.fail(
                        f"input {2 + i + k * n} is {site.spec(2 + i + k * n)}, expected {x} as input {2 + i}"
                    )
        kept = [2 + i + k * n for k in (0, *range(2, states + 2)) for i in range(n)]
        return tuple(site.spec(i) for i in kept)

    def compute(xp: Any, site: Site, r: Array, t: Array, *tensors: Array) -> list[Array]:
        n = _groups(site, states)
        made = [step(xp, site.attrs, r, t, *(tensors[i + k * n] for k in range(states + 2))) for i in range(n)]
        return [each[k].astype(tensors[i].dtype) for k in range(states + 1) for i, each in enumerate(made)]

    rate, first, later = np.array(0.1, np.float32), np.array(0), np.array(7)
    one = tuple(f32(3, 2) for _ in range(states + 2))
    return Op(
        name,
        1,
        domain="ai.onnx.preview.training",
        infer=infer,
        compute=plain(compute),
        attrs=attrs,
        cases=(
            Case("first", (rate, first, *one), case, n_outs=states + 1, low=0.1),
            Case("later", (rate, later, *one), case, n_outs=states + 1, low=0.1),
            Case(
                "two",
                (rate, later, *(s for _ in range(states + 2) for s in (f32(2), f32(1, 3)))),
                case,
                n_outs=2 * (states + 1),
                low=0.1,
            ),
        ),
    )


_MOMENTUM = {"alpha": 0.9, "beta": 0.8, "norm_coefficient": 0.01, "mode": "nesterov"}
OPS = (
    _optimizer("Momentum", _momentum, 1, dict.fromkeys(_MOMENTUM, REQUIRED), _MOMENTUM),
    _optimizer(
        "Adagrad", _adagrad, 1, {"decay_factor": 0.0, "epsilon": 1e-6, "norm_coefficient": 0.0}, {"decay_factor": 0.1}
    ),
    _optimizer(
        "Adam",
        _adam,
        2,
        {"alpha": 0.9, "beta": 0.999, "epsilon": 1e-6, "norm_coefficient": 0.0, "norm_coefficient_post": 0.0},
        {"norm_coefficient": 0.01, "norm_coefficient_post": 0.02},
    ),
)

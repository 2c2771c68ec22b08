"""Operators that draw: reproducible with a seed, new without, and distributed as they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

import infera_gpu


def draw(op: str, feeds: dict[str, np.ndarray] | None = None, **attrs: Any) -> Any:
    """A session's first and only run."""
    return session(op, feeds or {}, **attrs).run(feeds or {})["y"]


def session(op: str, feeds: dict[str, np.ndarray], **attrs: Any) -> infera_gpu.Session:
    graph = helper.make_graph(
        [helper.make_node(op, [*feeds], ["y"], **attrs)],
        "g",
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()],
        [helper.make_empty_tensor_value_info("y")],
    )
    return infera_gpu.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), device="cpu")


N = 20000
X = np.zeros((N,), np.float32)


@pytest.mark.parametrize(
    ("y", "mean", "deviation", "low", "high"),
    [
        (lambda: draw("RandomUniform", shape=[N], low=-1.0, high=3.0), 1.0, 4 / 12**0.5, -1, 3),
        (lambda: draw("RandomUniformLike", {"x": X}), 0.5, 1 / 12**0.5, 0, 1),
        (lambda: draw("RandomNormal", shape=[N], mean=2.0, scale=0.5), 2.0, 0.5, -9, 9),
        (lambda: draw("RandomNormalLike", {"x": X}), 0.0, 1.0, -9, 9),
        (lambda: draw("Bernoulli", {"x": X + np.float32(0.3)}), 0.3, 0.21**0.5, 0, 1),
    ],
    ids=["uniform", "uniform_like", "normal", "normal_like", "bernoulli"],
)
def test_moments_and_bounds(y: object, mean: float, deviation: float, low: float, high: float) -> None:
    """Within five standard errors: a right generator fails once in two million runs."""
    assert callable(y)
    got = y().astype(np.float64)
    assert low <= got.min() <= got.max() <= high
    assert abs(got.mean() - mean) < 5 * deviation / N**0.5
    assert abs(got.std() - deviation) < 5 * deviation / N**0.5
    correlation = np.corrcoef(got[1:], got[:-1])[0, 1]
    assert abs(correlation) < 5 / N**0.5


def test_multinomial_follows_the_log_probabilities() -> None:
    chances = np.array([0.1, 0.6, 0.3])
    got = draw("Multinomial", {"x": np.log(chances)[None].astype(np.float32)}, sample_size=N)
    counts = np.bincount(got[0], minlength=3) / N
    assert (np.abs(counts - chances) < 5 * np.sqrt(chances * (1 - chances) / N)).all()


@pytest.mark.parametrize("op", ["RandomUniform", "RandomNormal"])
def test_a_seed_repeats_and_none_does_not(op: str) -> None:
    seeded, free = session(op, {}, shape=[8], seed=3.0), session(op, {}, shape=[8])
    np.testing.assert_array_equal(seeded.run({})["y"], seeded.run({})["y"])
    assert (free.run({})["y"] != free.run({})["y"]).any()

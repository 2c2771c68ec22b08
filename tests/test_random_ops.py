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
CHANCES = np.array([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25], [0.02, 0.0, 0.98]])
DRAWS: dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]] = {
    "RandomUniform": ({}, {"shape": [N]}),
    "RandomUniformLike": ({"x": X}, {}),
    "RandomNormal": ({}, {"shape": [N]}),
    "RandomNormalLike": ({"x": X}, {}),
    "Bernoulli": ({"x": X + np.float32(0.3)}, {}),
    "Multinomial": ({"x": np.log(CHANCES[:1], dtype=np.float32)}, {"sample_size": N}),
    "Dropout": ({"x": X + 1, "ratio": np.array(0.4, np.float32), "training": np.array(True)}, {}),
}
"""Feeds and attributes that make each operator draw N numbers. Multinomial's are classes, Dropout's kept or not."""


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


@pytest.mark.parametrize("op", DRAWS)
def test_draws_are_independent_of_those_before(op: str) -> None:
    """No correlation at lags 1 to 10, and as many pairs of neighbours in each pair of quartiles as chance gives.

    Within five standard errors, as above. The statistic of the pairs is chi-square with n = (k - 1)² degrees of
    freedom, which exceeds n + 2 √(n t) + 2 t with probability e^-t at most (Laurent and Massart 2000, lemma 1).
    """
    feeds, attrs = DRAWS[op]
    got = draw(op, feeds, **attrs).astype(np.float64).reshape(-1)
    for lag in range(1, 11):
        assert abs(np.corrcoef(got[lag:], got[:-lag])[0, 1]) < 5 / N**0.5, f"lag {lag}"
    edges = np.unique(got)[1:] if len(np.unique(got)) < 4 else np.quantile(got, [0.25, 0.5, 0.75])
    kind, k = np.searchsorted(edges, got, side="right"), len(edges) + 1
    seen = np.bincount(kind[0::2] * k + kind[1::2], minlength=k * k)  # pairs that do not overlap
    share = np.bincount(kind, minlength=k) / N
    expected = np.outer(share, share).reshape(-1) * (N / 2)
    n, t = (k - 1) ** 2, 14.5  # once in two million runs
    assert ((seen - expected) ** 2 / expected).sum() < n + 2 * (n * t) ** 0.5 + 2 * t


def test_multinomial_follows_the_log_probabilities_of_each_row() -> None:
    with np.errstate(divide="ignore"):
        logs = np.log(CHANCES).astype(np.float32) + np.array([[0], [3], [-40]], np.float32)  # unnormalised
    got = draw("Multinomial", {"x": logs}, sample_size=N)
    assert got.shape == (3, N)
    for row, chances in zip(got, CHANCES, strict=True):
        share = np.bincount(row, minlength=3) / N
        assert (np.abs(share - chances) <= 5 * np.sqrt(chances * (1 - chances) / N)).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(got[a], got[b])[0, 1]) < 5 / N**0.5, f"rows {a} and {b}"


@pytest.mark.parametrize("op", DRAWS)
def test_a_seed_repeats_and_none_does_not(op: str) -> None:
    feeds, attrs = DRAWS[op]
    number = int if op == "Dropout" else float  # the type of the attribute
    seeded, again, other = (session(op, feeds, **attrs, seed=number(seed)) for seed in (3, 3, 4))
    free = session(op, feeds, **attrs)
    first = seeded.run(feeds)["y"]
    np.testing.assert_array_equal(first, seeded.run(feeds)["y"])
    np.testing.assert_array_equal(first, again.run(feeds)["y"])
    assert (first != other.run(feeds)["y"]).any()
    assert (free.run(feeds)["y"] != free.run(feeds)["y"]).any()

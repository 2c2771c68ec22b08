"""Products with one-hot vectors, as JAX's exporter writes embeddings, are lookups in a table made when loading."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import infera_gpu
from tests.text import parse

EMBEDDING = """
    g (int32[B, 5] ids, int64[3] shape) => (float[C, 5, 2] y)
    <int64[3] column = {{-1, 5, 1}}, int32[1, 1, 4] numbers = {{0, 1, 2, 3}}, float[1, 1, 2] bias = {{0.5, -1}},
     float[4, 2] w = {{1, -2, 3, -4, 0.25, 0.5, -7, 8}}> {{
        r = Reshape(ids, column)
        x = Expand(r, shape)
        e = Equal(x, numbers)
        c = Cast <to = 1> (e)
        p = MatMul(c, w)
        {rest}
    }}"""
REST = {
    "product": "y = Identity(p)",
    "bias": "y = Add(bias, p)",
    "activation": "a = Add(p, bias)  y = Tanh(a)",
}


def check(rest: str, shape: tuple[int, ...], ids: Any) -> None:
    text = parse(EMBEDDING.format(rest=REST[rest]))
    given = {"ids": np.array(ids, np.int32), "shape": np.array(shape)}
    fused, parts = (infera_gpu.load(text, device="cpu", fuse=f) for f in (True, False))
    assert [n.op for n in fused.graph.nodes if n.op != "Identity"] == ["Reshape", "Lookup"]
    np.testing.assert_allclose(fused.run(given)["y"], parts.run(given)["y"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("shape", [(1, 5, 1), (1, 5, 4), (2, 5, 1), (3, 1, 1)])
def test_one_hot_vectors_times_a_matrix(rest: str, shape: tuple[int, ...]) -> None:
    """Numbers that are no index give a row of zeros; a wider shape repeats rows."""
    ids = [[0, 3, -1, 2, 4]] if shape[0] != 2 else [[0, 3, -1, 2, 4]] * 2
    check(rest, shape, ids)

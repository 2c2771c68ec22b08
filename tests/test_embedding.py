"""Embeddings, their sum and its norm in one launch: in whole networks, and of indices that a table has not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import infera_gpu
from bench.build import bert
from infera_gpu.errors import InputError
from tests.text import parse

FORMS = {
    "types_first": "a = Gather(w, ids)  b = Gather(k, kinds)  c = Add(a, b)  d = Gather(p, at)  s = Add(c, d)",
    "positions_first": "a = Gather(p, at)  b = Gather(w, ids)  c = Add(a, b)  d = Gather(k, kinds)  s = Add(d, c)",
    "no_types": "a = Gather(w, ids)  b = Gather(p, at)  s = Add(b, a)",
    "positions_of_one_axis": "a = Gather(w, ids)  i = Squeeze(at, zero)  b = Gather(p, i)  s = Add(a, b)",
    "known_positions": "a = Gather(w, ids)  b = Gather(k, kinds)  c = Add(a, b)  s = Add(c, rows)",
    "known_positions_in_between": "a = Gather(w, ids)  c = Add(a, rows)  b = Gather(k, kinds)  s = Add(b, c)",
    "positions_of_each": "a = Gather(w, ids)  b = Gather(p, kinds)  c = Add(a, b)  d = Gather(k, kinds)  s = Add(c, d)",
}


def network(form: str, dtype: str) -> Any:
    numbers = np.sin(np.arange(200)).astype("float16" if dtype == "float16" else "float32")

    def table(name: str, *shape: int) -> str:
        """Half precision is written as the bits of its numbers."""
        values = numbers[len(name) :][: int(np.prod(shape))]
        written = (values.view(np.uint16) if dtype == "float16" else values).tolist()
        return f"{dtype}{list(shape)} {name} = {{{', '.join(map(str, written))}}}"

    tables = (
        table("w", 9, 6),
        table("k", 3, 6),
        table("p", 5, 6),
        table("rows", 1, 4, 6),
        table("g", 6),
        table("bias", 6),
    )
    return parse(f"""
        g (int64[B, S] ids, int64[B, S] kinds, int64[1, S] at) => ({dtype}[B, S, 6] y)
        <{", ".join(tables)}, int64[1] zero = {{0}}> {{
            {FORMS[form]}
            y = LayerNormalization <epsilon = 0.01> (s, g, bias)
        }}""")


FEEDS = {
    "ids": np.array([[0, 8, -9, 3], [-1, 2, 2, 5]]),
    "kinds": np.array([[0, 1, 2, -1], [-3, 0, 0, 1]]),
    "at": np.array([[0, 1, -1, 4]]),
}


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_launch(form: str, dtype: str) -> None:
    model = network(form, dtype)
    with infera_gpu.load(model, device="recording") as session:
        steps = [s.placed.node.op for p in session.plans(FEEDS) for s in p.steps if s.placed is not None]
        got = session.run(FEEDS)["y"]
    assert steps == ["EmbeddedNormalization"]
    want = infera_gpu.load(model, device="cpu", fuse=False).run(FEEDS)["y"]
    within = 1e-5 if dtype == "float" else 4e-3
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=0, atol=within)


def test_the_cpu_computes_the_parts() -> None:
    with infera_gpu.load(network("no_types", "float"), device="cpu") as session:
        assert [n.op for n in session.graph.nodes].count("Gather") == 2


@pytest.mark.parametrize("index", [-10, 9])
@pytest.mark.parametrize("fuse", [True, False])
def test_an_index_that_a_table_has_not_is_refused_where_it_was(index: int, fuse: bool) -> None:
    feeds = {**FEEDS, "ids": np.array([[0, index, 1, 3], [1, 2, 2, 5]])}
    session = infera_gpu.load(network("no_types", "float"), device="recording", fuse=fuse)
    with session, pytest.raises(InputError, match=f"index {index} is out of bounds"):
        session.run(feeds)


@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_bert_looks_its_tokens_up_in_one_launch(precision: Any) -> None:
    model = bert(layers=1, hidden=64, heads=4, inner=128, vocabulary=100)
    ids = np.random.default_rng(0).integers(0, 100, (2, 7))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids % 2}
    with infera_gpu.load(model, device="recording", precision=precision) as session:
        steps = [s.placed.node.op for p in session.plans(feeds) for s in p.steps if s.placed is not None]
        got = session.run(feeds)["last_hidden_state"]
    assert steps.count("EmbeddedNormalization") == 1
    assert "Gather" not in steps
    want = infera_gpu.load(model, device="cpu", fuse=False).run(feeds)["last_hidden_state"]
    within = {"fp32": 2e-5, "fp16": 6e-3, "bf16": 6e-2}[precision] * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=within)

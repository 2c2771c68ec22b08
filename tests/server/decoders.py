"""Small decoders as ONNX models, and what they generate by the book: all of the text again for each token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from infera_server.scheduling.rows import HostArray
from tests.text import parse

WORDS, WIDTH, PLACES = 16, 8, 64

ATTENTION = f"""g (int64[B, S] input_ids, int64[B, S] position_ids, float[B, P, {WIDTH}] past_key,
   float[B, P, {WIDTH}] past_value)
=> (float[B, S, {WORDS}] logits, float[B, T, {WIDTH}] present_key, float[B, T, {WIDTH}] present_value) {{
  words = Gather(E, input_ids)
  places = Gather(P0, position_ids)
  x = Add(words, places)
  q = MatMul(x, Wq)
  k = MatMul(x, Wk)
  v = MatMul(x, Wv)
  present_key = Concat <axis = 1> (past_key, k)
  present_value = Concat <axis = 1> (past_value, v)
  kt = Transpose <perm = [0, 2, 1]> (present_key)
  scores = MatMul(q, kt)
  sizes = Shape(present_key)
  total = Gather(sizes, one)
  all = Range(zero, total, one)
  own = Unsqueeze(position_ids, last)
  before = LessOrEqual(all, own)
  masked = Where(before, scores, low)
  weights = Softmax <axis = -1> (masked)
  y = MatMul(weights, present_value)
  z = Add(x, y)
  logits = MatMul(z, Et)
}}"""

MASKED = ATTENTION.replace(
    "int64[B, S] position_ids,", "int64[B, S] position_ids, int64[B, T] attention_mask,"
).replace(
    "  before = LessOrEqual(all, own)\n",
    """  counted = CumSum(attention_mask, one)
  all3 = Unsqueeze(counted, first)
  own3 = Add(own, one)
  up_to = LessOrEqual(all3, own3)
  real = Cast <to = 9> (attention_mask)
  real3 = Unsqueeze(real, first)
  before = And(up_to, real3)
""",
)
"""The same with a mask: places are counted where it is 1, so that others can lie before them."""

STATELESS = f"""g (int64[B, S] input_ids, int64[B, S] position_ids) => (float[B, S, {WORDS}] logits) """ + ATTENTION[
    ATTENTION.index("{") :
].replace("Concat <axis = 1> (past_key, ", "Identity(").replace("Concat <axis = 1> (past_value, ", "Identity(")
"""The same, which keeps nothing."""

RECURRENT = f"""g (int64[B, 1] token, float[B, {WIDTH}] hidden)
=> (float[B, {WORDS}] logits, float[B, {WIDTH}] hidden_out) {{
  words = Gather(E, token)
  x = Squeeze(words, first)
  a = MatMul(x, Wq)
  b = MatMul(hidden, Wk)
  c = Add(a, b)
  hidden_out = Tanh(c)
  logits = MatMul(hidden_out, Et)
}}"""


def _weights() -> dict[str, HostArray]:
    rng = np.random.default_rng(5)
    shapes = {
        "E": (WORDS, WIDTH),
        "P0": (PLACES, WIDTH),
        "Wq": (WIDTH, WIDTH),
        "Wk": (WIDTH, WIDTH),
        "Wv": (WIDTH, WIDTH),
    }
    found = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    found["Et"] = np.ascontiguousarray(found["E"].T)
    return found


WEIGHTS = _weights()


def put_decoder(root: Path, name: str, graph: str, config: str, version: str = "1") -> None:
    """A model's folder in a repository."""
    model = parse(graph)
    numbers = {"one": np.array(1), "zero": np.array(0), "first": np.array([1]), "last": np.array([2])}
    for named, array in {**WEIGHTS, **numbers, "low": np.array(-1e9, np.float32)}.items():
        if any(named in node.input for node in model.graph.node):
            model.graph.initializer.append(numpy_helper.from_array(array, named))
    folder = root / name / version
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    (root / name / "config.pbtxt").write_text(config)


def attention_logits(tokens: Sequence[int]) -> HostArray:
    """[WORDS] after the last of them."""
    w = WEIGHTS
    x = w["E"][list(tokens)] + w["P0"][: len(tokens)]
    scores = (x @ w["Wq"]) @ (x @ w["Wk"]).T
    scores[np.triu_indices(len(tokens), 1)] = -1e9
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ (x @ w["Wv"])
    last: HostArray = ((x + y) @ w["Et"])[-1]
    return last


def recurrent_state(tokens: Sequence[int]) -> HostArray:
    """[WIDTH] after the last of them."""
    hidden = np.zeros(WIDTH, np.float32)
    for token in tokens:
        hidden = np.tanh(WEIGHTS["E"][token] @ WEIGHTS["Wq"] + hidden @ WEIGHTS["Wk"])
    return hidden


def recurrent_logits(tokens: Sequence[int]) -> HostArray:
    """[WORDS] after the last of them."""
    last: HostArray = recurrent_state(tokens) @ WEIGHTS["Et"]
    return last

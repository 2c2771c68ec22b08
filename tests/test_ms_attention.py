"""Forms of com.microsoft's attention that onnxruntime's CPU kernels refuse or leave undefined: against other forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper

import infera_gpu
from infera_gpu.errors import InferaError
from tests.protos import value_info

RNG = np.random.default_rng(0)


def model(op: str, ins: Sequence[Any], n_outs: int = 1, **attrs: Any) -> bytes:
    names = ["" if x is None else f"i{k}" for k, x in enumerate(ins)]
    outs = [f"o{k}" for k in range(n_outs)]
    node = helper.make_node(op, names, outs, domain="com.microsoft", **attrs)
    graph = helper.make_graph(
        [node],
        "g",
        [value_info(n, x) for n, x in zip(names, ins, strict=True) if x is not None],
        [helper.make_tensor_value_info(o, 1, None) for o in outs],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def feeds(ins: Sequence[Any]) -> dict[str, np.ndarray]:
    return {f"i{k}": x for k, x in enumerate(ins) if x is not None}


def ours(op: str, ins: Sequence[Any], n_outs: int = 1, **attrs: Any) -> list[np.ndarray]:
    with infera_gpu.load(model(op, ins, n_outs, **attrs), device="cpu") as session:
        return list(session.run(feeds(ins)).values())


def theirs(op: str, ins: Sequence[Any], n_outs: int = 1, **attrs: Any) -> list[np.ndarray]:
    return list(onnxruntime.InferenceSession(model(op, ins, n_outs, **attrs)).run(None, feeds(ins)))


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_queries_keys_and_values(bias: bool) -> None:
    q, k, v, b = random(2, 3, 16), random(2, 3, 16), random(2, 3, 16), random(48) if bias else None
    want = theirs("MultiHeadAttention", [q, k, v, b], num_heads=4)[0]
    four = [x.reshape(2, 3, 4, 4) for x in (q, k, v)]
    packed = ours("MultiHeadAttention", [np.stack(four, axis=3), None, None, b], num_heads=4)[0]
    np.testing.assert_allclose(packed, want, atol=1e-6)
    half = ours("MultiHeadAttention", [q, np.stack(four[1:], axis=3), None, b], num_heads=4)[0]
    np.testing.assert_allclose(half, want, atol=1e-6)


def test_heads_are_normalised_before_they_are_turned() -> None:
    q, k, v = random(2, 3, 64), random(2, 3, 32), random(2, 3, 32)
    cos, sin, weights = random(9, 8), random(9, 8), (random(16), random(16))
    last, total = np.array([2, 2], np.int32), np.array([3], np.int32)
    attrs: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}

    def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        heads = x.reshape(2, 3, -1, 16).astype(np.float64)
        made = heads / np.sqrt((heads**2).mean(axis=-1, keepdims=True) + 1e-3) * weight
        return np.asarray(made.reshape(x.shape), np.float32)

    rest = [None, None, last, total, cos, sin]
    by_hand = theirs("GroupQueryAttention", [normed(q, weights[0]), normed(k, weights[1]), v, *rest], 3, **attrs)
    ins = [q, k, v, *rest, *[None] * 5, *weights]
    for got, want in zip(ours("GroupQueryAttention", ins, 3, qk_norm_epsilon=1e-3, **attrs), by_hand, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_padded_prompts_agree_where_they_have_tokens() -> None:
    last, total = np.array([3, 1], np.int32), np.array([4], np.int32)
    ins = [random(2, 4, 64), random(2, 4, 32), random(2, 4, 32), None, None, last, total, random(9, 8), random(9, 8)]
    attrs: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}
    got, want = ours("GroupQueryAttention", ins, 3, **attrs), theirs("GroupQueryAttention", ins, 3, **attrs)
    for row, n in enumerate(last + 1):
        np.testing.assert_allclose(got[0][row, :n], want[0][row, :n], atol=1e-5)
        for i in (1, 2):
            np.testing.assert_allclose(got[i][row, :, :n], want[i][row, :, :n], atol=1e-5)


def test_a_prompt_and_steps_are_one_long_prompt() -> None:
    attrs: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}
    whole = [random(2, 6, 64), random(2, 6, 32), random(2, 6, 32)]
    caches = [random(9, 8), random(9, 8)]

    def step(begin: int, end: int, past: Sequence[Any]) -> list[np.ndarray]:
        last, total = np.full(2, end - 1, np.int32), np.array([end], np.int32)
        return ours("GroupQueryAttention", [*(x[:, begin:end] for x in whole), *past, last, total, *caches], 3, **attrs)

    want = step(0, 6, [None, None])
    parts: list[np.ndarray] = []
    past: list[Any] = [None, None]
    for begin, end in ((0, 3), (3, 4), (4, 5), (5, 6)):
        y, *past = step(begin, end, past)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), want[0], atol=1e-5)
    np.testing.assert_allclose(past[0], want[1], atol=1e-6)


def test_lengths_out_of_range_are_refused() -> None:
    q, k, total = random(1, 1, 32), random(1, 1, 16), np.array([3], np.int32)
    for last in (-2, 3, 1000):
        ins = [q, k, k, random(1, 2, 2, 8), random(1, 2, 2, 8), np.array([last], np.int32), total]
        with pytest.raises(InferaError, match="seqlens_k"):
            ours("GroupQueryAttention", ins, 3, num_heads=4, kv_num_heads=2)


@pytest.mark.parametrize(
    "attrs", [{"sliding_window_cache": 1}, {"k_quant_type": "PER_TENSOR"}, {"kv_cache_bit_width": 8}]
)
def test_what_is_not_supported_is_named(attrs: dict[str, Any]) -> None:
    last, total = np.array([0], np.int32), np.array([1], np.int32)
    ins = [random(1, 1, 32), random(1, 1, 16), random(1, 1, 16), None, None, last, total]
    with pytest.raises(InferaError, match=f"{next(iter(attrs))} .* is not supported"):
        ours("GroupQueryAttention", ins, num_heads=4, kv_num_heads=2, **attrs)

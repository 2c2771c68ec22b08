"""Whole networks over a stand-in for CuPy, kernels interpreted, against the CPU: quantised products, a recurrence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import gpu_models
from bench.build_llama import Sizes, llama, llama_feeds
from bench.gpu_report import Context
from infera_gpu.devices import open_device
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from tests.fake_cublaslt import FakeCublasLt, with_library
from tests.kernels.watching import WatchingLauncher
from tests.text import parse

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

pytestmark = pytest.mark.kernels
pytest_plugins = ("tests.kernels.interpret_gpu_check",)


def drawn(count: int, low: float, high: float, form: str = "%.4f") -> str:
    values = np.random.default_rng(count).uniform(low, high, count)
    return ", ".join(form % v for v in values)


NETWORK = f"""
    g (float[T, 2, 6] x) => (float[T, 1, 2, 5] y, float[1, 2, 5] last, float[T, 2, 3] z) <
        int8[6, 8] w = {{{drawn(48, -127, 127, "%d")}}}, float[8] s = {{{drawn(8, 0.01, 0.1)}}},
        float[8] bias = {{{drawn(8, -1, 1)}}}, int8[8, 3] v = {{{drawn(24, -127, 127, "%d")}}},
        float qs = {{0.03}}, uint8 qz = {{120}}, float vs = {{0.02}}, int8 vz = {{0}},
        float[1, 20, 8] lw = {{{drawn(160, -0.5, 0.5)}}}, float[1, 20, 5] lr = {{{drawn(100, -0.5, 0.5)}}},
        float[1, 40] lb = {{{drawn(40, -0.5, 0.5)}}}
    > {{
        q, scale, zero = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, w, zero)
        f = Cast <to = 1> (i)
        m = Mul(scale, s)
        t = Mul(f, m)
        h = Add(t, bias)
        y, last = LSTM <hidden_size = 5> (h, lw, lr, lb)
        a = QuantizeLinear(h, qs, qz)
        b = DequantizeLinear(a, qs, qz)
        c = DequantizeLinear(v, vs, vz)
        z = MatMul(b, c)
    }}"""


def test_a_quantised_network_agrees_with_the_cpu(
    opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (4, 2, 6)).astype(np.float32)
    monkeypatch.setattr(gpu_models, "MODELS", {"small": (lambda: parse(NETWORK), {"x": x}, 1)})
    _, facts = gpu_models.models(opener(WatchingLauncher), ["small"])
    assert facts["small"]["steps"] == {"triton": 5}


PRODUCTS = f"""
    g (float[N, 7, 8] x) => (float[N, 7, 8] y) <
        float[8, 6] w = {{{drawn(48, -1, 1)}}}, float[6] b = {{{drawn(6, -1, 1)}}},
        float[8, 6] v = {{{drawn(48, -1, 1)}}}
    > {{
        e = MatMul(x, w)
        f = Add(e, b)
        h = Relu(f)
        k = Transpose <perm = [1, 0]> (v)
        m = MatMul(h, k)
        z = Add(m, x)
        y = Softmax(z)
    }}"""


def test_products_of_a_library_agree_with_the_cpu(
    opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what follows them, read by kernels that are interpreted."""
    rng, library = np.random.default_rng(0), FakeCublasLt()
    feeds = {"x": rng.standard_normal((2, 7, 8), np.float32)}
    monkeypatch.setattr(gpu_models, "MODELS", {"small": (lambda: parse(PRODUCTS), feeds, 1)})

    def launcher() -> Any:
        return with_library(WatchingLauncher(), library)

    gpu_models.models(opener(launcher), ["small"])
    assert [operation.attributes[7] for operation in library.asked][:2] == [2 | 4, 1]  # bias and ReLU; nothing


def test_a_decoder_generates_with_caches_that_stay_in_their_place(
    opener: Callable[[Any], Context], tmp_path: Path
) -> None:
    """Six steps of two sequences of their own lengths, against caches that are longer in every step, on the CPU. From
    the second step on nothing of a cache is copied: only the new tokens are written."""
    sizes = Sizes(layers=1, hidden=16, heads=2, groups=1, inner=24, vocabulary=40)
    how: dict[str, Any] = {"tokens": 1, "past": 20, "sizes": sizes}
    path = llama(tmp_path, room=4, **how)
    first = dict(llama_feeds(2, room=4, **how))
    lengths = np.array([20, 14], np.int32)  # the index of the new token
    device = opener(WatchingLauncher).open()
    reference = Session(load_graph(path), open_device("cpu"))
    with Session(load_graph(path), device) as session:
        there = {name: device.xp.asarray(array) for name, array in first.items()}
        kept = {name: there[f"past_{name}"] for name in ("key_0", "value_0")}
        want = first
        for step in range(6):
            there["seqlens_k"][...] = want["seqlens_k"] = lengths + np.int32(min(step, 3))
            there["input_ids"][...] = want["input_ids"] = np.array([[3], [7]]) + step
            device._stream.log.clear()
            got = session.run(there, kept)
            made = reference.run(want)
            np.testing.assert_allclose(got["logits"], made["logits"], atol=2e-2)
            for name, cache in kept.items():
                assert got[name] is cache
                for entry, length in enumerate(want["seqlens_k"] + 1):
                    ours, theirs = (np.asarray(x)[entry, :, :length] for x in (cache, made[name]))
                    np.testing.assert_allclose(ours, theirs, atol=2e-2)
            copies = [line for line in device._stream.log if line == f"copy {kept['key_0'].nbytes}"]
            assert bool(copies) == (step == 0)
            want = {**want, "past_key_0": made["key_0"], "past_value_0": made["value_0"]}
        (lease,) = session._leases.values()
        ((bound, arrays),) = lease._direct.values()
    assert bound.written == {"key_0", "value_0"}
    assert arrays.given.keys() == there.keys()

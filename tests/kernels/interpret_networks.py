"""Whole networks over a stand-in for CuPy, kernels interpreted, against the CPU: quantised products, a recurrence."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench import gpu_models
from bench.gpu_report import Context
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

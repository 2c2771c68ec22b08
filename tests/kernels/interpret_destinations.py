"""Random graphs whose results are wanted anywhere, in the place of inputs too, over a stand-in for CuPy with kernels
interpreted, against the CPU. A kernel that writes what another program still reads fails."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.gpu_report import Context
from infera_gpu.devices import open_device
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from tests.kernels.watching import WatchingLauncher
from tests.text import parse

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

pytestmark = pytest.mark.kernels
pytest_plugins = ("tests.kernels.interpret_gpu_check",)

N = 40
"""Elements of an axis: too many in all for one program of an elementwise kernel."""
CONSTANTS = f"""int64[1] last = {{-1}}, int64[1] far = {{-1000}}, int64[1] rows = {{0}}, int64 down = {{0}},
    int64[1] flat = {{-1}}, int64[2] square = {{{N}, {N}}}, float[{N}] scale = {{{", ".join(["1.5"] * N)}}},
    int64[2, 1] at = {{1, 3}}, float[2, {N}] update = {{{", ".join(["0.25"] * (2 * N))}}}"""
NODES = {
    "tanh": "{v} = Tanh({a})",
    "relu": "{v} = Relu({a})",
    "softmax": "{v} = Softmax({a})",
    "add": "{v} = Add({a}, {b})",
    "mul": "{v} = Mul({a}, {b})",
    "turned": "{v} = Transpose <perm = [1, 0]> ({a})",
    "reversed": "{v} = Slice({a}, last, far, rows, last)",
    "same": "{v} = Identity({a})",
    "swapped": "{v}p, {v}q = Split <axis = 0> ({a})  {v} = Concat <axis = 0> ({v}q, {v}p)",
    "half": "{v}p, {v}q = Split <axis = 1> ({a})  {v}r = Tanh({v}p)  {v} = Concat <axis = 1> ({v}r, {v}q)",
    "reshaped": "{v}p = Reshape({a}, flat)  {v} = Reshape({v}p, square)",
    "product": "{v} = MatMul({a}, {b})",
    "sums": "{v} = CumSum({a}, down)",
    "normed": "{v} = LayerNormalization({a}, scale)",
    "scattered": "{v} = ScatterND({a}, at, update)",
}


def graph(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """The text of a graph, its inputs and its outputs, all of one shape."""
    inputs = [f"x{i}" for i in range(rng.randint(1, 3))]
    values, nodes = list(inputs), []
    for i in range(rng.randint(1, 6)):
        text = NODES[rng.choice(sorted(NODES))]
        nodes.append(text.format(v=f"v{i}", a=rng.choice(values), b=rng.choice(values)))
        values.append(f"v{i}")
    made = values[len(inputs) :]
    outputs = sorted({*rng.sample(made, rng.randint(1, min(3, len(made)))), made[-1]})
    ins, outs = (", ".join(f"float[{N}, {N}] {name}" for name in names) for names in (inputs, outputs))
    return f"g ({ins}) => ({outs}) <{CONSTANTS}> {{ {' '.join(nodes)} }}", inputs, outputs


def places(rng: random.Random, given: list[Any], pool: list[Any], outputs: list[str]) -> dict[str, Any]:
    """Where results are wanted, apart from each other: in the place of inputs, elsewhere, or nowhere in particular."""
    found: dict[str, Any] = {}
    for name in outputs:
        array = rng.choice([*given, *given, *rng.sample(pool, 2 * len(given)), None])
        if array is not None and not any(np.shares_memory(array, other) for other in found.values()):
            found[name] = array
    return found


@pytest.mark.parametrize("seed", range(120))
def test_results_are_right_wherever_they_are_wanted(seed: int, opener: Callable[[Any], Context]) -> None:
    rng, drawn = random.Random(seed), np.random.default_rng(seed)
    text, inputs, outputs = graph(rng)
    device = opener(WatchingLauncher).open()
    with (
        Session(load_graph(parse(text)), device) as session,
        Session(load_graph(parse(text)), open_device("cpu")) as cpu,
    ):
        empty = [np.zeros((N, N), np.float32)] * 8
        wide = device.xp.asarray(np.zeros((3 * N, N), np.float32))
        pool = [*map(device.xp.asarray, empty), wide[:N], wide[N // 2 : N // 2 + N], wide[N : 2 * N]]
        for _ in range(4):
            given = rng.sample(pool, len(inputs))
            out = places(rng, given, pool, outputs)
            for _ in range(3):  # copied, bound to, recorded
                for array in pool:
                    np.copyto(array, drawn.standard_normal((N, N)).astype(np.float32))
                want = cpu.run({name: np.array(array) for name, array in zip(inputs, given, strict=True)})
                got = session.run(dict(zip(inputs, given, strict=True)), out)
                for name, array in want.items():
                    np.testing.assert_allclose(np.asarray(got[name]), array, atol=1e-4, rtol=1e-4, err_msg=text)


@pytest.mark.parametrize(
    "read", ["Transpose <perm = [1, 0]> (x)", "Slice(x, last, far, rows, last)"], ids=["turned", "reversed"]
)
@pytest.mark.parametrize("made", ["Exp(t)", "Sub(t, z)", "Softmax(t)"])
def test_a_result_in_the_place_of_what_is_read_in_another_order(
    made: str, read: str, opener: Callable[[Any], Context]
) -> None:
    text = f"g (float[A, A] x, float[A, A] z) => (float[A, A] y) <{CONSTANTS}> {{ t = {read}  y = {made} }}"
    device, drawn = opener(WatchingLauncher).open(), np.random.default_rng(0)
    x, z = (device.xp.asarray(np.zeros((N, N), np.float32)) for _ in range(2))
    model = load_graph(parse(text))
    with Session(model, device) as session, Session(model, open_device("cpu")) as cpu:
        for _ in range(4):
            for array in (x, z):
                np.copyto(array, drawn.standard_normal((N, N)).astype(np.float32))
            want = cpu.run({"x": np.array(x), "z": np.array(z)})["y"]
            session.run({"x": x, "z": z}, {"y": x})
            np.testing.assert_allclose(np.asarray(x), want, rtol=1e-5, atol=1e-6)

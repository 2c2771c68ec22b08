"""Rows of `bench.gpu_speed` over stand-ins for CuPy and torch, kernels interpreted: every builder, in tiny shapes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import gpu_network_sets, gpu_peers, gpu_rows, gpu_sets, gpu_timings
from bench.build import bert
from bench.build_llama import Sizes
from bench.build_vit import vit
from bench.gpu_models import bert_feeds
from bench.gpu_report import CheckFailed, Context
from bench.gpu_roofline import card_named
from bench.gpu_row_sections import copies, section, summary
from bench.gpu_rows import Row, measure
from infera_gpu.loader import load_graph
from infera_gpu.passes import layout
from infera_gpu.session import Session
from infera_kernels.launch import RecordingLauncher
from tests import fake_torch
from tests.kernels.test_paths import convolutions
from tests.kernels.watching import WatchingLauncher

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

pytestmark = pytest.mark.kernels
pytest_plugins = ("tests.kernels.interpret_gpu_check",)

LAYERS = """
g (float[N, 3, 9, 9] image) => (float[N, 8, 5, 5] y) {
    s = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (image, stem)
    t = Relu(s)
    a = Conv <pads = [1, 1, 1, 1]> (t, square)
    b = Relu(a)
    e = Conv <pads = [1, 1, 1, 1]> (b, square)
    f = Add(e, t)
    g = Relu(f)
    y = Conv <pads = [1, 1, 1, 1]> (g, square)
}"""
L2_BYTES = 2048
"""Of which most rows move less than three times as much, and some more."""
TINY = Sizes(layers=1, hidden=32, heads=4, groups=2, inner=16, vocabulary=50)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The sets in tiny shapes."""
    for name, value in {
        "SQUARES": ((8, 8, 8),),
        "LAYERS": ((1, 24, 16), (5, 24, 16)),
        "EPILOGUES": ((5, 24, 16),),
        "EXACT": (((5, 24, 16), "fp32"), ((5, 24, 16), "tf32")),
        "TOKENS": 8,
        "WIDTH": 128,
        "LENGTHS": (8,),
        "SHAPES": ((3, 40),),
        "CHAIN": (5, 24),
        "TRANSPOSES": {"matrix": ((5, 7), (1, 0)), "heads": ((2, 3, 4, 5), (0, 2, 1, 3))},
        "resnet50": lambda: convolutions(LAYERS),
        "images": lambda batch: {"image": np.ones((batch, 3, 9, 9), np.float32)},
    }.items():
        monkeypatch.setattr(gpu_sets, name, value)
    monkeypatch.setattr(layout, "gain_of", lambda *given: 1e12)
    monkeypatch.setattr(gpu_timings, "in_turn", timed)
    monkeypatch.setattr(gpu_rows, "l2_bytes", lambda device: L2_BYTES)
    monkeypatch.setattr(gpu_rows, "HOST_RUNS", 1)
    monkeypatch.setattr(gpu_rows, "REPEATED", 1)
    monkeypatch.setattr(gpu_peers, "REPEATED", 1)
    monkeypatch.setattr(gpu_network_sets, "cache_dir", lambda: tmp_path)
    gpu_sets.layers_of.cache_clear()


def timed(device: Any, calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """A millisecond each, a quarter of what is done besides, after it was called as often as one that times it does at
    least."""
    for call in calls.values():
        for _ in range(3):
            call()
    device.synchronize()
    middle = [0.9e-3, *[1e-3] * (gpu_timings.ROUNDS - 2), 1.5e-3]
    return {name: [t / 4 for t in middle] if name.startswith("besides") else middle for name in calls}


def listed(context: Context) -> Context:
    return Context(context.open, context.deadline, card_named("H200"), reading=lambda: {"sm_clock": 1980})


SETS: Mapping[str, Callable[[], list[Row]]] = {
    "products": gpu_sets.products,
    "attention": gpu_sets.attentions,
    "convolutions": partial(gpu_sets.convolutions, 2),
    "bandwidth": gpu_sets.bandwidth,
}
COLUMNS = {
    *(
        "set",
        "name",
        "precision",
        "inputs",
        "steps",
        "launches",
        "operations",
        "bytes",
        "first_run_seconds",
        "host_seconds",
    ),
    *("seconds", "peers", "error", "operations_per_s", "bytes_per_s", "bound_seconds", "fraction", "limit"),
    *("spread", "gpu"),
}
PEERS = {"attention": {"torch flash", "torch cuDNN"}}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", SETS)
def test_operators_beside_torch(name: str, opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rows, "torch_on_gpu", fake_torch.module)
    line, facts = section(SETS[name])(listed(opener(WatchingLauncher)))
    rows = facts["rows"]
    assert len(rows) == len(SETS[name]()) > 3
    for row in rows:
        assert row.keys() >= COLUMNS
        assert row["steps"] == 1 <= row["launches"]
        assert row["peers"].keys() == PEERS.get(name, {"torch"})
        assert row["spread"] == {peer: [0.9e-3, 1.5e-3] for peer in ("infera", *row["peers"])}
        assert row["gpu"] == {"sm_clock": 1980}
        assert row.get("cold", {}).keys() == ({"infera", *row["peers"]} if row["bytes"] < 3 * L2_BYTES else set())
        assert set(row.get("cold", {"": 0.75e-3}).values()) == {0.75e-3}
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / (0.75e-3 if "cold" in row else 1e-3))
        assert (row["operations"] > 0) == (name != "bandwidth")
        assert row["error"] < 0.02
    assert any("cold" in row for row in rows) == (name != "attention")
    assert "1.00x torch" in line
    json.dumps(facts)


@pytest.mark.usefixtures("small")
def test_operators_beside_nobody_are_compared_with_cupys(opener: Callable[[Any], Context]) -> None:
    _, facts = section(SETS["products"])(opener(WatchingLauncher))
    assert all(row["peers"] == {} and row["error"] < 0.02 for row in facts["rows"])
    assert all("fraction" not in row and row["operations_per_s"] > 0 for row in facts["rows"])
    with pytest.raises(CheckFailed, match="differs from CuPy"):
        section(SETS["products"])(opener(RecordingLauncher))


NETWORKS = (
    gpu_network_sets.Network(
        "bert",
        partial(bert, layers=1, hidden=16, heads=2, inner=16, vocabulary=50),
        partial(bert_feeds, length=5, vocabulary=50),
        "small",
        {"fp16": (1,), "fp32": (2,)},
    ),
    gpu_network_sets.Network(
        "vit",
        partial(vit, side=8, patch=4, layers=1, hidden=16, heads=2),
        lambda batch: {"image": np.ones((batch, 3, 8, 8), np.float32)},
        "small",
        {"fp16": (1,)},
    ),
)


@pytest.mark.usefixtures("small")
def test_networks_are_timed_eager_and_compiled(
    opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_network_sets, "NETWORKS", NETWORKS)
    context = listed(opener(WatchingLauncher))
    first, *others = gpu_network_sets.networks()
    assert [row.name for row in (first, *others)] == ["bert b1", "bert b2", "vit b1"]
    alone = measure(context, first)
    assert alone["peers"] == {}
    assert alone["launches"] >= alone["steps"] >= 10
    torch, resets = fake_torch.module(), list[str]()
    torch._dynamo.reset = lambda: resets.append("reset")
    monkeypatch.setattr(gpu_rows, "torch_on_gpu", lambda: torch)
    for row in (first, *others):
        beside = replace(row, peers={"torch": partial(_module, _answer(context, row))})
        found = measure(context, beside, "max-autotune")
        assert found["peers"].keys() == {"torch eager", "torch eager, CUDA graph", "torch.compile max-autotune"}
        assert "cold" not in found
        assert torch.backends.cudnn.benchmark
        assert found["error"] == 0
    assert len(resets) == 3, "each network is compiled anew"


def test_int8_says_how_far_it_is_from_float32(
    opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_timings, "in_turn", timed)
    monkeypatch.setattr(gpu_rows, "l2_bytes", lambda device: L2_BYTES)
    monkeypatch.setattr(gpu_rows, "HOST_RUNS", 1)
    first, _ = NETWORKS
    monkeypatch.setattr(
        gpu_network_sets, "QUANTISED", (gpu_network_sets.Quantised("bert", first.build, first.feeds, (1,)),)
    )
    (row,) = gpu_network_sets.integers()
    found = measure(listed(opener(WatchingLauncher)), row)
    assert 0 < found["error_against_float32"] < 0.2
    assert found["peers"] == {}


def _answer(context: Context, row: Row) -> Any:
    source, feeds = row.make()
    with Session(load_graph(source), context.open(), precision=row.precision) as session:
        return next(iter(session.run(feeds).values()))


def _module(answer: Any, torch: Any, source: Any, given: Any) -> Callable[[], Any]:
    return partial(lambda *inputs: (torch.tensor(answer, device="cuda"),), *given)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("tokens", "past"), [(3, 0), (1, 4)])
def test_a_decoder_takes_its_step(
    tokens: int, past: int, opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_network_sets, "CASES", (("step", 2, tokens, past),))
    (row,) = gpu_network_sets.decoder(TINY)
    found = measure(opener(WatchingLauncher), row)
    assert found["name"] == "llama-1b step b2"
    outline, _ = row.outline() if row.outline else (None, None)
    assert "zeros" in str(outline)
    seen: list[Any] = []
    monkeypatch.setattr("bench.torch_llama.torch_llama", lambda path, **sizes: _Module(seen, path, sizes))
    torch = fake_torch.module()
    source, feeds = row.make()
    row.peers["torch"](torch, source, [torch.tensor(a, device="cuda") for a in feeds.values()])()
    (path, sizes, shapes) = seen
    assert path.exists()
    assert sizes == {"tokens": tokens, "past": past, "sizes": TINY}
    assert shapes == [(2, tokens), *[(2, 2, past + tokens, 8)] * (2 if past else 0)]


class _Module:
    def __init__(self, seen: list[Any], path: Path, sizes: Any) -> None:
        self._seen = seen
        seen += [path, sizes]

    def to(self, device: str) -> Callable[..., None]:
        return lambda *given: self._seen.append([g.shape for g in given])


def test_copies(opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_timings, "in_turn", timed)
    row = copies(listed(opener(WatchingLauncher)), 1 << 12)
    assert row["bytes"] == 2 << 12
    assert row["bytes_per_s"] == pytest.approx(8192e3)


@pytest.mark.usefixtures("small")
def test_a_wrong_answer_is_a_row_that_says_so(
    opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = fake_torch.module()
    torch.__dict__["matmul"] = lambda a, b: torch.tensor(np.zeros((len(a), b.shape[1]), a.dtype), device="cuda")
    monkeypatch.setattr(gpu_rows, "torch_on_gpu", lambda: torch)
    with pytest.raises(CheckFailed, match="differs from PyTorch") as caught:
        section(lambda: gpu_sets.products()[:2])(listed(opener(WatchingLauncher)))
    rows = caught.value.facts["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row.keys() >= COLUMNS
        assert row["error"] > 0.5
        assert row["wrong"].startswith("differs from PyTorch")
    assert summary(rows, 2) == "0 of 2 rows, 2 wrong"


@pytest.mark.usefixtures("small")
def test_a_peer_that_fails_loses_nothing_but_itself(
    opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is called wrongly, or cannot be recorded: the others are timed, and somebody is compared with."""
    torch = fake_torch.module()
    monkeypatch.setattr(gpu_rows, "torch_on_gpu", lambda: torch)
    context = listed(opener(WatchingLauncher))
    del torch.nn.attention.SDPBackend.CUDNN_ATTENTION
    row = measure(context, gpu_sets.attentions()[0])
    assert row["peers"].keys() == {"torch flash"}
    assert row["peers_failed"].keys() == {"torch cuDNN"}
    assert row["peers_failed"]["torch cuDNN"].startswith("AttributeError: ")
    assert row["error"] < 0.02
    assert "1 peers failed: d64 1x8: torch cuDNN" in summary([row], 1)
    torch.cuda.CUDAGraph = None
    row = measure(context, gpu_sets.products()[0])
    assert row["peers"] == {}
    assert row["peers_failed"].keys() == {"torch"}
    assert row["error"] < 0.02
    torch.__dict__["tensor"] = None
    row = measure(context, gpu_sets.products()[0])
    assert row["seconds"] == 1e-3
    assert row["error"] < 0.02, "against CuPy"


@pytest.mark.usefixtures("small")
def test_a_peer_that_loses_the_gpu_ends_the_process(
    opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    class AcceleratorError(RuntimeError):
        error_code = 700

    def faulting(*given: Any) -> None:
        raise AcceleratorError("an illegal memory access was encountered")

    torch = fake_torch.module()
    torch.__dict__["matmul"] = faulting
    monkeypatch.setattr(gpu_rows, "torch_on_gpu", lambda: torch)
    with pytest.raises(AcceleratorError):
        measure(opener(WatchingLauncher), gpu_sets.products()[0])

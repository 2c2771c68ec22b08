"""The sections of `bench.gpu_check` over a stand-in for CuPy, kernels interpreted: that they check what they say."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from bench import gpu_batches, gpu_cudnn, gpu_early, gpu_models, gpu_networks, gpu_parity
from bench.build import bert
from bench.gpu_models import memory, models, trained
from bench.gpu_networks import precisions
from bench.gpu_operators import kernels, library, portable
from bench.gpu_parity import OURS, PEER
from bench.gpu_report import CheckFailed, Context, Section
from bench.gpu_tma import tma
from infera_gpu.devices import cuda
from infera_gpu.loader import load_graph
from infera_gpu.op import Call, Op
from infera_gpu.passes import layout
from infera_gpu.verify import compare
from infera_kernels.launch import RecordingLauncher, Target, cudnn, cudnn_of, library_of, nominal_target
from tests import fake_cupy
from tests.fake_cublaslt import FakeCublasLt, with_library
from tests.fake_cudnn import FakeCudnn, with_cudnn
from tests.kernels.test_paths import CONVOLUTIONS, WEIGHTS, convolutions
from tests.kernels.watching import WatchingLauncher
from tests.text import parse

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

from infera_kernels.triton.dnn import WAYS
from infera_kernels.triton.tiles import tma_tiles

pytestmark = pytest.mark.kernels

MIXED = np.arange(12, dtype=np.float32).reshape(3, 4) ** 2


class Streamed:
    """A launcher whose launches go through a stream: what is asked while it records is made when that is replayed."""

    def __init__(self, launcher: Any, stream: Any) -> None:
        self._launcher, self._stream = launcher, stream
        self.library, self.cudnn = (
            None if found is None else Streamed(found, stream) for found in (library_of(launcher), cudnn_of(launcher))
        )

    def launch(self, *args: Any, **options: Any) -> Call:
        fn, given = self._launcher.launch(*args, **options)
        return self._stream.put, ("launch", partial(fn, *given))

    def call(self, *asked: Any) -> Call | None:
        """Of a library in a launcher's place."""
        made: Call | None = self._launcher.call(*asked)
        return made and (self._stream.put, ("library", partial(made[0], *made[1])))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)


@pytest.fixture
def opener(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Context]:
    """A context whose devices have the launcher that `launcher()` makes."""
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.module())
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())

    def context(launcher: Any) -> Context:
        def opened(*, batch_invariant: bool = False) -> cuda.CudaDevice:
            device = cuda.CudaDevice(0, batch_invariant=batch_invariant)
            device._launcher = Streamed(launcher(), device._stream)
            return device

        return Context(opened, float("inf"))

    return context


class EarlyLauncher(WatchingLauncher):
    """Of a card whose kernels come early; the fifth of one that is `wrong` is lost."""

    def __init__(self, wrong: bool) -> None:
        super().__init__(replace(nominal_target(90), pdl=True))
        self._wrong, self._made = wrong, 0

    def _run(self, *given: Any) -> None:
        self._made += 1
        if not self._wrong or self._made != 5:
            super()._run(*given)


def named(*names: str) -> Callable[[Op], bool]:
    return lambda op: op.name in names


def test_library(opener: Callable[[Any], Context]) -> None:
    """Of products alone, and there is none where it is not installed."""
    made = FakeCublasLt()

    def launcher() -> Any:
        return with_library(WatchingLauncher(), made)

    wanted = named("MatMul", "Gemm", "Add")
    _, facts = library(opener(launcher), wanted)
    assert {name.split("-")[0] for name in facts["operators"]} == {"MatMul", "Gemm"}
    assert facts["done"] == len(made.asked) > 10
    assert facts["without_a_product"] > 0
    assert library(opener(WatchingLauncher), wanted) == ("cuBLASLt is not installed here", {})
    made.asked.clear()
    kernels(opener(launcher), wanted)
    assert not made.asked


def test_tiles_for_tma(opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, by more tiles than programs; a launcher without descriptors is told of."""
    few = Target(90, 1, nominal_target(90).shared_bytes)
    monkeypatch.setattr("bench.gpu_tma.tma_tiles", lambda arch: tma_tiles(arch)[::3])
    _, facts = tma(opener(lambda: WatchingLauncher(few)))
    assert facts["failed"] == {}
    assert facts["done"] == facts["cases"] == 2 * len(tma_tiles(90)[::3])
    assert tma(opener(lambda: WatchingLauncher(nominal_target(80)))) == ("no TMA here", {})
    with pytest.raises(CheckFailed, match="elements differ"):
        tma(opener(lambda: RecordingLauncher(few)))


def test_plans_of_cudnn(opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it has of the ways that would be tried, of which there are as many as products say."""
    assert WAYS == gpu_cudnn.WAYS
    monkeypatch.setattr(cudnn, "_idle", {})
    made = FakeCudnn()
    _, facts = gpu_cudnn.cudnn(opener(lambda: with_cudnn(WatchingLauncher(), made)))
    assert facts["failed"] == {}
    count = len(gpu_cudnn.CONVOLUTIONS) + len(gpu_cudnn.ATTENTIONS)
    assert facts["done"] == 3 * count
    assert len(made.asked) == 3 * facts["done"], "made, recorded and replayed"
    assert facts["without_a_plan"] == (WAYS - 3) * count
    assert gpu_cudnn.cudnn(opener(WatchingLauncher)) == ("cuDNN is not installed here", {})
    monkeypatch.setattr("tests.fake_cudnn.FUNCTIONS", {100: np.negative, 13: np.exp2, 15: np.log})
    with pytest.raises(CheckFailed, match=r"48 fail: .* elements differ"):
        gpu_cudnn.cudnn(opener(lambda: with_cudnn(WatchingLauncher(), made)))


def test_kernels(opener: Callable[[Any], Context]) -> None:
    names = ("Add", "Sign", "Where", "Not")
    summary, facts = kernels(opener(WatchingLauncher), named(*names))
    assert {name.split("-")[0] for name in facts["operators"]} == set(names)
    assert facts["failed"] == {}
    assert facts["done"] > facts["cases"] > 12
    assert summary.startswith(f"{facts['cases']} cases of ")


def test_kernels_that_do_not_run_are_found(opener: Callable[[Any], Context]) -> None:
    with pytest.raises(CheckFailed, match=r"Mul-7 same: AssertionError") as caught:
        kernels(opener(RecordingLauncher), named("Mul"))
    assert len(caught.value.facts["failed"]) == 6  # all but the empty one


def test_what_there_is_no_time_for_is_counted(opener: Callable[[Any], Context]) -> None:
    context = Context(opener(WatchingLauncher).open, 0.0)
    with pytest.raises(CheckFailed, match="nothing ran") as caught:
        kernels(context, named("Mul"))
    assert caught.value.facts["no_time_for"] == 7


def test_portable_operators(opener: Callable[[Any], Context]) -> None:
    _, facts = portable(opener(WatchingLauncher), named("Add", "Gather", "NonZero"))
    assert set(facts["operators"]) == {"Add-1", "Add-7", "Gather-1"}
    assert facts["on_the_host"] > 0


def test_a_transformer_agrees_with_the_cpu(opener: Callable[[Any], Context]) -> None:
    context = opener(WatchingLauncher)
    summary, facts = models(Context(context.open, time.monotonic() + 7), ["bert-small", "resnet50"])
    assert summary.startswith("bert-small agree with infera's CPU and onnxruntime to 0.0001 of the peak")
    assert summary.endswith(", no time for resnet50")
    found = facts["bert-small"]
    assert found["steps"]["triton"] > 12
    assert not {"upload", "download", "numpy", "cpu"} & found["steps"].keys()
    assert found["errors"].keys() == {"infera's CPU", "onnxruntime"}
    assert facts["compared"] == {"bert-small": "with infera's CPU and onnxruntime"}


SMALL = "g (float[N, 4] x) => (float[N, 4] y) { z = Mul(x, x) y = Softmax(z) }"


def test_what_departs_from_either_reference_is_told(
    opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models with weights of both kinds, and in every precision; without onnxruntime it is said."""
    monkeypatch.setattr(gpu_models, "MODELS", {"small": (lambda: parse(SMALL), {"x": MIXED}, 1)})
    monkeypatch.setattr(gpu_parity, "trained", lambda: {"kept": (lambda: parse(SMALL), {"x": MIXED})})
    monkeypatch.setattr(gpu_networks, "PRECISE", {"small": (lambda: parse(SMALL), {"x": MIXED})})
    sections: tuple[Section, ...] = (partial(models, names=["small"]), trained, precisions)
    context = opener(WatchingLauncher)
    for section, name in zip(sections, ("small", "kept", "small fp16"), strict=True):
        summary, facts = section(context)
        assert gpu_parity.ABSENT not in summary
        errors = facts[name] if section is precisions else facts[name]["errors"]
        assert {by: {*found} for by, found in errors.items()} == {OURS: {"y", "z"}, PEER: {"y", "z"}}

    def off(right: gpu_parity.Expected, got: Any) -> Any:
        return {by: compare({**got, "z": got["z"] + 999}, want) for by, want in right.wanted.items()}

    with monkeypatch.context() as patch:
        patch.setattr(gpu_parity.Expected, "differences", off)
        for section in sections:
            with pytest.raises(CheckFailed, match=f"z: .* from {OURS}; .* z: .* from {PEER}"):
                section(context)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for section in sections:
        summary, facts = section(context)
        assert summary.endswith(f"; {gpu_parity.ABSENT}")
        assert {*facts["compared"].values()} == {gpu_parity.ABSENT}


def test_convolutions_agree_with_the_cpu(opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined values are written where they are joined, images at the edges are read as they lie."""
    text = CONVOLUTIONS.replace("96, 96", "10, 10").replace("a = Add(e, p)", "a = Concat <axis = 1> (e, p)")
    text = text.replace("ConvTranspose <strides", "ConvTranspose <group = 2, strides")
    monkeypatch.setattr(layout, "gain_of", lambda *given: 1e12)
    monkeypatch.setitem(WEIGHTS, "up", (16, 4, 2, 2))
    monkeypatch.setitem(WEIGHTS, "head", (16, 4))
    image = np.random.default_rng(0).uniform(-1, 1, (2, 3, 10, 10)).astype(np.float32)
    monkeypatch.setattr(gpu_models, "MODELS", {"small": (lambda: convolutions(text), {"x": image}, 1)})
    _, facts = models(opener(WatchingLauncher), ["small"])
    assert facts["small"]["steps"].keys() <= {"triton", "upload", "download", "copy"}
    # Of outputs, of which the Sigmoid's argument is one: what leaves a GPU leaves in one piece.
    assert facts["small"]["steps"].get("copy", 0) <= 2


def test_entries_of_a_batch(opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(bert, layers=1, hidden=8, heads=1, inner=8, vocabulary=100)
    monkeypatch.setattr(gpu_batches, "NETWORKS", {"small": (small, lambda batch: gpu_models.bert_feeds(batch, 5, 100))})
    monkeypatch.setattr(gpu_batches, "gpu_seconds", lambda device, call: call() or 1e-3)
    summary, facts = gpu_batches.batches(opener(WatchingLauncher), 3, (0, 2))
    assert (
        summary
        == "small fp32 b1 1.00 ms (1.00x), b3 1.00 ms (1.00x); small fp16 b1 1.00 ms (1.00x), b3 1.00 ms (1.00x)"
    )
    assert facts["small fp16"]["with"]["seconds"].keys() == {1, 3}
    made = FakeCublasLt()
    context = opener(lambda: with_library(WatchingLauncher(), made))
    for option in (False, True):
        made.asked.clear()
        feeds = gpu_models.bert_feeds(3, 5, 100)
        gpu_batches._measured(context, load_graph(small()), feeds, (0,), "fp16", batch_invariant=option)
        assert bool(made.asked) is not option, "a library promises nothing of a batch"
    mixing = "g (float[N, 4] x) => (float[N, 4] y) { m = ReduceMean <axes = [0]> (x) y = Sub(x, m) }"
    monkeypatch.setattr(
        gpu_batches, "NETWORKS", {"mixing": (lambda: parse(mixing), lambda batch: {"x": MIXED[:batch]})}
    )
    with pytest.raises(CheckFailed, match=r"entries differ: {'mixing fp32': \[0, 2\]"):
        gpu_batches.batches(opener(WatchingLauncher), 3, (0, 2))


def test_kernels_that_come_early(opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(bert, layers=1, hidden=8, heads=1, inner=8, vocabulary=100)
    monkeypatch.setattr(gpu_early, "NETWORKS", {"small": (small, lambda batch: gpu_models.bert_feeds(batch, 5, 100))})
    monkeypatch.setattr(gpu_early, "gpu_seconds", lambda device, call: call() or 1e-3)
    monkeypatch.setattr(gpu_early, "RUNS", 3)
    assert gpu_early.early(opener(WatchingLauncher)) == ("not on this GPU, or not by its driver", {})
    made: list[EarlyLauncher] = []

    def launcher(wrong: bool = False) -> EarlyLauncher:
        made.append(EarlyLauncher(wrong and len(made) % 2 == 1))
        return made[-1]

    summary, facts = gpu_early.early(opener(launcher))
    assert summary == "small 1.000 ms (1.00x)"
    assert facts["small"] == {"seconds": {"as ever": 1e-3, "early": 1e-3}, "wrong_runs": 0}
    with pytest.raises(CheckFailed, match=r"runs with other bits: {'small': 1}"):
        gpu_early.early(opener(partial(launcher, wrong=True)))


def test_latencies_are_rows(opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(bert, layers=1, hidden=8, heads=1, inner=8, vocabulary=100)
    monkeypatch.setattr(gpu_models, "LATENCIES", {"small": (small, gpu_models.bert_feeds(1, 5, 100))})
    summary, facts = gpu_models.latency(opener(WatchingLauncher))
    (row,) = facts["rows"]
    assert row["operations"] > 0
    assert row["bytes"] / row["seconds"] == row["bytes_per_s"]
    assert summary.startswith("small ")


def test_memory(opener: Callable[[Any], Context]) -> None:
    small = partial(bert, layers=1, hidden=8, heads=1, inner=8, vocabulary=100)
    _, facts = memory(opener(WatchingLauncher), small)
    assert facts["after_two_runs"] == facts["after_more"] < facts["free_before"]
    assert facts["nvml_used_closed"] is None
    assert "missing" in facts["refusal of an arena"]


def test_memory_that_nvml_still_sees_is_noticed(
    opener: Callable[[Any], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = iter([1 << 30, 1 << 30, 2 << 30, 3 << 30])
    monkeypatch.setattr(gpu_models, "_nvml_used", lambda: next(used))
    small = partial(bert, layers=1, hidden=8, heads=1, inner=8, vocabulary=100)
    with pytest.raises(CheckFailed, match=r"NVML has 2,147,483,648 bytes more in use after close"):
        memory(opener(WatchingLauncher), small)

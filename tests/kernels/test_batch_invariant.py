"""`load(batch_invariant=True)`: whole models have the same kernels at every batch, and what cannot is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import infera_gpu
from bench.build_llama import Sizes, llama, llama_feeds
from bench.gpu_models import bert_feeds, images
from bench.models import path_of
from infera_gpu.errors import InvarianceError, PlanError
from infera_gpu.source import Source
from infera_kernels.launch import RecordingLauncher
from infera_server.models.model import open_session
from infera_server.models.placement import Place
from infera_server.settings import Settings
from tests.commandline import assert_fails, infera
from tests.kernels.support import Facts, Noting
from tests.kernels.test_paths import convolutions, numbers, small_bert
from tests.text import parse

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels

Feeds = Mapping[str, np.ndarray[Any, Any]]


def noted(model: Source, feeds: Feeds, *, batch_invariant: bool, precision: Any = "fp32") -> list[Facts]:
    """What the launches of a plan are compiled for, but for those in which order does not matter."""
    with infera_gpu.load(model, device="recording", precision=precision, batch_invariant=batch_invariant) as session:
        session.device._launcher = launcher = Noting(RecordingLauncher())  # type: ignore[attr-defined]
        session.reserve(feeds)
        return launcher.noted


def pictures(batch: int) -> Feeds:
    return {"x": np.zeros((batch, 3, 96, 96), np.float32)}


def sentences(batch: int) -> Feeds:
    return bert_feeds(batch, 24, 50)


MODELS: Mapping[str, tuple[Callable[[], Source], Callable[[int], Feeds]]] = {
    "transformer": (small_bert, sentences),
    "convolutions": (convolutions, pictures),
    "bert-base": (lambda: path_of("bert-base"), lambda batch: bert_feeds(batch, 128, 30522)),
    "resnet50": (lambda: path_of("resnet50"), images),
}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.large] if n in ("bert-base", "resnet50") else []) for n in MODELS]
)
def test_a_model_has_the_same_kernels_at_every_batch(name: str, precision: str) -> None:
    build, feeds = MODELS[name]
    model = build()
    alone, many = (noted(model, feeds(n), batch_invariant=True, precision=precision) for n in (1, 32))
    assert len(alone) > 5
    assert alone == many
    alone, many = (noted(model, feeds(n), batch_invariant=False, precision=precision) for n in (1, 32))
    assert alone != many


def test_a_decoders_step_has_the_same_parts_at_every_batch(tmp_path: Path) -> None:
    sizes = Sizes(layers=1, hidden=256, heads=8, groups=2, inner=96, vocabulary=50)
    model = llama(tmp_path, tokens=1, past=511, sizes=sizes)
    feeds = {n: llama_feeds(n, tokens=1, past=511, sizes=sizes) for n in (1, 256)}
    alone, many = (noted(model, feeds[n], batch_invariant=True) for n in feeds)
    assert alone == many
    assert {"decode_kernel", "combine_kernel"} <= {name for name, *_ in alone}
    split, whole = ({name for name, *_ in noted(model, feeds[n], batch_invariant=False)} for n in feeds)
    assert "combine_kernel" in split - whole


RESIDUALS = """
g (float[N, 8, 6, 6] x, float[N, 8, 6, 6] z) => (float[N, 8, 6, 6] y) <float[1, 8, 6, 6] place = {%s}> {
    a = Conv <pads = [1, 1, 1, 1]> (x, square)
    b = Add(a, place)
    c = Relu(b)
    d = Conv <pads = [1, 1, 1, 1]> (c, square)
    e = Add(d, z)
    y = Relu(e)
}"""
TERMS = """
g (float[N, 16] x, float[N, 16] z) => (float[N, 16] y) <float[16, 16] w = {%s}, float[16] b = {%s}> {
    a = MatMul(x, w)
    c = Add(a, z)
    d = MatMul(c, w)
    e = Add(d, b)
    y = Relu(e)
}"""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_added_does_not_depend_on_how_it_looks_in_a_batch_of_one(precision: str) -> None:
    """There every residual has the shape of one that is broadcast."""
    x = {n: {v: np.zeros((n, 8, 6, 6), np.float32) for v in "xz"} for n in (1, 32)}
    model = convolutions(RESIDUALS % numbers(8 * 6 * 6))
    alone, many = (noted(model, x[n], batch_invariant=True, precision=precision) for n in x)
    assert alone == many
    v = {n: {v: np.zeros((n, 16), np.float32) for v in "xz"} for n in (1, 32)}
    terms = parse(TERMS % (numbers(256), numbers(16)))
    alone, many = (noted(terms, v[n], batch_invariant=True, precision=precision) for n in v)
    assert alone == many


WHOLE = "it has no kernel that gives the same bits in every batch"


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("g (float[N, 8] x) => (uint8[N, 8] y) { y, s, z = DynamicQuantizeLinear(x) }", "DynamicQuantizeLinear"),
        ("g (float[N, 8, 8] x) => (float[N] y) { [corners] y = Det(x) }", "Det 'corners'"),
    ],
)
def test_what_depends_on_the_whole_batch_or_on_another_library_is_refused(text: str, node: str) -> None:
    model = parse(text)
    with infera_gpu.load(model, device="recording", batch_invariant=True) as session:
        (spec,) = session.tensor_inputs.values()
        with pytest.raises(InvarianceError, match=f"{node}.*{WHOLE}"):
            session.plan_for({"x": (2, *(8,) * (len(spec.shape) - 1))})


PRODUCT = "g (float[N, 64] x) => (float[N, 64] y) <float[64, 64] w = {%s}> { y = MatMul(x, w) }"


def test_integers_whose_scale_is_found_in_the_batch_are_refused() -> None:
    model = parse(PRODUCT % numbers(64 * 64))
    with (
        infera_gpu.load(model, device="recording", precision="int8", batch_invariant=True) as session,
        pytest.raises(PlanError, match=WHOLE),
    ):
        session.plan_for({"x": (2, 64)})


def test_what_only_moves_or_counts_is_not_refused() -> None:
    model = parse(
        "g (float[N, 4, 6] x, int64[N] i) => (float[N, 24] y, int64[M] j) <int64[2] s = {0, -1}> "
        "{ y = Reshape(x, s) j = Unique(i) }"
    )
    feeds = {"x": np.ones((2, 4, 6), np.float32), "i": np.array([3, 3])}
    with infera_gpu.load(model, device="recording", batch_invariant=True) as session:
        made = session.run(feeds)
    np.testing.assert_array_equal(made["j"], [3])
    assert made["y"].shape == (2, 24)


def test_the_command_line_and_the_server_ask_for_it(tmp_path: Path) -> None:
    path = tmp_path / "dynamic.onnx"
    onnx.save(parse("g (float[N, 8] x) => (uint8[N, 8] y) { y, s, z = DynamicQuantizeLinear(x) }"), path)
    command = "inspect", path, "--device", "recording", "--shape", "2,8"
    assert infera(*command)[0] == 0
    assert_fails(infera(*command, "--batch-invariant"), WHOLE)
    for asked in (False, True):
        with closing(open_session(path, Settings(batch_invariant=asked), place=Place("recording", None))) as session:
            assert vars(session.device)["batch_invariant"] is asked

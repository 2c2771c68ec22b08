"""What plans do, counted from declarations, against counts by hand; and what the roofline makes of it. No GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

import infera_gpu
from bench import gpu_predict, gpu_selections, gpu_sets
from bench.build import bert, resnet50
from bench.build_int8 import quantised
from bench.build_llama import Sizes, llama, llama_feeds
from bench.build_vit import vit
from bench.gpu_models import bert_feeds, images
from bench.gpu_roofline import ASSUMED, CARDS, bound, card_named, limit, predicted
from bench.gpu_row_models import model_of, node
from bench.gpu_work import OPERATIONS, TABLES, Work, bytes_of, operations_of, visible, works_of
from infera_gpu.destinations import destinations
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.dry import launches
from infera_gpu.graph import HostArray
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes import Precision
from infera_gpu.session import Session
from infera_gpu.source import Source
from tests.text import parse


def counted(source: Source, feeds: dict[str, HostArray], precision: Precision = "fp32") -> tuple[Work, ...]:
    with Session(load_graph(source), RecordingDevice(), precision=precision) as session:
        plan = session.plan_for(feeds)
        return works_of(plan, launches(session.device, session._constants, plan))


def of_text(text: str, **feeds: tuple[int, ...]) -> Work:
    """Of the only step."""
    (work,) = counted(parse(text), {name: np.zeros(shape, np.float32) for name, shape in feeds.items()})
    return work


def test_a_product() -> None:
    work = of_text("g (float[5, 7] a, float[7, 3] b) => (float[5, 3] y) { y = MatMul(a, b) }", a=(5, 7), b=(7, 3))
    assert work.arithmetic == "ieee"
    assert work.operations == 2 * 5 * 7 * 3
    assert work.nbytes == 4 * (5 * 7 + 7 * 3 + 5 * 3)


def test_a_product_of_something_turned() -> None:
    text = "g (float[7, 5] a, float[7, 3] b) => (float[5, 3] y) { y = Gemm <transA = 1> (a, b) }"
    assert of_text(text, a=(7, 5), b=(7, 3)).operations == 2 * 5 * 7 * 3


def test_a_gated_product_is_two() -> None:
    text = "g (float[5, 7] x, float[7, 3] v, float[7, 3] w) => (float[5, 3] y) { y = infera.GatedMatMul(x, v, w) }"
    work = of_text(text, x=(5, 7), v=(7, 3), w=(7, 3))
    assert work.operations == 2 * 2 * 5 * 7 * 3
    assert work.nbytes == 4 * (5 * 7 + 2 * 7 * 3 + 5 * 3)


@pytest.mark.kernels
@pytest.mark.parametrize(("rows", "between"), [(1, 0), (5, 2 * 5 * 700)])
def test_rows_that_are_normalised_before_are_moved_once_more(rows: int, between: int) -> None:
    text = f"""g (float[{rows}, 700] x, float[700, 9] w, float[700] s) => (float[{rows}, 9] y) {{
        y = infera.NormalizedMatMul(x, w, s)
    }}"""
    work = of_text(text, x=(rows, 700), w=(700, 9), s=(700,))
    assert work.operations == 2 * rows * 700 * 9
    assert work.nbytes == 4 * (rows * 700 + 700 * 9 + 700 + rows * 9 + between)
    assert work.launches >= 2 - (rows == 1)


def test_operands_count_once() -> None:
    work = of_text("g (float[4, 4] a) => (float[4, 4] y) { y = MatMul(a, a) }", a=(4, 4))
    assert work.nbytes == 2 * 4 * 4 * 4


def test_a_convolution_of_groups() -> None:
    text = """g (float[2, 4, 9, 9] x, float[6, 2, 3, 3] w) => (float[2, 6, 4, 4] y) {
        y = Conv <strides = [2, 2], group = 2> (x, w)
    }"""
    works = counted(parse(text), {"x": np.zeros((2, 4, 9, 9), np.float32), "w": np.zeros((6, 2, 3, 3), np.float32)})
    assert operations_of(works) == 2 * (2 * 6 * 4 * 4) * (2 * 3 * 3)


def test_a_transposed_convolution() -> None:
    text = """g (float[2, 4, 3, 3] x, float[4, 5, 2, 2] w) => (float[2, 5, 6, 6] y) {
        y = ConvTranspose <strides = [2, 2]> (x, w)
    }"""
    works = counted(parse(text), {"x": np.zeros((2, 4, 3, 3), np.float32), "w": np.zeros((4, 5, 2, 2), np.float32)})
    assert operations_of(works) == 2 * (2 * 4 * 3 * 3) * (5 * 2 * 2)


@pytest.mark.parametrize(("causal", "pairs"), [(0, 6 * 6), (1, 21)])
def test_attention_of_three_axes_and_of_four(causal: int, pairs: int) -> None:
    heads, size = 2, 8
    for shape in ((3, heads, 6, size), (3, 6, heads * size)):
        inputs = {name: np.zeros(shape, np.float32) for name in "qkv"}
        groups = None if len(shape) == 4 else heads
        made = node("Attention", *inputs, is_causal=causal, q_num_heads=groups, kv_num_heads=groups)
        model = model_of([made], inputs, {}, shape, np.float32)
        assert operations_of(counted(model, inputs)) == 3 * heads * pairs * 2 * (size + size)


@pytest.mark.parametrize(("queries", "keys"), [(1, 5), (3, 5), (5, 5), (5, 3)])
def test_the_last_query_sees_every_key(queries: int, keys: int) -> None:
    seen = np.arange(keys) <= np.arange(queries)[:, None] + keys - queries
    assert visible(queries, keys, causal=True) == seen.sum()
    assert visible(queries, keys, causal=False) == seen.size


def test_recurrences() -> None:
    text = """g (float[7, 2, 3] x, float[2, 20, 3] w, float[2, 20, 5] r) => (float[7, 2, 2, 5] y) {
        y = LSTM <hidden_size = 5, direction = "bidirectional"> (x, w, r)
    }"""
    shapes = {"x": (7, 2, 3), "w": (2, 20, 3), "r": (2, 20, 5)}
    works = counted(parse(text), {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    assert operations_of(works) == 2 * 7 * 2 * 2 * (4 * 5) * (3 + 5)


def test_of_a_table_as_much_as_comes_out() -> None:
    text = "g (float[1000, 8] t, int64[3] i) => (float[3, 8] y) { y = Gather(t, i) }"
    (work,) = counted(parse(text), {"t": np.zeros((1000, 8), np.float32), "i": np.zeros(3, np.int64)})
    assert work.operations == 0
    assert work.nbytes == 2 * 3 * 8 * 4 + 3 * 8


def test_of_every_table_of_an_embedding_as_much_as_comes_out() -> None:
    tables = "float[1000, 8] w, float[2, 8] k, float[500, 8] p, float[8] s"
    text = f"""g (int64[1, 3] i, int64[1, 3] j, {tables}) => (float[1, 3, 8] y) {{
        y = infera.EmbeddedNormalization(i, w, j, p, i, k, s)
    }}"""
    shapes = {"w": (1000, 8), "k": (2, 8), "p": (500, 8), "s": (8,)}
    feeds = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    indices = {name: np.zeros((1, 3), np.int64) for name in "ij"}
    (work,) = counted(parse(text), {**feeds, **indices})
    row = 8 * 4
    assert work.nbytes == 2 * 3 * row + 2 * row + 3 * row + row + 2 * 3 * 8


def test_networks_do_what_their_papers_say() -> None:
    """Multiply-adds: 4.09 G of ResNet-50 v1.5; each weight of an encoder's layers, and attention, a token. Of the last
    layer of a classifier, whose first token alone is read, the others have keys and values."""
    half: Precision = "fp16"
    assert operations_of(counted(resnet50(), images(1), half)) / 2 == pytest.approx(4.09e9, rel=0.002)
    tokens, wide = 19, 64
    layer = (4 * wide * wide + 2 * wide * 256) * tokens + 2 * tokens * tokens * wide
    small = bert(layers=2, hidden=wide, heads=4, inner=256, vocabulary=50)
    assert operations_of(counted(small, bert_feeds(1, tokens, 50), half)) == 2 * 2 * layer
    tokens = 1 + (32 // 16) ** 2
    layer = (4 * wide * wide + 2 * wide * 256) * tokens + 2 * tokens * tokens * wide
    last = 2 * wide * wide * (tokens + 1) + 2 * wide * 256 + 2 * tokens * wide
    ends = (tokens - 1) * 3 * 16 * 16 * wide + wide * 1000
    small = vit(side=32, layers=2, hidden=wide, heads=4)
    image = {"image": np.zeros((1, 3, 32, 32), np.float32)}
    assert operations_of(counted(small, image, half)) == 2 * (layer + last + ends)


def test_quantised_products_are_of_bytes() -> None:
    build = partial(bert, layers=1, hidden=64, heads=4, inner=128, vocabulary=50)
    feeds = bert_feeds(2, 9, 50)
    exact, made = counted(build(), feeds), counted(quantised(build(), feeds), feeds)
    assert operations_of(made) == operations_of(exact)
    products = {w.arithmetic for w in made if "MatMul" in w.label}
    assert products == {"int8"} or "triton" not in RecordingDevice().kinds


def test_quantised_images_answer_about_the_same() -> None:
    text = """g (float[N, 3, 9, 9] x) => (float[N, 4, 9, 9] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        y = BatchNormalization <epsilon = 0.001> (c, scale, bias, mean, variance)
    }"""
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3, 3, 3), "scale": (4,), "bias": (4,), "mean": (4,), "variance": (4,)}
    model = parse(text)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(rng.uniform(0.5, 1, shape).astype(np.float32), name)
        for name, shape in shapes.items()
    )
    feeds = {"x": rng.uniform(-1, 1, (2, 3, 9, 9)).astype(np.float32)}
    made = quantised(model, feeds)
    assert [n.op_type for n in made.graph.node] == ["QuantizeLinear", *["DequantizeLinear"] * 2, "Conv"]
    want, got = (infera_gpu.load(m, device="cpu").run(feeds)["y"] for m in (model, made))
    assert 0 < np.abs(got - want).max() < 0.03 * np.abs(want).max()


def test_halves_move_half_as_much() -> None:
    build = partial(bert, layers=2, hidden=64, heads=4, inner=128, vocabulary=50)
    whole, half = (counted(build(), bert_feeds(2, 9, 50), p) for p in ("fp32", "fp16"))
    assert operations_of(whole) == operations_of(half)
    assert bytes_of(half) < 0.6 * bytes_of(whole)
    assert {w.arithmetic for w in half} == {"", "half"}


def test_a_decoder_reads_its_weights_and_caches(tmp_path: Path) -> None:
    sizes = Sizes(layers=2, hidden=64, heads=4, groups=2, inner=96, vocabulary=300)
    path = llama(tmp_path, tokens=1, past=6, sizes=sizes)
    works = counted(path, dict(llama_feeds(3, tokens=1, past=6, sizes=sizes)))
    weights = sum(rows * columns for _, rows, columns, _ in sizes.matrices())
    scores = sizes.layers * 3 * sizes.heads * 7 * 2 * (2 * sizes.head)
    assert operations_of(works) == 2 * 3 * weights + scores
    caches = sizes.layers * 2 * 3 * sizes.groups * (6 + 7) * sizes.head
    assert 2 * (weights + caches) < bytes_of(works) < 2.3 * (weights + caches)


@pytest.mark.kernels
def test_caches_in_their_place_are_read_and_added_to(tmp_path: Path) -> None:
    sizes = Sizes(layers=2, hidden=64, heads=4, groups=2, inner=96, vocabulary=300)
    path = llama(tmp_path, tokens=1, past=6, room=2, sizes=sizes)
    feeds = dict(llama_feeds(3, tokens=1, past=6, room=2, sizes=sizes))
    with Session(load_graph(path), RecordingDevice()) as session:
        plan = session.plan_for(feeds)
    names = [f"{part}_{i}" for part in ("key", "value") for i in range(2)]
    assert {name: set(destinations(plan)[name]) for name in names} == {name: {f"past_{name}"} for name in names}
    moved, kept = (bytes_of(works_of(plan, [1] * len(plan.packed), kept=k)) for k in ((), names))
    cache = 2 * 3 * sizes.groups * 8 * sizes.head
    assert moved - kept == len(names) * cache * 7 // 8


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_an_outline_plans_like_the_model(bits: int | None, tmp_path: Path) -> None:
    sizes = Sizes(layers=1, hidden=32, heads=4, groups=2, inner=16, vocabulary=50, bits=bits)
    feeds = dict(llama_feeds(2, tokens=3, past=0, sizes=sizes))
    paths = [llama(tmp_path, tokens=3, past=0, sizes=sizes, values=values) for values in (True, False)]
    assert counted(paths[0], feeds) == counted(paths[1], feeds)
    sizes_of = [p.with_name(p.name.replace("-3-after-0.onnx", ".bin")).stat().st_size for p in paths]
    assert sizes_of[0] == sizes_of[1] > 0


def test_every_counted_operator_is_declared() -> None:
    declared = {f"{op.domain}.{op.name}" if op.domain else op.name for op in registry()}
    assert OPERATIONS.keys() | TABLES.keys() <= declared


@pytest.mark.kernels
def test_launches_are_counted_as_a_run_makes_them() -> None:
    """With nothing launched or uploaded. Once bound, the function that stands in for a step is a call more."""
    with Session(load_graph(bert(layers=1)), RecordingDevice(), precision="fp16") as session:
        feeds = bert_feeds(1, 16, 30522)
        plan = session.plan_for(feeds)
        counted = launches(session.device, session._constants, plan)
        assert session._constants.nbytes == 0
        session.run(feeds)
        (lease,) = session._leases.values()
        starts = lease._bound[plan].starts
    assert counted == tuple(b - a - 1 for a, b in pairwise(starts))
    assert max(counted) > 1 == min(counted)


@pytest.mark.kernels
def test_committed_predictions_are_of_the_plans_that_there_are() -> None:
    """`python -m bench.gpu_predict` writes them anew."""
    committed = json.loads(gpu_predict.path_for(CARDS[0]).read_text())["rows"]
    known = {(r["set"], r["name"], r["precision"]): (r["steps"], r["launches"], r["bytes"]) for r in committed}
    rows = [row for make in gpu_selections.NETWORKS.values() for row in make()]
    for columns, _ in gpu_predict.plans_of(rows):
        found = columns["steps"], columns["launches"], columns["bytes"]
        assert found == known[columns["set"], columns["name"], columns["precision"]], columns["name"]


# ---- the roofline


def test_the_bound_is_the_larger_of_two_times() -> None:
    card = card_named("A100 80GB")
    computes = Work("", "half", int(card.flops_per_s("half")), 1)
    moves = Work("", "half", 1, int(card.dram_bytes_per_s))
    assert bound([computes], card) == pytest.approx(1, rel=1e-3)
    assert bound([computes, moves, moves], card) == pytest.approx(3, rel=1e-3)
    assert limit([computes, moves, moves], card) == "memory"
    assert limit([computes], card) == "operations"
    assert predicted([computes], card) == pytest.approx(1 / ASSUMED.operations + ASSUMED.launch_seconds, rel=1e-3)


def test_what_is_moved_by_a_launch_before_takes_its_own_time() -> None:
    card = card_named("A100 80GB")
    work = Work("", "half", int(card.flops_per_s("half")), int(card.dram_bytes_per_s), 2)
    prepared = replace(work, before=int(card.dram_bytes_per_s / 2))
    assert predicted([prepared], card) - predicted([work], card) == pytest.approx(0.5 / ASSUMED.memory, rel=1e-3)
    assert bound([prepared], card) == bound([work], card)


def test_predictions_are_of_every_row_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sets, "SQUARES", ((64, 64, 64),))
    for name in ("LAYERS", "EPILOGUES", "EXACT"):
        monkeypatch.setattr(gpu_sets, name, ())
    gpu_predict.main({"products": gpu_sets.products}, ["--output", str(tmp_path)])
    files = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert files.keys() == {gpu_predict.path_for(card).name for card in CARDS}
    for made in files.values():
        assert made["predicted"]
        assert made["commit"]
        (row,) = made["rows"]
        assert row["operations"] == 2 * 64**3
        assert row["bytes"] == 3 * 64 * 64 * 2
        assert 0 < row["bound_seconds"] < row["predicted_seconds"]
        assert "seconds" not in row


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(KeyError):
        card_named("H2000")

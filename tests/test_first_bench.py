"""`bench.first` and `bench.shapes`: what they make of samples, and one small model through both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from rich.console import Console

from bench import first, shapes
from bench.first_worker import STAGES
from bench.worker import COMPILED, OURS, PEER
from infera_gpu import graph_cache


def test_first_takes_medians_of_stages_and_of_their_sum() -> None:
    samples = [dict(zip(STAGES, values, strict=True)) for values in ((1, 1, 1, 9, 1), (2, 2, 9, 2, 2), (3, 3, 3, 3, 3))]
    found = first.summarize(samples)
    assert found == {"import": 2e3, "modules": 2e3, "load": 3e3, "run": 3e3, "again": 2e3, "first": 10e3}


def test_first_measures_a_model_in_fresh_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path / "kept"))
    value = [helper.make_tensor_value_info(name, 1, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "g", value[:1], value[1:])
    path = tmp_path / "model.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    feeds = {"x": np.ones(3, np.float32)}
    row = first.measure(path, feeds, 1, tmp_path)
    assert set(row["milliseconds"]) == set(first.CONTENDERS) >= {OURS, first.NEW, PEER}
    assert all(row["milliseconds"][OURS][stage] > 0 for stage in STAGES)
    assert row["with_imports"] > 0
    assert row["new_ratio"] > 0
    assert ("compiled_ratio" in row) == (COMPILED in first.CONTENDERS)
    assert len(list((tmp_path / "kept" / "graphs").iterdir())) == 1
    shown = Console(record=True, width=140)
    shown.print(
        first.table([{"model": "exp", "failure": "", **row, "ratio": 1.51}, {"model": "no", "failure": "died"}])
    )
    text = shown.export_text()
    assert "1.51 !" in text
    assert "no" not in [line.split()[1] for line in text.splitlines() if line.startswith("│")]
    path.write_bytes(b"no model")
    with pytest.raises(RuntimeError, match=r"^(onnxruntime|infera): "):
        first.measure(path, feeds, 1, tmp_path)


def test_first_lets_children_keep_byte_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    found = first.child_environment(tmp_path)
    assert "PYTHONDONTWRITEBYTECODE" not in found
    assert found["OPENBLAS_NUM_THREADS"] == "1"
    kept = [first.child_environment(tmp_path, graphs=graphs)["INFERA_GRAPH_CACHE"] for graphs in (True, False)]
    assert list(map(graph_cache.enabled, ({"INFERA_GRAPH_CACHE": value} for value in kept))) == [True, False]


@pytest.mark.parametrize("name", sorted(shapes.STREAMS))
def test_streams_give_every_length_once_in_a_seeded_order(name: str) -> None:
    stream = shapes.STREAMS[name]
    requests = stream.requests(20)
    lengths = [max(next(iter(feeds.values())).shape[1:]) for feeds in requests]
    assert sorted(lengths) == sorted({*lengths})
    assert lengths != sorted(lengths)
    again = stream.requests(20)
    assert all(np.array_equal(a[k], b[k]) for a, b in zip(requests, again, strict=True) for k in a)


def test_shapes_summarizes_requests_and_planning() -> None:
    taken = [shapes.Taken(0.004, 0.002, 0.001), shapes.Taken(0.002, 0.002, 0.0005), shapes.Taken(0.009, 0.003, 0.002)]
    found = shapes.summarize(taken, nodes=10)
    assert found["milliseconds"] == {OURS: {"median": 4.0, "worst": 9.0}, PEER: {"median": 2.0, "worst": 3.0}}
    assert found["ratio"] == 2.0
    assert found["planning_micros_a_node"] == {"median": 100.0, "worst": 200.0}
    shown = Console(record=True, width=140)
    found["onnx_micros_a_node"] = 20.0
    rows = [
        {"model": "m", "runtime": runtime, "shapes": 3, "failure": "", "new": found, "again": found}
        for runtime in (OURS, COMPILED)
    ]
    shown.print(shapes.table(rows))
    text = shown.export_text()
    assert "3 again" in text
    assert COMPILED in text

"""Large initialisers go past the parser: what is loaded is the same, from damaged files too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from infera_gpu import source
from infera_gpu.errors import InvalidModel
from infera_gpu.graph import HostArray
from infera_gpu.loader import load_graph
from infera_gpu.source import read_metadata
from infera_gpu.wire import LARGE, skim

SIZES = (LARGE // 4, 3, LARGE // 4 - 1, 3 * LARGE)


def model() -> onnx.ModelProto:
    """The sum of float32 initialisers, large ones and small ones, after some that are not raw."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal(n, np.float32), f"w{i}") for i, n in enumerate(SIZES)]
    listed = helper.make_tensor("listed", 1, [LARGE], rng.standard_normal(LARGE))
    nodes = [helper.make_node("ReduceSum", [w.name], [f"s{i}"]) for i, w in enumerate([listed, *weights])]
    nodes.append(helper.make_node("Sum", [f"s{i}" for i in range(len(nodes))], ["y"]))
    graph = helper.make_graph(
        nodes, "g", [], [helper.make_tensor_value_info("y", 1, ["n"])], [weights[0], listed, *weights[1:]]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="tests")


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small file, skimmed all the same."""
    monkeypatch.setattr(source, "SKIMMED", 0)
    return bytes(model().SerializeToString())


def constants(payload: bytes | Path) -> Mapping[str, HostArray] | None:
    try:
        return load_graph(payload).constants
    except InvalidModel:
        return None


def same(a: Mapping[str, HostArray] | None, b: Mapping[str, HostArray] | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k], equal_nan=True) for k in a)


def test_what_is_cut_out_fits_back_in(whole: bytes) -> None:
    found = skim(whole)
    assert found is not None
    assert [i for i, _ in sorted(found.spans.items())] == [0, 4]  # of the others none is large and raw
    assert len(found.skeleton) < len(whole) - 3 * LARGE
    parsed = onnx.ModelProto.FromString(found.skeleton)
    for i, (start, stop) in found.spans.items():
        assert parsed.graph.initializer[i].HasField("raw_data")
        parsed.graph.initializer[i].raw_data = whole[start:stop]
    assert parsed == model()


def test_files_and_bytes_load_the_same_arrays(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(whole)
    want = {t.name: numpy_helper.to_array(t) for t in model().graph.initializer}
    for payload in (whole, path):
        got = constants(payload)
        assert same(got, want)
        assert got is not None
        assert not any(a.flags.writeable for a in got.values())
        assert all(a.flags.aligned for a in got.values())
    assert read_metadata(path)["producer_name"] == "tests"


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_end_as_they_would_through_the_parser(
    whole: bytes, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are changed, left out and repeated, near the tags and lengths of what is cut out more than elsewhere."""
    rng = np.random.default_rng(seed)
    found = skim(whole)
    assert found is not None
    near = [at for start, stop in found.spans.values() for at in (*range(start - 24, start + 2), stop, stop + 1)]
    damaged = []
    for _ in range(150):
        at = int(rng.choice(near)) if rng.random() < 0.7 else int(rng.integers(len(whole)))
        middle = (bytes([int(rng.integers(256))]), b"", whole[at : at + 2] * 2)[int(rng.integers(3))]
        damaged.append(whole[:at] + middle + whole[at + 1 :])
    skimmed = [constants(payload) for payload in damaged]
    assert any(c is None for c in skimmed)
    assert any(c is not None for c in skimmed)
    monkeypatch.setattr(source, "SKIMMED", 1 << 60)
    assert all(same(got, constants(payload)) for got, payload in zip(skimmed, damaged, strict=True))

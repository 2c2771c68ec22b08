"""Graphs on disk: as they were, found by what they depend on, and never in the way of loading a model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import infera_gpu
from infera_gpu import graph_cache, running
from infera_gpu.devices import open_device
from infera_gpu.graph import Graph, Node
from infera_gpu.graph_codec import LINE, Damaged, Unencodable, decoded, encoded
from infera_gpu.spec import MapSpec, OptionalSpec, SequenceSpec, TensorSpec
from infera_kernels.cpu.aligned import address, aligned

F32 = np.dtype(np.float32)


def bytes_of(content: bytes) -> np.ndarray[Any, Any]:
    data: np.ndarray[Any, Any] = aligned((len(content),), np.uint8)
    data[:] = np.frombuffer(content, np.uint8)
    return data


def same(a: Any, b: Any) -> bool:
    """Equal values of equal types, NaN included; arrays bit by bit."""
    if isinstance(a, np.ndarray):
        return type(b) is np.ndarray and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, Graph):
        return isinstance(b, Graph) and all(same(getattr(a, k), getattr(b, k)) for k in Graph.__slots__)
    if isinstance(a, Node):
        return isinstance(b, Node) and all(same(getattr(a, k), getattr(b, k)) for k in Node.__dataclass_fields__)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "keys"):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and repr(a) == repr(b)


def everything() -> Graph:
    """A graph with every kind of thing that one may have."""
    shared = np.arange(6, dtype=np.float32).reshape(2, 3)
    inner = Graph(
        (Node("Identity", ("x",), ("z",)),), {}, {"z": OptionalSpec(SequenceSpec(None))}, {"c": shared}, {"": 17}
    )
    attrs: dict[str, Any] = {
        "int": 1 << 40, "float": 0.1, "minus": -0.0, "inf": float("inf"), "nan": float("nan"), "text": "a\u2044\ud800",
        "truth": True, "none": None, "ints": (1, 2, 3), "floats": (0.5, 1.0), "empty": (), "texts": ("a", "b"),
        "array": np.array([1, 2], np.int64), "body": inner, "bodies": (inner, inner),
    }  # fmt: skip
    constants: dict[str, np.ndarray[Any, Any]] = {
        "shared": shared,
        "again": shared,
        "nothing": np.zeros((0, 3), np.float64),
        "scalar": np.array(7, np.int8),
        "half": np.array([1.5, np.nan], np.float16),
        "brain": np.array([1.5, -2], ml_dtypes.bfloat16),
        "four": np.array([-8, 7, 1], ml_dtypes.int4),
        "truth": np.array([True, False]),
        "complex": np.array([1 + 2j], np.complex64),
    }
    return Graph(
        (
            Node("If", ("x", "", "y"), ("a", ""), attrs, "com.example", "name", "overload", 3),
            Node("Relu", ("a",), ("b",)),
        ),
        {"x": TensorSpec(("n", None, 3), F32), "s": SequenceSpec(TensorSpec((), F32, ranked=False))},
        {"b": TensorSpec((), np.dtype(object)), "m": MapSpec(np.dtype(np.int64), TensorSpec((2,), F32))},
        constants,
        {"": 17, "com.example": 1},
        {"a": TensorSpec((1,), np.dtype(ml_dtypes.float8_e5m2))},
        "a graph",
        {"shared": TensorSpec((2, 3), F32)},
    )


def test_a_graph_comes_back_as_it_was() -> None:
    graph = everything()
    made = decoded(bytes_of(encoded(graph)))
    assert same(graph, made)
    assert made.constants["shared"] is made.constants["again"]  # packed and uploaded once
    assert made.constants["shared"] is not made.constants["scalar"]
    assert all(address(a) % LINE == 0 and not a.flags.writeable for a in made.constants.values() if a.size)


@pytest.mark.parametrize(
    "value",
    [
        np.array(["text"], object),
        np.arange(6).reshape(2, 3).T,
        np.array(["2020-01-01"], "datetime64[D]"),
        b"no text",
        [1, 2],
        np.float32(1),
        TensorSpec((), F32),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_written_is_refused(value: Any) -> None:
    with pytest.raises(Unencodable):
        encoded(Graph((Node("Relu", ("x",), ("y",), {"a": value}),), {}, {}))


def test_damage_anywhere_is_noticed() -> None:
    content = encoded(everything())
    for at in range(0, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        with pytest.raises(Damaged):
            decoded(bytes_of(bytes(changed)))
    for end in (0, 1, 8, 28, 29, len(content) // 2, len(content) - 1):
        with pytest.raises(Damaged):
            decoded(bytes_of(content[:end]))
    with pytest.raises(Damaged):
        decoded(bytes_of(content + b"\0"))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b'"nodes"', b'"nodez"'),
        lambda text: text.replace(b"[2,3]", b"[9,9]"),
        lambda text: text.replace(b"[2,3]", b"[2,[]"),
        lambda text: text.replace(b'"tensor"', b'"tansor"'),
        lambda text: b"[" * len(text),
    ],
)
def test_what_no_writer_says_is_damage(change: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph((), {"x": TensorSpec((2, 3), F32)}, {}, {"c": np.zeros((2, 3), np.float32)})
    content = encoded(graph)
    end = content.index(b'"name":""}') + len(b'"name":""}')
    monkeypatch.setattr("infera_gpu.graph_codec.zlib.crc32", lambda data: 0)
    head, text, rest = content[:8] + bytes(4) + content[12:28], content[28:end], content[end:]
    assert same(decoded(bytes_of(head + text + rest)), graph)
    with pytest.raises(Damaged):
        decoded(bytes_of(head + change(text) + rest))


# ---- on disk


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of entries, which are kept during the test."""
    monkeypatch.setenv("INFERA_GRAPH_CACHE", "1")
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


def model_file(path: Path, bias: float = 1.0, *, overridable: bool = False) -> Path:
    """y = relu((x + 0) W + bias), with W of 4 KiB."""
    w = np.linspace(-1, 1, 1024, dtype=np.float32).reshape(32, 32)
    given = {"w": w, "b": np.full(32, bias, np.float32), "zero": np.array(-0.0, np.float32)}
    x, y = (helper.make_tensor_value_info(name, 1, ["n", 32]) for name in "xy")
    nodes = [
        helper.make_node("Add", ["x", "zero"], ["same"]),
        helper.make_node("MatMul", ["same", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["q"]),
        helper.make_node("Relu", ["q"], ["y"]),
    ]
    extra = [helper.make_tensor_value_info("b", 1, [32])] if overridable else []
    graph = helper.make_graph(
        nodes, "g", [x, *extra], [y], [numpy_helper.from_array(a, name) for name, a in given.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def entries(kept: Path) -> list[Path]:
    return sorted(file for file in kept.glob("*/*") if file.suffix != ".plan")


def result(path: Path, times: int = 2, **options: Any) -> np.ndarray[Any, Any]:
    """What a model makes, which is loaded so many times: the second time it is kept."""
    x = np.linspace(-3, 3, 96, dtype=np.float32).reshape(3, 32)
    made: list[np.ndarray[Any, Any]] = []
    for _ in range(times):
        with infera_gpu.load(path, device="cpu", **options) as loaded:
            made.append(loaded.run({"x": x})["y"])
    assert all(np.array_equal(made[0], m) for m in made)
    return made[0]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows whenever passes run."""
    ran: list[str] = []
    real = running.optimized

    def optimized(graph: Graph, *args: Any, **given: Any) -> Graph:
        ran.append(graph.name)
        return real(graph, *args, **given)

    monkeypatch.setattr(running, "optimized", optimized)
    return ran


def test_a_model_that_was_loaded_before_needs_no_passes(kept: Path, tmp_path: Path, passes: list[str]) -> None:
    path = model_file(tmp_path / "m.onnx")
    first = result(path, times=1)
    assert os.listdir(kept) == [f"{path.stat().st_size:x}"]
    assert entries(kept) == []
    assert np.array_equal(result(path), first)
    assert len(entries(kept)) == 1
    assert len(passes) == 2
    copied = shutil.copy(path, tmp_path / "copy.onnx")
    with infera_gpu.load(copied, device="cpu") as loaded:  # another name, and the path as it comes
        assert [n.op for n in loaded.graph.nodes] == ["FusedMatMul"]
        assert len(passes) == 2
        assert [n.op for n in loaded.loaded.nodes] == ["Add", "MatMul", "Add", "Relu"]
        assert loaded.inputs == {"x": TensorSpec(("n", 32), F32)}
        assert loaded.name == loaded.graph.name == "copy.onnx"
    assert len(entries(kept)) == 1


def test_another_model_or_another_device_is_another_entry(
    kept: Path, tmp_path: Path, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_file(tmp_path / "m.onnx")
    given: tuple[dict[str, Any], ...] = ({}, {"accuracy": "strict"}, {"precision": "fp16"})
    for options in given:
        result(path, **options)
    assert len(entries(kept)) == 3
    infera_gpu.load(path, device="recording").close()
    assert len(entries(kept)) == 4
    model_file(path, bias=2.0)
    made = result(path)
    assert len(entries(kept)) == 5
    assert len(passes) == 6
    monkeypatch.setenv("INFERA_GRAPH_CACHE", "0")
    assert np.array_equal(result(path), made)


def test_sources_are_told_apart(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, device = model_file(tmp_path / "m.onnx"), open_device("cpu")
    result(path)
    for sources in ("another version", None):
        monkeypatch.setattr(graph_cache, "_sources", lambda sources=sources: sources)
        entry = graph_cache.entry_of(path, device, "fp32")
        assert entry is None if sources is None else entry is not None and entry.read() is None


def test_a_source_that_changed_after_its_import_is_not_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert graph_cache._sources.__wrapped__() is not None
    monkeypatch.setattr(graph_cache, "_IMPORTED_NS", 1)
    assert graph_cache._sources.__wrapped__() is None


def test_what_is_not_kept(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_file(tmp_path / "m.onnx")
    infera_gpu.load(path.read_bytes(), device="cpu").close()
    infera_gpu.load(path, device="cpu", fuse=False).close()
    result(model_file(tmp_path / "overridable.onnx", overridable=True))
    external = onnx.load(path)
    onnx.save(external, tmp_path / "e.onnx", save_as_external_data=True, size_threshold=0, location="e.bin")
    result(tmp_path / "e.onnx")
    for limit, value in (("MAX_BYTES", 4000), ("NS_OF_A_BYTE", 10**9)):
        with monkeypatch.context() as patch:
            patch.setattr(graph_cache, limit, value)
            result(path)
    assert f"{path.stat().st_size:x}" not in os.listdir(kept)
    monkeypatch.setenv("INFERA_GRAPH_CACHE", "off")
    result(path)
    assert entries(kept) == []


def test_a_model_that_changed_while_it_was_loaded_is_not_kept(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_file(tmp_path / "m.onnx")
    real, biases = running.optimized, iter([5.0, 6.0])

    def optimized(*args: Any, **given: Any) -> Graph:
        model_file(path, bias=next(biases))
        return real(*args, **given)

    monkeypatch.setattr(running, "optimized", optimized)
    for _ in range(2):
        infera_gpu.load(path, device="cpu").close()
    assert entries(kept) == []


@pytest.mark.parametrize("damage", [b"", b"infera1\n", b"\0" * 4096])
def test_a_damaged_entry_is_made_again(kept: Path, tmp_path: Path, passes: list[str], damage: bytes) -> None:
    path = model_file(tmp_path / "m.onnx")
    want = result(path)
    (entry,) = entries(kept)
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    assert np.array_equal(result(path), want)
    assert entry.read_bytes() == whole
    assert len(passes) == 3


def test_a_folder_that_cannot_be_written_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[str]
) -> None:
    path = model_file(tmp_path / "m.onnx")
    monkeypatch.setenv("INFERA_GRAPH_CACHE", "1")
    monkeypatch.setenv("INFERA_CACHE_DIR", str(path))  # a file
    want = result(path)
    assert np.array_equal(result(path), want)
    assert len(passes) == 4


def test_no_model_is_told_as_before(kept: Path, tmp_path: Path) -> None:
    for name, content in (("none", None), ("empty", b""), ("text", b"no model")):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(infera_gpu.InvalidModel, match=name):
            infera_gpu.load(path, device="cpu")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # which nobody writes to: to open it would wait for ever
        with pytest.raises(infera_gpu.InvalidModel, match="no regular file"):
            infera_gpu.load(tmp_path / "pipe", device="cpu")
    assert entries(kept) == []


def test_the_oldest_entries_go(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_twice(bias: float) -> None:
        for _ in range(2):  # no run, which would keep a plan
            infera_gpu.load(model_file(tmp_path / "m.onnx", bias=bias), device="cpu").close()

    monkeypatch.setattr(graph_cache, "MAX_ENTRIES", 2)
    found: list[Path] = []
    for i in range(3):
        load_twice(float(i))
        (made,) = set(entries(kept)) - set(found)
        os.utime(made, ns=(i, i))
        found.append(made)
    assert entries(kept) == sorted(found[1:])
    monkeypatch.setattr(graph_cache, "MAX_TOTAL", found[2].stat().st_size)
    load_twice(9.0)
    assert len(entries(kept)) == 1
    assert not set(found) & set(entries(kept))


def test_empty_folders_go(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_file(tmp_path / "m.onnx")
    result(path)
    (entry,) = entries(kept)
    for size in ("1", "2"):
        (kept / size).mkdir()
    monkeypatch.setattr(graph_cache, "MAX_ENTRIES", 3)
    path.write_bytes(path.read_bytes() + b"\x3a\x00")  # an empty graph, merged into the one that is there
    result(path, times=1)
    assert os.listdir(kept) == [entry.parent.name]
    assert entries(kept) == [entry]


def test_processes_that_write_at_the_same_time(kept: Path, tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.onnx")
    script = "import sys, infera_gpu\nfor _ in range(20): infera_gpu.load(sys.argv[1], device='cpu').close()"
    remove = "import sys, time, pathlib\nfor _ in range(300):\n time.sleep(0.01)\n"
    remove += " for f in pathlib.Path(sys.argv[1]).glob('*/*.graph'): f.unlink(missing_ok=True)"
    running = [subprocess.Popen([sys.executable, "-c", script, str(path)], stderr=subprocess.PIPE) for _ in range(3)]
    remover = subprocess.Popen([sys.executable, "-c", remove, str(kept)])
    try:
        assert [(p.communicate(timeout=120)[1], p.returncode) for p in running] == [(b"", 0)] * 3
    finally:
        remover.kill()
        remover.wait()
    result(path)
    assert len(entries(kept)) == 1
    assert entries(kept)[0].suffix == ".graph"

"""Tensors in files beside the model: mapped, shared, and read from nowhere else."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import infera_gpu
from infera_gpu.errors import InvalidModel
from infera_gpu.spec import onnx_of_dtype
from infera_gpu.tensors import nbytes

OUTSIDE = b"\0" * 64


def external(name: str, array: np.ndarray, **entries: object) -> TensorProto:
    """A tensor without data that says where it is to be found."""
    tensor = TensorProto(name=name, data_type=onnx_of_dtype(array.dtype), dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(*tensors: TensorProto) -> onnx.ModelProto:
    """Every tensor as an output, through an Identity."""
    outs = [helper.make_tensor_value_info(f"{t.name}_out", t.data_type, list(t.dims)) for t in tensors]
    nodes = [helper.make_node("Identity", [t.name], [f"{t.name}_out"]) for t in tensors]
    graph = helper.make_graph(nodes, "g", [], outs, list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def saved(folder: Path, data: bytes, *tensors: TensorProto) -> Path:
    (folder / "weights.bin").write_bytes(data)
    path = folder / "model.onnx"
    path.write_bytes(model(*tensors).SerializeToString())
    return path


def is_mapped(array: np.ndarray) -> bool:
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap)


W = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("change", [lambda f: os.truncate(f, 0), lambda f: f.write_bytes(bytes(W.nbytes)), os.remove])
def test_files_that_are_read_may_change(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = saved(tmp_path, W.tobytes(), external("w", W))
    with infera_gpu.load(path, device="cpu", mapped=False) as session:
        change(tmp_path / "weights.bin")
        assert np.array_equal(session.run({})["w_out"], W)


def test_large_tensors_are_looked_at_where_they_lie(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        b"\1" * 64 + W.tobytes() + W.tobytes(),
        external("a", W, offset=64, length=24),
        external("b", W, offset=88),
    )
    with infera_gpu.load(path, device="cpu") as session:
        graph = session.loaded
        assert all(map(is_mapped, graph.constants.values()))
        assert not any(a.flags.writeable for a in graph.constants.values())
        np.testing.assert_array_equal(session.run({})["a_out"], W)
        np.testing.assert_array_equal(session.run({})["b_out"], W)


@pytest.mark.parametrize(
    "dtype",
    [
        *(
            np.float16,
            np.float64,
            np.int8,
            np.uint64,
            np.bool_,
            np.complex64,
            ml_dtypes.bfloat16,
            ml_dtypes.float8_e5m2,
        ),
        *(ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2, ml_dtypes.float4_e2m1fn),
    ],
)
@pytest.mark.parametrize("shape", [(7,), (), (0, 3), (3, 5)])
def test_every_type_is_read_as_onnx_reads_it(tmp_path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    array: np.ndarray = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    want = numpy_helper.from_array(array, "w")
    path = saved(tmp_path, b"\7" + want.raw_data, external("w", array, offset=1))
    got = infera_gpu.load(path, device="cpu", fuse=False).loaded.constants["w"]
    assert got.dtype == array.dtype
    assert got.shape == shape
    np.testing.assert_array_equal(got.astype(np.complex64), array.astype(np.complex64))
    inline = infera_gpu.load(model(want), device="cpu", fuse=False).loaded.constants["w"]
    assert inline.tobytes() == got.tobytes()


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2, ml_dtypes.float4_e2m1fn]
)
def test_every_value_of_a_packed_type_is_read(tmp_path: Path, dtype: type) -> None:
    bits = 4 if "4" in np.dtype(dtype).name else 2
    patterns = np.arange(1 << bits, dtype=np.uint8)
    raw = b"".join(
        bytes([sum(int(p) << (bits * i) for i, p in enumerate(patterns[at : at + 8 // bits]))])
        for at in range(0, len(patterns), 8 // bits)
    )
    tensor = TensorProto(name="w", data_type=onnx_of_dtype(np.dtype(dtype)), dims=patterns.shape, raw_data=raw)
    want = numpy_helper.to_array(tensor)
    got = infera_gpu.load(model(tensor), device="cpu", fuse=False).loaded.constants["w"]
    assert got.astype(np.float32).tolist() == want.astype(np.float32).tolist()
    assert len(set(got.astype(np.float32).tolist())) == len(patterns) - (1 if dtype is ml_dtypes.float4_e2m1fn else 0)


def test_attributes_and_functions_have_external_tensors_too(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(W.tobytes())
    made = model(numpy_helper.from_array(W, "w"))
    made.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=external("", W)))
    made.graph.node[1].input[0] = "c"
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    np.testing.assert_array_equal(infera_gpu.load(tmp_path / "model.onnx", device="cpu").run({})["w_out"], W)


def test_one_region_may_serve_many_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path, b"\0" + W.tobytes(), *(external(f"w{i}", W, offset=1) for i in range(50)))
    constants = infera_gpu.load(path, device="cpu", fuse=False).loaded.constants
    assert len({id(a) for a in constants.values()}) == 1  # unaligned: copied, once


def test_overlapping_regions_do_not_multiply_memory(tmp_path: Path) -> None:
    data = bytes(1 << 16)
    w = np.zeros((1 << 14) - 8, np.float32)
    path = saved(tmp_path, data, *(external(f"w{i}", w, offset=4 * i + 1) for i in range(7)))
    with pytest.raises(InvalidModel, match="overlap"):
        infera_gpu.load(path, device="cpu")


def link(folder: Path) -> None:
    (folder / "weights.bin").symlink_to(folder.parent / "secret.bin")


def linked_folder(folder: Path) -> None:
    (folder / "sub").symlink_to(folder.parent)


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "weights.bin")


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "location", "message"),
    [
        (nothing, "../secret.bin", "below the model's folder"),
        (nothing, "a/../../secret.bin", "below the model's folder"),
        (nothing, "..\\secret.bin", "below the model's folder"),
        (nothing, "C:\\secret.bin", "below the model's folder"),
        (nothing, "\\\\host\\secret.bin", "below the model's folder"),
        (nothing, "{outside}/secret.bin", "below the model's folder"),
        (nothing, "/dev/zero", "below the model's folder"),
        (nothing, "", "below the model's folder"),
        (nothing, ".", "below the model's folder"),
        (nothing, "a\0b", "below the model's folder"),
        (nothing, "x" * 5000, "cannot be read: File name too long"),
        (nothing, "absent.bin", "cannot be read: No such file"),
        (link, "weights.bin", "is a symbolic link"),
        (linked_folder, "sub/secret.bin", "cannot be read: Not a directory"),
        (fifo, "weights.bin", "no regular file"),
    ],
)
def test_nothing_outside_the_models_folder_is_read(
    tmp_path: Path, prepare: Callable[[Path], None], location: str, message: str
) -> None:
    (tmp_path / "secret.bin").write_bytes(OUTSIDE)
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(folder)
    tensor = external("w", W, location=location.format(outside=tmp_path))
    (folder / "model.onnx").write_bytes(model(tensor).SerializeToString())
    with pytest.raises(InvalidModel, match=message):
        infera_gpu.load(folder / "model.onnx", device="cpu")


def test_the_layout_of_hugging_faces_cache_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1").write_bytes(model(external("w", W)).SerializeToString())
    (blobs / "2").write_bytes(W.tobytes())
    (snapshot / "model.onnx").symlink_to("../../blobs/1")
    (snapshot / "weights.bin").symlink_to("../../blobs/2")
    np.testing.assert_array_equal(infera_gpu.load(snapshot / "model.onnx", device="cpu").run({})["w_out"], W)
    (tmp_path / "secret.bin").write_bytes(OUTSIDE)
    (snapshot / "weights.bin").unlink()
    (snapshot / "weights.bin").symlink_to("../../secret.bin")
    with pytest.raises(InvalidModel, match="is a symbolic link"):
        infera_gpu.load(snapshot / "model.onnx", device="cpu")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"length": 20}, "needs 24 bytes, it has 20"),
        ({"length": 28}, "bytes 0 to 28 of 'weights.bin', which has 24"),
        ({"offset": 4}, "bytes 4 to 28"),
        ({"offset": 1 << 62}, "which has 24"),
        ({"offset": "-4"}, "has the offset '-4'"),
        ({"offset": "1e3"}, "has the offset '1e3'"),
        ({"offset": "9" * 30}, "has the offset"),
        ({"length": "٢٤"}, "has the length"),
    ],
)
def test_offsets_and_lengths_are_checked(tmp_path: Path, entries: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        infera_gpu.load(saved(tmp_path, W.tobytes(), external("w", W, **entries)), device="cpu")


def test_bytes_have_no_files_beside_them(tmp_path: Path) -> None:
    path = saved(tmp_path, W.tobytes(), external("w", W))
    with pytest.raises(InvalidModel, match="load the model from its path"):
        infera_gpu.load(path.read_bytes(), device="cpu")


def test_sizes_of_packed_types() -> None:
    assert nbytes(np.dtype(ml_dtypes.int4), (3, 3)) == 5
    assert nbytes(np.dtype(ml_dtypes.uint2), (5,)) == 2
    assert nbytes(np.dtype(np.float64), (2, 0)) == 0

"""`infera run`: inputs from files, outputs shown and written, and what goes wrong with either."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import infera_gpu
from infera_gpu.cli.feeds import random_feeds, read_feeds
from infera_gpu.errors import (
    DeviceError,
    InferaError,
    InputError,
    InvarianceError,
    OutOfMemoryError,
    PlanError,
)
from infera_gpu.spec import TensorSpec, spec_of
from tests.commandline import assert_explained, assert_fails, infera, model, save, save_add, save_relu
from tests.text import parse


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    return save_relu(tmp_path)


@pytest.fixture
def add(tmp_path: Path) -> Path:
    return save_add(tmp_path)


def test_run_shows_every_output(relu: Path, tmp_path: Path) -> None:
    x = save(tmp_path / "x.npy", np.array([[-1, 2, -3]], np.float32))
    status, out, err = infera("run", relu, "-i", x, "--device", "cpu")
    assert (status, err) == (0, "")
    assert "float32[1, 3]" in out
    assert "0, 2, 0" in out


def test_run_writes_npz(add: Path, tmp_path: Path) -> None:
    a, b = (np.arange(6, dtype=np.float32).reshape(2, 3) * k for k in (1, 10))
    pairs = (f"a={save(tmp_path / 'a.npy', a)}", f"b={save(tmp_path / 'b.npy', b)}")
    status, out, _ = infera("run", add, "-i", pairs[0], "-i", pairs[1], "-o", tmp_path / "out.npz", "--device", "cpu")
    assert (status, out) == (0, "")
    with np.load(tmp_path / "out.npz") as written:
        assert written.files == ["y"]
        np.testing.assert_array_equal(written["y"], a + b)


def test_run_takes_inputs_by_name_from_npz(add: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", a=np.ones((2, 3), np.float32), b=np.full((2, 3), 4, np.float32))
    status, out, _ = infera("run", add, "-i", tmp_path / "in.npz", "--device", "cpu")
    assert status == 0
    assert "5, 5, 5, 5, ..." in out


def test_run_random_is_seeded_and_says_what_it_chose(relu: Path) -> None:
    status, first, err = infera("run", relu, "--random", "--device", "cpu")
    assert status == 0
    assert "x[0] 'N'" in err
    assert "x float32[1, 3]" in err
    assert infera("run", relu, "--random", "--device", "cpu")[1] == first
    assert infera("run", relu, "--random", "--seed", 1, "--device", "cpu")[1] != first
    status, out, err = infera("run", relu, "--random", "--shape", "5,3", "--device", "cpu")
    assert (status, err) == (0, "")
    assert "float32[5, 3]" in out


def test_run_fails_in_one_line(relu: Path, add: Path, tmp_path: Path) -> None:
    x = save(tmp_path / "x.npy", np.ones((1, 3), np.float32))
    wide = save(tmp_path / "wide.npy", np.ones((1, 4), np.float32))
    double = save(tmp_path / "double.npy", np.ones((1, 3)))
    (tmp_path / "text.npy").write_text("not an array")
    assert_fails(infera("run", relu), "input 'x' is missing")
    assert_fails(infera("run", relu, "-i", f"z={x}"), "'z' is not an input", "'x' float32[N, 3]")
    assert_fails(infera("run", relu, "-i", wide), "'x' has shape [1, 4]", "float32[N, 3]")
    assert_fails(infera("run", relu, "-i", double), "'x' is float64", "float32")
    assert_fails(infera("run", relu, "-i", tmp_path / "none.npy"), "none.npy: no such file")
    assert_fails(infera("run", relu, "-i", tmp_path / "text.npy"), "text.npy: not a .npy or .npz file")
    assert_fails(infera("run", add, "-i", x), "which input?", "'a' float32[2, 3]")
    assert_fails(infera("run", relu, "-i", x, "--shape", "1,3"), "--shape is for random inputs")
    assert_fails(infera("run", relu, "--random", "--shape", "1,a"), "'1,a' is not a list of integers")
    assert_fails(infera("run", relu, "--random", "--shape", "q=1,3"), "'q' is not an input")
    array = tmp_path / "out.npy"
    assert_fails(infera("run", relu, "-i", x, "-o", array), "one .npz file", "name it out.npz", status=2)
    assert not array.exists()
    assert_fails(
        infera("run", relu, "-i", x, "-o", tmp_path / "no" / "out.npz"),
        "out.npz cannot be written: No such file or directory",
    )
    assert_fails(infera("run", relu, "-i", x, "--device", "abacus"), "unknown device 'abacus'")
    assert_fails(
        infera("run", relu, "-i", x, "--device", "cpu", "--batch-invariant"), "batch_invariant=True is for GPUs"
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_, object])
def test_random_feeds_fit_their_specs(dtype: Any) -> None:
    inputs = {"x": TensorSpec(("N", 2, None), np.dtype(dtype)), "y": TensorSpec(("N",), np.dtype(dtype))}
    feeds = random_feeds(inputs, {}, {"x": (4, 2, 0)})
    assert [spec_of(a) for a in feeds.values()] == [TensorSpec(s, np.dtype(dtype)) for s in ((4, 2, 0), (4,))]
    given = {"y": np.zeros(7, dtype)}
    assert random_feeds(inputs, given, {})["x"].shape == (7, 2, 1)
    assert random_feeds({"s": TensorSpec((), np.dtype(dtype))}, {}, {})["s"].shape == ()


# ---- files of arrays


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """x [2] -> outputs under names that numpy.savez keeps for itself, and one with folders"""
    path = tmp_path / "named.onnx"
    nodes = [helper.make_node("Relu", ["x"], [name]) for name in AWKWARD_NAMES]
    onnx.save(model(nodes, {"x": [2]}, {name: [2] for name in AWKWARD_NAMES}), path)
    return path


AWKWARD_NAMES = ("file", "allow_pickle", "args", "StatefulPartitionedCall/block:0", "../up")


@pytest.mark.parametrize(
    ("spec", "text", "want"),
    [
        (TensorSpec((), np.dtype(np.int64)), "16000", np.array(16000, np.int64)),
        (TensorSpec((1,), np.dtype(np.int64)), "-3", np.array([-3], np.int64)),
        (TensorSpec((None, 3), np.dtype(np.float32)), "1, 2.5,1e3", np.array([[1, 2.5, 1000]], np.float32)),
        (TensorSpec((2,), np.dtype(np.bool_)), "1,0", np.array([True, False])),
        (TensorSpec((1,), np.dtype(np.float32)), "nan", np.array([np.nan], np.float32)),
        (TensorSpec((), np.dtype(np.uint64)), str((1 << 64) - 1), np.array((1 << 64) - 1, np.uint64)),
    ],
)
def test_numbers_are_inputs(spec: TensorSpec, text: str, want: Any) -> None:
    (found,) = read_feeds([f"x={text}"], {"x": spec}).values()
    assert (found.dtype, found.shape) == (want.dtype, want.shape)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
    ("dtype", "shape", "text", "says"),
    [
        (np.int64, (1,), "1.5", "whole numbers"),
        (np.int64, (1,), "nan", "whole numbers"),
        (np.int64, (), "1,2", "one number"),
        (np.uint8, (1,), "300", "out of bounds"),
        (np.uint8, (1,), "-1", "out of bounds"),
        (object, (1,), "1", "strings"),
        (np.float32, (1,), "1,two", "no such file"),
        (np.float32, (1,), "", "no such file"),
    ],
)
def test_numbers_that_do_not_fit_are_explained(dtype: Any, shape: tuple[int, ...], text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_feeds([f"x={text}"], {"x": TensorSpec(shape, np.dtype(dtype))})


def test_a_file_goes_before_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open("7", "wb") as file:
        np.save(file, np.ones(1, np.float32))
    assert read_feeds(["x=7"], {"x": TensorSpec((1,), np.dtype(np.float32))})["x"] == 1


def test_outputs_are_written_under_any_name(named: Path, tmp_path: Path) -> None:
    x, out = save(tmp_path / "x.npy", np.array([-1, 2], np.float32)), tmp_path / "out.npz"
    assert infera("run", named, "-i", x, "-o", out, "--device", "cpu")[0] == 0
    with np.load(out, allow_pickle=False) as written:
        assert tuple(written.files) == AWKWARD_NAMES
        assert all(written[name].tolist() == [0, 2] for name in AWKWARD_NAMES)


def test_strings_are_called_so_and_written_and_read_back(tmp_path: Path) -> None:
    path, out = tmp_path / "words.onnx", tmp_path / "out.npz"
    made = model([helper.make_node("Identity", ["words"], ["y"])], {}, {"y": [2]}, TensorProto.STRING)
    made.graph.initializer.append(numpy_helper.from_array(np.array(["naïve", ""], object), "words"))
    onnx.save(made, path)
    assert "string[2]" in infera("run", path, "--device", "cpu")[1]
    assert infera("run", path, "-o", out, "--device", "cpu")[0] == 0
    (read,) = read_feeds([str(out)], {"y": TensorSpec((2,), np.dtype(object))}).values()
    assert (read.dtype, read.tolist()) == (np.dtype(object), ["naïve", ""])


def test_random_strings_are_called_strings(tmp_path: Path) -> None:
    path = tmp_path / "same.onnx"
    made = model([helper.make_node("Identity", ["x"], ["y"])], {"x": ["N"]}, {"y": ["N"]}, TensorProto.STRING)
    onnx.save(made, path)
    assert "using x string[1]" in infera("run", path, "--random", "--device", "cpu")[2]
    assert " string[N]" in infera("inspect", path, "--device", "cpu")[1]
    assert_explained(infera("run", path, "-i", f"z={save(tmp_path / 'z.npy', np.ones(1))}"), "'x' string[N]")


def test_a_file_that_cannot_be_written_whole_is_left_as_it_was(
    named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.npz"
    out.write_bytes(b"before")
    before = sorted(tmp_path.iterdir())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    assert_explained(
        infera("run", named, "--random", "-o", out, "--device", "cpu"), "out.npz cannot be written: No space"
    )
    assert out.read_bytes() == b"before"
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_go_through_links_and_to_devices(named: Path, tmp_path: Path) -> None:
    (tmp_path / "link.npz").symlink_to("target.npz")
    for out in (tmp_path / "link.npz", Path(os.devnull)):
        assert infera("run", named, "--random", "-o", out, "--device", "cpu")[0] == 0
    assert (tmp_path / "link.npz").is_symlink()
    assert zipfile.is_zipfile(tmp_path / "target.npz")
    assert Path(os.devnull).is_char_device()


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def damaged_npz(folder: Path) -> bytes:
    """An archive whose only member begins with a block of a type that deflate has not."""
    np.savez_compressed(folder / "good.npz", x=np.random.default_rng(0).standard_normal((50, 3)))
    content = bytearray((folder / "good.npz").read_bytes())
    name, extra = struct.unpack_from("<HH", content, 26)
    content[30 + name + extra] = 0xFF
    return bytes(content)


HEADERS = {
    "a shape of terabytes": "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 3), }\n",
    "a shape past 64 bits": "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999, 3), }\n",
    "an open bracket": "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3\n",
    "no header": "",
    "an unknown type": "{'descr': 'no type', 'fortran_order': False, 'shape': (1, 3), }\n",
    "pickled objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1, 3), }\n",
}


@pytest.mark.parametrize("damage", [*HEADERS, "a damaged archive", "half an archive", "a text", "a folder"])
def test_damaged_inputs_are_explained(relu: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.npy"
    match damage:
        case "a damaged archive":
            path.write_bytes(damaged_npz(tmp_path))
        case "half an archive":
            path.write_bytes(damaged_npz(tmp_path)[:300])
        case "a text":
            path.write_text("1.0, 2.0, 3.0\n")
        case "a folder":
            path.mkdir()
        case _:
            path.write_bytes(npy(HEADERS[damage]))
    words = "cannot be read" if damage == "a folder" else "not a .npy or .npz file that can be read"
    result = infera("run", relu, "-i", path, "--device", "cpu")
    assert_explained(result, "x.npy", words)
    assert "pickle" not in result[2]


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ("99999999999,3", "a random input 'x' float32[99999999999, 3] needs"),
        ("99999999999999999999,3", "no array is that large"),
        ("0,9223372036854775807", "no array is that large"),
        ("-1,3", "a dimension is negative"),
    ],
)
def test_shapes_past_memory_are_explained(relu: Path, shape: str, says: str) -> None:
    assert_explained(infera("run", relu, "--random", f"--shape={shape}", "--device", "cpu"), says)


def test_running_out_of_memory_is_explained(relu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError("Unable to allocate 1. TiB")

    monkeypatch.setattr("infera_gpu.session.Session.run", full)
    assert_explained(infera("run", relu, "--random", "--shape", "1,3"), "out of memory: Unable to allocate 1. TiB")


# ---- models that are none


def test_missing_file() -> None:
    assert_fails(infera("run", "silero-vat"), "neither a file nor a name in the catalogue", "silero-vad")


def test_not_onnx(tmp_path: Path) -> None:
    path = tmp_path / "page.onnx"
    path.write_text("<html>404 not found</html>")
    assert_fails(infera("inspect", path), "page.onnx: not an ONNX model")


def test_truncated(relu: Path) -> None:
    relu.write_bytes(relu.read_bytes()[:-7])
    assert_fails(infera("inspect", relu), "relu.onnx", "truncated")


def test_empty(tmp_path: Path) -> None:
    path = tmp_path / "empty.onnx"
    path.touch()
    assert_fails(infera("run", path), "empty.onnx: the file is empty")


def test_unsupported_operator(tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    nodes = [helper.make_node("Frobnicate", ["x"], ["y"], name="knob", domain="example")]
    made = model(nodes, {"x": [1]}, {"y": [1]})
    made.opset_import.append(helper.make_opsetid("example", 1))
    onnx.save(made, path)
    assert_fails(infera("run", path, "--random"), "unsupported operator", "Frobnicate", "knob")


def test_bfloat16_is_read_from_what_numpy_saves(tmp_path: Path) -> None:
    onnx.save(parse("g (bfloat16[N] x) => (float[N] y) { y = Cast <to = 1> (x) }"), tmp_path / "m.onnx")
    x = save(tmp_path / "x.npy", np.array([1.5, -2], ml_dtypes.bfloat16))
    status, out, _ = infera("run", tmp_path / "m.onnx", "-i", x, "--device", "cpu")
    assert status == 0
    assert "1.5, -2" in out


def test_random_values_that_make_no_sense_come_with_advice(tmp_path: Path) -> None:
    onnx.save(parse("g (float[N] x, int64[M] s) => (float[A,B] y) { y = Reshape(x, s) }"), tmp_path / "m.onnx")
    result = infera("run", tmp_path / "m.onnx", "--random", "--shape", "x=7", "--shape", "s=2", "--device", "cpu")
    assert_fails(result, "are random; give sensible ones")


def test_what_random_values_are_not_to_blame_for_comes_without_advice(
    relu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "run", relu, "--random", "--shape", "2,3", "--device", "cpu"
    causes: list[tuple[InferaError, bool]] = [
        (InputError("a value"), True),
        (PlanError("a shape"), True),
        (InvarianceError("no kernel"), False),
        (DeviceError("no device"), False),
        (OutOfMemoryError("an arena", needed=2, available=1), False),
    ]
    for cause, advised in causes:

        def failing(*_: object, cause: InferaError = cause) -> None:
            raise cause

        monkeypatch.setattr("infera_gpu.session.Session.run", failing)
        result = infera(*asked)
        assert_explained(result, str(cause))
        assert ("are random" in result[2]) == advised


ODD = "x\x1b[31m\n\x07"
SHOWN = r"x\x1b[31m"


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),  # an error
        ("run", "--random"),  # a note, and a table
        ("inspect", "--shape", "2,3", "--passes", "--time"),
        ("verify", "--first", "--shape", "2,3"),
    ],
    ids=str,
)
def test_names_do_nothing_to_a_terminal(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    path = tmp_path / "odd.onnx"
    nodes = [helper.make_node("Relu", [ODD], ["t" + ODD], name=ODD), helper.make_node("Exp", ["t" + ODD], ["y" + ODD])]
    onnx.save(model(nodes, {ODD: ["N", 3]}, {"y" + ODD: ["N", 3]}), path)
    command, *options = arguments
    _, out, err = infera(command, path, *options, "--device", "cpu")
    assert SHOWN in out + err
    assert not {"\x1b", "\x07"} & {*out, *err}
    plan = infera_gpu.load(path, device="cpu").plan_for({ODD: (2, 3)})
    assert plan.headline.count("\n") == 1
    assert len(str(plan).splitlines()) == 4

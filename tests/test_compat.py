"""The same code against onnxruntime and against infera_gpu.

Options and providers: test_compat_options.py; values and bindings: test_compat_binding.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import infera_gpu
from infera_gpu import compat
from tests.compat_support import CPU, FEEDS, MODEL, both, quiet, refused
from tests.text import parse

DOCS = Path(__file__).parents[1] / "docs" / "onnxruntime.md"


def identity(code: int, shape: list[Any] | None) -> bytes:
    x, y = (helper.make_tensor_value_info(name, code, shape) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return bytes(model.SerializeToString())


def test_changing_the_import_changes_no_answer() -> None:
    theirs, ours = (m.InferenceSession(MODEL, quiet(m), providers=CPU) for m in (onnxruntime, infera_gpu))
    for names in (None, [], (), ["p"], ["j", "y"], ("y",), ["j", "j"]):
        for want, got in zip(theirs.run(names, FEEDS), ours.run(names, FEEDS), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)
            assert got.dtype == want.dtype
    for get in ("get_inputs", "get_outputs", "get_overridable_initializers"):
        for want, got in zip(getattr(theirs, get)(), getattr(ours, get)(), strict=True):
            assert (got.name, got.shape, got.type) == (want.name, want.shape, want.type)
    assert ours.get_providers() == theirs.get_providers() == CPU
    assert ours.get_provider_options() == theirs.get_provider_options()
    assert ours.end_profiling() == theirs.end_profiling() == ""
    assert ours.get_profiling_start_time_ns() == theirs.get_profiling_start_time_ns() == 0


@pytest.mark.parametrize(
    "code",
    [c for c in TensorProto.DataType.values() if 0 < c <= TensorProto.FLOAT8E5M2FNUZ and c not in (14, 15)],
    ids=TensorProto.DataType.Name,
)
def test_types_are_spelt_alike(code: int) -> None:
    """onnxruntime has neither complex tensors nor an Identity for the types after these."""
    model = identity(code, ["N", 2])
    theirs, ours = (m.InferenceSession(model, providers=CPU).get_inputs()[0] for m in (onnxruntime, infera_gpu))
    assert (ours.type, ours.shape) == (theirs.type, theirs.shape)


@pytest.mark.parametrize("shape", [None, [], [None], [0, -1], ["", 3], ["N", "N"], [1]], ids=str)
def test_shapes_are_told_alike(shape: list[Any] | None) -> None:
    model = identity(TensorProto.FLOAT, shape)
    theirs, ours = (m.InferenceSession(model, providers=CPU) for m in (onnxruntime, infera_gpu))
    assert ours.get_inputs()[0].shape == theirs.get_inputs()[0].shape
    assert ours.get_outputs()[0].shape == theirs.get_outputs()[0].shape


def test_an_output_without_a_declared_shape_is_not_inferred() -> None:
    model = parse("g (float[N, 2] x) => (float[?, ?] y) { y = Exp(x) }").SerializeToString()
    theirs, ours = (m.InferenceSession(model, providers=CPU).get_outputs()[0] for m in (onnxruntime, infera_gpu))
    assert (theirs.shape, ours.shape) == (["N", 2], [None, None])


@both
def test_feeds_that_are_no_arrays(ort: Any) -> None:
    session = ort.InferenceSession(MODEL, quiet(ort), providers=CPU)
    y, j = session.run(["y", "j"], {"x": [[0.0, 1, 2, 3]], "i": [3]}, ort.RunOptions())
    np.testing.assert_allclose(y, np.exp([[0, 1, 2, 3]]), rtol=1e-6)
    assert (y.dtype, j.dtype, j.tolist()) == (np.float32, np.int64, [6])
    strided = np.asfortranarray(FEEDS["x"])
    np.testing.assert_allclose(session.run(["y"], {"x": strided, "i": [1, 2]})[0], np.exp(strided), rtol=1e-6)


def test_numbers_are_taken_beyond_onnxruntime() -> None:
    session = infera_gpu.InferenceSession(identity(TensorProto.FLOAT, []), providers=CPU)
    for three in (3.0, np.float32(3), np.array(3, np.float32)):
        (y,) = session.run(None, {"x": three})
        assert (y.shape, y.dtype, float(y)) == ((), np.float32, 3)


@both
@pytest.mark.parametrize(
    ("names", "change"),
    [
        (["q"], {}),
        ([""], {}),
        (None, {"z": FEEDS["i"]}),
        (None, {"x": FEEDS["x"].astype(np.float64)}),
        (None, {"x": FEEDS["x"][:, :3]}),
        (None, {"x": FEEDS["x"][0]}),
        (None, {"x": None}),
        ("j", {}),
    ],
    ids=["output", "empty output", "extra", "dtype", "shape", "rank", "None", "one name"],
)
def test_what_both_refuse(ort: Any, names: Any, change: dict[str, Any]) -> None:
    session = ort.InferenceSession(MODEL, quiet(ort), providers=CPU)
    with pytest.raises(refused(ort, TypeError if isinstance(names, str) else infera_gpu.InputError)):
        session.run(names, {**FEEDS, **change})


@both
def test_a_missing_input_is_a_value_error(ort: Any) -> None:
    with pytest.raises(ValueError, match="missing"):
        ort.InferenceSession(MODEL, providers=CPU).run(["y"], {"x": FEEDS["x"]})


def test_sizes_that_contradict_a_symbol_are_refused_here_alone() -> None:
    feeds = {"x": FEEDS["x"], "i": np.arange(3)}
    assert onnxruntime.InferenceSession(MODEL, quiet(onnxruntime), providers=CPU).run(["j"], feeds)[0].shape == (3,)
    with pytest.raises(infera_gpu.InputError, match="'N' is 3 there but 2 in 'x'"):
        infera_gpu.InferenceSession(MODEL, providers=CPU).run(["j"], feeds)


def test_types_that_contradict_each_other_are_refused_in_a_run_here_and_at_load_there() -> None:
    model = parse("g (int64[N] x) => (int64[N] y) <float one = {1.0}> { y = Add(x, one) }").SerializeToString()
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="Type Error"):
        onnxruntime.InferenceSession(model, quiet(onnxruntime), providers=CPU)
    session = infera_gpu.InferenceSession(model, providers=CPU)
    with pytest.raises(infera_gpu.PlanError, match=r"Add 'y': inputs .* differ in type"):
        session.run(None, {"x": np.arange(3)})


@both
def test_run_options(ort: Any) -> None:
    session = ort.InferenceSession(MODEL, quiet(ort), providers=CPU)
    options = ort.RunOptions()
    options.logid, options.log_severity_level, options.log_verbosity_level = "run", 4, 0
    options.only_execute_path_to_fetches = True
    options.add_run_config_entry("k", "v")
    assert options.get_run_config_entry("k") == "v"
    assert len(session.run(None, FEEDS, options)) == 3
    options.terminate = True
    with pytest.raises(refused(ort, infera_gpu.InferaError), match="terminate"):
        session.run(None, FEEDS, options)
    with pytest.raises(TypeError):
        session.run(None, FEEDS, 3)
    with pytest.raises(AttributeError):
        options.no_such_option = 1


# ---- where models come from, and what they say


@both
def test_sources_and_metadata(ort: Any, tmp_path: Path) -> None:
    model = onnx.load_model_from_string(MODEL)
    model.producer_name, model.domain, model.doc_string, model.model_version = "p", "d", "doc", 7
    model.graph.doc_string = "graph doc"
    helper.set_model_props(model, {"names": "{0: 'cat'}"})
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    sources = [path, str(path), path.read_bytes()] + (
        [model, bytearray(path.read_bytes())] if ort is infera_gpu else []
    )
    for source in sources:
        session = ort.InferenceSession(source, quiet(ort), providers=CPU)
        meta = session.get_modelmeta()
        assert meta.custom_metadata_map == {"names": "{0: 'cat'}"}
        assert (meta.producer_name, meta.domain, meta.version, meta.graph_name) == ("p", "d", 7, "g")
        assert (meta.description, meta.graph_description) == ("doc", "graph doc")
    with pytest.raises(infera_gpu.ModelError if ort is infera_gpu else TypeError):
        ort.InferenceSession(3, providers=CPU)
    with pytest.raises(refused(ort, infera_gpu.ModelError), match="absent"):
        ort.InferenceSession("absent.onnx", providers=CPU)


def test_initialisers_that_are_inputs_too_may_be_fed() -> None:
    model = parse("g (float[N] x, float[1] w) => (float[N] y) { y = Mul(x, w) }")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2], np.float32), "w"))
    theirs, ours = (m.InferenceSession(model.SerializeToString(), providers=CPU) for m in (onnxruntime, infera_gpu))
    assert [a.name for a in ours.get_inputs()] == [a.name for a in theirs.get_inputs()] == ["x"]
    told = [[(a.name, a.type, a.shape) for a in m.get_overridable_initializers()] for m in (ours, theirs)]
    assert told[0] == told[1] == [("w", "tensor(float)", [1])]
    one = np.ones(1, np.float32)
    for session in (ours, theirs):
        assert session.run(None, {"x": one})[0].tolist() == [2]
        assert session.run(None, {"x": one, "w": 5 * one})[0].tolist() == [5]


@both
def test_module_functions(ort: Any) -> None:
    assert ort.get_device() in ("CPU", "GPU")
    assert set(ort.get_available_providers()) <= set(ort.get_all_providers())
    assert ort.get_available_providers()[-1:] == CPU
    ort.set_seed(3)
    ort.set_default_logger_severity(2)
    ort.set_default_logger_verbosity(0)
    with pytest.raises(ValueError if ort is infera_gpu else RuntimeError, match="severity"):
        ort.set_default_logger_severity(9)


def test_strings_go_through() -> None:
    session = infera_gpu.InferenceSession(identity(TensorProto.STRING, ["N"]), providers=CPU)
    (got,) = session.run(None, {"x": np.array(["a", "ü"])})
    assert got.dtype == object
    assert got.tolist() == ["a", "ü"]


def test_every_name_exists_there_too_and_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name in compat.__all__:
        assert hasattr(onnxruntime, name), name
        assert name in infera_gpu.__all__
        ours, theirs = getattr(compat, name), getattr(onnxruntime, name)
        assert re.search(rf"`[^`]*\b{name}\b[^`]*`", text), f"{name} is not in {DOCS.name}"
        if name in ("InferenceSession", "IOBinding", "SessionOptions", "RunOptions", "OrtValue"):
            public = {n for n in vars(ours) if not n.startswith("_")} - EXTENSIONS.get(name, set())
            assert public <= set(dir(theirs)), public - set(dir(theirs))
            missing = [n for n in public if not re.search(rf"\b{n}\b", text)]
            assert not missing, f"{missing} of {name} are not in {DOCS.name}"


EXTENSIONS = {
    "IOBinding": {"execute"},
    "OrtValue": {"array", "device", "placed", "empty", "at_address", "copy", "readable_on"},
    "SessionOptions": {"free_dimensions", "unwritten"},
}
"""Public here for the modules of compat to call each other; not part of onnxruntime's API."""

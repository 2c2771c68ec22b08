"""OrtValue and IOBinding: the same code against onnxruntime and against infera_gpu."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

import infera_gpu
from infera_gpu.devices import cuda
from tests import fake_cupy
from tests.compat_support import CPU, FEEDS, MODEL, both, quiet, refused
from tests.text import parse

X, I = FEEDS["x"], FEEDS["i"]


def session_of(ort: Any) -> Any:
    return ort.InferenceSession(MODEL, quiet(ort), providers=CPU)


# ---- OrtValue


@both
def test_a_value_describes_itself(ort: Any) -> None:
    value = ort.OrtValue.ortvalue_from_numpy(X)
    assert (value.shape(), value.data_type(), value.element_type()) == ([2, 4], "tensor(float)", TensorProto.FLOAT)
    assert (value.device_name(), value.tensor_size_in_bytes()) == ("cpu", X.nbytes)
    assert value.is_tensor()
    assert value.has_value()
    assert not value.is_sparse_tensor()
    assert not value.is_tensor_sequence()
    np.testing.assert_array_equal(value.numpy(), X)
    np.testing.assert_array_equal(np.asarray(value), X)
    assert np.shares_memory(value.numpy(), X)
    assert not np.shares_memory(np.array(value, copy=True), X)
    assert np.asarray(value, np.float64).dtype == np.float64
    np.testing.assert_array_equal(np.from_dlpack(value), X)


@both
def test_a_value_shares_the_memory_of_an_array(ort: Any) -> None:
    array = X.copy()
    value = ort.OrtValue.ortvalue_from_numpy(array)
    assert value.data_ptr() == array.ctypes.data
    array[0, 0] = 5
    assert value.numpy()[0, 0] == 5
    value.update_inplace(np.ones((2, 4), np.float32))
    assert array[0, 0] == 1
    value.update_inplace(ort.OrtValue.ortvalue_from_numpy(X))
    np.testing.assert_array_equal(array, X)
    value.update_inplace(np.asfortranarray(2 * X))
    np.testing.assert_array_equal(array, 2 * X)
    with pytest.raises(refused(ort, infera_gpu.InputError)):
        value.update_inplace(np.ones((1, 4), np.float32))


@both
@pytest.mark.parametrize("shape", [[], [1], [3, 5], [2, 0, 3]], ids=str)
def test_values_from_shape_and_type(ort: Any, shape: list[int]) -> None:
    for element_type, name in ((np.float32, "float"), (np.int64, "int64"), (TensorProto.FLOAT16, "float16")):
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, element_type)
        assert (value.shape(), value.data_type()) == (shape, f"tensor({name})")


@both
@pytest.mark.parametrize("wrong", [[1, 2], np.array(["a"]), np.array(["a"], object)], ids=["list", "str", "object"])
def test_values_are_made_of_numeric_arrays(ort: Any, wrong: Any) -> None:
    with pytest.raises(refused(ort, infera_gpu.InputError)):
        ort.OrtValue.ortvalue_from_numpy(wrong)
    with pytest.raises(refused(ort, infera_gpu.DeviceError), match="device"):
        ort.OrtValue.ortvalue_from_numpy(X, "tpu", 0)


def test_values_refuse_what_onnxruntime_reinterprets() -> None:
    value = infera_gpu.OrtValue.ortvalue_from_numpy(np.zeros((2, 4), np.float32))
    with pytest.raises(infera_gpu.InputError, match=r"float64\[2, 4\], expected float32\[2, 4\]"):
        value.update_inplace(np.ones((2, 4)))
    with pytest.raises(infera_gpu.InputError, match="read-only"):
        infera_gpu.OrtValue.ortvalue_from_numpy(np.frombuffer(b"1234", np.uint8)).update_inplace(np.zeros(4, np.uint8))
    with pytest.raises(infera_gpu.InputError, match="99 is no element type"):
        infera_gpu.OrtValue.ortvalue_from_shape_and_type([1], 99)


@both
def test_values_as_feeds(ort: Any) -> None:
    feeds = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in FEEDS.items()}
    np.testing.assert_allclose(session_of(ort).run(["y"], feeds)[0], np.exp(X), rtol=1e-6)
    j, y = session_of(ort).run_with_ort_values(["j", "y"], feeds)
    assert j.numpy().tolist() == [0, 2]
    np.testing.assert_allclose(y.numpy(), np.exp(X), rtol=1e-6)


# ---- IOBinding


@both
def test_a_binding_follows_the_array_and_gives_what_is_bound(ort: Any) -> None:
    session, x = session_of(ort), X.copy()
    binding = session.io_binding()
    assert isinstance(binding, ort.IOBinding)
    binding.bind_cpu_input("x", x)
    binding.bind_cpu_input("i", I)
    assert binding.get_outputs() == []
    for name in ("j", "y", "j"):
        binding.bind_output(name)
    for _ in range(2):
        x += 1
        binding.synchronize_inputs()
        session.run_with_iobinding(binding, ort.RunOptions())
        binding.synchronize_outputs()
        j, y = binding.copy_outputs_to_cpu()
        assert not any(map(np.shares_memory, (j, y), (v.numpy() for v in binding.get_outputs())))
        assert j.tolist() == [0, 2]
        np.testing.assert_allclose(y, np.exp(x), rtol=1e-6)
        assert [v.data_type() for v in binding.get_outputs()] == ["tensor(int64)", "tensor(float)"]
    binding.clear_binding_outputs()
    with pytest.raises(refused(ort, infera_gpu.InputError), match="output"):
        session.run_with_iobinding(binding)
    binding.bind_output("y")
    binding.clear_binding_inputs()
    with pytest.raises(refused(ort, infera_gpu.InputError)):
        session.run_with_iobinding(binding)


@both
def test_memory_of_the_caller(ort: Any) -> None:
    session, y = session_of(ort), np.zeros((2, 4), np.float32)
    x = ort.OrtValue.ortvalue_from_numpy(X)
    binding = session.io_binding()
    binding.bind_input("x", x.device_name(), 0, np.float32, x.shape(), x.data_ptr())
    binding.bind_input("i", "cpu", 0, TensorProto.INT64, I.shape, I.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    j = ort.OrtValue.ortvalue_from_shape_and_type([2], np.int64)
    binding.bind_ortvalue_output("j", j)
    session.run_with_iobinding(binding)
    np.testing.assert_allclose(y, np.exp(X), rtol=1e-6)
    assert j.numpy().tolist() == [0, 2]
    assert binding.get_outputs()[1].data_ptr() == j.data_ptr()
    binding.bind_output("y", "cpu", 0, np.float32, [1, 4], y.ctypes.data)
    with pytest.raises(refused(ort, infera_gpu.InputError)):
        session.run_with_iobinding(binding)
    with pytest.raises(ValueError, match="shape"):
        binding.bind_output("y", buffer_ptr=y.ctypes.data)


@both
def test_the_output_of_one_run_is_the_input_of_the_next(ort: Any) -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Add(x, x) }").SerializeToString()
    session = ort.InferenceSession(model, providers=CPU)
    value = ort.OrtValue.ortvalue_from_numpy(np.ones(3, np.float32))
    for _ in range(3):
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", value)
        binding.bind_output("y")
        session.run_with_iobinding(binding)
        (value,) = binding.get_outputs()
    assert value.numpy().tolist() == [8, 8, 8]


def test_empty_memory_has_no_address() -> None:
    session = session_of(infera_gpu)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, [0, 4], 0)
    binding.bind_input("i", "cpu", 0, np.int64, [0], 0)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    assert binding.copy_outputs_to_cpu()[0].shape == (0, 4)


def test_mistakes_are_told_when_they_are_made() -> None:
    session = session_of(infera_gpu)
    binding = session.io_binding()
    with pytest.raises(infera_gpu.InputError, match="'q' is not an input; the inputs are: x, i"):
        binding.bind_cpu_input("q", X)
    with pytest.raises(infera_gpu.InputError, match="'q' is not an output; the outputs are: y, j, p"):
        binding.bind_output("q")
    with pytest.raises(infera_gpu.InputError, match=r"input 'i' is a list, expected a numeric numpy\.ndarray"):
        binding.bind_cpu_input("i", [1, 2])
    with pytest.raises(infera_gpu.InputError, match="another session"):
        session_of(infera_gpu).run_with_iobinding(binding)
    session.set_providers(CPU)
    with pytest.raises(infera_gpu.InputError, match="before set_providers"):
        session.run_with_iobinding(binding)


# ---- on a GPU: a stand-in for CuPy, which shows what is copied where, not that a GPU does it


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = fake_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object() if name == "cupy" else None)
    return fake


def on_gpu(model: bytes = MODEL) -> infera_gpu.InferenceSession:
    return infera_gpu.InferenceSession(model, providers=[("CUDAExecutionProvider", {"device_id": "0"}), *CPU])


def test_a_gpu_session_names_its_device(cupy: Any) -> None:
    session = on_gpu()
    assert session.get_providers() == infera_gpu.get_available_providers() == ["CUDAExecutionProvider", *CPU]
    assert session.get_provider_options() == {"CUDAExecutionProvider": {"device_id": "0"}, "CPUExecutionProvider": {}}
    assert infera_gpu.get_device() == "GPU"
    session.set_providers(CPU)
    assert session.get_providers() == CPU
    with pytest.raises(infera_gpu.InputError, match="device_id is 'first'"):
        infera_gpu.InferenceSession(MODEL, providers=[("CUDAExecutionProvider", {"device_id": "first"})])
    with pytest.raises(infera_gpu.DeviceError, match="cuda:7 does not exist"):
        infera_gpu.InferenceSession(MODEL, providers=[("CUDAExecutionProvider", {"device_id": 7})])


def test_values_and_outputs_stay_on_the_gpu(cupy: Any) -> None:
    session = on_gpu()
    binding = session.io_binding()
    x = infera_gpu.OrtValue.ortvalue_from_numpy(X, "cuda", 0)
    assert (x.device_name(), type(x.array)) == ("cuda", cupy.ndarray)
    binding.bind_ortvalue_input("x", x)
    binding.bind_cpu_input("i", I)
    binding.bind_output("y", "cuda")
    binding.bind_output("j")
    log: list[str] = session.session.device._stream.log  # type: ignore[attr-defined]
    log.clear()
    session.run_with_iobinding(binding)
    assert f"d2h {X.nbytes}" not in log
    assert f"h2d {X.nbytes}" not in log
    y, j = binding.get_outputs()
    assert (type(y.array), y.device_name(), j.device_name()) == (cupy.ndarray, "cuda", "cpu")
    np.testing.assert_allclose(y.numpy(), np.exp(X), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), np.exp(X), rtol=1e-6)
    with pytest.raises(ValueError, match="without a copy"):
        np.array(y, copy=False)
    y.update_inplace(X)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], X)
    np.testing.assert_allclose(session.run(["y"], {"x": y, "i": I})[0], np.exp(X), rtol=1e-6)


def test_a_shape_that_depends_on_data_goes_through_the_host(cupy: Any) -> None:
    model = parse("g (float[N] x) => (int64[1, K] at) { at = NonZero(x) }").SerializeToString()
    session = on_gpu(model)
    binding = session.io_binding()
    binding.bind_cpu_input("x", np.array([0, 1, 2], np.float32))
    binding.bind_output("at", "cuda", 0)
    session.run_with_iobinding(binding)
    (at,) = binding.get_outputs()
    assert (at.device_name(), type(at.array), at.numpy().tolist()) == ("cuda", cupy.ndarray, [[1, 2]])


def test_gpu_addresses_are_given_to_cupy_as_they_are(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bytes, by the CUDA array interface: CuPy makes such an array without a copy."""
    memory, plain, asked = cupy.asarray(X), cupy.asarray, []

    def asarray(given: Any) -> Any:
        if not isinstance(given, SimpleNamespace):
            return plain(given)
        asked.append(given.__cuda_array_interface__)
        return memory.view(np.uint8).reshape(-1)

    monkeypatch.setattr(cupy, "asarray", asarray)
    binding = on_gpu().io_binding()
    binding.bind_input("x", "cuda", 0, np.float32, X.shape, 4096)
    binding.bind_cpu_input("i", I)
    binding.bind_output("y")
    binding.execute()
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], np.exp(X), rtol=1e-6)
    assert asked == [{"shape": (X.nbytes,), "typestr": "|u1", "data": (4096, False), "version": 3}]

"""The same options and providers against onnxruntime and against infera_gpu."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnxruntime
import pytest

import infera_gpu
from tests.compat_support import CPU, FEEDS, MODEL, both, quiet, refused, without_gpu


def test_session_options_have_the_same_defaults() -> None:
    theirs, ours = onnxruntime.SessionOptions(), infera_gpu.SessionOptions()
    for field in dataclasses.fields(ours):
        if field.init and field.name != "log_severity_level":  # whose default changed between releases
            want, got = getattr(theirs, field.name), getattr(ours, field.name)
            kind = str if isinstance(got, str) else int
            assert kind(got) == kind(want), field.name


@both
def test_session_options_are_kept(ort: Any) -> None:
    options = ort.SessionOptions()
    for name in ("enable_cpu_mem_arena", "enable_mem_pattern", "enable_mem_reuse", "use_per_session_threads"):
        setattr(options, name, False)
        assert getattr(options, name) is False
    options.use_deterministic_compute = True
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.inter_op_num_threads = options.intra_op_num_threads = np.int64(1)
    options.log_severity_level, options.log_verbosity_level = 4, 0
    options.logid, options.profile_file_prefix = "id", "prefix"
    options.use_per_session_threads = True
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    with pytest.raises(RuntimeError, match="nope"):
        options.get_session_config_entry("nope")
    session = ort.InferenceSession(MODEL, sess_options=options, providers=CPU)
    assert session.get_session_options().logid == "id"
    np.testing.assert_allclose(session.run(["y"], FEEDS)[0], np.exp(FEEDS["x"]), rtol=1e-6)


@both
@pytest.mark.parametrize(
    ("name", "value"),
    [("intra_op_num_threads", "x"), ("execution_mode", "x"), ("enable_mem_pattern", "no"), ("logid", 3)],
)
def test_options_have_types(ort: Any, name: str, value: Any) -> None:
    with pytest.raises(TypeError):
        setattr(ort.SessionOptions(), name, value)
    with pytest.raises(AttributeError):
        ort.SessionOptions().no_such_option = 1
    with pytest.raises(TypeError):
        ort.InferenceSession(MODEL, 3)


@both
def test_free_dimensions(ort: Any) -> None:
    options = quiet(ort)
    options.add_free_dimension_override_by_name("N", 2)
    session = ort.InferenceSession(MODEL, options, providers=CPU)
    assert [a.shape for a in (*session.get_inputs(), *session.get_outputs())] == [[2, 4], [2], [2, 4], [2], [2, 4]]
    assert session.run(["j"], FEEDS)[0].tolist() == [0, 2]
    with pytest.raises(refused(ort, infera_gpu.InputError), match=r"[Ee]xpected"):
        session.run(["j"], {"x": FEEDS["x"][:1], "i": FEEDS["i"][:1]})


def test_what_options_cannot_do_is_refused() -> None:
    options = infera_gpu.SessionOptions()
    with pytest.raises(infera_gpu.InferaError, match=r"my_ops\.so.*CONTRIBUTING"):
        options.register_custom_ops_library("my_ops.so")
    with pytest.raises(infera_gpu.InferaError, match=r"DATA_BATCH.*by_name"):
        options.add_free_dimension_override_by_denotation("DATA_BATCH", 1)
    with pytest.raises(infera_gpu.InputError, match="'N' is -1"):
        options.add_free_dimension_override_by_name("N", -1)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [("enable_profiling", True, "profile"), ("optimized_model_filepath", "o.onnx", "plan_for")],
)
def test_files_that_are_not_written_are_told_of_once(name: str, value: Any, instead: str) -> None:
    options = infera_gpu.SessionOptions()
    setattr(options, name, value)
    with pytest.warns(UserWarning, match=f"{name}: no .* is written.*{instead}") as told:
        infera_gpu.InferenceSession(MODEL, options, providers=CPU)
    assert [w.filename for w in told] == [__file__]


# ---- providers


@both
@without_gpu
@pytest.mark.parametrize(
    "providers",
    [
        ["TensorrtExecutionProvider"],
        ["CUDAExecutionProvider"],
        ["TensorrtExecutionProvider", "CPUExecutionProvider"],
        ["CPUExecutionProvider", "OpenVINOExecutionProvider"],
        [("TensorrtExecutionProvider", {"trt_fp16_enable": True}), "CPUExecutionProvider"],
        ["CPUExecutionProvider", "CPUExecutionProvider"],
    ],
    ids=str,
)
def test_providers_that_do_not_work_are_passed_over_with_a_warning(ort: Any, providers: list[Any]) -> None:
    with pytest.warns(UserWarning, match=r"ExecutionProvider.*(not (in )?available|ignor)"):
        session = ort.InferenceSession(MODEL, quiet(ort), providers=providers)
    assert session.get_providers() == CPU
    with pytest.warns(UserWarning, match="ExecutionProvider"):
        session.set_providers(providers)
    assert session.get_providers() == CPU
    assert session.run(["j"], FEEDS)[0].tolist() == [0, 2]


@both
@without_gpu
@pytest.mark.parametrize("given", [{}, {"providers": None}, {"providers": []}, {"provider_options": [{}]}], ids=str)
def test_without_providers_the_best_device_is_taken(ort: Any, given: dict[str, Any]) -> None:
    assert ort.InferenceSession(MODEL, quiet(ort), **given).get_providers()[-1:] == CPU


@without_gpu
def test_a_warning_says_why_and_where() -> None:
    why = r"CUDAExecutionProvider is not available \(.*(infera-gpu\[cuda12\]|driver|GPU)"
    with pytest.warns(UserWarning, match=why) as told:
        infera_gpu.InferenceSession(MODEL, providers=["CUDAExecutionProvider"])
    assert [w.filename for w in told] == [__file__]


@pytest.mark.parametrize(
    ("providers", "options"),
    [
        ("CPUExecutionProvider", None),
        ([3], None),
        ([("CPUExecutionProvider",)], None),
        ([("CPUExecutionProvider", 3)], None),
        (CPU, [{}, {}]),
        ([("CPUExecutionProvider", {})], [{"a": "b"}]),
    ],
    ids=str,
)
def test_what_is_no_list_of_providers_is_refused(providers: Any, options: Any) -> None:
    """onnxruntime prints "EP Error" and takes the CPU."""
    with pytest.raises(infera_gpu.InputError, match="provider"):
        infera_gpu.InferenceSession(MODEL, providers=providers, provider_options=options)


@both
def test_keywords(ort: Any) -> None:
    session = ort.InferenceSession(MODEL, quiet(ort), CPU, [{}], enable_fallback=False, disabled_optimizers=["Fusion"])
    session.disable_fallback()
    session.enable_fallback()
    session.set_providers(CPU)
    assert session.get_providers() == CPU
    with pytest.raises(TypeError, match="no_such_keyword"):
        infera_gpu.InferenceSession(MODEL, no_such_keyword=1)  # type: ignore[call-arg]

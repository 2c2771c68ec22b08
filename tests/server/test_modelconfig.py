"""A Triton repository is served as its config.pbtxt says, and what has no effect is named."""

from __future__ import annotations

import base64
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import onnx
import pytest
from google.protobuf import text_format

from infera_server.errors import BadRequest
from infera_server.models import modelconfig
from infera_server.models.definition import Definition, define
from infera_server.models.discovery import Source, survey
from infera_server.models.ignored import RULES, ignored
from infera_server.models.limited import limited
from infera_server.models.modelconfig import ConfigError
from infera_server.models.repository import Repository
from infera_server.models.samples import run_samples
from infera_server.report import lines
from infera_server.settings import Settings
from tests.server.support import Running, doubler, hosting, until
from tests.text import parse

DOUBLE = "g (float[N, 4] x) => (float[N, 4] y) { y = Add(x, x) }"

IO = """
input [ { name: "x" data_type: TYPE_FP32 dims: [4] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [4] } ]
"""


def put(
    root: Path, name: str, config: str | None, *versions: str, model: str = DOUBLE, file: str = "model.onnx"
) -> Path:
    """A model's folder in a repository."""
    for version in versions or ("1",):
        folder = root / name / version
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(parse(model), folder / file)
    if config is not None:
        (root / name / "config.pbtxt").write_text(config)
    return root / name


@contextmanager
def repository(root: Path, **settings: Any) -> Iterator[Running]:
    with hosting(Repository(Settings(**settings), survey([root]).sources, rescan=lambda: survey([root]))) as running:
        yield running


def states(root: Path, **settings: Any) -> dict[str, str]:
    """State and reason of each version, by `model/version`, of a repository that is loaded and closed."""
    found = Repository(Settings(**settings), survey([root]).sources)
    found.load(lambda fn, arg: fn(arg))
    for model in found.ready():
        model.close()
    return {f"{e.source.name}/{e.source.version}": f"{e.state.value}: {e.reason}" for e in found.entries()}


def infer(running: Running, x: Any, model: str = "m", **more: Any) -> tuple[int, Any]:
    x = np.asarray(x, np.float32)
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}
    return running.infer(model, {"inputs": [tensor], **more})


def message(text: str) -> Any:
    config = text_format.Parse(text, modelconfig.new())
    modelconfig.check(config, "m")
    return config


# --- what is told --------------------------------------------------------------------------------------------------


def test_the_configuration_is_told_as_triton_tells_it(tmp_path: Path) -> None:
    put(tmp_path, "m", "max_batch_size: 64 platform: 'onnxruntime_onnx' dynamic_batching {}" + IO)
    with repository(tmp_path) as running:
        status, found = running.get("/v2/models/m/config")
    assert status == 200
    assert found == {
        "name": "m",
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "runtime": "",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 64,
        "input": [
            {"name": "x", "data_type": "TYPE_FP32", "format": "FORMAT_NONE", "dims": [4], "is_shape_tensor": False,
             "allow_ragged_batch": False, "optional": False, "is_non_linear_format_io": False}
        ],
        "output": [
            {"name": "y", "data_type": "TYPE_FP32", "dims": [4], "label_filename": "", "is_shape_tensor": False,
             "is_non_linear_format_io": False}
        ],
        "batch_input": [],
        "batch_output": [],
        "optimization": {
            "priority": "PRIORITY_DEFAULT",
            "input_pinned_memory": {"enable": True},
            "output_pinned_memory": {"enable": True},
            "gather_kernel_buffer_threshold": 0,
            "eager_batching": False,
        },
        "dynamic_batching": {
            "preferred_batch_size": [64],
            "max_queue_delay_microseconds": 0,
            "preserve_ordering": False,
            "priority_levels": 0,
            "default_priority_level": 0,
            "priority_queue_policy": {},
        },
        "instance_group": [
            {"name": "m", "kind": "KIND_CPU", "count": 1, "gpus": [], "secondary_devices": [], "profile": [],
             "passive": False, "host_policy": ""}
        ],
        "default_model_filename": "model.onnx",
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {},
        "model_warmup": [],
    }  # fmt: skip


# --- what is honoured ----------------------------------------------------------------------------------------------


def test_the_batch_is_left_out_of_dims_and_limited(tmp_path: Path) -> None:
    put(tmp_path, "m", "max_batch_size: 2" + IO)
    with repository(tmp_path) as running:
        assert running.get("/v2/models/m")[1]["inputs"][0]["shape"] == [-1, 4]
        assert infer(running, np.ones((2, 4)))[0] == 200
        status, reply = infer(running, np.ones((3, 4)))
        assert (status, "batch-size must be <= 2 for 'm'" in reply["error"]) == (400, True)


def test_a_batch_of_one_is_a_batch(tmp_path: Path) -> None:
    put(tmp_path, "m", "max_batch_size: 1" + IO)
    with repository(tmp_path) as running:
        assert infer(running, np.ones((1, 4)), outputs=[{"name": "y", "parameters": {"classification": 1}}])[1][
            "outputs"
        ][0]["shape"] == [1, 1]
        assert infer(running, np.ones((2, 4)))[0] == 400


def test_without_max_batch_size_there_is_no_batch(tmp_path: Path) -> None:
    put(tmp_path, "m", IO.replace("[4]", "[-1, 4]"))
    with repository(tmp_path, max_batch=2) as running:
        assert infer(running, np.ones((100, 4)))[0] == 200
        assert running.get("/v2/models/m/config")[1]["max_batch_size"] == 0


def test_an_operators_limit_goes_before_the_configurations(tmp_path: Path) -> None:
    put(tmp_path, "m", "max_batch_size: 32" + IO)
    with repository(tmp_path, max_batch=8) as running:
        assert infer(running, np.ones((9, 4)))[0] == 400


def test_fixed_dims_hold_where_the_model_is_open(tmp_path: Path) -> None:
    put(tmp_path, "m", "max_batch_size: 8" + IO, model="g (float[N, W] x) => (float[N, W] y) { y = Add(x, x) }")
    with repository(tmp_path) as running:
        assert infer(running, np.ones((1, 4)))[0] == 200
        status, reply = infer(running, np.ones((1, 5)))
        assert (status, "Expected [-1,4], got [1,5]" in reply["error"]) == (400, True)


def test_tensors_are_reshaped(tmp_path: Path) -> None:
    config = """
    max_batch_size: 4
    input [ { name: "x" data_type: TYPE_FP32 dims: [4] reshape { shape: [2, 2] } } ]
    output [ { name: "y" data_type: TYPE_FP32 dims: [1, 4] reshape { shape: [2, 2] } } ]
    """
    put(tmp_path, "m", config, model="g (float[N, 2, 2] x) => (float[N, 2, 2] y) { y = Transpose<perm=[0, 2, 1]>(x) }")
    with repository(tmp_path) as running:
        assert running.get("/v2/models/m")[1]["outputs"][0]["shape"] == [-1, 1, 4]
        reply = infer(running, [[1, 2, 3, 4], [5, 6, 7, 8]])[1]
        assert (reply["outputs"][0]["shape"], reply["outputs"][0]["data"]) == ([2, 1, 4], [1, 3, 2, 4, 5, 7, 6, 8])


def test_a_scalar_is_one_element(tmp_path: Path) -> None:
    put(tmp_path, "m", IO.replace("[4]", "[1]"), model="g (float x) => (float y) { y = Add(x, x) }")
    with repository(tmp_path) as running:
        reply = infer(running, [3.0])[1]
        assert (reply["outputs"][0]["shape"], reply["outputs"][0]["data"]) == ([1], [6.0])


def test_an_optional_input_may_be_left_out(tmp_path: Path) -> None:
    config = """
    input [ { name: "x" data_type: TYPE_FP32 dims: [2] }, { name: "b" data_type: TYPE_FP32 dims: [2] optional: true } ]
    """
    put(tmp_path, "m", config, model="g (float[2] x, float[2] b = {10, 20}) => (float[2] y) { y = Add(x, b) }")
    with repository(tmp_path) as running:
        assert infer(running, [1, 2])[1]["outputs"][0]["data"] == [11, 22]
        tensors = [{"name": n, "shape": [2], "datatype": "FP32", "data": [1, 2]} for n in ("x", "b")]
        assert running.infer("m", {"inputs": tensors})[1]["outputs"][0]["data"] == [2, 4]


def test_classes_have_labels(tmp_path: Path) -> None:
    folder = put(tmp_path, "m", "max_batch_size: 2" + IO.replace('"y"', '"y" label_filename: "labels.txt"'))
    (folder / "labels.txt").write_text("cat\ndog\n")
    with repository(tmp_path) as running:
        reply = infer(running, [[1, 4, 3, 2]], outputs=[{"name": "y", "parameters": {"classification": 3}}])[1]
        assert reply["outputs"][0]["data"] == ["8.000000:1:dog", "6.000000:2", "4.000000:3"]


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("", ["10"]),
        ("version_policy: { latest { num_versions: 2 } }", ["3", "10"]),
        ("version_policy: { all {} }", ["1", "3", "10"]),
        ("version_policy: { specific { versions: [1, 3, 7] } }", ["1", "3"]),
    ],
)
def test_the_version_policy_chooses(tmp_path: Path, policy: str, served: list[str]) -> None:
    put(tmp_path, "m", policy, "1", "3", "10")
    with repository(tmp_path) as running:
        assert running.get("/v2/models/m")[1]["versions"] == served
        assert infer(running, np.ones((1, 4)))[1]["model_version"] == served[-1]
        assert list(running.index()) == [f"m/{version}" for version in served]


def test_a_policy_that_chooses_nothing_is_said(tmp_path: Path) -> None:
    text = "at least one version must be available under the version policy of model 'm'"
    put(tmp_path, "m", "version_policy: { specific { versions: [7] } }")
    put(tmp_path, "n", None)
    with repository(tmp_path) as running:
        assert running.index() == {"m/1": f"UNAVAILABLE: {text}", "n/1": "READY"}
        with pytest.raises(BadRequest, match=f"^load failed for model 'm': {text}"):
            running.call(running.host.service.load_model("m"))


def test_the_models_file_has_the_name_that_is_given(tmp_path: Path) -> None:
    put(tmp_path, "m", 'default_model_filename: "net.bin"', file="net.bin")
    with repository(tmp_path) as running:
        assert infer(running, np.ones((1, 4)))[0] == 200


def test_the_classes_of_messages_are_never_collected() -> None:
    """protobuf can hand out one that is being collected: a model that was being loaded meanwhile ended the server."""
    kind = ref(type(modelconfig.new().dynamic_batching.default_queue_policy))
    gc.collect()
    assert kind() is not None


def test_the_queue_is_as_long_as_its_policy_says() -> None:
    policy = "default_queue_policy { max_queue_size: 7 default_timeout_microseconds: 5000 }"
    definition = Definition("m", [], message(f"max_batch_size: 8 dynamic_batching {{ {policy} }}"))
    tuned = definition.tuned(Settings())
    assert (tuned.max_batch, tuned.max_queue, definition.queue_timeout) == (8, 7, 0.005)
    levels = "dynamic_batching { priority_levels: 4 default_priority_level: 2 }"
    tuned = Definition("m", [], message(levels)).tuned(Settings())
    assert (tuned.priority_levels, tuned.default_priority) == (4, 2)
    threads = message(THREADS.format(3))
    assert Definition("m", [], threads).tuned(Settings()).threads == 3
    assert Definition("m", [], threads).tuned(Settings(threads=1)).threads == 1
    for default in (0, -1):
        assert Definition("m", [], message(THREADS.format(default))).tuned(Settings()).threads is None


def test_instances_say_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(group: str, gpus: int = 0, **settings: Any) -> list[str]:
        monkeypatch.setattr("infera_server.models.definition.gpu_count", lambda: gpus)
        return list(Definition("m", [], message(f"instance_group [ {group} ]")).devices(Settings(**settings)))

    assert devices("{ kind: KIND_CPU }") == ["cpu"]
    assert devices("{ count: 1 }") == []
    assert devices("{ kind: KIND_GPU gpus: [1] }", gpus=2) == ["cuda:1"]
    assert devices("{ gpus: [1] }, { gpus: [0, 1] }", gpus=2) == ["cuda:1", "cuda:0"]
    assert devices("{ gpus: [1, 0] }", gpus=2, pins={"m": "cuda:0"}) == ["cuda:1"], "the pin says which"
    assert devices("{ kind: KIND_GPU }", gpus=1) == []
    assert devices("{ kind: KIND_GPU }", device="cpu") == []
    for group, missing in (("{ kind: KIND_GPU }", 0), ("{ gpus: [0, 1] }", 1)):
        with pytest.raises(ConfigError, match=f"kind KIND_GPU but there is no GPU {missing}; --device says where"):
            devices(group, gpus=missing)


def test_samples_are_run_before_the_model_is_ready(tmp_path: Path) -> None:
    sample = """
    model_warmup [ {{ name: "s" batch_size: 2 count: 3
      inputs {{ key: "x" value {{ data_type: TYPE_FP32 dims: [4] {data} }} }} }} ]
    """
    folder = put(tmp_path, "m", None)
    (folder / "warmup").mkdir()
    (folder / "warmup" / "x").write_bytes(np.arange(4, dtype="<f4").tobytes())
    for data in ("zero_data: true", "random_data: true", 'input_data_file: "x"'):
        put(tmp_path, "m", "max_batch_size: 4" + IO + sample.format(data=data))
        assert states(tmp_path) == {"m/1": "READY: "}
    for change, text in (
        ('input_data_file: "../config.pbtxt"', "leads outside the model's folder"),
        ('input_data_file: "/etc/passwd"', "leads outside the model's folder"),
        ('input_data_file: "y"', f"'y' does not exist in {tmp_path / 'm' / 'warmup'}"),
        ("", "input 'x' needs zero_data, random_data or input_data_file"),
        ("zero_data: true dims: 5", "warm-up sample 's': input 'x' has 3 dimensions [2, 4, 5], expected"),
    ):
        put(tmp_path, "m", "max_batch_size: 4" + IO + sample.format(data=change))
        assert text in states(tmp_path)["m/1"]
    session = doubler()
    config = message("max_batch_size: 4" + sample.format(data='input_data_file: "x"'))
    assert run_samples(session, config, folder) == 3
    assert session.batches == [2, 2, 2]
    (folder / "warmup" / "x").write_bytes(b"short")
    put(tmp_path, "m", "max_batch_size: 4" + IO + sample.format(data='input_data_file: "x"'))
    assert "has 5 bytes, input 'x' needs 16" in states(tmp_path)["m/1"]


# --- what is refused -----------------------------------------------------------------------------------------------


BATCHED = "max_batch_size: 4" + IO
THREADS = 'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{}" }} }}'


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("max_batch_size: 4 name: 'n'", "directory name must equal model name"),
        ("max_batch_size: -1", "'max_batch_size' must be non-negative value for m"),
        ("platform: 'tensorrt_plan'", "unexpected platform type 'tensorrt_plan' for m"),
        ("backend: 'python'", "unable to find backend library for backend 'python'"),
        ("max_batch: 4", 'has no field named "max_batch". Did you mean max_batch_size?'),
        ("dynamic_batching { prefered_batch_size: 4 }", "Did you mean preferred_batch_size?"),
        ("zzz: 4", 'has no field named "zzz"'),
        (BATCHED.replace("FP32", "INT32"),
         "configuration expects datatype TYPE_INT32 for input 'x', model provides TYPE_FP32"),
        (BATCHED.replace('"x"', '"z"'), "unexpected inference input 'z', allowed inputs are: x"),
        (BATCHED.replace('"y"', '"z"'), "unexpected inference output 'z', allowed outputs are: y"),
        (BATCHED.replace("[4]", "[5]"),
         ("model 'm', tensor 'x': the model expects 2 dimensions (shape [-1,4]) but the model configuration specifies "
         "2 dimensions (an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, "
         "making complete shape [-1,5])")),
        (IO, "the model expects 2 dimensions (shape [-1,4]) but the model configuration specifies 1 dimensions"),
        (BATCHED.replace("dims: [4]", "dims: [4] optional: true", 1),
         "optional input 'x' is not supported for models that support batching"),
        (IO.replace("[4]", "[-1, 4]").replace("dims", "optional: true dims", 1), "input 'x' cannot be optional"),
        (BATCHED.replace("dims: [4]", "dims: [4] reshape { shape: [5] }", 1),
         "different size for dims and reshape"),
        (BATCHED.replace("dims: [4]", "dims: [4] allow_ragged_batch: true", 1), "ragged"),
        (BATCHED.replace("dims: [4]", "dims: [0]", 1), "dimension must be integer >= 1, or -1"),
        ("max_batch_size: 4 dynamic_batching { preferred_batch_size: 8 }", "preferred size must be <= max batch size"),
        ("dynamic_batching { priority_levels: 2 default_priority_level: 3 }", "default priority level"),
        (BATCHED + "dynamic_batching { priority_levels: 3 default_priority_level: 1"
         " priority_queue_policy { key: 7 value { max_queue_size: 1 } } }",
         "priority queue policy must have priority level in range [1, 3] for m"),
        (BATCHED.replace("dims: [4]", "dims: [4] format: FORMAT_NCHW", 1),
         "model input NHWC/NCHW require 3 dims for m"),
        ("instance_group [ { kind: KIND_CPU gpus: [0] } ]",
         "instance group m_0 of model m has kind KIND_CPU but specifies one or more GPUs"),
        ("instance_group [ { kind: KIND_CPU }, { name: 'g' kind: KIND_MODEL gpus: [0] } ]",
         "instance group g of model m has kind KIND_MODEL but specifies one or more GPUs"),
        (THREADS.format("many"), "parameters.intra_op_thread_count must be an integer up to 4096, is 'many'"),
        (THREADS.format(4097), "parameters.intra_op_thread_count must be an integer up to 4096, is '4097'"),
        ("default_model_filename: '../1/model.onnx'", "leads outside the model's folder"),
        ("default_model_filename: '/etc/passwd'", "leads outside the model's folder"),
        ("default_model_filename: 'no.onnx'", "does not exist"),
        ("platform: 'ensemble' ensemble_scheduling {}", "must specify 'step' for ensemble 'm'"),
        ("platform: 'ensemble'", "ensemble scheduling must be set for ensemble m whose platform is ensemble"),
        ("ensemble_scheduling {}", "ensemble scheduling cannot be set for model 'm' whose platform is not ensemble"),
        (BATCHED.replace('"y"', '"y" label_filename: "../../x"'), "leads outside the model's folder"),
        (BATCHED.replace('"y"', '"y" label_filename: "nope"'), "does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_the_reason_in_the_index(tmp_path: Path, config: str, text: str) -> None:
    put(tmp_path, "m", config)
    put(tmp_path, "ok", None)
    found = states(tmp_path)
    assert found["ok/1"] == "READY: "
    assert found["m/1"].startswith("UNAVAILABLE: ")
    assert text in found["m/1"]


def test_a_model_whose_batch_is_fixed_cannot_be_batched(tmp_path: Path) -> None:
    put(tmp_path, "m", "max_batch_size: 4", model="g (float[2, 4] x) => (float[2, 4] y) { y = Add(x, x) }")
    text = "the first dimension must be -1; but shape expected by the model is [2,4]"
    assert text in states(tmp_path)["m/1"]


def test_no_link_leads_out_of_the_repository(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "repository"
    put(outside, "o", "", "1")
    (root / "a" / "1").mkdir(parents=True)
    (root / "a" / "1" / "model.onnx").symlink_to(outside / "o" / "1" / "model.onnx")
    (root / "b").symlink_to(outside / "o")
    put(root, "c", None)
    (root / "c" / "config.pbtxt").symlink_to(outside / "o" / "config.pbtxt")
    found = survey([root])
    assert [source.name for source in found.sources] == ["c"]
    assert all("leads outside" in found.problems[name].reason for name in ("a", "b"))
    with pytest.raises(ConfigError, match="leads outside"):
        define("c", found.sources)


# --- what is ignored -----------------------------------------------------------------------------------------------


def test_what_is_ignored_is_named_in_the_index(tmp_path: Path) -> None:
    put(tmp_path, "m", "max_batch_size: 4 dynamic_batching { max_queue_delay_microseconds: 100 }" + IO)
    assert states(tmp_path)["m/1"].startswith("READY: ignored: dynamic_batching.max_queue_delay_microseconds: ")


def test_a_batch_that_is_not_proven_and_a_version_that_is_not_there_are_named(tmp_path: Path) -> None:
    mixing = "g (float[N, 4] x) => (float[N, 4] y) { m = ReduceMax<keepdims=1>(x) y = Sub(x, m) }"
    put(tmp_path, "m", "version_policy: { specific { versions: [1, 9] } }" + BATCHED, model=mixing)
    (state,) = states(tmp_path).values()
    assert state.startswith("READY: ignored: version_policy.specific: version 9 is not there; max_batch_size: requests")
    assert "run one by one, batching is off" in state


def test_a_limit_of_the_server_that_holds_in_place_of_a_setting_is_named(tmp_path: Path) -> None:
    policy = "{ max_queue_size: 10000 default_timeout_microseconds: 60000000 }"
    asked = message(
        f"max_batch_size: 32 dynamic_batching {{ default_queue_policy {policy} priority_queue_policy [ "
        f"{{ key: 2 value {policy} }}, {{ key: 10 value {{ max_queue_size: 1 }} }} ] }} {THREADS.format(8)}"
    )
    assert limited(asked, Settings(max_queue=10000, request_timeout=60, priority_levels=10), "m", ["cpu"]) == []
    assert limited(asked, Settings(max_batch=8, threads=1), "m", ["cpu"]) == [
        "max_batch_size: 32 is over --max-batch 8",
        "dynamic_batching.priority_queue_policy[10]: levels are 1 to 9",
        "dynamic_batching.default_queue_policy.max_queue_size: 10000 is over --max-queue 256",
        "dynamic_batching.default_queue_policy.default_timeout_microseconds: 60 s is over --request-timeout 30",
        "dynamic_batching.priority_queue_policy[2].max_queue_size: 10000 is over --max-queue 256",
        "dynamic_batching.priority_queue_policy[2].default_timeout_microseconds: 60 s is over --request-timeout 30",
        "parameters.intra_op_thread_count: --threads 1 goes before it",
    ]
    put(tmp_path, "m", f"dynamic_batching {{ default_queue_policy {policy} }} {BATCHED}")
    assert "max_queue_size: 10000 is over --max-queue 256; " in states(tmp_path)["m/1"]


def test_a_configuration_that_is_not_utf8_says_so(tmp_path: Path) -> None:
    folder = put(tmp_path, "m", None)
    (folder / "config.pbtxt").write_bytes(b"# caf\xe9\n")
    assert states(tmp_path)["m/1"] == f"UNAVAILABLE: {folder / 'config.pbtxt'} cannot be read: byte 5 is not UTF-8"


def test_a_device_that_an_option_says_in_place_of_the_groups_is_named(tmp_path: Path) -> None:
    def named(groups: str, *devices: str, **settings: Any) -> list[str]:
        return limited(message(f"instance_group [ {groups} ]"), Settings(**settings), "m", devices)

    first, cpu = "{ kind: KIND_GPU gpus: [0] }", ["instance_group: --device cpu goes before it"]
    for groups in (first, "{ gpus: [0] }", "{ kind: KIND_GPU }"):
        assert named(groups, "cpu", device="cpu") == cpu
        assert named(groups, "cuda:0", device="cuda") == []
    assert named(first, "cuda:1", device="cuda:1") == ["instance_group: --device cuda:1 goes before it"]
    assert named(first, "cuda:1", pins={"m": "cuda:1"}) == ["instance_group: --pin m=cuda:1 goes before it"]
    assert named("{ kind: KIND_GPU }", "cuda:1", device="cuda:1") == []
    assert named("{ kind: KIND_CPU }", "cuda:0", device="auto") == ["instance_group: --device auto goes before it"]
    assert named("{ gpus: [0, 1] }", "cuda:0", pins={"m": "cuda:0"}) == [
        "instance_group: --pin m=cuda:0 goes before it"
    ]
    for groups in ("", "{ count: 1 }", "{ kind: KIND_CPU }"):
        assert named(groups, "cpu", device="cpu") == []
    assert named("{ gpus: [0] }", "cpu") == [], "nothing goes before it"
    put(tmp_path, "m", f"instance_group [ {first} ]")
    assert states(tmp_path, device="cpu")["m/1"] == f"READY: ignored: {cpu[0]}"


def test_a_version_that_only_a_label_names_is_named(tmp_path: Path) -> None:
    (put(tmp_path, "m", None) / "infera.toml").write_text("[labels]\nstable = 9\nold = 1\n")
    assert states(tmp_path)["m/1"] == "READY: ignored: infera.toml: it names version 9, which is not served"


def test_the_report_is_of_the_models_own_settings(tmp_path: Path) -> None:
    policy = "default_queue_policy { max_queue_size: 7 default_timeout_microseconds: 5000000 }"
    put(tmp_path, "m", f"dynamic_batching {{ {policy} }} {THREADS.format(3)} {BATCHED}")
    settings = Settings()
    with repository(tmp_path) as running:
        (entry,) = running.host.repository.entries()
        found = list(lines(entry, settings))
    assert "m version 1: device: cpu, 3 threads: as set" in found
    (limits,) = (line for line in found if ": limits: " in line)
    assert "limits: 7 waiting requests, " in limits
    assert limits.endswith(", 5 s a request")


EXAMPLES = """
runtime: "x"
optimization { graph { level: 1 } priority: PRIORITY_MAX cuda { graphs: true } execution_accelerators {}
  input_pinned_memory { enable: true } output_pinned_memory { enable: true } gather_kernel_buffer_threshold: 1
  eager_batching: true }
cc_model_filenames { key: "8.0" value: "x" }
metric_tags { key: "a" value: "b" }
model_operations { op_library_filename: "x" }
model_transaction_policy { decoupled: true }
model_repository_agents { agents { name: "x" } }
model_metrics {}
response_cache { enable: true }
instance_group [ { count: 2 gpus: [0, 1] rate_limiter {}
  secondary_devices {} profile: "x" passive: true host_policy: "x" } ]
"""
NARROW = IO.replace(" dims", " is_shape_tensor: true is_non_linear_format_io: true dims")
PIPED = """
platform: "ensemble" default_model_filename: "x" model_warmup { name: "x" }
instance_group [ { kind: KIND_CPU }, { kind: KIND_GPU } ]
ensemble_scheduling { max_inflight_requests: 1 step {}, step { model_namespace: "x" } }
"""
BATCHING = "dynamic_batching { preferred_batch_size: 4 max_queue_delay_microseconds: 1 preserve_ordering: true }"


def test_every_setting_without_effect_is_found_where_it_is_asked_for() -> None:
    asked = [message(f"{EXAMPLES} max_batch_size: 4 {more}") for more in (BATCHING, "sequence_batching {}", NARROW)]
    asked.append(message(PIPED))
    found = {note.partition(":")[0] for config in asked for note in ignored(config)}
    assert found == {rule.setting for rule in RULES}
    assert ignored(message("max_batch_size: 4 instance_group [ { count: 1 } ]" + IO)) == []
    names = message('parameters { key: "A" value { string_value: "1" } }')
    assert ignored(names) == ["parameters.A: the runtime chooses its own kernels and memory"]


HEEDED = """
name platform backend version_policy max_batch_size parameters model_warmup response_cache default_model_filename
input.name input.data_type input.format input.dims input.reshape input.allow_ragged_batch input.optional
output.name output.data_type output.dims output.reshape output.label_filename batch_input batch_output
dynamic_batching.priority_levels dynamic_batching.default_priority_level dynamic_batching.default_queue_policy
dynamic_batching.priority_queue_policy instance_group.name instance_group.kind instance_group.gpus sequence_batching
ensemble_scheduling.step.model_name ensemble_scheduling.step.model_version ensemble_scheduling.step.input_map
ensemble_scheduling.step.output_map
"""
"""Settings that something is made of, that are told to clients as they are, or that are refused if they cannot be."""


def settings_of(kind: Any, prefix: str = "") -> Iterator[str]:
    """The dotted paths of all settings in a message."""
    for field in kind.fields:
        below = field.message_type
        if below is None or below.GetOptions().map_entry:
            yield prefix + field.name
        else:
            yield from [prefix + field.name] if not below.fields else settings_of(below, f"{prefix}{field.name}.")


def test_every_setting_there_is_is_heeded_or_named() -> None:
    known = {*HEEDED.split(), *(rule.setting for rule in RULES)}
    paths = list(settings_of(modelconfig.new().DESCRIPTOR))
    assert "optimization.cuda.graphs" in paths
    assert [path for path in paths if not any(f"{path}.".startswith(f"{setting}.") for setting in known)] == []


# --- a load request's own ------------------------------------------------------------------------------------------


def test_a_load_request_brings_its_configuration(tmp_path: Path) -> None:
    put(tmp_path, "m", "max_batch_size: 4" + IO, "1", "2")
    with repository(tmp_path) as running:
        load = running.host.service.load_model
        running.call(load("m", json.dumps({"max_batch_size": 2, "version_policy": {"specific": {"versions": [1]}}})))
        assert running.get("/v2/models/m/config")[1]["max_batch_size"] == 2
        until(lambda: running.index() == {"m/1": "READY", "m/2": "UNAVAILABLE: unloaded; kept for a rollback"})
        for bad, text in (
            ("{bad", "failed to load 'm', failed to poll from model repository: Invalid config override"),
            ('{"foo": 1}', "Invalid config override"),
            ('{"max_batch_size": -3}', "must be non-negative"),
            ("[" * 10000, "Invalid config override"),
            (" " * (2 << 20), "Invalid config override: over"),
            ('{"version_policy": {"specific": {}}}', "load failed for model 'm': at least one version"),
        ):
            with pytest.raises(BadRequest, match=text):
                running.call(load("m", bad))
        assert running.index()["m/1"] == "READY"
        running.call(load("m"))
        assert running.get("/v2/models/m")[1]["versions"] == ["2"]
        until(lambda: running.index() == {"m/1": "UNAVAILABLE: unloaded; kept for a rollback", "m/2": "READY"})
        running.call(running.host.service.unload_model("m"))
        until(lambda: running.index() == {"m/1": "UNAVAILABLE: unloaded", "m/2": "UNAVAILABLE: unloaded"})


def test_what_is_told_can_be_loaded(tmp_path: Path) -> None:
    """Of a file alone too, and of one whose name in its folder is its own."""
    onnx.save(parse(DOUBLE), tmp_path / "mlp.onnx")
    put(tmp_path, "m", None, file="net.onnx")
    with repository(tmp_path) as running:
        for name, file in (("mlp", "mlp.onnx"), ("m", "net.onnx")):
            told = running.get(f"/v2/models/{name}/config")[1]
            assert told["default_model_filename"] == file
            running.call(running.host.service.load_model(name, json.dumps(told)))
            assert running.get(f"/v2/models/{name}/config")[1] == told


def test_a_file_alone_has_no_labels(tmp_path: Path) -> None:
    onnx.save(parse(DOUBLE), tmp_path / "m.onnx")
    output = {"name": "y", "data_type": "TYPE_FP32", "dims": [4], "label_filename": "labels.txt"}
    with repository(tmp_path) as running:
        with pytest.raises(BadRequest, match="load failed for model 'm'"):
            running.call(running.host.service.load_model("m", json.dumps({"max_batch_size": 4, "output": [output]})))
        assert running.index() == {"m/1": "READY: label_filename 'labels.txt' needs a model's folder"}


def test_a_load_request_brings_its_files(tmp_path: Path) -> None:
    put(tmp_path, "m", None)
    triple = parse("g (float[N, 4] x) => (float[N, 4] y) { d = Add(x, x) y = Add(d, x) }").SerializeToString()
    with repository(tmp_path, max_load_bytes=10_000) as running:
        load = running.host.service.load_model
        running.call(load("m", "{}", {"file:7/model.onnx": triple}))
        reply = infer(running, np.ones((1, 4)))[1]
        assert (reply["model_version"], reply["outputs"][0]["data"]) == ("7", [3.0] * 4)
        running.call(load("new", "{}", {"1/model.onnx": triple}))
        assert infer(running, np.ones((1, 4)), "new")[1]["outputs"][0]["data"] == [3.0] * 4
        for files, config, text in (
            ({"1/model.onnx": triple}, None, "Load parameter 'config' must be specified for model file override"),
            ({"file:../x": triple}, "{}", "must stay within model directory"),
            ({"file:/tmp/x": triple}, "{}", "must stay within model directory"),
            ({"file:1/\0": triple}, "{}", "must stay within model directory"),
            ({"file:x": triple}, "{}", "at least one version must be available"),
            ({"file:1/model.onnx": b"x"}, "{}", "version 1 is at UNAVAILABLE state: "),
            ({"file:1/model.onnx": b"x" * 10_001}, "{}", "10,001 bytes, at most 10,000 are accepted"),
            ({"file:1/a": b"x", "file:1/a/b": b"x"}, "{}", "cannot be kept"),
        ):
            with pytest.raises(BadRequest, match=text):
                running.call(load("m", config, files))
        for name in ("", "a/b", "stats", ".", ".."):
            with pytest.raises(BadRequest, match=f"'{name}' is no name that a model can be served under"):
                running.call(load(name, "{}", {"1/model.onnx": triple}))
        assert infer(running, np.ones((1, 4)))[1]["model_version"] == "7"


def test_a_load_request_may_be_as_large_as_its_files(tmp_path: Path) -> None:
    """Over REST, where they are in base64: `max_body_bytes` is for inference."""
    put(tmp_path, "m", None)
    weights = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Add(x, x) }").SerializeToString()
    with repository(tmp_path, max_load_bytes=400_000, max_body_bytes=1_000) as running:

        def load(padding: int) -> tuple[int, bytes]:
            files = {"1/model.onnx": weights, "1/padding": bytes(padding)}
            parameters = {f"file:{name}": base64.b64encode(content).decode() for name, content in files.items()}
            document = json.dumps({"parameters": {"config": "{}", **parameters}})
            status, _, body = running.request("POST", "/v2/repository/models/m/load", document)
            return status, body

        assert load(300_000) == (200, b"")
        status, body = load(400_000)
        assert (status, b"at most 400,000 are accepted" in body) == (400, True)
        assert load(500_000)[0] == 413


def test_a_source_alone_has_no_configuration() -> None:
    definition = define("m", [Source("m", "2", Path("m.onnx")), Source("m", "1", Path("m.onnx"))])
    assert [source.version for source in definition.sources] == ["2", "1"]
    assert definition.config is None

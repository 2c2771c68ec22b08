"""Calls of the V2 gRPC protocol, right and wrong, for a model `mlp`: input [N, 784] -> output [N, 10], at most 64 rows.

What a real tritonserver answers to them is in `grpc_replies.json`, which is written anew by

    python -m tests.server.grpc_cases 127.0.0.1:8001

against a tritonserver that serves nothing but this model.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format

from infera_server.protocols.protos import message, pool

RECORDED = Path(__file__).with_name("grpc_replies.json")
SERVICE = "inference.GRPCInferenceService"

PATIENCE = 60.0
"""Seconds that an answer may take."""

ZEROS = bytes(784 * 4)


@dataclass(frozen=True)
class Reply:
    """A status code's name, and its text or the message in JSON."""

    code: str
    text: str = ""
    message: Any = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A request to a method."""

    name: str
    method: str
    request: Any


def infer(inputs: Any = None, raw: list[bytes] | None = None, **more: Any) -> Any:
    """A ModelInferRequest: of one row of zeros where nothing else is said."""
    request = message("inference.ModelInferRequest")(model_name=more.pop("model_name", "mlp"))
    json_format.ParseDict({"inputs": [tensor()] if inputs is None else inputs} | more, request)
    request.raw_input_contents.extend([ZEROS] if raw is None else raw)
    return request


def tensor(shape: tuple[int, ...] = (1, 784), **more: Any) -> dict[str, Any]:
    """An input's description."""
    return {"name": "input", "datatype": "FP32", "shape": list(shape)} | more


def request(kind: str, /, **members: Any) -> Any:
    """A message by its name without the package."""
    return json_format.ParseDict(members, message(f"inference.{kind}")())


def call(channel: grpc.Channel, method: str, sent: Any, metadata: Sequence[tuple[str, str]] = ()) -> Reply:
    """What a server answers."""
    kind = pool().FindServiceByName(SERVICE).methods_by_name[method].output_type.full_name
    stub = channel.unary_unary(
        f"/{SERVICE}/{method}",
        request_serializer=lambda m: m.SerializeToString(),
        response_deserializer=message(kind).FromString,
    )
    try:
        return Reply("OK", message=_as_dict(stub(sent, timeout=PATIENCE, metadata=metadata)))
    except grpc.RpcError as error:
        return Reply(error.code().name, error.details() or "")


def _as_dict(reply: Any) -> Any:
    return json_format.MessageToDict(reply, preserving_proto_field_name=True, descriptor_pool=pool())


def plain(text: str) -> str:
    """A text of Triton's without what is not told here: the request's id in front, advice on configurations behind."""
    return re.sub(r" (NOTE: .*)?$", "", re.sub(r"^\[request id: [^]]*\] ", "", text))


@cache
def recorded(path: Path = RECORDED) -> dict[str, Reply]:
    """Triton's replies by the cases' names."""
    return {
        name: Reply(reply["code"], plain(reply.get("text", "")), reply.get("message") or {})
        for name, reply in json.loads(path.read_text()).items()
    }


def _parameter(name: str, **value: Any) -> dict[str, Any]:
    return {"parameters": {name: value}}


def _output(**parameters: Any) -> dict[str, Any]:
    return {"outputs": [{"name": "output", "parameters": parameters}]}


def _region(**parameters: Any) -> list[Any]:
    return [tensor(parameters=parameters)]


CASES = [
    # --- inference
    Case("infer", "ModelInfer", infer()),
    Case("infer with an id", "ModelInfer", infer(id="q1")),
    Case("infer a version", "ModelInfer", infer(model_version="1")),
    Case("infer typed", "ModelInfer", infer([tensor(contents={"fp32_contents": [0.0] * 784})], [])),
    Case("infer one output", "ModelInfer", infer(outputs=[{"name": "output"}])),
    Case(
        "infer binary_data_size", "ModelInfer", infer([tensor(parameters={"binary_data_size": {"int64_param": 3136}})])
    ),
    Case("classification", "ModelInfer", infer(**_output(classification={"int64_param": 3}))),
    Case("classification of more than there are", "ModelInfer", infer(**_output(classification={"int64_param": 99}))),
    Case("classification zero", "ModelInfer", infer(**_output(classification={"int64_param": 0}))),
    Case("classification text", "ModelInfer", infer(**_output(classification={"string_param": "3"}))),
    Case("unknown model", "ModelInfer", infer(model_name="nope")),
    Case("no model", "ModelInfer", infer(model_name="")),
    Case("unknown version", "ModelInfer", infer(model_version="9")),
    Case("version zero", "ModelInfer", infer(model_version="0")),
    Case("version no number", "ModelInfer", infer(model_version="one")),
    Case("version with a tail", "ModelInfer", infer(model_version="1x")),
    Case("version negative", "ModelInfer", infer(model_version="-3")),
    Case("version latest", "ModelInfer", infer(model_version="-1")),
    Case("version huge", "ModelInfer", infer(model_version="99999999999999999999")),
    Case("unknown input", "ModelInfer", infer([tensor(name="zz")])),
    Case("no input", "ModelInfer", infer([], [])),
    Case("input twice", "ModelInfer", infer([tensor(), tensor()], [ZEROS, ZEROS])),
    Case("two inputs", "ModelInfer", infer([tensor(), tensor(name="zz")], [ZEROS, ZEROS])),
    Case("unknown output", "ModelInfer", infer(outputs=[{"name": "zz"}])),
    Case("wrong datatype", "ModelInfer", infer([tensor(datatype="INT32")])),
    Case("unknown datatype", "ModelInfer", infer([tensor(datatype="FP31")])),
    Case("no datatype", "ModelInfer", infer([tensor(datatype="")])),
    Case("wrong shape", "ModelInfer", infer([tensor((1, 783))], [ZEROS[4:]])),
    Case("wrong rank", "ModelInfer", infer([tensor((784,))])),
    Case("no shape", "ModelInfer", infer([tensor(())])),
    Case("negative shape", "ModelInfer", infer([tensor((-1, 784))])),
    Case("no rows", "ModelInfer", infer([tensor((0, 784))], [b""])),
    Case("too many rows", "ModelInfer", infer([tensor((65, 784))], [ZEROS * 65])),
    Case("too many bytes", "ModelInfer", infer(raw=[ZEROS + b"1234"])),
    Case("too few bytes", "ModelInfer", infer(raw=[ZEROS[4:]])),
    Case("no bytes", "ModelInfer", infer(raw=[b""])),
    Case("no data", "ModelInfer", infer(raw=[])),
    Case("data too many", "ModelInfer", infer(raw=[ZEROS, ZEROS])),
    Case("typed and raw", "ModelInfer", infer([tensor(contents={"fp32_contents": [0.0] * 784})])),
    Case("typed empty and raw", "ModelInfer", infer([tensor(contents={})])),
    Case("typed empty", "ModelInfer", infer([tensor(contents={})], [])),
    Case("typed too few", "ModelInfer", infer([tensor(contents={"fp32_contents": [0.0] * 3})], [])),
    Case("typed otherwise", "ModelInfer", infer([tensor(contents={"int64_contents": [1]})], [])),
    Case("typed int", "ModelInfer", infer([tensor(contents={"int_contents": [1]})], [])),
    Case("typed uint", "ModelInfer", infer([tensor(contents={"uint_contents": [1]})], [])),
    Case("typed bool", "ModelInfer", infer([tensor(contents={"bool_contents": [True]})], [])),
    Case("typed bytes", "ModelInfer", infer([tensor(contents={"bytes_contents": ["YQ=="]})], [])),
    Case(
        "typed twice",
        "ModelInfer",
        infer([tensor(contents={"fp32_contents": [0.0] * 784, "fp64_contents": [1.0]})], []),
    ),
    Case("priority", "ModelInfer", infer(**_parameter("priority", int64_param="1"))),
    Case("priority unsigned", "ModelInfer", infer(**_parameter("priority", uint64_param="1"))),
    Case("priority text", "ModelInfer", infer(**_parameter("priority", string_param="1"))),
    Case("priority negative", "ModelInfer", infer(**_parameter("priority", int64_param="-1"))),
    Case("timeout", "ModelInfer", infer(**_parameter("timeout", int64_param="10000000"))),
    Case("timeout text", "ModelInfer", infer(**_parameter("timeout", string_param="1"))),
    Case("sequence_id bool", "ModelInfer", infer(**_parameter("sequence_id", bool_param=True))),
    Case("sequence_start int", "ModelInfer", infer(**_parameter("sequence_start", int64_param="1"))),
    Case("sequence_end int", "ModelInfer", infer(**_parameter("sequence_end", int64_param="1"))),
    Case("parameter text", "ModelInfer", infer(**_parameter("mine", string_param="x"))),
    Case("parameter double", "ModelInfer", infer(**_parameter("mine", double_param=0.5))),
    Case("parameter unsigned", "ModelInfer", infer(**_parameter("mine", uint64_param="1"))),
    Case("parameter without value", "ModelInfer", infer(**_parameter("mine"))),
    Case("parameter reserved", "ModelInfer", infer(**_parameter("triton_x", bool_param=True))),
    Case(
        "parameter empty final",
        "ModelInfer",
        infer(**_parameter("triton_enable_empty_final_response", bool_param=True)),
    ),
    Case(
        "parameter empty final int",
        "ModelInfer",
        infer(**_parameter("triton_enable_empty_final_response", int64_param="1")),
    ),
    # --- shared memory
    Case(
        "region unknown",
        "ModelInfer",
        infer(_region(shared_memory_region={"string_param": "no"}, shared_memory_byte_size={"int64_param": 3136}), []),
    ),
    Case("region without size", "ModelInfer", infer(_region(shared_memory_region={"string_param": "no"}), [])),
    Case(
        "region no text",
        "ModelInfer",
        infer(_region(shared_memory_region={"int64_param": 1}, shared_memory_byte_size={"int64_param": 3136}), []),
    ),
    Case(
        "region size text",
        "ModelInfer",
        infer(_region(shared_memory_region={"string_param": "no"}, shared_memory_byte_size={"string_param": "1"}), []),
    ),
    Case(
        "region offset text",
        "ModelInfer",
        infer(
            _region(
                shared_memory_region={"string_param": "no"},
                shared_memory_offset={"string_param": "1"},
                shared_memory_byte_size={"int64_param": 3136},
            ),
            [],
        ),
    ),
    Case("region size alone", "ModelInfer", infer(_region(shared_memory_byte_size={"int64_param": 3136}), [])),
    Case("region offset alone", "ModelInfer", infer(_region(shared_memory_offset={"int64_param": 0}), [])),
    Case(
        "region and contents",
        "ModelInfer",
        infer(
            [
                tensor(
                    contents={"fp32_contents": [0.0] * 784},
                    parameters={
                        "shared_memory_region": {"string_param": "no"},
                        "shared_memory_byte_size": {"int64_param": 3136},
                    },
                )
            ],
            [],
        ),
    ),
    Case(
        "output region unknown",
        "ModelInfer",
        infer(**_output(shared_memory_region={"string_param": "no"}, shared_memory_byte_size={"int64_param": 40})),
    ),
    Case(
        "output region and classification",
        "ModelInfer",
        infer(
            **_output(
                classification={"int64_param": 1},
                shared_memory_region={"string_param": "no"},
                shared_memory_byte_size={"int64_param": 40},
            )
        ),
    ),
    Case(
        "system register nothing",
        "SystemSharedMemoryRegister",
        request("SystemSharedMemoryRegisterRequest", name="no", key="/no-such-key", byte_size=4),
    ),
    Case(
        "system unregister nothing",
        "SystemSharedMemoryUnregister",
        request("SystemSharedMemoryUnregisterRequest", name="no"),
    ),
    Case("system unregister all", "SystemSharedMemoryUnregister", request("SystemSharedMemoryUnregisterRequest")),
    Case("system status", "SystemSharedMemoryStatus", request("SystemSharedMemoryStatusRequest")),
    Case("system status unknown", "SystemSharedMemoryStatus", request("SystemSharedMemoryStatusRequest", name="no")),
    Case(
        "cuda register",
        "CudaSharedMemoryRegister",
        request("CudaSharedMemoryRegisterRequest", name="no", raw_handle="", byte_size=4),
    ),
    Case(
        "cuda unregister nothing", "CudaSharedMemoryUnregister", request("CudaSharedMemoryUnregisterRequest", name="no")
    ),
    Case("cuda unregister all", "CudaSharedMemoryUnregister", request("CudaSharedMemoryUnregisterRequest")),
    Case("cuda status", "CudaSharedMemoryStatus", request("CudaSharedMemoryStatusRequest")),
    Case("cuda status unknown", "CudaSharedMemoryStatus", request("CudaSharedMemoryStatusRequest", name="no")),
    # --- management
    Case("live", "ServerLive", request("ServerLiveRequest")),
    Case("ready", "ServerReady", request("ServerReadyRequest")),
    Case("model ready", "ModelReady", request("ModelReadyRequest", name="mlp")),
    Case("model ready version", "ModelReady", request("ModelReadyRequest", name="mlp", version="1")),
    Case("model ready unknown", "ModelReady", request("ModelReadyRequest", name="nope")),
    Case("model ready unknown version", "ModelReady", request("ModelReadyRequest", name="mlp", version="9")),
    Case("model ready no number", "ModelReady", request("ModelReadyRequest", name="mlp", version="one")),
    Case("metadata", "ModelMetadata", request("ModelMetadataRequest", name="mlp")),
    Case("metadata unknown", "ModelMetadata", request("ModelMetadataRequest", name="nope")),
    Case("metadata unknown version", "ModelMetadata", request("ModelMetadataRequest", name="mlp", version="9")),
    Case("metadata no number", "ModelMetadata", request("ModelMetadataRequest", name="mlp", version="one")),
    Case("config unknown", "ModelConfig", request("ModelConfigRequest", name="nope")),
    Case("config no number", "ModelConfig", request("ModelConfigRequest", name="mlp", version="one")),
    Case("statistics unknown", "ModelStatistics", request("ModelStatisticsRequest", name="nope")),
    Case("statistics unknown version", "ModelStatistics", request("ModelStatisticsRequest", name="mlp", version="9")),
    Case("statistics no number", "ModelStatistics", request("ModelStatisticsRequest", name="mlp", version="one")),
    Case("index", "RepositoryIndex", request("RepositoryIndexRequest")),
    Case("index ready", "RepositoryIndex", request("RepositoryIndexRequest", ready=True)),
    Case("index of a repository", "RepositoryIndex", request("RepositoryIndexRequest", repository_name="x")),
    Case("load unknown", "RepositoryModelLoad", request("RepositoryModelLoadRequest", model_name="nope")),
    Case(
        "load of a repository",
        "RepositoryModelLoad",
        request("RepositoryModelLoadRequest", repository_name="x", model_name="mlp"),
    ),
    Case(
        "load config no text",
        "RepositoryModelLoad",
        request("RepositoryModelLoadRequest", model_name="mlp", parameters={"config": {"bool_param": True}}),
    ),
    Case(
        "load file no bytes",
        "RepositoryModelLoad",
        request(
            "RepositoryModelLoadRequest", model_name="mlp", parameters={"file:1/model.onnx": {"string_param": "x"}}
        ),
    ),
    Case(
        "load other parameter",
        "RepositoryModelLoad",
        request("RepositoryModelLoadRequest", model_name="mlp", parameters={"x": {"bool_param": True}}),
    ),
    Case(
        "load file without config",
        "RepositoryModelLoad",
        request(
            "RepositoryModelLoadRequest", model_name="mlp2", parameters={"file:1/model.onnx": {"bytes_param": "eA=="}}
        ),
    ),
    Case("unload unknown", "RepositoryModelUnload", request("RepositoryModelUnloadRequest", model_name="nope")),
    Case(
        "unload of a repository",
        "RepositoryModelUnload",
        request("RepositoryModelUnloadRequest", repository_name="x", model_name="mlp"),
    ),
    Case(
        "unload dependents int",
        "RepositoryModelUnload",
        request(
            "RepositoryModelUnloadRequest", model_name="nope", parameters={"unload_dependents": {"int64_param": "1"}}
        ),
    ),
    Case("trace", "TraceSetting", request("TraceSettingRequest")),
    Case("trace of a model", "TraceSetting", request("TraceSettingRequest", model_name="mlp")),
    Case("trace unknown model", "TraceSetting", request("TraceSettingRequest", model_name="nope")),
    Case("trace file", "TraceSetting", request("TraceSettingRequest", settings={"trace_file": {"value": ["x"]}})),
    Case(
        "trace rate no number",
        "TraceSetting",
        request("TraceSettingRequest", settings={"trace_rate": {"value": ["x"]}}),
    ),
    Case(
        "trace rate twice",
        "TraceSetting",
        request("TraceSettingRequest", settings={"trace_rate": {"value": ["1", "2"]}}),
    ),
    Case(
        "trace count below", "TraceSetting", request("TraceSettingRequest", settings={"trace_count": {"value": ["-2"]}})
    ),
    Case(
        "trace level off and on",
        "TraceSetting",
        request("TraceSettingRequest", settings={"trace_level": {"value": ["OFF", "TIMESTAMPS"]}}),
    ),
    Case("trace cleared", "TraceSetting", request("TraceSettingRequest", settings={"trace_rate": {}})),
    Case("log", "LogSettings", request("LogSettingsRequest")),
    Case("log file", "LogSettings", request("LogSettingsRequest", settings={"log_file": {"string_param": "x"}})),
    Case("log info int", "LogSettings", request("LogSettingsRequest", settings={"log_info": {"uint32_param": 1}})),
    Case(
        "log verbose text",
        "LogSettings",
        request("LogSettingsRequest", settings={"log_verbose_level": {"string_param": "x"}}),
    ),
    Case(
        "log format unknown",
        "LogSettings",
        request("LogSettingsRequest", settings={"log_format": {"string_param": "x"}}),
    ),
    Case("log format int", "LogSettings", request("LogSettingsRequest", settings={"log_format": {"uint32_param": 1}})),
    Case("log unknown", "LogSettings", request("LogSettingsRequest", settings={"log_x": {"bool_param": True}})),
]


UNLIKE = {
    "version with a tail": Reply(
        "INVALID_ARGUMENT",
        "failed to get model version from specified version string '1x' (details: stol), "
        "version should be an integral value > 0",
    ),
    "version huge": Reply("NOT_FOUND", "Request for unknown model: 'mlp' version 99999999999999999999 is not found"),
    "two inputs": Reply("INVALID_ARGUMENT", "unexpected inference input 'zz' for model 'mlp'"),
    "wrong rank": Reply(
        "INVALID_ARGUMENT", "unexpected shape for input 'input' for model 'mlp'. Expected [-1,784], got [784]."
    ),
    "no shape": Reply(
        "INVALID_ARGUMENT", "unexpected shape for input 'input' for model 'mlp'. Expected [-1,784], got []."
    ),
    "negative shape": Reply("INVALID_ARGUMENT", "input 'input': no tensor has the shape [-1, 784]"),
    "no rows": Reply("INVALID_ARGUMENT", "inference request batch-size must be at least 1 for 'mlp'"),
    "system register nothing": Reply("INVALID_ARGUMENT", "Unable to open shared memory region: '/no-such-key'"),
    "cuda register": Reply("INVALID_ARGUMENT", "'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t"),
    "trace count below": Reply("INVALID_ARGUMENT", "Unable to parse 'trace_count'. Expecting value >= -1, got:-2"),
    "log format unknown": Reply("INVALID_ARGUMENT", "invalid argument for --log_format, got: x"),
    "load unknown": Reply("NOT_FOUND", "failed to load 'nope', failed to poll from model repository"),
    "load file without config": Reply(
        "INVALID_ARGUMENT",
        "failed to load 'mlp2', failed to poll from model repository: "
        "Load parameter 'config' must be specified for model file override",
    ),
    "unload unknown": Reply("NOT_FOUND", "Request for unknown model: 'nope' is not found"),
}
"""What is answered instead of Triton's reply, on purpose: its own says what is not so, blames itself, or is another
over HTTP."""


def record(address: str, cases: Sequence[Case], path: Path) -> None:
    """Ask a Triton, and keep its replies."""
    with grpc.insecure_channel(address) as channel:
        found = {case.name: call(channel, case.method, case.request) for case in cases}
    rows = [f"{json.dumps(name)}: {json.dumps({k: v for k, v in vars(r).items() if v})}" for name, r in found.items()]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def main() -> None:
    record(sys.argv[1], CASES, RECORDED)


if __name__ == "__main__":
    main()

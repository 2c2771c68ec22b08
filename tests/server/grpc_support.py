"""Models and calls that the tests of gRPC share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import json_format

from infera_server.codec import DATATYPES
from infera_server.protocols.protos import message
from infera_server.scheduling.rows import HostArray
from tests.server.grpc_cases import SERVICE
from tests.server.support import WAIT, FakeSession, Running, spec

METHOD = f"/{SERVICE}/"


def mlp() -> FakeSession:
    """input [N, 784] -> output [N, 10], what the cases' model gives for zeros."""
    return FakeSession(
        {"input": spec("N", 784)},
        {"output": spec("N", 10)},
        lambda feeds: {"output": np.full((len(feeds["input"]), 10), 0.1, np.float32)},
    )


def echoes() -> dict[str, FakeSession]:
    """For every datatype a model of its name: x [N, 3] -> y, the same."""
    return {
        name: FakeSession({"x": spec("N", 3, dtype=dtype)}, {"y": spec("N", 3, dtype=dtype)}, lambda f: {"y": f["x"]})
        for name, dtype in DATATYPES.items()
    }


@contextlib.contextmanager
def channel(running: Running, **options: Any) -> Iterator[grpc.Channel]:
    """A connection of its own."""
    own = [("grpc.use_local_subchannel_pool", 1), *options.items()]
    with grpc.insecure_channel(f"127.0.0.1:{running.host.grpc_port}", options=own) as made:
        yield made


def infer(made: grpc.Channel, sent: Any, timeout: float = WAIT, **more: Any) -> Any:
    """The response to a ModelInferRequest. Raises grpc.RpcError."""
    return unary(made)(sent, timeout=timeout, **more)


def unary(made: grpc.Channel) -> Any:
    """ModelInfer as grpc calls it."""
    return made.unary_unary(
        METHOD + "ModelInfer", lambda m: m.SerializeToString(), message("inference.ModelInferResponse").FromString
    )


def stream(made: grpc.Channel) -> Any:
    """ModelStreamInfer as grpc calls it."""
    return made.stream_stream(
        METHOD + "ModelStreamInfer",
        lambda m: m.SerializeToString(),
        message("inference.ModelStreamInferResponse").FromString,
    )


def request(model: str, array: HostArray, datatype: str = "FP32", raw: bytes | None = None, **more: Any) -> Any:
    """A ModelInferRequest of input `x`."""
    made = message("inference.ModelInferRequest")(model_name=model)
    json_format.ParseDict({"inputs": [{"name": "x", "datatype": datatype, "shape": array.shape}], **more}, made)
    made.raw_input_contents.append(array.tobytes() if raw is None else raw)
    return made


def array_of(response: Any, dtype: Any = np.float32) -> HostArray:
    """The first output."""
    return np.frombuffer(response.raw_output_contents[0], dtype).reshape(response.outputs[0].shape)


def status_of(error: pytest.ExceptionInfo[grpc.RpcError]) -> tuple[str, str]:
    """The code and the text of a call that failed."""
    return error.value.code().name, error.value.details()


def values(datatype: str) -> HostArray:
    """[2, 3] with the type's ends."""
    dtype = DATATYPES[datatype]
    if datatype == "BYTES":
        return np.array([["", "a", "ä€"], ["0", "\x00", "long" * 100]], object)
    if datatype == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    if dtype.kind in "iu":
        ends = np.iinfo(dtype)
        return np.array([[ends.min, ends.max, 0], [1, 2, 3]], dtype)
    return np.array([[0.0, -0.0, np.inf], [np.nan, 1.5, -65504.0]]).astype(dtype)


FIELDS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


def typed(datatype: str, items: Any) -> Any:
    """A ModelInferRequest of input `x` [2, 3] in its typed field."""
    made = message("inference.ModelInferRequest")(model_name=datatype)
    entry = made.inputs.add(name="x", datatype=datatype, shape=[2, 3])
    getattr(entry.contents, FIELDS[datatype]).extend(items)
    return made

"""Streams of requests to `mlp`, as in `grpc_cases`, and to `repeat`, which answers a request once for each element.

`repeat` is a decoupled model: IN [-1] INT32 -> for each element OUT [1], and IDX [1] UINT32, its place; FAIL [1] INT32,
which may be left out, is the place at which it fails instead. What a real tritonserver answers is in
`grpc_stream_replies.json`, which is written anew by

    python -m tests.server.grpc_stream_cases 127.0.0.1:8001

against a tritonserver with both models, `repeat` in its Python backend: each response is sent by itself, and the end
without one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import json_format

from infera_server.protocols.protos import message, pool
from tests.server.grpc_cases import PATIENCE, SERVICE, infer, plain, tensor

RECORDED = Path(__file__).with_name("grpc_stream_replies.json")

ENDS = {"triton_enable_empty_final_response": {"bool_param": True}}


def repeat(values: Sequence[int], fail: int | None = None, **more: Any) -> Any:
    """A request to `repeat`."""
    inputs = [tensor((len(values),), name="IN", datatype="INT32")]
    raw = [np.array(values, np.int32).tobytes()]
    if fail is not None:
        inputs.append(tensor((1,), name="FAIL", datatype="INT32"))
        raw.append(np.array([fail], np.int32).tobytes())
    return infer(inputs, raw, model_name="repeat", **more)


STREAMS: dict[str, list[Any]] = {
    "in order": [infer(id="a"), infer(id="b"), infer()],
    "an end of its own": [infer(id="a", parameters=ENDS)],
    "errors": [
        infer(id="model", model_name="nope"),
        infer(id="version", model_version="one"),
        infer([tensor(name="zz")], id="input"),
        infer([tensor((1, 783))], [bytes(783 * 4)], id="shape"),
        infer([tensor(datatype="INT32")], id="datatype"),
        infer([tensor((65, 784))], [bytes(65 * 784 * 4)], id="rows"),
        infer(id="bytes", raw=[bytes(8)]),
        infer(id="output", outputs=[{"name": "zz"}]),
        infer(id="last"),
    ],
    "several": [repeat([5, 6, 7], id="a")],
    "several and an end": [repeat([5, 6, 7], id="a", parameters=ENDS)],
    "one": [repeat([5])],
    "none": [repeat([], id="a")],
    "none and an end": [repeat([], id="a", parameters=ENDS)],
    "fails at last": [repeat([5, 6, 7], 2, id="a")],
    "fails at last and an end": [repeat([5, 6, 7], 2, id="a", parameters=ENDS)],
    "fails at once": [repeat([5, 6, 7], 0, id="a")],
    "one of its outputs": [repeat([5, 6], outputs=[{"name": "IDX"}])],
    "no such input": [infer(id="a", model_name="repeat")],
}


def talk(channel: grpc.Channel, sent: Sequence[Any]) -> list[Any]:
    """The responses to a stream, which ends well."""
    stub = channel.stream_stream(
        f"/{SERVICE}/ModelStreamInfer",
        request_serializer=lambda m: m.SerializeToString(),
        response_deserializer=message("inference.ModelStreamInferResponse").FromString,
    )
    found = []
    for response in stub(iter(sent), timeout=PATIENCE):
        made = json_format.MessageToDict(response, preserving_proto_field_name=True, descriptor_pool=pool())
        if "error_message" in made:
            made["error_message"] = plain(made["error_message"])
        found.append(made)
    return found


def recorded() -> dict[str, list[Any]]:
    """Triton's responses by the streams' names."""
    found: dict[str, list[Any]] = json.loads(RECORDED.read_text())
    return found


def main() -> None:
    with grpc.insecure_channel(sys.argv[1]) as channel:
        found = {name: talk(channel, sent) for name, sent in STREAMS.items()}
    rows = [f"{json.dumps(name)}: {json.dumps(responses)}" for name, responses in found.items()]
    RECORDED.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()

"""What a tritonserver answers, recorded, and how a reply of ours compares with it.

`triton_replies.jsonl` has one exchange a line: a request, and the reply of tritonserver 2.51.0 (of the nvidia-pytriton
0.7.0 wheel) that serves the model of `mlp` by its Python backend. To record it again, for the same requests::

    python -m tests.server.triton http://127.0.0.1:8000
"""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import math
import re
import struct
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import onnx
from onnx import helper, numpy_helper

RECORDED = Path(__file__).with_name("triton_replies.jsonl")
MODEL = "mlp"
SIZES = (784, 512, 256, 10)
PATIENCE = 60.0

COUNTERS = {"ns", "count", "last_inference", "inference_count", "execution_count", "batch_size"}
"""Members whose numbers depend on what came before."""

FLOATS = {"FP16": "e", "FP32": "f", "FP64": "d"}


def mlp() -> onnx.ModelProto:
    """input [N, 784] -> output [N, 10], a perceptron with weights of seed 0."""
    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "input"
    for i, (fan_in, fan_out) in enumerate(pairwise(SIZES)):
        w = rng.standard_normal((fan_in, fan_out)) / np.sqrt(fan_in)
        weights += [
            numpy_helper.from_array(w.astype(np.float32), f"W{i}"),
            numpy_helper.from_array(np.zeros(fan_out, np.float32), f"b{i}"),
        ]
        last = i == len(SIZES) - 2
        nodes.append(helper.make_node("Gemm", [x, f"W{i}", f"b{i}"], [f"g{i}"]))
        x = "output" if last else f"r{i}"
        nodes.append(helper.make_node("Softmax" if last else "Relu", [f"g{i}"], [x]))
    kind = onnx.TensorProto.FLOAT
    tensors = [helper.make_tensor_value_info(n, kind, ["N", s]) for n, s in (("input", 784), ("output", 10))]
    graph = helper.make_graph(nodes, MODEL, tensors[:1], tensors[1:], weights)
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])


@dataclass(frozen=True)
class Reply:
    """A reply without what is of no interest. `type` is empty where nothing came."""

    status: int
    type: str
    body: Any
    coding: str = ""


def exchanges() -> Iterator[tuple[dict[str, Any], Reply]]:
    """Requests and Triton's replies, in their order: some change what later ones find."""
    for line in RECORDED.read_text().splitlines():
        request = json.loads(line)
        yield request, Reply(**request.pop("reply"))


# --- requests ------------------------------------------------------------------------------------------------------


def encode(body: Any) -> bytes | None:
    """A body: {"json": ...}, {"text": ...} or {"base64": ...}, `repeat` times each, or a list of these."""
    if body is None:
        return None
    if isinstance(body, list):
        return b"".join(encode(part) or b"" for part in body)
    if "json" in body:
        data = json.dumps(_expand(body["json"])).encode()
    else:
        data = body["text"].encode() if "text" in body else base64.b64decode(body["base64"])
    return data * int(body.get("repeat", 1))


def _expand(x: Any) -> Any:
    """{"$fill": [v, n]} is n times v, {"$ramp": n} is 0, 1/n, 2/n, ..."""
    if isinstance(x, dict):
        if "$fill" in x:
            return [x["$fill"][0]] * x["$fill"][1]
        if "$ramp" in x:
            return [i / x["$ramp"] for i in range(x["$ramp"])]
        return {k: _expand(v) for k, v in x.items()}
    return [_expand(v) for v in x] if isinstance(x, list) else x


def ask(address: str, request: dict[str, Any]) -> Reply:
    """Send a request, and wait `until` a path has a status where it says so.

    An index is asked again while a model is being unloaded.
    """
    reply = _send(address, request)
    until = request.get("until")
    deadline = time.monotonic() + PATIENCE
    while until and not _among(_send(address, {"path": until["path"]}).status, until["status"]):
        assert time.monotonic() < deadline, f"{until['path']} did not become {until['status']}"
        time.sleep(0.01)
    while _is_unloading(reply):
        assert time.monotonic() < deadline, "a model is never unloaded"
        time.sleep(0.01)
        reply = _send(address, request)
    return reply


def _is_unloading(reply: Reply) -> bool:
    return isinstance(reply.body, list) and any(e.get("state") == "UNLOADING" for e in reply.body if "state" in e)


def _send(address: str, request: dict[str, Any]) -> Reply:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        body, headers = encode(request.get("body")), request.get("headers", {})
        connection.request(request.get("method", "GET"), request["path"], body, headers)
        reply = connection.getresponse()
        return _read(reply.status, reply.headers, reply.read())
    finally:
        connection.close()


# --- replies -------------------------------------------------------------------------------------------------------


def _read(status: int, headers: http.client.HTTPMessage, raw: bytes) -> Reply:
    coding = headers.get("Content-Encoding", "")
    raw = gzip.decompress(raw) if coding == "gzip" else zlib.decompress(raw) if coding == "deflate" else raw
    kind = headers.get("Content-Type", "").split(";")[0].strip().lower() if raw else ""
    return Reply(status, kind, _normal(_parsed(raw, kind, headers.get("Inference-Header-Content-Length"))), coding)


def _parsed(raw: bytes, kind: str, header: str | None) -> Any:
    if header is not None:
        document = json.loads(raw[: int(header)])
        return {"header": document, "tensors": _tensors(document, raw[int(header) :])}
    text = raw.decode(errors="replace")
    if kind == "text/event-stream":
        return [json.loads(event.partition(":")[2]) for event in text.split("\n\n") if event.strip()]
    try:
        return json.loads(text)
    except ValueError:
        return text


def _tensors(document: dict[str, Any], tail: bytes) -> dict[str, Any]:
    found = {}
    for output in document["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is not None:
            data, tail = tail[:size], tail[size:]
            assert len(data) == size, "binary data is cut short"
            found[output["name"]] = _values(data, output["datatype"])
    assert not tail, "stray bytes after the tensors"
    return found


def _values(data: bytes, datatype: str) -> Any:
    if code := FLOATS.get(datatype):
        return list(struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data))
    if datatype != "BYTES":
        return data.hex()
    items = []
    while data:
        size = int.from_bytes(data[:4], "little")
        items.append(data[4 : 4 + size].decode(errors="replace"))
        data = data[4 + size :]
    return items


def _normal(x: Any) -> Any:
    """Without counters, other models and ids in texts."""
    if isinstance(x, list):
        if x and all(isinstance(v, dict) and "name" in v and "state" in v for v in x):
            x = [v for v in x if v["name"] == MODEL]
        return [_normal(v) for v in x]
    if not isinstance(x, dict):
        return x
    x = dict(x)
    if "extensions" in x:
        x |= {"name": "~", "version": "~", "extensions": sorted(x["extensions"])}
    if "model_stats" in x:
        own = [m for m in x["model_stats"] if m["name"] == MODEL]
        x["model_stats"] = own or x["model_stats"]
    if x.get("batch_stats"):
        x["batch_stats"] = x["batch_stats"][:1]
    if isinstance(x.get("error"), str):
        x["error"] = re.sub(r"^\[request id: [^]]*\] ", "", x["error"])
    return {k: "~" if k in COUNTERS and isinstance(v, int | float) else _normal(v) for k, v in x.items()}


# --- comparison ----------------------------------------------------------------------------------------------------

TOLERANCE = 1e-4
_SCORE = re.compile(r"([-+.\deE]+|nan|inf):(\d+(?::.*)?)")


def differences(want: Reply, got: Reply, coded: bool) -> dict[str, str]:
    """How a reply differs, by aspect; the coding counts where one was asked for."""
    found = {}
    if want.status != got.status:
        found["status"] = f"{want.status} against {got.status}"
    if want.type != got.type:
        found["type"] = f"{want.type} against {got.type}"
    if coded and want.coding != got.coding:
        found["coding"] = f"{want.coding} against {got.coding}"
    if text := difference(want.body, got.body):
        found["body"] = text
    return found


def difference(a: Any, b: Any, pattern: bool = False, at: str = "$") -> str:
    """Where and how b differs from a. In a pattern "*" is anything, and objects may have further members."""
    if pattern and a == "*":
        return ""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a if pattern else sorted(a.keys() | b.keys()):
            if key not in a or key not in b:
                return f"{at}.{key} is not in both"
            if text := difference(a[key], b[key], pattern, f"{at}.{key}"):
                return text
        return ""
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{at} has {len(a)} against {len(b)} elements"
        parts = (difference(x, y, pattern, f"{at}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
        return next(filter(None, parts), "")
    return "" if _equal(a, b) else f"{at}: {str(a)[:80]} against {str(b)[:80]}"


@dataclass(frozen=True)
class Difference:
    """Why replies to some requests are not Triton's, and what may differ of them.

    `allowed` has what a reply may be instead: its status or a list of them, its type, a pattern of its body. The names
    of the `requests` have spaces between them.
    """

    reason: str
    allowed: dict[str, Any]
    requests: str


def by_request(table: Iterable[Difference]) -> dict[str, Difference]:
    """The differences by the requests' names."""
    return {name: difference for difference in table for name in difference.requests.split()}


def unexpected(want: Reply, got: Reply, known: Difference | None, coded: bool = False) -> dict[str, str]:
    """How a reply differs beyond what is `known`, by aspect. Fails where what is known is there no longer."""
    found = differences(want, got, coded)
    if known is None:
        return found
    assert found, "the difference is gone: strike it from the table"
    allowed = known.allowed
    status = allowed.get("status", want.status)
    fine = {
        "status": _among(got.status, status),
        "type": got.type == allowed.get("type"),
        "body": "body" in allowed and not difference(allowed["body"], got.body, pattern=True),
    }
    return {aspect: text for aspect, text in found.items() if not fine.get(aspect)}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, str) and isinstance(b, str):
        x, y = _SCORE.fullmatch(a), _SCORE.fullmatch(b)
        if x and y and x[2] == y[2]:
            a, b = float(x[1]), float(y[1])
    if type(a) in (int, float) and type(b) in (int, float) and float in (type(a), type(b)):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or (a != a and b != b)
    return type(a) is type(b) and bool(a == b)


def _among(status: int, allowed: int | list[int]) -> bool:
    return status in (allowed if isinstance(allowed, list) else [allowed])


def record(url: str) -> None:
    """Send the recorded requests to a Triton, and keep its replies."""
    address = urlsplit(url).netloc
    lines = []
    for request, _ in exchanges():
        reply = ask(address, request)
        kept = {"status": reply.status, "type": reply.type, "body": reply.body, "coding": reply.coding}
        lines.append(json.dumps(request | {"reply": kept}))
    RECORDED.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    record(sys.argv[1])

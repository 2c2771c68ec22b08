"""The models that servers are measured with, the bodies of requests to them, and whether an answer is right."""

from __future__ import annotations

import json
import re
import shutil
import struct
import urllib.error
import urllib.request
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bench.servers import CACHE, Server

SIZES = (784, 512, 256, 10)


def save_model(path: Path) -> None:
    """The MLP: `input` [N, 784] -> `output` [N, 10]."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "input"
    for i, (columns, width) in enumerate(pairwise(SIZES)):
        w = (rng.standard_normal((columns, width)) / np.sqrt(columns)).astype(np.float32)
        weights += [numpy_helper.from_array(w, f"w{i}"), numpy_helper.from_array(np.zeros(width, np.float32), f"b{i}")]
        last = width == SIZES[-1]
        nodes.append(helper.make_node("Gemm", [value, f"w{i}", f"b{i}"], ["output" if last else f"g{i}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"g{i}"], [f"r{i}"]))
        value = f"r{i}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", SIZES[0]])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", SIZES[-1]])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def save_pick(path: Path) -> None:
    """The same tensors and hardly any work: the first 10 of 784 columns."""
    graph = helper.make_graph(
        [helper.make_node("Slice", ["input", "start", "stop", "axis"], ["output"])],
        "pick",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", SIZES[0]])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", SIZES[-1]])],
        [numpy_helper.from_array(np.array([v]), n) for n, v in (("start", 0), ("stop", SIZES[-1]), ("axis", 1))],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def save_bodies(folder: Path) -> None:
    """One row as V2 in binary and in JSON, and as a bare list; with the headers of each."""
    x = np.random.default_rng(1).random((1, SIZES[0]), np.float32)
    entry = {"name": "input", "shape": x.shape, "datatype": "FP32"}
    asked = [{"name": "output", "parameters": {"binary_data": True}}]
    head = json.dumps(
        {"inputs": [entry | {"parameters": {"binary_data_size": x.nbytes}}], "outputs": asked}, separators=(",", ":")
    ).encode()
    plain = "Content-Type: application/json\n"
    numbers = [float(f"{v:.6f}") for v in x.ravel().tolist()]
    for name, body, headers in (
        ("binary", head + x.tobytes(), f"Inference-Header-Content-Length: {len(head)}\n"),
        ("json", json.dumps({"inputs": [entry | {"data": numbers}]}, separators=(",", ":")).encode(), plain),
        ("rows", json.dumps({"rows": [numbers]}, separators=(",", ":")).encode(), plain),
    ):
        (folder / f"{name}.body").write_bytes(body)
        (folder / f"{name}.headers").write_text(headers)


def prepared(name: str) -> Path:
    """A folder of the cache with the models and the bodies of requests, and nothing else."""
    folder = CACHE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_model(folder / "mlp.onnx")
    save_pick(folder / "pick.onnx")
    save_bodies(folder)
    return folder


def right_answer(folder: Path) -> Sequence[float]:
    """What onnxruntime makes of the row that is sent."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "mlp.onnx", providers=["CPUExecutionProvider"])
    x = np.frombuffer((folder / "binary.body").read_bytes()[-4 * SIZES[0] :], np.float32).reshape(1, -1)
    found: list[float] = session.run(None, {"input": x})[0].ravel().tolist()
    return found


def check_answer(server: Server, body: str, folder: Path, want: Sequence[float]) -> int:
    """The bytes of a reply. Raises RuntimeError where it is not the model's answer."""
    headers = dict(line.split(": ", 1) for line in (folder / f"{body}.headers").read_text().splitlines())
    request = urllib.request.Request(server.urls[body], (folder / f"{body}.body").read_bytes(), headers)
    with _opened(server, body, request) as reply:
        content = reply.read()
        if (length := reply.headers.get("Inference-Header-Content-Length")) is not None:
            got = list(struct.unpack(f"<{SIZES[-1]}f", content[int(length) :]))
        else:
            got = [float(n) for n in re.findall(rb"-?\d+\.\d+(?:e-?\d+)?", content)][-SIZES[-1] :]
    if server.name != "asgi" and not np.allclose(got, want, rtol=1e-3, atol=1e-4):
        raise RuntimeError(f"{server.name}: {body}: answered {got}, not {want}")
    return len(content)


def _opened(server: Server, body: str, request: urllib.request.Request) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{server.name}: {body}: {error.code} {error.read(500)!r}") from None

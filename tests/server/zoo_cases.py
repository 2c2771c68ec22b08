"""Requests to the models of `zoo`, right and wrong.

What a real tritonserver answers to them is in `zoo_replies.json`, which is written anew by

    python -m tests.server.zoo_cases 127.0.0.1:8000

against a tritonserver that serves what `zoo` writes.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from tests.server.triton import Reply, ask
from tests.server.zoo import ONNX_TYPES

RECORDED = Path(__file__).with_name("zoo_replies.json")

Case = dict[str, Any]
"""A request as `triton.ask` sends it."""

CASES: dict[str, Case] = {}
"""By names without spaces, in their order."""


def tensor(name: str, datatype: str, shape: Any, data: Any = None, **parameters: Any) -> dict[str, Any]:
    """An input's entry."""
    entry: dict[str, Any] = {"name": name, "shape": shape, "datatype": datatype}
    if data is not None:
        entry["data"] = data
    return entry | ({"parameters": parameters} if parameters else {})


def post(name: str, model: str, document: Any, call: str = "infer", version: str = "", **headers: str) -> None:
    """A document, or the bytes of a body."""
    part = f"/versions/{version}" if version else ""
    is_bytes = isinstance(document, bytes)
    body = {"base64": base64.b64encode(document).decode()} if is_bytes else {"json": document}
    fields = {key.replace("_", "-"): value for key, value in headers.items()}
    _add(name, {"method": "POST", "path": f"/v2/models/{model}{part}/{call}", "body": body, "headers": fields})


def _add(name: str, case: Case) -> None:
    name = "-".join(name.split())
    assert name not in CASES, f"two cases are called {name}"
    CASES[name] = case


def infer(name: str, model: str, *inputs: Any, **more: Any) -> None:
    post(name, model, {"inputs": inputs, **more})


def binary(name: str, model: str, inputs: list[Any], tail: bytes, **more: Any) -> None:
    text = json.dumps({"inputs": inputs, **more}).encode()
    post(name, model, text + tail, Inference_Header_Content_Length=str(len(text)))


def get(path: str) -> None:
    _add(path, {"method": "GET", "path": f"/v2/models/{path}"})


def texts(*items: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def output(name: str, **parameters: Any) -> list[Any]:
    return [{"name": name, "parameters": parameters}]


# --- datatypes -------------------------------------------------------------------------------------------------------

ENDS: dict[str, list[Any]] = {
    "BOOL": [True, False], "UINT8": [0, 255], "UINT16": [0, 65535], "UINT32": [0, 2**32 - 1], "UINT64": [0, 2**64 - 1],
    "INT8": [-128, 127], "INT16": [-32768, 32767], "INT32": [-(2**31), 2**31 - 1], "INT64": [-(2**63), 2**63 - 1],
    "FP32": [1.5, -0.1], "FP64": [1e300, -0.1], "BYTES": ["a", "\u00e9\n\""],
}  # fmt: skip
CODES = dict(zip(ONNX_TYPES, "?BHIQbhiqefd", strict=False))

value: Any
for datatype in ONNX_TYPES:
    x = tensor("x", datatype, [2], binary_data_size=0)
    if datatype == "BYTES":
        sent = texts(b"a", b"")
    else:
        sent = struct.pack("<2" + CODES[datatype], *ENDS.get(datatype, [1, 2]))
    x["parameters"] = {"binary_data_size": len(sent)}
    binary(f"{datatype} binary", datatype, [x], sent, outputs=output("y", binary_data=True))
    binary(f"{datatype} no bytes", datatype, [tensor("x", datatype, [2], binary_data_size=0)], b"")
    if datatype == "FP16":
        binary("FP16 out as JSON", datatype, [x], sent)
        continue
    infer(f"{datatype} ends", datatype, tensor("x", datatype, [2], ENDS[datatype]))
    infer(f"{datatype} empty", datatype, tensor("x", datatype, [0], []))
    for kind, value in (
        ("true", True), ("fraction", 1.5), ("negative", -1), ("over 64 bits", 2**64), ("text", "x"), ("null", None),
        ("one", 1), ("whole", 1.0), ("nested", [1]), ("object", {}), ("2^31", 2**31), ("300", 300),
    ):  # fmt: skip
        infer(f"{datatype} {kind}", datatype, tensor("x", datatype, [2], [value, value]))

for name, values in (
    ("not finite", [float("nan"), float("-inf")]), ("denormal", [1e-45, 3.4e38]), ("too big", [1e39, -1e39]),
    ("large", [1e5, 123456789]),
):  # fmt: skip
    infer(f"FP32 {name}", "FP32", tensor("x", "FP32", [2], values))
infer("FP64 digits", "FP64", tensor("x", "FP64", [2], [0.1, 1 / 3]))

for name, value in (
    ("nested rows", [[1], [2]]), ("nested deep", [[[[1, 2]]]]), ("ragged", [[1, 2], []]), ("mixed", [1, [2]]),
    ("text", "12"), ("number", 5), ("object", {"0": 1}), ("short", [1]), ("long", [1, 2, 3]), ("none", []),
):  # fmt: skip
    infer(f"data {name}", "INT32", tensor("x", "INT32", [2], value))
for name, value in (
    ("text", "2"), ("number", 2), ("null", None), ("nested", [[2]]), ("whole", [2.0]), ("fraction", [1.5]),
    ("negative", [-1]), ("bool", [True]), ("over 64 bits", [2**64]), ("none", []), ("rank 2", [2, 1]),
):  # fmt: skip
    infer(f"shape {name}", "INT32", tensor("x", "INT32", value, [1, 2]))
for key, name, value in (
    ("name", "number", 5), ("name", "null", None), ("name", "empty", ""), ("datatype", "number", 5),
    ("datatype", "null", None), ("datatype", "empty", ""), ("datatype", "another", "INT64"),
    ("datatype", "enum", "TYPE_INT32"), ("parameters", "null", None), ("parameters", "list", []), ("more", "x", 1),
):  # fmt: skip
    infer(f"an input's {key} {name}", "INT32", tensor("x", "INT32", [2], [1, 2]) | {key: value})
for name, more in (
    ("fraction", 8.0), ("null", None), ("bool", True), ("huge", 2**63), ("over 64 bits", 2**64), ("less", 4),
    ("more", 12),
):  # fmt: skip
    binary(f"binary_data_size {name}", "INT32", [tensor("x", "INT32", [2], binary_data_size=more)], bytes(8))
infer("two sources", "INT32", tensor("x", "INT32", [2], [1, 2], binary_data_size=8))
infer("unknown parameter", "INT32", tensor("x", "INT32", [2], [1, 2], mine={"a": 1}))
infer("a null for an input", "INT32", None)
post("a null for the inputs", "INT32", {"inputs": None})

# --- texts -----------------------------------------------------------------------------------------------------------

two = texts(b"abc", b"def")
for name, sent, count in (
    ("unequal", texts(b"a", b"bcdefgh" * 100), 2), ("not UTF-8", texts(b"\xff\xfe", b"\0"), 2),
    ("few", texts(b"a"), 2),
    ("many", texts(b"a", b"b", b"c"), 2), ("cut", two[:-1], 2), ("cut length", two[:-5], 2),
    ("one byte more", two + b"\0", 2),
    ("four bytes more", two + bytes(4), 2), ("a length too large", struct.pack("<I", 2**31) + b"abc", 1),
    ("the largest length", b"\xff" * 4, 1), ("none", b"", 0),
):  # fmt: skip
    entry = tensor("x", "BYTES", [count], binary_data_size=len(sent))
    binary(f"texts {name}", "BYTES", [entry], sent, outputs=output("y", binary_data=True))
binary("texts not UTF-8 as JSON", "BYTES", [tensor("x", "BYTES", [1], binary_data_size=5)], texts(b"\xff"))
infer("texts with zeros", "BYTES", tensor("x", "BYTES", [2], ["a\0b", "\U0001f600"]))
infer("texts nested", "BYTES", tensor("x", "BYTES", [2], [["a"], ["b"]]))
infer("texts in rows", "text", tensor("x", "BYTES", [2, 2], [["a", "bb"], ["", "d"]]))
infer("texts of no width", "text", tensor("x", "BYTES", [2, 0], []))

# --- shapes, inputs, outputs -----------------------------------------------------------------------------------------

for shape, data in (
    ([1, 0, 2], []), ([1, 2, 0], []), ([0, 2, 2], []), ([1, 2, 2], [[[1, 2], [3, 4]]]), ([1, 4], [1, 2, 3, 4]),
    ([2, 1, 2], [[[1, 2]], [[3, 4]]]), ([1, 2, 2], [1, 2, 3]), ([1, 1, 1], 7), ([9, 1, 1], [1] * 9),
):  # fmt: skip
    infer(f"grid {shape} {str(data)[:16]}", "grid", tensor("x", "FP32", shape, data))
binary(
    "grid of no bytes",
    "grid",
    [tensor("x", "FP32", [1, 0, 2], binary_data_size=0)],
    b"",
    outputs=output("y", binary_data=True),
)

A, B = tensor("A", "FP32", [1, 3], [1, 2, 3]), tensor("B", "FP32", [1, 3], [[10, 20, 30]])
infer("both inputs", "add", A, B)
infer("both inputs the other way", "add", B, A)
infer("one input", "add", A)
infer("no input", "add")
infer("an input more", "add", A, B, tensor("C", "FP32", [1, 3], [1, 2, 3]))
infer("one output", "add", A, B, outputs=[{"name": "D"}])
infer("an output twice", "add", A, B, outputs=[{"name": "D"}, *output("D", binary_data=True)])
infer("too many rows", "add", *[tensor(n, "FP32", [5, 3], [1] * 15) for n in "AB"])
infer("one more row", "add", A, tensor("B", "FP32", [2, 3], [1] * 6))
binary(
    "JSON and bytes",
    "add",
    [B, tensor("A", "FP32", [1, 3], binary_data_size=12)],
    struct.pack("<3f", 1, 2, 3),
    outputs=[*output("C", binary_data=True), {"name": "D"}],
)
infer("optional left out", "optional", tensor("x", "FP32", [2], [1, 2]))
infer("optional given", "optional", tensor("x", "FP32", [2], [1, 2]), tensor("B0", "FP32", [2], [10, 20]))
infer("optional and no other", "optional")
infer("optional alone", "optional", tensor("B0", "FP32", [2], [10, 20]))

X = tensor("x", "FP32", [1, 2], [1, 2])
for name, value in (
    ("null", None), ("object", {}), ("text", "y"), ("numbers", [1]), ("nulls", [None]),
    ("a number's name", [{"name": 1}]),
    ("an empty name", [{"name": ""}]), ("parameters a list", [{"name": "y", "parameters": []}]),
    ("parameters null", [{"name": "y", "parameters": None}]), ("binary_data text", output("y", binary_data="true")),
    ("binary_data number", output("y", binary_data=1)), ("unknown parameter", output("y", mine=1)),
):  # fmt: skip
    infer(f"outputs {name}", "versions", X, outputs=value)

# --- raw requests ----------------------------------------------------------------------------------------------------

for name, model, sent in (
    ("of two inputs", "add", bytes(24)), ("of a text", "word", b"hello"), ("of no text", "word", b""),
    ("of texts", "text", texts(b"abc")),
    ("of scores", "scores", struct.pack("<4f", *range(4))), ("of two open dimensions", "grid", bytes(16)),
    ("of any length", "INT32", struct.pack("<3i", 1, 2, 3)), ("of half an element", "INT32", bytes(6)),
):  # fmt: skip
    post(f"raw {name}", model, sent, Inference_Header_Content_Length="0")

# --- classification --------------------------------------------------------------------------------------------------

scores = tensor("x", "FP32", [2, 4], [0.1, 0.4, 0.2, 0.3, 4, 3, 2, 1])
for classes in (1, 2, 4, 5, 0, 10**6, -1, 1.0, True, "2", None):
    infer(f"classes {classes!r}", "scores", scores, outputs=output("classes", classification=classes))
infer("classes as bytes", "scores", scores, outputs=output("classes", classification=2, binary_data=True))
infer(
    "classes as all outputs",
    "scores",
    scores,
    outputs=output("classes", classification=2),
    parameters={"binary_data_output": True},
)
infer(
    "classes that tie", "scores", tensor("x", "FP32", [1, 4], [1, 1, 1, 1]), outputs=output("classes", classification=3)
)
infer(
    "classes of counts",
    "counts",
    tensor("x", "INT32", [2, 3], [1, 5, -7, 2, 9, 4]),
    outputs=output("y", classification=2),
)
infer("classes of bools", "BOOL", tensor("x", "BOOL", [2], [True, False]), outputs=output("y", classification=2))

# --- the request's own members ---------------------------------------------------------------------------------------

for name, value in (
    ("empty", ""),
    ("quoted", '"\\'),
    ("of lines", "a\nb"),
    ("of any letters", "\u00e9\U0001f600"),
    ("null", None),
    ("list", []),
):
    infer(f"id {name}", "versions", X, id=value)
for name, value in (
    ("none", {}), ("null", None), ("list", []), ("of a fraction", {"a": 0.5}), ("of a null", {"a": None}),
    ("of a list", {"a": [1]}),
    ("of a large number", {"a": 2**63}), ("of an endless number", {"a": 2**64}),
    ("timeout 0", {"timeout": 0}), ("timeout negative", {"timeout": -1}), ("timeout text", {"timeout": "5"}),
    ("priority negative", {"priority": -1}), ("sequence_id fraction", {"sequence_id": 1.5}),
    ("sequence_id bool", {"sequence_id": True}),
    ("sequence_start text", {"sequence_start": "true"}), ("sequence_start 1", {"sequence_start": 1}),
    ("binary_data_output text", {"binary_data_output": "true"}),
    ("binary_data_output 1", {"binary_data_output": 1}),
    ("without a name", {"": 1}),
):  # fmt: skip
    infer(f"parameters {name}", "versions", X, parameters=value)

document = json.dumps({"inputs": [X]}).encode()
for name, body in (
    ("after a byte order mark", b"\xef\xbb\xbf" + document), ("in white space", b"\r\n " + document + b"\t"),
    ("twice", document * 2), ("in gzip", gzip.compress(document, mtime=0)), ("in zlib", zlib.compress(document)),
):  # fmt: skip
    coding = {"in gzip": "gzip", "in zlib": "deflate"}.get(name)
    post(f"JSON {name}", "versions", body, **({"Content_Encoding": coding} if coding else {}))

# --- versions and ensembles ------------------------------------------------------------------------------------------

for version in ("", "1", "2", "10", "3", "01", "0"):
    part = f"/versions/{version}" if version else ""
    post(f"version {version}", "versions", {"inputs": [X]}, version=version)
    for path in ("", "/ready", "/config") if version in ("2", "3") else ("", "/ready"):
        get(f"versions{part}{path}")
get("versions/stats")
get("versions/versions/10/stats")
get("versions/versions/2/stats")
infer("ensemble", "ensemble", A, B, id="e")
infer("ensemble of one input", "ensemble", A)
infer("ensemble of a tensor inside", "ensemble", A, B, outputs=[{"name": "sum"}])
infer("ensemble of too many rows", "ensemble", *[tensor(n, "FP32", [5, 3], [1] * 15) for n in "AB"])

# --- generate --------------------------------------------------------------------------------------------------------

for name, value in (
    ("", {"in": "hi"}), ("a list", {"in": ["hi"]}), ("two", {"in": ["a", "b"]}), ("a number", {"in": 5}),
    ("a null", {"in": None}),
    ("no input", {}), ("an id", {"in": "hi", "id": "q"}), ("a number's id", {"in": "hi", "id": 5}),
    ("more", {"in": "hi", "a": 1}),
    ("more null", {"in": "hi", "a": None}), ("more objects", {"in": "hi", "a": {}}),
    ("parameters", {"in": "hi", "parameters": {"a": 1}}),
    ("parameters a list", {"in": "hi", "parameters": []}), ("parameters null", {"in": "hi", "parameters": None}),
    ("the input inside", {"parameters": {"in": "hi"}}),
    ("the input twice", {"in": "x", "parameters": {"in": "hi"}}),
    ("an output's name", {"in": "hi", "out": "x"}),
):  # fmt: skip
    post(f"generate {name}", "word", value, "generate")
    post(f"generate_stream {name}", "word", value, "generate_stream")
post("generate of a version", "versions", {"x": [1, 2]}, "generate", "10")
post("generate of too few", "versions", {"x": 1}, "generate")
post("generate of two rows", "versions", {"x": [1, 2, 3, 4]}, "generate")
post("generate of two inputs", "add", {"A": [1, 2, 3], "B": [1, 2, 3]}, "generate")


@cache
def recorded() -> dict[str, Reply]:
    """Triton's replies by the cases' names."""
    return {name: Reply(**reply) for name, reply in json.loads(RECORDED.read_text()).items()}


def main() -> None:
    rows = []
    for name, case in CASES.items():
        reply = ask(sys.argv[1], case)
        kept = {"status": reply.status, "type": reply.type, "body": reply.body, "coding": reply.coding}
        rows.append(f"{json.dumps(name)}: {json.dumps(kept)}")
    RECORDED.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()

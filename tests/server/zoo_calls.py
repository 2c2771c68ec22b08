"""Calls of the V2 gRPC protocol to the models of `zoo`, right and wrong, as in `grpc_cases`.

What a real tritonserver answers to them is in `zoo_call_replies.json`, which is written anew by

    python -m tests.server.zoo_calls 127.0.0.1:8001

against a tritonserver that serves what `zoo` writes.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

from tests.server.grpc_cases import Case, Reply, infer, record, request, tensor
from tests.server.grpc_cases import recorded as recorded_in
from tests.server.zoo_cases import CODES, ENDS, texts

RECORDED = Path(__file__).with_name("zoo_call_replies.json")

CASES: list[Case] = []


def call(name: str, method: str, /, **members: Any) -> None:
    CASES.append(Case(name, method, request(f"{method}Request", **members)))


def ask(name: str, model: str, inputs: list[Any], raw: list[bytes], /, **more: Any) -> None:
    CASES.append(Case(name, "ModelInfer", infer(inputs, raw, model_name=model, **more)))


def x(datatype: str, *shape: int, name: str = "x", **more: Any) -> dict[str, Any]:
    return tensor(shape, name=name, datatype=datatype, **more)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def output(name: str, **parameters: Any) -> list[Any]:
    return [{"name": name, "parameters": parameters}]


for datatype, code in CODES.items():
    ends = texts(b"a", b"\xff\0") if datatype == "BYTES" else struct.pack("<2" + code, *ENDS.get(datatype, [1, 2]))
    ask(f"{datatype} ends", datatype, [x(datatype, 2)], [ends])
    ask(f"{datatype} empty", datatype, [x(datatype, 0)], [b""])
    ask(f"{datatype} one byte less", datatype, [x(datatype, 2)], [ends[:-1]])
    ask(f"{datatype} one byte more", datatype, [x(datatype, 2)], [ends + b"\0"])
    ask(f"{datatype} rank 2", datatype, [x(datatype, 1, 2)], [ends])

two = texts(b"abc", b"def")
for name, sent, count in (
    ("few", texts(b"a"), 2), ("many", texts(b"a", b"b", b"c"), 2), ("cut length", two[:-5], 2),
    ("four bytes more", two + bytes(4), 2), ("a length too large", struct.pack("<I", 2**31) + b"abc", 1),
):  # fmt: skip
    ask(f"texts {name}", "BYTES", [x("BYTES", count)], [sent])
for name, items in (("", ["YWJj", ""]), ("few", ["YWJj"]), ("many", ["YWJj", "", "YQ=="])):
    ask(f"texts typed {name}", "text", [x("BYTES", 1, 2, contents={"bytes_contents": items})], [])
ask("typed numbers", "UINT64", [x("UINT64", 2, contents={"uint64_contents": ["0", str(2**64 - 1)]})], [])

AB, ONE, TWO = [x("FP32", 1, 3, name="A"), x("FP32", 1, 3, name="B")], floats(1, 2, 3), floats(10, 20, 30)
ask("both inputs", "add", AB, [ONE, TWO])
ask("both inputs the other way", "add", AB[::-1], [TWO, ONE])
ask("raw for one", "add", AB, [ONE])
ask("raw for three", "add", AB, [ONE, TWO, ONE])
ask("raw and typed", "add", [AB[0], AB[1] | {"contents": {"fp32_contents": [1, 2, 3]}}], [ONE])
ask("no input", "add", [], [])
ask("one input", "add", AB[:1], [ONE])
ask("one output", "add", AB, [ONE, TWO], outputs=[{"name": "D"}])
ask("an output twice", "add", AB, [ONE, TWO], outputs=[{"name": "D"}, {"name": "D"}])
ask("an output without a name", "add", AB, [ONE, TWO], outputs=[{}])
ask("too many rows", "add", [x("FP32", 5, 3, name=n) for n in "AB"], [bytes(60)] * 2)
ask("optional left out", "optional", [x("FP32", 2)], [floats(1, 2)])
ask("optional given", "optional", [x("FP32", 2), x("FP32", 2, name="B0")], [floats(1, 2), floats(10, 20)])
ask("optional and no other", "optional", [], [])
ask("no columns", "grid", [x("FP32", 1, 0, 2)], [b""])
ask("rows and columns", "grid", [x("FP32", 1, 2, 2)], [bytes(16)])

SCORES = [x("FP32", 2, 4)], [floats(0.1, 0.4, 0.2, 0.3, 4, 3, 2, 1)]
for classes in (1, 4, 5, 0, -1):
    ask(f"classes {classes}", "scores", *SCORES, outputs=output("classes", classification={"int64_param": classes}))
ask("classes true", "scores", *SCORES, outputs=output("classes", classification={"bool_param": True}))
counts = [x("INT32", 2, 3)], [struct.pack("<6i", 1, 5, -7, 2, 9, 4)]
ask("classes of counts", "counts", *counts, outputs=output("y", classification={"int64_param": 2}))

ROW = [x("FP32", 1, 2)], [floats(1, 2)]
for version in ("", "1", "2", "10", "01", "0", "999"):
    ask(f"version {version}", "versions", *ROW, model_version=version)
    call(f"metadata of version {version}", "ModelMetadata", name="versions", version=version)
    call(f"version {version} ready", "ModelReady", name="versions", version=version)
call("statistics of versions", "ModelStatistics", name="versions")
call("statistics of a version", "ModelStatistics", name="versions", version="10")
call("statistics of a version that is not served", "ModelStatistics", name="versions", version="2")
ask("ensemble", "ensemble", AB, [ONE, TWO], id="e")
ask("ensemble of one input", "ensemble", AB[:1], [ONE])
ask("ensemble of a tensor inside", "ensemble", AB, [ONE, TWO], outputs=[{"name": "sum"}])
for name, value in (("double", {"double_param": 0.5}), ("text", {"string_param": "a"})):
    ask(f"parameter {name}", "versions", *ROW, parameters={"mine": value})
ask("parameter of an input", "versions", [x("FP32", 1, 2, parameters={"mine": {"string_param": "a"}})], [floats(1, 2)])
ask("parameter of an output", "versions", *ROW, outputs=output("y", mine={"string_param": "a"}))


def recorded() -> dict[str, Reply]:
    """Triton's replies by the cases' names."""
    return recorded_in(RECORDED)


def main() -> None:
    record(sys.argv[1], CASES, RECORDED)


if __name__ == "__main__":
    main()

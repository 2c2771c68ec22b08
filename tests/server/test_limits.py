"""Requests that are small and ask for much: refused with what is wrong, soon, and with a short answer."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from infera_server.codec import Buffer
from infera_server.http import coding, exchange
from infera_server.http.coding import Coding
from tests.server.support import FakeSession, Running, any_width, doubler, serving, spec

MIB = 1 << 20
SOON = 2.0
"""Seconds on a busy machine; most take a millisecond."""

INFER, GENERATE = "/v2/models/double/infer", "/v2/models/double/generate"
ANY, TEXT = "/v2/models/any/infer", "/v2/models/text/infer"
LOAD = "/v2/repository/models/double/load"
DEEP, LONG = 50_000, 500_000
GZIP, DEFLATE = {"Content-Encoding": "gzip"}, {"Content-Encoding": "deflate"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    text = FakeSession({"s": spec("N", dtype=object)}, {"t": spec("N", dtype=object)}, lambda feeds: {"t": feeds["s"]})
    sessions = {"double": doubler(), "any": any_width(), "text": text}
    with serving(sessions, max_batch=64, max_body_bytes=16 * MIB, max_json_bytes=4 * MIB) as running:
        yield running


def tensor(**members: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0, 1, 2, 3], **members}


def asked(*, outputs: Any = None, **members: Any) -> bytes:
    """A request of one input with other members."""
    more = {} if outputs is None else {"outputs": outputs}
    return json.dumps({"inputs": [tensor(**members)], **more}).encode()


def binary(size: Any, *shape: int, tail: bytes = b"", **members: Any) -> tuple[bytes, dict[str, str]]:
    """A request whose input is said to have so many bytes."""
    one = {"name": "x", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size}, **members}
    document = json.dumps({"inputs": [one]}).encode()
    return document + tail, {"Inference-Header-Content-Length": str(len(document))}


def text(tail: bytes, count: int) -> tuple[bytes, dict[str, str]]:
    return binary(len(tail), count, tail=tail, name="s", datatype="BYTES")


def with_parameter(value: bytes) -> bytes:
    return asked()[:-1] + b', "parameters": {"timeout": ' + value + b"}}"


NESTED = b"[" * DEEP + b"]" * DEEP
CASES: dict[str, tuple[str, bytes, dict[str, str], int]] = {
    "deep document": (INFER, b"[" * DEEP, {}, 400),
    "deep object": (INFER, b'{"a":' * DEEP, {}, 400),
    "deep data": (INFER, asked().replace(b"[0, 1, 2, 3]", NESTED), {}, 400),
    "data as deep as JSON may be": (INFER, asked().replace(b"[0, 1, 2, 3]", b"[" * 900 + b"]" * 900), {}, 400),
    "deep parameter": (INFER, with_parameter(NESTED), {}, 400),
    "deep flat input": (GENERATE, b'{"x": ' + NESTED + b"}", {}, 400),
    "deep configuration": (LOAD, json.dumps({"parameters": {"config": "[" * 30_000}}).encode(), {}, 400),
    "deep index": ("/v2/repository/index", b"[" * DEEP, {}, 400),
    "deep settings": ("/v2/trace/setting", b"[" * DEEP, {}, 400),
    "many dimensions": (INFER, asked(shape=[1] * LONG), {}, 400),
    "33 dimensions": (ANY, asked(shape=[1] * 33), {}, 400),
    "large dimension": (ANY, asked(shape=[1, 2**31 - 1]), {}, 400),
    "dimension of 70 bits": (ANY, asked(shape=[1, 2**70]), {}, 400),
    "large product": (ANY, asked(shape=[2**31 - 1] * 30), {}, 400),
    "no row of a large size": (ANY, asked(shape=[0, 2**31 - 1], data=[]), {}, 400),
    "many rows of no size": (ANY, asked(shape=[2**31 - 1, 0], data=[]), {}, 400),
    "dimension of many digits": (ANY, asked().replace(b"1, 4", b"1, " + b"9" * LONG), {}, 400),
    "number of many digits": (INFER, asked().replace(b"[0,", b"[" + b"9" * LONG + b","), {}, 400),
    "infinite parameter": (INFER, with_parameter(b"1e400"), {}, 400),
    "parameter of 70 bits": (INFER, with_parameter(b"1180591620717411303424"), {}, 400),
    "negative parameter": (INFER, with_parameter(b"-1"), {}, 400),
    "size of 63 bits": (INFER, *binary(2**63 - 1, 1, 4), 400),
    "size of 70 bits": (INFER, *binary(2**70, 1, 4), 400),
    "negative size": (INFER, *binary(-1, 1, 4), 400),
    "no bytes for a large product": (ANY, *binary(0, 2**31 - 1, 2**31 - 1), 400),
    "many rows without bytes": (ANY, *binary(0, 2**31 - 1, 0), 400),
    "text that is longer than its data": (TEXT, *text(b"\xff\xff\xff\xff", 1), 400),
    "more texts than bytes": (TEXT, *text(b"", 2**31 - 1), 400),
    "many empty texts": (TEXT, *text(bytes(4 * 100_000), 100_000), 400),
    "gzip bomb": (INFER, gzip.compress(bytes(32 * MIB)), GZIP, 413),
    "gzip bomb of JSON": (INFER, gzip.compress(b"[" * (5 * MIB)), GZIP, 413),
    "flat gzip bomb": (GENERATE, gzip.compress(bytes(5 * MIB)), GZIP, 413),
    "deflate bomb": (INFER, zlib.compress(bytes(32 * MIB)), DEFLATE, 413),
    "many gzip members": (INFER, gzip.compress(b"") * 3000, GZIP, 400),
    "too much JSON": (INFER, b" " * (5 * MIB), {}, 413),
    "many inputs": (INFER, json.dumps({"inputs": [tensor()] * 20_000}).encode(), {}, 400),
    "class of 70 bits": (INFER, asked(outputs=[{"name": "y", "parameters": {"classification": 2**70}}]), {}, 400),
    "long name": (INFER, asked(name="a" * LONG), {}, 400),
    "long datatype": (INFER, asked(datatype="a" * LONG), {}, 400),
    "long output": (INFER, asked(outputs=[{"name": "a" * LONG}]), {}, 400),
    "long text for a number": (INFER, asked(data=["a" * LONG]), {}, 400),
    "long model": (f"/v2/models/{'a' * 50_000}/infer", asked(), {}, 404),
    "surrogate": (INFER, asked(name="\ud800"), {}, 400),
    "no UTF-8": (INFER, asked().replace(b'"x"', b'"\xff"'), {}, 400),
    "UTF-16": (INFER, asked().decode().encode("utf-16"), {}, 400),
}


@pytest.mark.parametrize("name", CASES)
def test_little_that_asks_for_much(server: Running, name: str) -> None:
    path, body, headers, status = CASES[name]
    began = time.process_time()  # not of a clock: others may keep the machine busy
    found, _, reply = server.request("POST", path, body, headers)
    assert time.process_time() - began < SOON
    assert (found, len(reply) < 1000) == (status, True), reply[:1000]
    assert json.loads(reply)["error"]


@pytest.mark.parametrize("path", [INFER, GENERATE])
def test_a_small_body_that_decodes_to_much_is_not_decoded_in_the_event_loop(
    server: Running, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    decompress = coding.decompress

    def spy(body: Buffer, coded: Coding, limit: int) -> bytes:
        made.append(limit)
        return decompress(body, coded, limit)

    monkeypatch.setattr(coding, "decompress", spy)
    small = asked() if path == INFER else b'{"x": [0, 1, 2, 3]}'
    for body, looks in ((small, 1), (small[:-1] + b" " * MIB + b"}", 2)):
        made.clear()
        assert server.request("POST", path, gzip.compress(body), GZIP)[0] == 200
        assert (made[0], len(made)) == (exchange.INLINE_BYTES, looks)


def test_classes_are_no_more_than_there_are(server: Running) -> None:
    status, reply = server.infer("double", asked(outputs=[{"name": "y", "parameters": {"classification": 2**40}}]))
    assert (status, len(reply["outputs"][0]["data"])) == (200, 4)

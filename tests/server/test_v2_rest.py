"""The V2 dialect without a socket: what is sent is what arrives, and nothing malformed is more than a BadRequest."""

from __future__ import annotations

import gzip
import json
import math
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from infera_server import codec
from infera_server.errors import BadRequest, NotFound, RequestError, TooLarge, UnknownCoding
from infera_server.http import coding
from infera_server.protocols import v2_rest
from infera_server.requests import Output, Request
from infera_server.scheduling.rows import HostArray, Layout
from infera_server.scheduling.signature import Signature, tensors
from tests.server.support import spec

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
NUMERIC = [name for name in codec.DATATYPES if name != "BYTES"]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=6)


def signature(dtype: Any, rank: int, layout: Layout | None = None) -> Signature:
    specs = tensors({"x": spec(*[None] * rank, dtype=dtype)})
    return Signature("m", "1", specs, tensors({"y": spec(*[None] * rank, dtype=dtype)}), layout)


def packed(document: Any, *tail: bytes) -> tuple[bytes, int]:
    head = json.dumps(document).encode()
    return head + b"".join(tail), len(head)


def entry(x: HostArray, name: str = "x", **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(x.shape), "datatype": codec.datatype_of(x.dtype, name), **more}


@st.composite
def arrays(draw: st.DrawFn, datatypes: list[str]) -> HostArray:
    dtype = codec.DATATYPES[draw(st.sampled_from(datatypes))]
    shape = draw(SHAPES)
    if dtype == ml_dtypes.bfloat16:
        return draw(hnp.arrays(np.float32, shape)).astype(dtype)
    return draw(hnp.arrays(dtype, shape))


def same(a: HostArray, b: HostArray) -> None:
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


# --- what is sent is what arrives ----------------------------------------------------------------------------------


@given(arrays(NUMERIC), st.integers(0, 3))
def test_binary_round_trip(x: HostArray, junk: int) -> None:
    model = signature(x.dtype, x.ndim)
    raw = codec.to_bytes(x)
    padding = " " * junk  # any alignment of the bytes after the header
    document = {
        "inputs": [entry(x, parameters={"binary_data_size": len(raw)})],
        "parameters": {"binary_data_output": True},
    }
    head = (json.dumps(document) + padding).encode()
    request = v2_rest.parse(head + raw, len(head), model)
    same(request.feeds["x"], x)
    reply, tail = v2_rest.respond(Request("", {}, [Output("y", binary=True)]), {"y": x}, model)
    out = json.loads(reply)["outputs"][0]
    assert out == entry(x, "y", parameters={"binary_data_size": len(raw)})
    assert b"".join(tail) == bytes(raw)


@given(arrays([n for n in NUMERIC if n not in ("FP16", "BF16")]), st.booleans())
def test_json_round_trip(x: HostArray, nested: bool) -> None:
    model = signature(x.dtype, x.ndim)
    reply, tail = v2_rest.respond(Request("i", {}, [Output("y", binary=False)]), {"y": x}, model)
    assert not tail
    document = json.loads(reply)
    assert document["id"] == "i"
    data = document["outputs"][0]["data"]
    if nested and x.ndim:
        data = np.array(data, object).reshape(x.shape).tolist()
    body = json.dumps({"inputs": [entry(x, data=data)]}).encode()
    got = v2_rest.parse(body, None, model).feeds["x"]
    assert got.shape == x.shape
    np.testing.assert_array_equal(got, x)


@given(hnp.arrays(object, SHAPES, elements=TEXTS), st.booleans())
def test_strings_round_trip(x: HostArray, binary: bool) -> None:
    model = signature(object, x.ndim)
    reply, tail = v2_rest.respond(Request("", {}, [Output("y", binary)]), {"y": x}, model)
    out = json.loads(reply)["outputs"][0] | {"name": "x"}
    body, header = packed({"inputs": [out]}, *map(bytes, tail))
    got = v2_rest.parse(body, header if binary else None, model).feeds["x"]
    assert got.shape == x.shape
    assert got.tolist() == x.tolist()


@given(st.lists(st.binary(max_size=5), max_size=4))
def test_bytes_that_are_no_text_survive(items: list[bytes]) -> None:
    raw = b"".join(struct.pack("<I", len(i)) + i for i in items)
    array = codec.from_bytes(raw, np.dtype(object), (len(items),), "x")
    assert codec.to_bytes(array) == raw


def test_mixed_json_and_binary_inputs_and_outputs() -> None:
    model = Signature("m", "1", tensors({n: spec(2) for n in "abc"}), tensors({n: spec(2) for n in "abc"}), None)
    a, b, c = (np.array([i, i + 0.5], np.float32) for i in range(3))
    document = {
        "id": "7",
        "inputs": [
            entry(c, "c", parameters={"binary_data_size": 8}),
            entry(a, "a", data=a.tolist()),
            entry(b, "b", parameters={"binary_data_size": 8}),
        ],
        "outputs": [{"name": "b", "parameters": {"binary_data": True}}, {"name": "a"}],
        "parameters": {"timeout": 1500, "anything": "goes"},
    }
    body, header = packed(document, c.tobytes(), b.tobytes())
    request = v2_rest.parse(body, header, model)
    assert {n: x.tolist() for n, x in request.feeds.items()} == {"a": [0, 0.5], "b": [1, 1.5], "c": [2, 2.5]}
    assert (request.id, request.timeout) == ("7", 0.0015)
    reply, tail = v2_rest.respond(request, {"a": a, "b": b, "c": c}, model)
    outputs = json.loads(reply)["outputs"]
    assert [o["name"] for o in outputs] == ["b", "a"]
    assert outputs[1]["data"] == a.tolist()
    assert tail == [b.tobytes()]


def test_binary_views_are_not_copies() -> None:
    x = np.arange(6, dtype=np.float32)
    body, header = packed({"inputs": [entry(x, parameters={"binary_data_size": 24})]}, x.tobytes())
    got = v2_rest.parse(body, header, signature(np.float32, 1)).feeds["x"]
    assert np.shares_memory(got, np.frombuffer(body, np.uint8))


def test_not_a_number_and_infinity_both_ways() -> None:
    model = signature(np.float32, 1)
    body = b'{"inputs":[{"name":"x","shape":[4],"datatype":"FP32","data":[NaN,Infinity,-Infinity,1.5]}]}'
    x = v2_rest.parse(body, None, model).feeds["x"]
    np.testing.assert_array_equal(x, np.array([np.nan, np.inf, -np.inf, 1.5], np.float32))
    reply, _ = v2_rest.respond(Request("", {}, [Output("y", False)]), {"y": x}, model)
    assert b"[NaN, Infinity, -Infinity, 1.5]" in reply


def test_a_raw_request_is_one_row() -> None:
    x = np.arange(6, dtype=np.float32)
    model = Signature(
        "m", "1", tensors({"x": spec("N", 6)}), tensors({"y": spec("N", 6)}), Layout({"x": 0}, {"y": 0}, (1, 4))
    )
    request = v2_rest.parse(x.tobytes(), 0, model)
    same(request.feeds["x"], x.reshape(1, 6))
    assert request.outputs == [Output("y", binary=True)]


def test_classification_ranks_rows_and_breaks_ties_by_index() -> None:
    scores = np.array([[0.1, 0.5, 0.5, 0.2], [4, 3, 2, 1]], np.float32)
    assert codec.top_classes(scores, 3, rows=True).tolist() == [
        ["0.500000:1", "0.500000:2", "0.200000:3"],
        ["4.000000:0", "3.000000:1", "2.000000:2"],
    ]
    assert codec.top_classes(np.array([3, 9], np.int64), 5, rows=False).tolist() == ["9:1", "3:0"]


def test_bool_bytes_other_than_0_and_1_are_true() -> None:
    x = codec.from_bytes(b"\x00\x01\x02\xff", np.dtype(np.bool_), (4,), "x")
    assert x.view(np.uint8).tolist() == [0, 1, 1, 1]


# --- what is malformed is refused ----------------------------------------------------------------------------------

BATCHED = Signature(
    "m", "1", tensors({"x": spec("N", 2)}), tensors({"y": spec("N", 2)}), Layout({"x": 0}, {"y": 0}, (1, 2, 4))
)
GOOD = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
BINARY = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in GOOD.items() if k != key}


REFUSALS: list[tuple[Any, str]] = [
    ([1, 2], "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),
    ({}, "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),
    ({"inputs": {}}, "Unable to parse 'inputs': attempt to access JSON non-array as array"),
    ({"inputs": []}, "expected 1 inputs but got 0 inputs for model 'm'"),
    ({"inputs": [3]}, "non-object"),
    ({"inputs": [without("name")]}, "Unable to parse 'name': attempt to access non-existing object member 'name'"),
    ({"inputs": [without("shape")]}, "Unable to parse 'shape': attempt to access non-existing"),
    ({"inputs": [without("datatype")]}, "Unable to parse 'datatype': attempt to access non-existing"),
    ({"inputs": [without("data")]}, "But no field is set"),
    ({"inputs": [GOOD | BINARY]}, "But set 'data' 'binary_data_size'"),
    ({"inputs": [GOOD, GOOD]}, "input 'x' already exists in request"),
    ({"inputs": [GOOD | {"name": "z"}]}, "unexpected inference input 'z' for model 'm'"),
    ({"inputs": [GOOD | {"name": "z" * 500}]}, "zzz...'"),
    ({"inputs": [GOOD | {"datatype": "fp32"}]}, "invalid datatype for input x"),
    ({"inputs": [GOOD | {"datatype": "INT32"}]}, "data-type is 'INT32', but model 'm' expects 'FP32'"),
    ({"inputs": [GOOD | {"datatype": "FP16"}]}, "receiving FP16 data via JSON is not supported"),
    ({"inputs": [GOOD | {"data": None}]}, "non-array as array"),
    ({"inputs": [GOOD | {"data": ["1", "2"]}]}, "non-number as double"),
    ({"inputs": [GOOD | {"data": [True, False]}]}, "non-number as double"),
    ({"inputs": [GOOD | {"data": [1, None]}]}, "non-number as double"),
    ({"inputs": [GOOD | {"data": [1, {}]}]}, "non-number as double"),
    ({"inputs": [GOOD | {"data": [[1], 2]}]}, "Shape does not match true shape"),
    ({"inputs": [GOOD | {"data": [1, 2, 3]}]}, "Shape does not match true shape"),
    ({"inputs": [GOOD | {"data": [1, 1e39]}]}, "a number is too big for FP32"),
    ({"inputs": [GOOD | {"shape": [1, -2]}]}, "non-unsigned-integer as unsigned-integer"),
    ({"inputs": [GOOD | {"shape": [1, True]}]}, "non-unsigned-integer as unsigned-integer"),
    ({"inputs": [GOOD | {"shape": [1.0, 2.0]}]}, "non-unsigned-integer as unsigned-integer"),
    ({"inputs": [GOOD | {"shape": 2}]}, "non-array as array"),
    ({"inputs": [GOOD | {"shape": [1] * 40}]}, "40 dimensions"),
    ({"inputs": [GOOD | {"shape": [2**63, 2]}]}, f"dimension {2**63} is over"),
    ({"inputs": [GOOD | {"shape": [2**31 - 1, 2]}]}, "Shape does not match true shape"),
    (
        {"inputs": [GOOD | {"shape": [1, 1, 2]}]},
        "unexpected shape for input 'x' for model 'm'. Expected [-1,2], got [1,1,2]",
    ),
    ({"inputs": [GOOD | {"shape": [2, 1]}]}, "Expected [-1,2], got [2,1]"),
    ({"inputs": [BINARY | {"parameters": {"binary_data_size": -1}}]}, "non-unsigned-integer"),
    ({"inputs": [BINARY | {"parameters": {"binary_data_size": 2**60}}]}, "additional bytes"),
    ({"inputs": [GOOD], "id": 42}, "Unable to parse 'id': attempt to access JSON non-string as string"),
    ({"inputs": [GOOD], "parameters": {"timeout": -1}}, "Unable to parse 'timeout'"),
    ({"inputs": [GOOD], "parameters": {"binary_data_output": 1}}, "Unable to parse 'binary_data_output'"),
    ({"inputs": [GOOD], "parameters": {"a": {}}}, "parameter 'a' has invalid type"),
    ({"inputs": [GOOD], "parameters": []}, "non-object"),
    ({"inputs": [GOOD], "outputs": {}}, "Unable to parse 'outputs'"),
    ({"inputs": [GOOD], "outputs": [{}]}, "Unable to parse 'name'"),
    ({"inputs": [GOOD], "outputs": [{"name": "z"}]}, "unexpected inference output 'z' for model 'm'"),
    (
        {"inputs": [GOOD], "outputs": [{"name": "y", "parameters": {"classification": -1}}]},
        "Unable to set 'classification'",
    ),
    ({"inputs": [GOOD], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "Unable to parse 'binary_data'"),
]


@pytest.mark.parametrize(("document", "text"), REFUSALS)
def test_refusals_have_tritons_texts(document: Any, text: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        v2_rest.parse(json.dumps(document).encode(), None, BATCHED)
    assert text in str(refusal.value)


@pytest.mark.parametrize(
    ("body", "header", "text"),
    [
        (b"{bad", None, "failed to parse the request JSON buffer"),
        (b"", None, "failed to parse the request JSON buffer"),
        (b"\xff\xfe", None, "failed to parse the request JSON buffer"),
        (b"[" * 100_000, None, "failed to parse the request JSON buffer"),
        (b'{"inputs":[NaN' + b"[" * 100_000, None, "failed to parse the request JSON buffer"),
        (b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1e400,1]}]}', None, "failed to parse"),
        (packed({"inputs": [GOOD]}, b"x")[0], None, "must not be followed by other values"),
        (packed({"inputs": [BINARY]}, bytes(8))[0], None, "expecting 8 additional bytes"),
        (b"12345678", 9, "inference header size should be in range (0, 8), got: 9"),
        (b"12345678", -1, "inference header size should be in range (0, 8), got: -1"),
        (*packed({"inputs": [BINARY]}, bytes(7)), "unexpected size for input 'x', expecting 1 additional bytes"),
        (*packed({"inputs": [BINARY]}, bytes(9)), "unexpected additional input data for model 'm'"),
        (*packed({"inputs": [BINARY | {"shape": [2, 2]}]}, bytes(8)), "Expected 16, got 8"),
        (bytes(7), 0, "input byte size mismatch for input 'raw_input' for model 'm'. Expected 8, got 7"),
    ],
)
def test_bodies_that_do_not_add_up(body: bytes, header: int | None, text: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        v2_rest.parse(body, header, BATCHED)
    assert text in str(refusal.value)


def test_shared_memory_is_not_found() -> None:
    with pytest.raises(NotFound, match="Unable to find shared memory region: 'r'"):
        v2_rest.parse(
            json.dumps({"inputs": [without("data") | {"parameters": {"shared_memory_region": "r"}}]}).encode(),
            None,
            BATCHED,
        )


def test_large_unsigned_integers_are_exact() -> None:
    assert codec.from_json([2**63 + 1, 0], "UINT64", (2,), "x").tolist() == [2**63 + 1, 0]


@pytest.mark.parametrize(
    ("data", "datatype", "text"),
    [
        ([1.5], "INT32", "non-signed-integer"),
        ([300], "INT8", "does not fit in INT8"),
        ([-1], "UINT8", "does not fit in UINT8"),
        ([2**64], "UINT64", "non-unsigned-integer"),
        ([2**63], "INT64", "does not fit in INT64"),
        ([2**63, 0], "INT64", "too big for INT64"),
        ([2**63, -1], "UINT64", "too big for UINT64"),
        ([2**63, 0.5], "UINT64", "non-unsigned-integer"),
        ([2], "BOOL", "does not fit in BOOL"),
        (["x"], "BOOL", "non-boolean"),
        ([1], "BYTES", "non-string as string"),
        (["\ud800"], "BYTES", "lone surrogate"),
    ],
)
def test_values_that_do_not_fit(data: list[Any], datatype: str, text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        codec.from_json(data, datatype, (len(data),), "x")


def test_deeply_nested_strings_are_refused() -> None:
    data: Any = "x"
    for _ in range(900):
        data = [data]
    with pytest.raises(BadRequest, match="nested deeper"):
        codec.from_json(data, "BYTES", (1,), "x")


@pytest.mark.parametrize(
    "raw", [b"\x01\x00\x00", b"\x02\x00\x00\x00a", b"\x01\x00\x00\x00ab", b"\xff\xff\xff\xff", b""]
)
def test_damaged_bytes_tensors(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        codec.from_bytes(raw, np.dtype(object), (1,), "x")


def outcome(read: Callable[[], object]) -> tuple[int, str]:
    """The status and text that a reading ends in; anything but a RequestError is the test's failure."""
    try:
        read()
    except RequestError as error:
        return error.status, str(error)
    return 200, ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["x", "FP32"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["name", "shape", "datatype", "data", "parameters", "binary_data_size", "inputs", "outputs"]
            )
            | st.text(max_size=3),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "inputs": JSON
            | st.lists(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "name": st.just("x") | JSON, "shape": st.just([1, 2]) | JSON, "parameters": JSON,
                        "datatype": st.just("FP32") | JSON, "data": st.just([1, 2]) | JSON,
                    },
                ),
                max_size=2,
            ),
            "outputs": JSON, "parameters": JSON, "id": JSON,
        },
    ),
    st.binary(max_size=12),
    st.integers(-1, 300) | st.none(),
)  # fmt: skip
def test_no_document_is_more_than_refused(document: Any, tail: bytes, header: int | None) -> None:
    body = json.dumps(document).encode() + tail
    status, text = outcome(lambda: v2_rest.parse(body, header, BATCHED))
    assert status in (200, 400, 404)
    json.loads(v2_rest.error_body(text))


@settings(max_examples=200)
@given(st.binary(max_size=60), st.integers(-1, 70) | st.none())
def test_no_bytes_are_more_than_refused(body: bytes, header: int | None) -> None:
    assert outcome(lambda: v2_rest.parse(body, header, BATCHED))[0] in (200, 400)


# --- content codings -----------------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate"]))
def test_codings_round_trip(body: bytes, name: Any) -> None:
    assert coding.decompress(coding.compress([body[:5], memoryview(body)[5:]], name), name, 300) == body


def test_bare_deflate_and_several_gzip_members_are_read() -> None:
    bare = zlib.compressobj(wbits=-15)
    assert coding.decompress(bare.compress(b"hello") + bare.flush(), "deflate", 10) == b"hello"
    assert coding.decompress(gzip.compress(b"a") + gzip.compress(b"b"), "gzip", 10) == b"ab"


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_a_bomb_is_defused(name: Any) -> None:
    bomb = coding.compress([bytes(10_000_000)], name)
    tracemalloc.start()
    with pytest.raises(TooLarge, match="more than 1,000 bytes after"):
        coding.decompress(bomb, name, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_many_empty_members_are_refused() -> None:
    with pytest.raises(BadRequest, match="follow the request body's gzip data"):
        coding.decompress(gzip.compress(b"") * 1000, "gzip", 1000)


@given(st.binary(max_size=40), st.sampled_from(["gzip", "deflate"]))
def test_damaged_data_is_refused(body: bytes, name: Any) -> None:
    assert outcome(lambda: coding.decompress(body, name, 100))[0] in (200, 400, 413)


def test_truncated_data_is_refused() -> None:
    with pytest.raises(BadRequest, match="cut short"):
        coding.decompress(gzip.compress(b"hello")[:-3], "gzip", 100)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (b"", None), (b"identity", None), (b"br", None), (b"gzip", "gzip"), (b"GZIP", "gzip"), (b"deflate", "deflate"),
        (b"br, deflate, gzip", "deflate"), (b"deflate;q=0.5, gzip;q=0.8", "gzip"), (b"gzip;q=0", None),
        (b"gzip;q=x", None), (b"*", None),
    ],
)  # fmt: skip
def test_accept_encoding(accept: bytes, chosen: str | None) -> None:
    assert coding.preferred(accept) == chosen


def test_an_unknown_coding_is_refused() -> None:
    assert coding.coding_of(b"identity") is None
    with pytest.raises(UnknownCoding, match="'br'"):
        coding.coding_of(b"br")


def test_timeouts_are_bounded() -> None:
    body = json.dumps({"inputs": [GOOD], "parameters": {"timeout": 2**63}}).encode()
    timeout = v2_rest.parse(body, None, BATCHED).timeout
    assert timeout is not None
    assert math.isfinite(timeout)


# --- raw requests, parameters, codings -----------------------------------------------------------------------------


def raw_model(shape: tuple[Any, ...], axis: int | None = None) -> Signature:
    layout = None if axis is None else Layout({"x": axis}, {"y": 0}, (1, 2, 4))
    return Signature("m", "1", tensors({"x": spec(*shape)}), tensors({"y": spec(*shape)}), layout)


@pytest.mark.parametrize(
    ("shape", "axis", "floats", "got"),
    [
        (("K",), None, 10, (10,)),
        (("N", "K"), 0, 10, (1, 10)),
        ((3, "N"), 1, 3, (3, 1)),
        (("K", 5), None, 10, (2, 5)),
        ((2, 5), None, 10, (2, 5)),
        (("K", 5), None, 0, (0, 5)),
    ],
)
def test_a_raw_request_tells_the_open_dimension(
    shape: tuple[Any, ...], axis: int | None, floats: int, got: tuple[int, ...]
) -> None:
    assert v2_rest.parse(bytes(4 * floats), 0, raw_model(shape, axis)).feeds["x"].shape == got


@pytest.mark.parametrize(
    ("shape", "axis", "size", "expected"),
    [
        (("K",), None, 15, 12),
        (("N", 4), 0, 15, 16),
        ((3, "N"), 1, 24, 12),
        (("K", 5), None, 30, 20),
        ((2,), None, 0, 8),
    ],
)
def test_a_raw_request_of_another_size_is_refused(
    shape: tuple[Any, ...], axis: int | None, size: int, expected: int
) -> None:
    with pytest.raises(BadRequest, match=f"Expected {expected}, got {size}"):
        v2_rest.parse(bytes(size), 0, raw_model(shape, axis))


def test_the_shape_is_checked_before_the_data_is_read() -> None:
    body = b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[' + b"[]," * 300_000 + b"[]]}]}"
    with pytest.raises(BadRequest, match=r"Expected \[-1,2\], got \[1,3\]"):
        v2_rest.parse(body, None, BATCHED)
    lists: list[Any] = [[]] * 1_000_000
    tracemalloc.start()
    with pytest.raises(BadRequest, match="Shape does not match"):
        codec.from_json(lists, "FP32", (1, 2), "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_no_sequence_and_any_priority_are_accepted() -> None:
    document = {"inputs": [GOOD], "parameters": {"sequence_id": 0, "sequence_start": False, "priority": 3}}
    assert v2_rest.parse(json.dumps(document).encode(), None, BATCHED).feeds["x"].shape == (1, 2)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (b"identity;q=1, gzip;q=0.1", None),
        (b"gzip;q=0.1, identity;q=0", "gzip"),
        (b"gzip;level=1;q=0", None),
        (b"gzip; level=1 ; q=0.5, deflate;q=0.6", "deflate"),
        (b"identity, gzip", "gzip"),
    ],
)
def test_the_identity_may_be_liked_better(accept: bytes, chosen: str | None) -> None:
    assert coding.preferred(accept) == chosen


@pytest.mark.parametrize("odd", [0.5, np.inf, np.nan])
def test_long_tensors_in_json_are_read_and_written_piece_by_piece(odd: float) -> None:
    array = np.arange(2 * codec.PIECE + 3, dtype=np.float32)
    array[-2] = odd
    data = json.loads(codec.to_json(array, "FP32", "y"))
    np.testing.assert_array_equal(np.array(data, np.float32), array)
    for nested in (data, [data], [[value] for value in data]):
        np.testing.assert_array_equal(codec.from_json(nested, "FP32", array.shape, "x"), array)
    if odd == 0.5:
        with pytest.raises(BadRequest, match="attempt to access JSON"):
            codec.from_json(data, "INT32", array.shape, "x")
        with pytest.raises(BadRequest, match="attempt to access JSON"):
            codec.from_json([*data[:-1], "text"], "FP32", array.shape, "x")

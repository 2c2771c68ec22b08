"""The OpenAPI document, and requests made from it: no mistake of a client is an error of the server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.support import Running, doubler, serving

INFERENCE = ("infer", "generate", "generate_stream")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(["double", "nope", "1", "0", "x", "é", "..", "%00"])


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving({"double": doubler()}, max_batch=4) as running:
        yield running


@pytest.fixture(scope="module")
def document(server: Running) -> dict[str, Any]:
    status, found = server.get("/openapi.json")
    assert status == 200
    return dict(found)


def test_every_route_is_described(document: dict[str, Any]) -> None:
    paths = document["paths"]
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        for suffix in INFERENCE:
            assert "requestBody" in paths[f"{prefix}/{suffix}"]["post"]
        for suffix in ("", "/ready", "/config", "/stats"):
            assert "get" in paths[prefix + suffix]
    for path, verbs in paths.items():
        for verb, operation in verbs.items():
            if verb != "head":
                told = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
                assert told == set(re.findall(r"{(\w+)}", path)), path


def values_of(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Documents that a JSON Schema allows, and some that it does not, member by member."""
    kinds = schema.get("type", [])
    right: st.SearchStrategy[Any] = st.nothing()
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if "enum" in schema:
            right |= st.sampled_from(schema["enum"])
        elif kind == "object":
            members = {name: values_of(member) for name, member in schema.get("properties", {}).items()}
            right |= st.fixed_dictionaries({}, optional=members)
            if "additionalProperties" in schema:
                right |= st.dictionaries(st.text(max_size=8), values_of(schema["additionalProperties"]), max_size=3)
        elif kind == "array":
            right |= st.lists(values_of(schema.get("items", {"type": "number"})), max_size=4)
        elif kind == "string":
            right |= st.text(max_size=8) | st.sampled_from(["x", "y", "double"])
        elif kind == "integer":
            right |= st.integers(0, 8)
        elif kind == "number":
            right |= st.floats(-8, 8) | st.integers(-8, 8)
        elif kind == "boolean":
            right |= st.booleans()
    return right | right | right | JSON


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Verb, path and the body's schema of everything; without what stops the tests' model."""
    return [
        (verb.upper(), path, operation.get("requestBody", {}).get("content", {}).get("application/json", {}))
        for path, verbs in sorted(document["paths"].items())
        for verb, operation in sorted(verbs.items())
        if not path.endswith(("/load", "/unload"))
    ]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_request_is_the_servers_fault(server: Running, document: dict[str, Any], data: st.DataObject) -> None:
    verb, path, content = data.draw(st.sampled_from(operations(document)))
    asked = re.sub(r"{\w+}", lambda _: quoted(data.draw(NAMES)), path)
    body = None
    if verb == "POST":
        value = data.draw(values_of(content.get("schema", {"type": "object"})))
        body = json.dumps(value).encode() if data.draw(st.integers(0, 9)) else data.draw(st.binary(max_size=40))
    status, _, reply = server.request(verb, asked, body)
    assert status < 500 or (status == 501 and b"through network protocol" in reply), (verb, asked, body, reply)


def quoted(name: str) -> str:
    return name if name.startswith("%") else "".join(f"%{b:02x}" for b in name.encode())


def test_the_page_of_routes_loads_nothing_from_elsewhere(server: Running, document: dict[str, Any]) -> None:
    status, headers, body = server.request("GET", "/docs")
    page = body.decode()
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert all(f"<code>{path}</code>" in page for path in document["paths"])
    assert not re.search(r"<script|src=|//", page)

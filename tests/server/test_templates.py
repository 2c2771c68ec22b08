"""JSON requests recognised by what lies between their numbers: never anything but what reading them in full gives."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infera_server.errors import RequestError
from infera_server.http.templates import (
    MAX_FIXED,
    MAX_TARGETS,
    MAX_TEMPLATES,
    PATIENCE,
    Template,
    Templates,
    template_of,
)
from infera_server.protocols import v2_rest
from infera_server.requests import Request
from infera_server.scheduling.signature import Signature, tensors
from tests.server.support import spec

TARGET = "m", None
SPECS = {
    "f": spec("N", "W"),
    "i": spec("N", dtype=np.int8),
    "u": spec("N", dtype=np.uint64),
    "d": spec("N", dtype=np.float64),
}


class Served(SimpleNamespace):
    """As much of a model as is looked at, and one that can be referred to weakly."""


def model(*names: str) -> Any:
    specs = tensors({name: SPECS[name] for name in names})
    return Served(signature=Signature("m", "1", specs, tensors({"y": spec("N")}), None))


def document(served: Any, values: dict[str, list[Any]], **members: Any) -> bytes:
    inputs = served.signature.inputs
    entries = [
        {"name": name, "shape": [len(data)] if name != "f" else [1, len(data)], "datatype": inputs[name].datatype}
        | {"data": data}
        for name, data in values.items()
    ]
    return json.dumps({"inputs": entries, **members}).encode()


def kept(served: Any, body: bytes) -> Template:
    template = template_of(body, served, v2_rest.parse(body, None, served.signature))
    assert template is not None
    return template


def same(found: Request, read: Request) -> None:
    assert (found.id, found.outputs, found.parameters) == (read.id, read.outputs, read.parameters)
    assert (found.timeout, found.priority, found.correlation) == (read.timeout, read.priority, read.correlation)
    assert found.feeds.keys() == read.feeds.keys()
    for name, array in found.feeds.items():
        assert (array.dtype, array.shape) == (read.feeds[name].dtype, read.feeds[name].shape)
        assert array.tobytes() == read.feeds[name].tobytes()


FLOATS = st.floats(-1e38, 1e38) | st.integers(-(2**53), 2**53)


@given(
    st.lists(st.tuples(FLOATS, st.integers(-128, 127), st.integers(0, 2**64 - 1), FLOATS), min_size=1, max_size=5),
    st.text(st.characters(codec="ascii", exclude_characters='"\\', categories=["L", "N", "P", "S"])),
)
def test_other_values_are_read_as_in_full(rows: list[tuple[Any, ...]], identity: str) -> None:
    served = model("f", "i", "u", "d")
    first = document(served, {name: [1] * len(rows) for name in "fiud"}, id="first", parameters={"timeout": 5, "a": 1})
    other = document(
        served,
        dict(zip("fiud", map(list, zip(*rows, strict=True)), strict=True)),
        id=identity,
        parameters={"timeout": 5, "a": 1},
    )
    found = kept(served, first).read(other)
    assert found is not None
    same(found, v2_rest.parse(other, None, served.signature))


@pytest.mark.parametrize(
    "text",
    ["1, 2", "1, 2, 3, 4", "", "1, 2, true", "1, false, 3", "1, null, 3", '1, "2", 3', "1, [2], 3", "[1, 2, 3]",
     "1, 2, 1e39", "1, 2, 1e999", "1, 2, NaN", "1, 2, Infinity", "1 2 3", "1, 2, 3,", "1, 2, {}", "1, 2, 03",
     "1, 2, +3", "1, 2, 3 // a", '1], "x": [2, 3', '1, 2, 3], "data": [1, 2, 3', "1,2,3]}]} ", "1, 2, \xff"],
)  # fmt: skip
def test_what_is_not_as_before_is_left_to_be_read_in_full(text: str) -> None:
    served = model("f")
    body = document(served, {"f": [1.5, 2.5, 3.5]})
    template = kept(served, body)
    assert template.read(body) is not None
    assert template.read(body.replace(b"1.5, 2.5, 3.5", text.encode("latin-1"))) is None


@pytest.mark.parametrize(("name", "value"), [("i", "128"), ("i", "1.0"), ("i", "-129"), ("u", "-1"), ("u", str(2**64))])
def test_integers_that_do_not_fit_are_refused(name: str, value: str) -> None:
    served = model(name)
    template = kept(served, document(served, {name: [1, 2]}))
    assert template.read(document(served, {name: [1, 2]}).replace(b"[1, 2]", f"[1, {value}]".encode())) is None


@pytest.mark.parametrize("identity", ['a"b', "a\\nb", "a\x01b", "\x7f", "\xe9"])
def test_ids_that_are_not_plain_are_left_to_be_read_in_full(identity: str) -> None:
    served = model("i")
    body = document(served, {"i": [1]}, id="@@")
    assert kept(served, body).read(body.replace(b"@@", identity.encode())) is None


def test_any_change_of_the_text_is_read_as_in_full() -> None:
    """Bytes replaced, dropped, doubled, moved; whatever is still recognised has the meaning that it has."""
    served = model("f", "i")
    body = document(served, {"f": [1.25, -2], "i": [3, 4, 5]}, id="x1", outputs=[{"name": "y"}])
    template, rng = kept(served, body), random.Random(0)
    recognised = 0
    for _ in range(20_000):
        changed = bytearray(body)
        for _ in range(rng.randint(1, 3)):
            at, to = rng.randrange(len(changed)), rng.randrange(len(changed))
            match rng.randrange(4):
                case 0:
                    changed[at] = rng.choice(b'0123456789.,-eE[]{}":\\ tfn\x00\xff')
                case 1:
                    del changed[at : at + rng.randint(1, 3)]
                case 2:
                    changed[at:at] = changed[to : to + rng.randint(1, 20)]
                case _:
                    changed[at:at] = rng.choice([b"1", b", 2", b"]", b"[", b'"', b'"data": [', b"], "])
        found = template.read(bytes(changed))
        if found is not None:
            recognised += 1
            same(found, v2_rest.parse(bytes(changed), None, served.signature))
    assert recognised > 100


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": [{"name": "i", "shape": [1], "datatype": "INT8", "data": [[1]]}]}',
        b'{"inputs": [{"name": "i", "shape": [1], "datatype": "INT8", "data": [1]}], "x": {"data": [1]}}',
        b'{"x": [{"data": [1]}], "inputs": [{"name": "i", "shape": [1], "datatype": "INT8", "data": [[1]]}]}',
        b'{"parameters": {"id": "a"}, "inputs": [{"name": "i", "shape": [1], "datatype": "INT8", "data": [1]}]}',
        b'{"inputs": [{"name": "i", "shape": [1], "datatype": "INT8", "data": [2], "data": [1]}]}',
        b'{"inputs": [{"name": "i", "shape": [1], "datatype": "INT8", "d\\u0061ta": [1]}], "\\"data": [1]}',
        b'{"inputs": [{"name": "i", "shape": [1], "datatype": "INT8", "data": [1]}], "x": "%s"}' % (b"x" * MAX_FIXED),
    ],
)
def test_documents_in_which_the_places_are_not_plain_are_not_kept(body: bytes) -> None:
    served = model("i")
    assert template_of(body, served, v2_rest.parse(body, None, served.signature)) is None


def test_they_are_of_one_model_and_not_too_many() -> None:
    served, other, templates = model("i"), model("i"), Templates()
    bodies = [document(served, {"i": [1] * (count + 1)}) for count in range(MAX_TEMPLATES + 1)]
    for body in bodies:
        assert templates.find(TARGET, served, body) is None
        templates.keep(TARGET, served, body, v2_rest.parse(body, None, served.signature))
        assert templates.find(TARGET, served, body) is not None
    assert templates.find(TARGET, served, bodies[0]) is None
    assert templates.find(TARGET, other, bodies[-1]) is None
    assert templates.find(("m", "1"), served, bodies[-1]) is None
    for index in range(2 * MAX_TARGETS):
        target = str(index), None
        templates.keep(target, served, bodies[0], v2_rest.parse(bodies[0], None, served.signature))
        assert templates.find(target, served, bodies[0]) is not None
    assert templates.find(TARGET, served, bodies[-1]) is None


def test_documents_that_are_always_new_soon_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    served, templates, made = model("i"), Templates(), 0

    def counted(*_: Any) -> None:
        nonlocal made
        made += 1

    monkeypatch.setattr("infera_server.http.templates.template_of", counted)
    body = document(served, {"i": [1]})
    for _ in range(40 * PATIENCE):
        templates.keep(TARGET, served, body, v2_rest.parse(body, None, served.signature))
    assert made < 2 * PATIENCE


def test_refusals_are_those_of_reading_in_full() -> None:
    served = model("i")
    with pytest.raises(RequestError, match="does not fit in INT8"):
        v2_rest.parse(document(served, {"i": [128]}), None, served.signature)


def test_what_ends_alike_is_not_the_same() -> None:
    served = model("i")
    body = document(served, {"i": [1, 2]})
    template = kept(served, body)
    end = template.pieces[-1]
    assert template.read(body) is not None
    for other in (
        body + end,
        body[: -len(end)] + b"," + end,
        body[: -len(end)] + end[:1] + b",[3" + end,
        end,
        body[:-1],
    ):
        assert template.read(other) is None, other
    nothing = replace(template, pieces=[b"{}"], places=[])
    assert nothing.read(b"{}") is not None
    assert nothing.read(b"{}{}") is None

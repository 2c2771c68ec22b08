"""What a request asks for, whatever its dialect; the messages of gRPC."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2

from infera_server.errors import BadRequest
from infera_server.protocols import protos
from infera_server.requests import Correlation, Options, options
from tests.server.support import doubler, serving


def test_parameters() -> None:
    asked = options({"timeout": 1500, "priority": 2, "sequence_id": 7, "sequence_start": True, "colour": "red"})
    assert asked == Options(0.0015, 2, Correlation(7, start=True), {"colour": "red"})
    assert options({"sequence_id": 0, "sequence_end": False, "timeout": 0}) == Options()
    assert options({"sequence_id": "a", "sequence_end": True}).correlation == Correlation("a", end=True)
    assert options({"sequence_start": True}).correlation == Correlation(0, start=True)


@pytest.mark.parametrize(
    "wrong",
    [{"timeout": -1}, {"timeout": 1.5}, {"priority": "high"}, {"sequence_id": True}, {"sequence_id": 1.5},
     {"sequence_start": 1}],
)  # fmt: skip
def test_parameters_that_cannot_be_meant(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=next(iter(wrong))):
        options(wrong)


@pytest.mark.parametrize(
    "wrong", [{"a": "\ud800"}, {"\ud800": 1}, {"a": 2**64}, {"sequence_id": 2**70}, {"a": -(2**64)}]
)
def test_parameters_that_lenient_json_alone_can_hold(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=r"lone surrogate|more than 64 bits"):
        options(wrong)


@pytest.mark.parametrize("parameters", [{"sequence_id": 1}, {"sequence_start": True}, {"sequence_end": True}])
def test_a_model_without_state_does_not_mind_sequences(parameters: dict[str, Any]) -> None:
    """As Triton."""
    with serving({"double": doubler()}) as running:
        x = np.ones((1, 4), np.float32)
        tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.tolist()}
        status, reply = running.infer("double", {"inputs": [tensor], "parameters": parameters})
        assert status == 200
        assert reply["outputs"][0]["data"] == [2.0] * 4


def test_the_messages_are_compiled() -> None:
    """Every field that is written in a `.proto` file is in the file that protoc made of them."""
    folder = files(protos)
    compiled = descriptor_pb2.FileDescriptorSet.FromString(folder.joinpath("v2.binpb").read_bytes())
    for file in compiled.file:
        text = re.sub(r"//.*", "", folder.joinpath(file.name).read_text())
        declared = re.findall(
            r"^ *(?:repeated +|map *<[^>]*> *|[\w.]+ +)+(\w+) *= *\d+ *(?:\[[^]]*\])?;", text, re.MULTILINE
        )
        assert sorted(declared) == sorted(_fields(file.message_type)), file.name


def _fields(messages: Iterable[Any]) -> Iterator[str]:
    for message in messages:
        if not message.options.map_entry:
            yield from (field.name for field in message.field)
            yield from _fields(message.nested_type)

"""The Open Inference Protocol V2 over gRPC, with Triton's extensions: requests read and responses made.

https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto

Tensors in `raw_input_contents` are views of the message, and outputs are copied once, into the reply. Refusals have
Triton's texts, without the request's id that Triton puts in front of some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

from google.protobuf.message import DecodeError

from infera_server import codec
from infera_server.codec import Buffer, short
from infera_server.errors import BadRequest, NotFound
from infera_server.models.servable import Servable
from infera_server.protocols import grpc_members as members
from infera_server.protocols import wire
from infera_server.protocols.protos import message
from infera_server.requests import (
    FINAL,
    NO_OPTIONS,
    Options,
    Output,
    Region,
    Request,
    all_outputs,
    check_complete,
    check_input,
    from_bytes,
    input_of,
)
from infera_server.scheduling.rows import Arrays, HostArray
from infera_server.scheduling.signature import Signature, Tensor
from infera_server.shared_memory import Regions

InferRequest = message("inference.ModelInferRequest")
InferResponse = message("inference.ModelInferResponse")
StreamResponse = message("inference.ModelStreamInferResponse")

RAW_INPUTS, RAW_OUTPUTS, ID, INFER_RESPONSE = 7, 6, 3, 2
"""Numbers of fields: of a request, of a response, of both, of a response on a stream."""

MAX_DIGITS = 20
"""Of a version; a longer number is none that is served."""

MIN_SECONDS = 1e-6
"""What a deadline that has passed is taken for: 0 would be none."""


@dataclass(slots=True)
class Message:
    """A serialised request in parts: the rest of it (`header`) is the same from one request to the next, mostly."""

    header: bytes
    id: str
    raw: list[memoryview]
    nbytes: int


def cut(data: bytes) -> Message:
    """Raises BadRequest for what is no message."""
    raw: list[memoryview] = []
    ids: list[memoryview] = []
    header = wire.cut(data, {RAW_INPUTS: raw, ID: ids})
    try:
        return Message(header, str(ids[-1], "utf-8") if ids else "", raw, len(data))
    except UnicodeDecodeError:
        raise BadRequest(wire.UNREADABLE) from None


def parse(header: bytes) -> Any:
    """Raises BadRequest for what is no request."""
    try:
        return InferRequest.FromString(header)
    except DecodeError:
        raise BadRequest(wire.UNREADABLE) from None


def version_of(text: str) -> str | None:
    """The version or label that a request names; None for the default. Raises BadRequest for a number below 0."""
    if not text:
        return None
    if text[0] == "-" and text[1:].isdigit():
        raise BadRequest(f"invalid model version specified '{short(text)}' , version should be an integral value > 0")
    if text.isascii() and text.isdigit():
        return text.lstrip("0")[:MAX_DIGITS] or "0"
    return text


def look_up(get: Callable[[str, str | None], Servable], name: str, version: str | None) -> Servable:
    """What `get` gives. A label that it does not find is, to Triton, no version. Raises RequestError."""
    try:
        return get(name, version)
    except NotFound:
        if version is None or version.isdigit():
            raise
        raise BadRequest(
            f"failed to get model version from specified version string '{short(version)}' (details: stol), "
            "version should be an integral value > 0"
        ) from None


@dataclass(frozen=True, slots=True)
class Part:
    """An input. Its bytes are `data`, or lie in a region, or are the next raw ones of the message."""

    tensor: Tensor
    shape: tuple[int, ...]
    data: bytes | None
    region: Region | None


@dataclass(frozen=True, slots=True)
class Template:
    """All of a request but its id, its deadline and its raw tensors."""

    inputs: Sequence[Part]
    outputs: Sequence[Output]
    options: Options

    @property
    def is_slow(self) -> bool:
        """Whether the elements of raw tensors are read one by one."""
        return any(part.tensor.dtype.hasobject for part in self.inputs)


def template_of(asked: Any, model: Signature) -> Template:
    """What a request asks of a model. Raises BadRequest."""
    chosen = members.options_of(asked.parameters) if asked.parameters else NO_OPTIONS
    parts: dict[str, Part] = {}
    for entry in asked.inputs:
        name = entry.name
        if name in parts:
            raise BadRequest(f"input '{short(name)}' already exists in request")
        data, region = members.source_of(entry, model)
        tensor = input_of(name, model)
        datatype, shape = entry.datatype, tuple(entry.shape)
        check_input(tensor, datatype if datatype in codec.DATATYPES else "<invalid>", shape, model)
        if shape and not 0 <= min(shape) <= max(shape) <= codec.MAX_DIMENSION:
            raise BadRequest(f"input '{name}': no tensor has the shape {short(str(list(shape)))}")
        parts[name] = Part(tensor, shape, data, region)
    check_complete(parts, model)
    outputs = members.outputs_of(asked.outputs, model) if asked.outputs else all_outputs(model, binary=True)
    return Template(list(parts.values()), outputs, chosen)


def fill(template: Template, message: Message, model: Signature, regions: Regions, remaining: float | None) -> Request:
    """The request, of which the caller is to be told within `remaining` seconds (None: no matter when).

    Raises BadRequest, and NotFound for an unknown region.
    """
    feeds: dict[str, HostArray] = {}
    rest = iter(message.raw)
    for part in template.inputs:
        tensor = part.tensor
        raw: memoryview | bytes | None
        if part.data is not None:
            if message.raw:
                raise BadRequest(
                    "contents field must not be specified when using raw_input_contents "
                    f"for '{tensor.name}' for model '{model.name}'"
                )
            raw = part.data
        elif part.region is not None:
            raw = regions.view(part.region).toreadonly()
        else:
            raw = next(rest, None)
            if raw is None:
                raise BadRequest(
                    f"unable to find data for input tensor '{tensor.name}' for model '{model.name}' in request."
                )
        feeds[tensor.name] = from_bytes(tensor, raw, part.shape, model)
    outputs = template.outputs
    if any(output.region for output in outputs):
        outputs = [replace(o, region=regions.hold(o.region)) if o.region else o for o in outputs]
    options = template.options
    timeout = options.timeout
    if remaining is not None:
        timeout = max(min(remaining, timeout or remaining), MIN_SECONDS)
    return Request(
        message.id,
        feeds,
        outputs,
        timeout,
        options.priority,
        options.correlation,
        options.others,
        options.trace,
    )


def respond(request: Request, outputs: Arrays, model: Signature, regions: Regions, more: bytes = b"") -> list[Buffer]:
    """The parts of a serialised ModelInferResponse; `more` is a serialised one too, whose members it has besides."""
    parts: list[Buffer] = [_origin(model.name, model.version, request.id), more]
    tail: list[Buffer] = []
    for want in request.outputs:
        tensor = model.outputs[want.name]
        array, datatype = outputs[want.name], tensor.datatype
        if want.classes:
            array, datatype = codec.top_classes(array, want.classes, model.leading, tensor.labels), "BYTES"
        data = codec.to_bytes(array)
        if want.region is not None:
            regions.write(want.region, data, want.name)
            data = b""
        parts.append(_described(want.name, datatype, array.shape))
        tail += wire.head(RAW_OUTPUTS, len(data)), data
    return parts + tail


def streamed(parts: list[Buffer]) -> bytes:
    """A response as a stream has it."""
    return b"".join([wire.head(INFER_RESPONSE, sum(map(len, parts))), *parts])


def refused(text: str, request_id: str, more: bytes = b"") -> bytes:
    """The answer to a request on a stream that was not taken; with the members of `more`, as in `respond`."""
    parts: list[Buffer] = [InferResponse(id=request_id).SerializeToString(), more]
    return bytes(StreamResponse(error_message=text).SerializeToString()) + streamed(parts)


def failed(text: str, request: Request, model: Signature, more: bytes = b"") -> bytes:
    """The answer to a request on a stream that was taken and then failed; with the members of `more`."""
    parts = ended(request, model, final_parameter() + more)
    return bytes(StreamResponse(error_message=text).SerializeToString()) + streamed(parts)


def ended(request: Request, model: Signature, more: bytes) -> list[Buffer]:
    """The parts of a response that has the members of `more` alone. Without a version, as Triton has it."""
    return [InferResponse(id=request.id, model_name=model.name).SerializeToString(), more]


# --- parts of replies, serialised: concatenated messages are one message ---------------------------------------------


def _origin(model: str, version: str, request_id: str) -> bytes:
    """Whose response it is."""
    origin = _served(model, version)
    if not request_id:
        return origin
    encoded = request_id.encode()
    return origin + wire.head(ID, len(encoded)) + encoded


@lru_cache(maxsize=1024)
def _served(model: str, version: str) -> bytes:
    return bytes(InferResponse(model_name=model, model_version=version).SerializeToString())


@lru_cache(maxsize=4096)
def _described(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    """An output's description."""
    made = InferResponse()
    made.outputs.add(name=name, datatype=datatype, shape=shape)
    return bytes(made.SerializeToString())


def text_parameter(key: str, value: str) -> bytes:
    """A response's parameter, serialised."""
    made = InferResponse()
    made.parameters[key].string_param = value
    return bytes(made.SerializeToString())


@cache
def final_parameter(final: bool = True) -> bytes:
    """Whether no other response to the request follows on its stream, serialised."""
    made = InferResponse()
    made.parameters[FINAL].bool_param = final
    return bytes(made.SerializeToString())

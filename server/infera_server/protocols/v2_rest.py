"""The Open Inference Protocol V2 over REST, with Triton's binary tensor, raw and classification extensions.

https://github.com/kserve/open-inference-protocol and https://github.com/triton-inference-server/server/tree/main/docs/protocol

Refusals have Triton's texts. Where Triton answers 500 to a mistake of the client, this answers 400.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from infera_server import codec
from infera_server.codec import Buffer, short
from infera_server.errors import BadRequest, read_error
from infera_server.protocols import members
from infera_server.requests import (
    Common,
    Options,
    Output,
    Parameter,
    Region,
    Request,
    Slice,
    all_outputs,
    check_complete,
    check_input,
    check_output,
    from_bytes,
    input_of,
    options,
)
from infera_server.scheduling.rows import Arrays, HostArray
from infera_server.scheduling.signature import Signature
from infera_server.shared_memory import NO_REGIONS, Regions

MAX_REPLIES = 64
"""Documents of replies that are kept with what requests have in common."""

_MARK = b"\0"
_HOLE = orjson.Fragment(_MARK)
"""Stands for a value; no JSON has this byte."""

_PARAMETERS = {"type": "object", "additionalProperties": {"type": ["boolean", "number", "string"]}}
_PARAMETERS_OR_NONE = _PARAMETERS | {"type": ["object", "null"]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": _PARAMETERS,
        "inputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype"],
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "datatype": {"type": "string", "enum": list(codec.DATATYPES)},
                    "parameters": _PARAMETERS_OR_NONE,
                    "data": {"type": "array"},
                },
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "parameters": _PARAMETERS_OR_NONE},
            },
        },
    },
}
"""The JSON Schema of a request's document."""


def header_length(value: bytes) -> int:
    """Inference-Header-Content-Length. Raises BadRequest for what is not a number."""
    digits = value.strip()
    if not digits.isdigit() and not (digits[:1] == b"-" and digits[1:].isdigit()):
        raise BadRequest(f"inference header size should be a number, got: {short(value.decode('latin-1'))}")
    return int(digits[:20])


def about(text: Buffer) -> tuple[str, bool]:
    """The id in a request's JSON, and whether it asks where its time went. Raises BadRequest where it is no JSON."""
    document, _ = members.load(text)
    trace = members.traces(document.get("parameters"))
    try:
        return members.identity(document), trace
    except BadRequest:
        return "", trace


def parse(body: Buffer, header: int | None, model: Signature, regions: Regions = NO_REGIONS) -> Request:
    """Read a request whose JSON is the first `header` bytes of the body (None: all of it; 0: there is none).

    Tensors in shared memory are views of it. May run in any thread. Raises RequestError.
    """
    if header == 0:
        return Request("", _raw_feeds(body, model), all_outputs(model, binary=True))
    if header is not None and not 0 < header <= len(body):
        raise BadRequest(f"inference header size should be in range (0, {len(body)}), got: {header}")
    document, rest = members.load(body if header is None else memoryview(body)[:header])
    tail = memoryview(body)[len(body) if header is None else header :]
    try:
        return _request(document, rest, tail, model, regions)
    except Exception as error:
        raise read_error(error, model.name, members.traces(document.get("parameters"))) from None


def _request(document: dict[str, Any], rest: bool, tail: memoryview, model: Signature, regions: Regions) -> Request:
    """The request of a document, and what follows it; with `rest` more JSON does."""
    if "inputs" not in document:
        raise members.missing("inputs")
    found: dict[str, HostArray | Slice] = {}
    offset = 0
    for entry in members.list_of(document["inputs"], "inputs"):
        name, data = _input(entry, len(tail), offset, model, regions)
        if name in found:
            raise BadRequest(f"input '{name}' already exists in request")
        found[name] = data
        offset = data.stop if isinstance(data, Slice) else offset
    if offset != len(tail):
        raise BadRequest(f"unexpected additional input data for model '{model.name}'")
    feeds = {
        name: from_bytes(data.tensor, tail[data.start : data.stop], data.shape, model)
        if isinstance(data, Slice)
        else data
        for name, data in found.items()
    }
    if rest:
        raise BadRequest(
            "failed to parse the request JSON buffer: The document root must not be followed by other values. "
            "Is the Inference-Header-Content-Length header missing?"
        )
    check_complete(feeds, model)
    request_id = members.identity(document)
    asked, binary = _parameters(document.get("parameters", {}))
    wanted = _outputs(document, binary, model, regions)
    slices = [data for data in found.values() if isinstance(data, Slice)]
    return Request(
        request_id,
        feeds,
        wanted,
        asked.timeout,
        asked.priority,
        asked.correlation,
        asked.others,
        asked.trace,
        common=Common(slices) if len(slices) == len(found) and not any(out.region for out in wanted) else None,
    )


def respond(
    request: Request, outputs: Arrays, model: Signature, regions: Regions = NO_REGIONS
) -> tuple[bytes, list[Buffer]]:
    """The reply's JSON, and the bytes that follow it: none where no output is binary.

    Outputs with a region are written there, and the JSON has their shapes alone.
    """
    common = request.common
    if common is None:
        entries, values, tail = _entries(request, outputs, model, regions)
        return _filled(_pieces(request, entries, model), request, values), tail
    key = model.version, bool(request.id), *[outputs[want.name].shape for want in request.outputs]
    pieces = common.replies.get(key)
    if pieces is None:
        entries, values, tail = _entries(request, outputs, model, regions)
        pieces = _pieces(request, entries, model)
        if all(
            not want.classes
            and want.region is None
            and not (want.binary and model.outputs[want.name].datatype == "BYTES")
            for want in request.outputs
        ):
            if len(common.replies) >= MAX_REPLIES:
                common.replies.clear()
            common.replies[key] = pieces
    else:
        values, tail = [], []
        for want in request.outputs:
            if want.binary:
                tail.append(codec.to_bytes(outputs[want.name]))
            else:
                values.append(codec.to_json(outputs[want.name], model.outputs[want.name].datatype, want.name))
    return _filled(pieces, request, values), tail


def _entries(
    request: Request, outputs: Arrays, model: Signature, regions: Regions
) -> tuple[list[dict[str, Any]], list[bytes], list[Buffer]]:
    """The reply's entry for each output, without their values: those that go into the JSON, and those that follow."""
    entries: list[dict[str, Any]] = []
    values: list[bytes] = []
    tail: list[Buffer] = []
    for want in request.outputs:
        tensor = model.outputs[want.name]
        array, datatype = outputs[want.name], tensor.datatype
        if want.classes:
            array, datatype = codec.top_classes(array, want.classes, model.leading, tensor.labels), "BYTES"
        entry: dict[str, Any] = {"name": want.name, "datatype": datatype, "shape": array.shape}
        if want.region is not None:
            regions.write(want.region, codec.to_bytes(array), want.name)
        elif want.binary:
            data = codec.to_bytes(array)
            entry["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            entry["data"] = _HOLE
            values.append(codec.to_json(array, datatype, want.name))
        entries.append(entry)
    return entries, values, tail


def _pieces(request: Request, entries: list[dict[str, Any]], model: Signature) -> Sequence[bytes]:
    """The reply's JSON around its values and, before those, its id if it has one."""
    reply: dict[str, Any] = {"id": _HOLE} if request.id else {}
    reply |= {"model_name": model.name, "model_version": model.version, "outputs": entries}
    return orjson.dumps(reply).split(_MARK)


def _filled(pieces: Sequence[bytes], request: Request, values: list[bytes]) -> bytes:
    if request.id:
        values = [orjson.dumps(request.id), *values]
    if not values:
        return pieces[0]
    parts = [pieces[0]]
    for value, piece in zip(values, pieces[1:], strict=True):
        parts += value, piece
    return b"".join(parts)


def with_parameters(document: bytes, parameters: Mapping[str, Parameter]) -> bytes:
    """The JSON of a reply, which has these parameters besides."""
    return b'%s,"parameters":%s}' % (document[:-1], orjson.dumps(parameters)) if parameters else document


def ended(request: Request, model: Signature) -> bytes:
    """The JSON of a reply that says no more than that there is no other."""
    reply: dict[str, Any] = {"id": request.id} if request.id else {}
    reply |= {"model_name": model.name, "model_version": model.version, "outputs": []}
    return orjson.dumps(reply)


def error_body(message: str) -> bytes:
    """`{"error": message}`; in ASCII, so that any text of a request can be quoted."""
    return b'{"error": %b}' % json.dumps(message).encode()  # of a string alone it is quick


# --- the document ----------------------------------------------------------------------------------------------------


def _parameters(value: object) -> tuple[Options, bool]:
    """What the parameters ask for, and whether outputs are binary by default."""
    parameters = members.object_of(value, "request params.")
    for key, given in parameters.items():
        if not isinstance(given, str | int | float):
            raise BadRequest(members.NO_PARAMETER.format(short(key)))
    binary = members.flag(parameters.pop("binary_data_output", False), "binary_data_output")
    return options(parameters), binary


# --- inputs ----------------------------------------------------------------------------------------------------------


def _input(entry: object, total: int, offset: int, model: Signature, regions: Regions) -> tuple[str, HostArray | Slice]:
    """One input: its values, from the JSON or shared memory, or where its bytes lie, from `offset` of `total` bytes."""
    entry = members.object_of(entry, "input")
    name = members.text(entry, "name")
    if "shape" not in entry:
        raise members.missing("shape")
    shape = codec.shape_of(entry["shape"])
    datatype = members.text(entry, "datatype")
    if datatype not in codec.DATATYPES:
        raise BadRequest(f"invalid datatype for input {short(name)}")
    parameters = members.parameters_of(entry, "input params")
    if ("data" in entry) + ("binary_data_size" in parameters) + ("shared_memory_region" in parameters) != 1:
        raise _not_one_source(entry, parameters)
    tensor = input_of(name, model)
    if "data" in entry:
        codec.check_json("receiving", datatype, f"input {name}")
    check_input(tensor, datatype, shape, model)
    if "data" in entry:
        return name, codec.from_json(entry["data"], datatype, shape, name)
    if "shared_memory_region" in parameters:
        return name, from_bytes(tensor, regions.view(_region(parameters)).toreadonly(), shape, model)
    size = members.natural(parameters["binary_data_size"], "binary_data_size")
    if size > total - offset:
        raise BadRequest(
            f"unexpected size for input '{name}', expecting {size - total + offset} additional bytes "
            f"for model '{model.name}'"
        )
    return name, Slice(tensor, shape, offset, offset + size, model.name)


def _not_one_source(entry: dict[str, Any], parameters: dict[str, Any]) -> BadRequest:
    given = [key for key in ("data",) if key in entry]
    given += [key for key in ("binary_data_size", "shared_memory_region") if key in parameters]
    found = "set " + " ".join(f"'{key}'" for key in given) if given else "no field is set"
    return BadRequest(
        "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
        f"'shared_memory_region' in 'parameters'. But {found}"
    )


def _region(parameters: dict[str, Any]) -> Region:
    """Where in shared memory a tensor lies."""
    name = members.text(parameters, "shared_memory_region")
    offset, nbytes = (
        members.natural(parameters.get(key, 0), key) for key in ("shared_memory_offset", "shared_memory_byte_size")
    )
    return Region(name, offset, nbytes)


def _raw_feeds(body: Buffer, model: Signature) -> dict[str, HostArray]:
    """The whole body is the one input: one row of it, with at most one open dimension, which the size then tells.

    BYTES have one element, which is the body.
    """
    if len(model.inputs) != 1:
        raise BadRequest(
            "Raw request must only have 1 input (found 1) to be deduced but got "
            f"{len(model.inputs)} inputs in '{model.name}' model configuration"
        )
    (tensor,) = model.inputs.values()
    shape = list(tensor.shape)
    if model.layout:
        shape[model.layout.inputs[tensor.name]] = 1
    if tensor.datatype == "BYTES":
        if any(d != 1 for d in shape):
            raise BadRequest(f"For BYTE datatype raw input '{tensor.name}', the model must have input shape [1]")
        return {tensor.name: codec.from_bytes(_one_text(body), tensor.dtype, tuple(shape), tensor.name, model.name)}
    known = math.prod(d for d in shape if d != -1) * tensor.dtype.itemsize
    if shape.count(-1) == 1 and known:
        shape[shape.index(-1)] = len(body) // known
    if -1 in shape:
        raise BadRequest(
            f"The shape of the raw input '{tensor.name}' can not be deduced because there are more than one "
            "variable-sized dimension"
        )
    expected = math.prod(shape) * tensor.dtype.itemsize
    if len(body) != expected:
        raise BadRequest(
            f"input byte size mismatch for input 'raw_input' for model '{model.name}'. "
            f"Expected {expected}, got {len(body)}"
        )
    return {tensor.name: codec.from_bytes(body, tensor.dtype, tuple(shape), tensor.name)}


def _one_text(body: Buffer) -> bytes:
    return len(body).to_bytes(4, "little") + body


# --- outputs ---------------------------------------------------------------------------------------------------------


def _outputs(document: dict[str, Any], binary: bool, model: Signature, regions: Regions) -> Sequence[Output]:
    entries = members.list_of(document.get("outputs", []), "outputs")
    wanted: dict[str, Output] = {}
    for entry in entries:
        entry = members.object_of(entry, "output")
        name = members.text(entry, "name")
        parameters = members.parameters_of(entry, "output params")
        classes = members.natural(parameters.get("classification", 0), "classification", verb="set")
        check_output(name, classes, model)
        own = members.flag(parameters.get("binary_data", binary), "binary_data")
        region = None
        if "shared_memory_region" in parameters:
            for key in ("classification", "binary_data"):
                if parameters.get(key):
                    raise BadRequest(f"Output can't set both 'shared_memory_region' and '{key}'")
            region = regions.hold(_region(parameters))
        wanted.setdefault(name, Output(name, own, classes, region))
    outputs = list(wanted.values()) or all_outputs(model, binary)
    for output in outputs:
        if not (output.binary or output.classes or output.region):
            codec.check_json("sending", model.outputs[output.name].datatype, f"output {output.name}")
    return outputs

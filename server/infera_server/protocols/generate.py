"""Triton's generate extension: a flat JSON document in, a flat JSON document out, one or a stream of them.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_generate.md

Members named like inputs are inputs, as scalars or flat lists; the others are parameters. `parameters` may hold more of
both. Every output is a scalar, where it has one element, or a flat list.
"""

from __future__ import annotations

from typing import Any

import orjson

from infera_server import codec
from infera_server.codec import short
from infera_server.errors import BadRequest, read_error
from infera_server.protocols import members
from infera_server.requests import Parameter, Request, all_outputs, check_complete, options
from infera_server.scheduling.explanation import PARAMETER
from infera_server.scheduling.rows import Arrays, HostArray
from infera_server.scheduling.signature import Signature, Tensor


def parse(body: bytes, model: Signature) -> Request:
    """The request in a document. Raises RequestError."""
    document = members.body(body)
    nested = document.pop("parameters", {})
    try:
        return _request(document, nested, model)
    except Exception as error:
        given = {**document, **nested} if type(nested) is dict else document
        trace = PARAMETER not in model.inputs and members.traces(given)
        raise read_error(error, model.name, trace) from None


def _request(document: dict[str, Any], nested: object, model: Signature) -> Request:
    request_id = members.identity(document)
    if type(nested) is not dict:
        raise BadRequest("Expected JSON object for keyword: 'parameters': attempt to access JSON non-object as object")
    feeds: dict[str, HostArray] = {}
    parameters: dict[str, Parameter] = {}
    for where, found in (("", document), ("Converting keyword: 'parameters': ", nested)):
        for name, value in found.items():
            tensor = model.inputs.get(name)
            if tensor is not None:
                if name in feeds:
                    raise BadRequest(f"{where}input '{name}' already exists in request")
                feeds[name] = _input(tensor, value)
            elif isinstance(value, str | int | float):
                parameters[name] = value
            else:
                raise BadRequest(where + members.NO_PARAMETER.format(short(name)))
    check_complete(feeds, model)
    for tensor in model.outputs.values():
        codec.check_json("sending", tensor.datatype, f"output {tensor.name}")
    asked = options(parameters)
    return Request(
        request_id,
        feeds,
        all_outputs(model, binary=False),
        asked.timeout,
        asked.priority,
        asked.correlation,
        asked.others,
        asked.trace,
    )


def _input(tensor: Tensor, value: object) -> HostArray:
    """The values in the input's shape: what is open of it gets what is left for it from the right, others 1."""
    values = value if type(value) is list else [value]
    left = len(values)
    shape = list(tensor.shape)
    for i in reversed(range(len(shape))):
        if shape[i] == -1:
            shape[i], left = left, 1
        elif shape[i] and left % shape[i] == 0:
            left //= shape[i]
        else:
            left = -1
            break
    if left != 1:
        raise BadRequest(f"The schema can not convert input '{tensor.name}' to tensor with proper shape")
    return codec.from_json(values, tensor.datatype, tuple(shape), tensor.name)


def respond(request: Request, outputs: Arrays, model: Signature) -> bytes:
    """The reply's document."""
    reply: dict[str, Any] = {"id": request.id} if request.id else {}
    reply |= {"model_name": model.name, "model_version": model.version}
    for want in request.outputs:
        array = outputs[want.name]
        values = codec.to_json(array, model.outputs[want.name].datatype, want.name)
        reply[want.name] = orjson.Fragment(values[1:-1] if array.size == 1 else values)
    return orjson.dumps(reply)


def event(document: bytes, explained: str = "") -> bytes:
    """A document as a server-sent event; what explains it is one of its members, where there is any."""
    if explained:
        document = b'%s,"%s":%s}' % (document[:-1], PARAMETER.encode(), orjson.dumps(explained))
    return b"data: %s\n\n" % document

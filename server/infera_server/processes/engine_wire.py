"""What the processes of a server tell each other of sessions and errors: JSON, no pickle."""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Mapping
from typing import Any

import orjson

import infera_gpu.errors
from infera_gpu.spec import TensorSpec, dtype_of_onnx, onnx_of_dtype
from infera_server import errors
from infera_server.runtime import Session, Specs
from infera_server.scheduling.independence import Facts

MAX_MESSAGE = 1 << 18
"""Bytes of one message; arrays are not in it."""

MAX_TEXT = 1 << 14
"""Characters of an error's text, and of its traceback, that are told."""


def specs_out(specs: Specs) -> dict[str, Any]:
    """As `specs_in` reads them."""
    return {name: [list(spec.shape), onnx_of_dtype(spec.dtype), spec.ranked] for name, spec in specs.items()}


def specs_in(told: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Specs that were told."""
    return {name: TensorSpec(tuple(shape), dtype_of_onnx(code), ranked) for name, (shape, code, ranked) in told.items()}


def about(session: Session) -> dict[str, Any]:
    """What the server knows of a session from the start."""
    return {
        "inputs": specs_out(session.inputs),
        "outputs": specs_out(session.outputs),
        "overridable": specs_out(session.overridable),
        "device": session.device.name,
    }


def facts_in(told: Mapping[str, Any]) -> Facts:
    """Facts that were told, as the fields' names and values."""
    return Facts(**told)


def error_out(error: Exception) -> dict[str, Any]:
    """An exception, as `error_in` makes it again. What is a client's answer already needs no trace."""
    trace = "" if isinstance(error, errors.RequestError) else "".join(traceback.format_exception(error))
    try:
        details = orjson.loads(orjson.dumps(vars(error)))
    except TypeError:  # something in it is no JSON
        details = {}
    return {
        "types": [kind.__name__ for kind in type(error).__mro__],
        "text": str(error)[:MAX_TEXT],
        "details": details if len(orjson.dumps(details)) < MAX_TEXT else {},
        "trace": trace[-MAX_TEXT:],
    }


def error_in(told: Mapping[str, Any]) -> Exception:
    """The exception, of the nearest type that is known here; it notes where it was raised."""
    kind = next(filter(None, map(_error_type, told["types"])), Exception)
    error = kind.__new__(kind, told["text"])
    error.args = (told["text"],)
    vars(error).update(told["details"])
    if told["trace"]:
        error.add_note(f"In the other process:\n{told['trace']}")
    return error


def _error_type(name: str) -> type[Exception] | None:
    for module in (infera_gpu.errors, errors, builtins):
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, Exception):
            return found
    return None

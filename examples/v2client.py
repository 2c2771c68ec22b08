"""A client of the V2 inference protocol (KServe, Triton) with binary tensors, in the standard library and NumPy."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

Infer: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""A model to call: named inputs in, named outputs out. What answers may be a server, or a session in this process."""

_DATATYPES = {
    **{f"{kind}{bits}": np.dtype(f"{kind}{bits}".lower()) for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DATATYPES.items()}


class ServerError(Exception):
    """The server refused a request; the text is its own."""


class Client:
    """One keep-alive connection to a server; not for several threads at once."""

    def __init__(self, host: str, port: int, *, timeout: float = 60.0) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=timeout)

    def close(self) -> None:
        self._connection.close()

    def ready(self) -> bool:
        """Whether the server answers and all its models are ready."""
        try:
            return self.request("GET", "/v2/health/ready")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def model(self, name: str) -> Infer:
        """The model of this name as a function."""
        return lambda feeds: self.infer(name, feeds)

    def infer(self, model: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every output of `model`, by name. Raises ServerError with the server's own text."""
        header = {
            "inputs": [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": _NAMES[array.dtype],
                    "parameters": {"binary_data_size": array.nbytes},
                }
                for name, array in feeds.items()
            ],
            "parameters": {"binary_data_output": True},
        }
        text = json.dumps(header).encode()
        body = b"".join((text, *(array.tobytes() for array in feeds.values())))
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(text))}
        status, length, answer = self.request("POST", f"/v2/models/{model}/infer", body, headers)
        if status != 200:
            raise ServerError(f"{model}: {status} {answer[:500].decode(errors='replace')}")
        return _tensors(answer, len(answer) if length is None else length)

    def request(
        self, verb: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, int | None, bytes]:
        """(status, length of the JSON part where tensors follow it, body)"""
        try:
            self._connection.request(verb, path, body, dict(headers or {}))
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise
        length = response.headers.get("Inference-Header-Content-Length")
        return response.status, int(length) if length else None, answer


def _tensors(answer: bytes, length: int) -> dict[str, Array]:
    """Outputs of a response: its first `length` bytes are JSON, binary tensors follow in the order of entries."""
    found: dict[str, Array] = {}
    at = length
    for output in json.loads(answer[:length])["outputs"]:
        dtype, shape = _DATATYPES[output["datatype"]], output["shape"]
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            found[output["name"]] = np.array(output["data"], dtype).reshape(shape)
        else:
            found[output["name"]] = np.frombuffer(answer[at : at + size], dtype).reshape(shape)
            at += size
    return found

"""The messages of the V2 gRPC protocol, of Triton's model configuration, and of gRPC's health protocol.

The `.proto` files are those of https://github.com/triton-inference-server/common, with the Watch of gRPC's health
protocol added to it; `v2.binpb` is what protoc makes of them, and is made again by

    python -m grpc_tools.protoc -I. --include_imports --descriptor_set_out=v2.binpb *.proto

The messages live in a pool of their own: a process may hold a client's generated code for the same files too.
"""

from __future__ import annotations

import threading
from functools import cache
from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_making = threading.Lock()


def pool() -> descriptor_pool.DescriptorPool:
    """Every message and service. There is one: messages of two pools do not go together."""
    with _making:
        return _pool()


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    found = descriptor_pool.DescriptorPool()
    data = files(__package__).joinpath("v2.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        found.Add(file)
    return found


def message(name: str) -> Any:
    """The class of a message, as `inference.ModelInferRequest`."""
    with _making:
        return _message(name)


@cache
def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(name))

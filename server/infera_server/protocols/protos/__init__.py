"""The messages of the V2 gRPC protocol, of Triton's model configuration, and of gRPC's health protocol.

The `.proto` files are those of https://github.com/triton-inference-server/common, with the Watch of gRPC's health
protocol added to it; `v2.binpb` is what protoc makes of them, and is made again by

    python -m grpc_tools.protoc -I. --include_imports --descriptor_set_out=v2.binpb *.proto

The messages live in a pool of their own: a process may hold a client's generated code for the same files too. Their
classes are all made at once, nested ones too, and kept: protobuf makes a class when it is first needed and holds it
weakly, so that one which is being collected can still be handed to another thread, which then crashes the process.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_making = threading.Lock()


def pool() -> descriptor_pool.DescriptorPool:
    """Every message and service. There is one: messages of two pools do not go together."""
    with _making:
        return _made()[0]


def message(name: str) -> Any:
    """The class of a message, as `inference.ModelInferRequest`."""
    with _making:
        return _made()[1][name]


@cache
def _made() -> tuple[descriptor_pool.DescriptorPool, Mapping[str, Any]]:
    found = descriptor_pool.DescriptorPool()
    data = files(__package__).joinpath("v2.binpb").read_bytes()
    classes: dict[str, Any] = {}
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        found.Add(file)
        left = [*found.FindFileByName(file.name).message_types_by_name.values()]
        while left:
            kind = left.pop()
            classes[kind.full_name] = message_factory.GetMessageClass(kind)
            left += kind.nested_types
    return found, classes

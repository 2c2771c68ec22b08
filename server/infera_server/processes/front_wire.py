"""What the engine and its workers tell each other of requests: JSON beside the tensors, no pickle.

A block of shared memory is a message: a head, a document, another that says where the arrays lie, and from the next
multiple of `ALIGNMENT` on these.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any

import orjson

from infera_server.codec import DATATYPES
from infera_server.processes.arena import Blocks, Lent
from infera_server.processes.segment import Place, aligned, packed, places, views, write
from infera_server.requests import Correlation, Output, Request
from infera_server.scheduling.jobs import Batch, Job
from infera_server.scheduling.rows import Arrays, HostArray, Layout
from infera_server.scheduling.signature import Signature, Tensor

HEAD = struct.Struct("<IIQ")
"""Bytes of the two documents, and of the arrays."""

NO_ARRAYS: Arrays = {}


class Entry(IntEnum):
    """What a number in a ring is, by its lowest bits; the others are a block's offset or a request's number."""

    MESSAGE = 0
    RETURNED = 1
    """A block that the other end has written is its own again."""

    CANCEL = 2
    LOST = 3
    """There was no memory for an answer."""


KIND_BITS = 2


def entry(kind: Entry, value: int) -> int:
    """As it stands in a ring."""
    return value << KIND_BITS | kind


def kind_of(number: int) -> tuple[int, int]:
    """Kind and value of an entry."""
    return number & (1 << KIND_BITS) - 1, number >> KIND_BITS


# --- blocks ----------------------------------------------------------------------------------------------------------


def put(blocks: Blocks, document: Any, arrays: Arrays = NO_ARRAYS) -> int:
    """The offset of a new block with a document and arrays. Raises Overloaded or Unavailable.

    Arrays that lie in a block of their own already are not copied: the document says which, how large it is, and where.
    """
    own, size, lying = blocks.lying_in(arrays)
    parts = packed({name: array for name, array in arrays.items() if name not in lying} if lying else arrays)
    text, where = orjson.dumps((document, own, size, lying)), orjson.dumps(parts.described)
    begin = HEAD.size + len(text) + len(where)
    first = aligned(begin)
    offset = blocks.take(first + parts.nbytes)
    try:
        memory = blocks.reaching(offset + first + parts.nbytes, grow=True)
        memory[offset : offset + begin] = HEAD.pack(len(text), len(where), parts.nbytes) + text + where
        write(memory, parts, offset + first)
    except BaseException:
        blocks.give_back(offset)
        raise
    if lying:
        blocks.hold(own)
    return offset


def read(lent: Lent, offset: int) -> tuple[Any, dict[str, HostArray]]:
    """The document and the arrays of a block, which is lent until nothing views these any more. Raises ValueError."""
    texts = offset + HEAD.size
    length, more, nbytes = HEAD.unpack(lent.reaching(texts)[offset:texts])
    end = texts + length + more
    read = lent.reaching(end)[texts:end]
    document, own, size, lying = orjson.loads(read[:length])
    first = aligned(end - offset)
    arrays = views(lent.block(offset, first + nbytes), _places(read[length:]), first)
    if size:
        arrays |= views(lent.block(own, size), places(lying))
    return document, arrays


@lru_cache(1024)
def _places(text: bytes) -> Sequence[Place]:
    """What is described, which is the same for many requests."""
    return places(orjson.loads(text))


# --- models ----------------------------------------------------------------------------------------------------------


def signature_out(signature: Signature) -> dict[str, Any]:
    """As `signature_in` reads it; of padding nothing, which the engine sees to."""
    layout = signature.layout
    return {
        "name": signature.name,
        "version": signature.version,
        "inputs": [_tensor_out(tensor) for tensor in signature.inputs.values()],
        "outputs": [_tensor_out(tensor) for tensor in signature.outputs.values()],
        "layout": None if layout is None else [layout.inputs, layout.outputs, layout.buckets, layout.shared],
        "decoupled": signature.decoupled,
    }


def signature_in(told: Mapping[str, Any]) -> Signature:
    """A signature that was told."""
    inputs, outputs = ({t[0]: _tensor_in(*t) for t in told[kind]} for kind in ("inputs", "outputs"))
    layout = None
    if told["layout"] is not None:
        rows, results, buckets, shared = told["layout"]
        layout = Layout(rows, results, tuple(buckets), tuple(shared))
    return Signature(told["name"], told["version"], inputs, outputs, layout, told["decoupled"])


def _tensor_out(tensor: Tensor) -> list[Any]:
    return [tensor.name, tensor.datatype, tensor.shape, tensor.optional, tensor.labels]


def _tensor_in(name: str, datatype: str, shape: list[int], optional: bool, labels: list[str]) -> Tensor:
    return Tensor(name, datatype, DATATYPES[datatype], tuple(shape), optional, tuple(labels))


# --- requests --------------------------------------------------------------------------------------------------------


def request_out(request: Request) -> list[Any]:
    """A request without its arrays and without what only its dialect needs, as `request_in` reads it."""
    told = request.correlation
    correlation = None if told is None else [told.id, told.start, told.end, told.owner]
    return [request.id, [o.name for o in request.outputs], request.priority, correlation, request.parameters]


def request_in(told: list[Any], feeds: dict[str, HostArray], timeout: float | None) -> Request:
    """A request that was told."""
    identity, outputs, priority, correlation, parameters = told
    return Request(
        identity,
        feeds,
        _outputs(*outputs),
        timeout,
        priority,
        None if correlation is None else Correlation(*correlation),
        parameters,
    )


@lru_cache
def _outputs(*names: str) -> Sequence[Output]:
    return [Output(name, binary=True) for name in names]


_BATCH = (
    "rows", "padded", "taken_at", "gathered_at", "ran_at", "split_at", "free_at", "asked_at", "behind", "most", "fill"
)  # fmt: skip


def run_out(batch: Batch | None, job: Job) -> list[Any]:
    """How a job was run, for traces and explanations, as `run_in` reads it. (All processes have one clock.)"""
    told = None if batch is None else [len(batch.jobs), *(getattr(batch, name) for name in _BATCH)]
    return [job.queued_at, job.came_at, told]


def run_in(told: list[Any], job: Job) -> Batch | None:
    """The batch of a job, which is told when it was queued."""
    job.queued_at, job.came_at, run = told
    if run is None:
        return None
    jobs, *values = run
    return Batch([job] * jobs, **dict(zip(_BATCH, values, strict=True)))

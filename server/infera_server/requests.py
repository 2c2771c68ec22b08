"""An inference request, whatever dialect it came in, and what a model's signature makes of it.

Dialects read the wire and make a `Request`; the checks here give all of them the same refusals, in Triton's words.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from infera_server import codec
from infera_server.codec import short
from infera_server.errors import BadRequest, Unsupported
from infera_server.scheduling.explanation import PARAMETER
from infera_server.scheduling.jobs import Each
from infera_server.scheduling.rows import HostArray
from infera_server.scheduling.signature import Signature, Tensor

if TYPE_CHECKING:
    from infera_server.shared_memory import Memory

Parameter: TypeAlias = bool | int | float | str

FINAL = "triton_final_response"
"""A response's parameter: whether no other response to its request follows."""

MAX_MICROSECONDS = 2**62
"""A timeout above it is as good as none."""


@dataclass(frozen=True, slots=True)
class Region:
    """Where in a registered shared memory region a tensor lies; sizes in bytes. With its `memory` it is kept mapped."""

    name: str
    offset: int
    nbytes: int
    memory: Memory | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Output:
    """One output asked for: its `classes` best classes instead of its values where that is not 0.

    `binary` is for dialects that can write it in two ways. With a `region` it is written there.
    """

    name: str
    binary: bool
    classes: int = 0
    region: Region | None = None


@dataclass(frozen=True, slots=True)
class Correlation:
    """Which sequence a request belongs to, and whether it is its first or last.

    `owner` is the name of the API key that it came with: one key's sequence 7 is not another's.
    """

    id: int | str
    start: bool = False
    end: bool = False
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Slice:
    """An input of a `model` that is sent as bytes: `[start, stop)` of what follows a request's document."""

    tensor: Tensor
    shape: tuple[int, ...]
    start: int
    stop: int
    model: str


@dataclass(frozen=True)
class Common:
    """What requests of one document have in common: all that is not their id or their inputs' values.

    `slices` are the inputs, where all are sent as bytes. `replies` is for the dialect: what its replies have in common,
    by all else that they depend on.
    """

    slices: Sequence[Slice] = ()
    replies: dict[tuple[Hashable, ...], Sequence[bytes]] = field(default_factory=dict)
    grouped: list[tuple[Signature, int, Hashable]] = field(default_factory=list)
    """For the model that they were last sent to, where their shapes alone decide it: their rows, and with whom they can
    share a batch. One entry, or none."""

    @cached_property
    def nbytes(self) -> int:
        """Of what follows the document."""
        return self.slices[-1].stop if self.slices else 0

    @cached_property
    def are_views(self) -> bool:
        """Whether the arrays are views of the bytes, made in no time."""
        return all(s.tensor.dtype.kind not in "Ob" for s in self.slices)

    def feeds(self, body: codec.Buffer, start: int) -> dict[str, HostArray]:
        """The inputs in the bytes that follow the document, from `start` on."""
        if self.are_views:
            return {s.tensor.name: np.ndarray(s.shape, s.tensor.dtype, body, start + s.start) for s in self.slices}
        tail = memoryview(body)[start:]
        return {
            s.tensor.name: codec.from_bytes(tail[s.start : s.stop], s.tensor.dtype, s.shape, s.tensor.name, s.model)
            for s in self.slices
        }


@dataclass(slots=True)
class Request:
    """A request, checked against the model's signature.

    `timeout` is in seconds, None: not given. A smaller `priority` goes first; 0 is the model's default. `parameters`
    holds what the protocol has no meaning for. With `trace` the reply says where its time went. Whoever can take any
    number of responses sets `each`: it is called with all but the last, which may have no outputs then.
    """

    id: str
    feeds: dict[str, HostArray]
    outputs: Sequence[Output]
    timeout: float | None = None
    priority: int = 0
    correlation: Correlation | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    trace: bool = False
    common: Common | None = None
    each: Each | None = None

    @property
    def lies_with_client(self) -> bool:
        """Whether inputs are read in memory of the client, who may change them once it is answered."""
        return any(map(_is_shared, self.feeds.values()))

    def claim(self, owner: str) -> None:
        """Its sequence, if it belongs to one, is one of the API key of this name."""
        if self.correlation is not None:
            self.correlation = replace(self.correlation, owner=owner)

    def for_again(self, common: Common) -> Request:
        """The request as it is kept to be sent again."""
        return replace(self, feeds={}, common=common)

    def again(self, feeds: dict[str, HostArray], identity: str) -> Request:
        """The request of the same document with other values and another id."""
        return Request(
            identity, feeds, self.outputs, self.timeout, self.priority, self.correlation, self.parameters, self.trace,
            self.common,
        )  # fmt: skip


def _is_shared(array: HostArray) -> bool:
    """Whether an array is a view of a region, as `shared_memory` makes them."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, memoryview) and isinstance(owner.obj, mmap.mmap)


@dataclass(frozen=True, slots=True)
class Options:
    """What a request's parameters ask for."""

    timeout: float | None = None
    priority: int = 0
    correlation: Correlation | None = None
    others: Mapping[str, Parameter] = field(default_factory=dict)
    trace: bool = False


NO_OPTIONS = Options()


def options(parameters: Mapping[str, Parameter]) -> Options:
    """Read the parameters that mean something to every dialect. Raises BadRequest for a value that cannot be meant."""
    if not parameters:
        return NO_OPTIONS
    for name, value in parameters.items():
        _check_sendable(name, value)
    others = dict(parameters)
    micros, priority = (_natural(others.pop(key, 0), key) for key in ("timeout", "priority"))
    identity = others.pop("sequence_id", 0)
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        raise BadRequest("Unable to parse 'sequence_id': attempt to access JSON non-string as string")
    start, end = (_flag(others.pop(key, False), key) for key in ("sequence_start", "sequence_end"))
    correlation = Correlation(identity, start, end) if identity not in (0, "") or start or end else None
    trace = _flag(others.pop(PARAMETER, False), PARAMETER)
    return Options(min(micros, MAX_MICROSECONDS) / 1e6 or None, priority, correlation, others, trace)


def _check_sendable(name: str, value: Parameter) -> None:
    """Raises BadRequest for what lenient JSON can say and no other document can: half characters, endless integers."""
    try:
        name.encode()
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        raise BadRequest("a parameter holds a lone surrogate") from None
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise BadRequest(f"parameter '{short(name)}' is an integer of more than 64 bits")


def _natural(value: Parameter, name: str) -> int:
    if type(value) is not int or value < 0:
        raise BadRequest(f"Unable to parse '{name}': attempt to access JSON non-unsigned-integer as unsigned-integer")
    return value


def _flag(value: Parameter, name: str) -> bool:
    if type(value) is not bool:
        raise BadRequest(f"Unable to parse '{name}': attempt to access JSON non-boolean as boolean")
    return value


def input_of(name: str, model: Signature) -> Tensor:
    """The model's input of this name. Raises BadRequest."""
    tensor = model.inputs.get(name)
    if tensor is None:
        raise BadRequest(f"unexpected inference input '{short(name)}' for model '{model.name}'")
    return tensor


def check_input(tensor: Tensor, datatype: str, shape: tuple[int, ...], model: Signature) -> None:
    """Raises BadRequest where the datatype or a fixed dimension is another than the model's."""
    if datatype != tensor.datatype:
        raise BadRequest(
            f"inference input '{tensor.name}' data-type is '{short(datatype)}', "
            f"but model '{model.name}' expects '{tensor.datatype}'"
        )
    if not tensor.accepts(shape):
        want, got = (",".join(map(str, s)) for s in (tensor.shape, shape))
        raise BadRequest(
            f"unexpected shape for input '{tensor.name}' for model '{model.name}'. Expected [{want}], got [{got}]."
        )


def from_bytes(tensor: Tensor, raw: memoryview | bytes, shape: tuple[int, ...], model: Signature) -> HostArray:
    """The tensor in `raw`, a view where it can be one. Raises BadRequest where the length is not the shape's."""
    need = codec.nbytes_of(tensor.dtype, shape)
    if need is not None and need != len(raw):
        raise BadRequest(
            f"input byte size mismatch for input '{tensor.name}' for model '{model.name}'. "
            f"Expected {need}, got {len(raw)}"
        )
    return codec.from_bytes(raw, tensor.dtype, shape, tensor.name, model.name)


def check_complete(given: Collection[str], model: Signature) -> None:
    """Raises BadRequest where an input is missing."""
    missing = [name for name, tensor in model.inputs.items() if name not in given and not tensor.optional]
    if missing:
        total = len(model.inputs)
        least = total - sum(tensor.optional for tensor in model.inputs.values())
        expected = f"{total} inputs" if least == total else f"number of inputs between {least} and {total}"
        raise BadRequest(
            f"expected {expected} but got {len(given)} inputs for model '{model.name}'. "
            f"Got input(s) {_quoted(sorted(given))}, but missing required input(s) {_quoted(missing)}. "
            "Please provide all required input(s)."
        )


def _quoted(names: Iterable[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"


def check_output(name: str, classes: int, model: Signature) -> None:
    """Raises BadRequest for an output that the model has not, or that has no scores to classify by."""
    if name not in model.outputs:
        raise BadRequest(f"unexpected inference output '{short(name)}' for model '{model.name}'")
    if classes and model.outputs[name].datatype == "BYTES":
        raise BadRequest(f"output '{name}' is BYTES, which has no scores to classify by")


def check_again(request: Request, model: Signature) -> None:
    """Raises BadRequest where a request that was checked against another signature does not fit this one."""
    for name, array in request.feeds.items():
        check_input(input_of(name, model), codec.datatype_of(array.dtype, name), array.shape, model)
    check_complete(request.feeds, model)
    for output in request.outputs:
        check_output(output.name, output.classes, model)


def check_each(request: Request, model: Signature) -> None:
    """Raises Unsupported where there may be more responses than somebody takes."""
    if model.decoupled and request.each is None:
        raise Unsupported("HTTP end point doesn't support models with decoupled transaction policy")


def all_outputs(model: Signature, binary: bool) -> list[Output]:
    """Every output of the model."""
    return [Output(name, binary) for name in model.outputs]

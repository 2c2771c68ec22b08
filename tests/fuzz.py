"""Damaged and hostile model files, and what loading and running them may do.

    python -m tests.fuzz --minutes 10 --seed 1

makes files out of small models (bytes cut off, flipped, copied about; fields of the protobuf set to other values, left
out, doubled, swapped), loads each and runs what loads on tiny inputs, in a process with 4 GiB of address space and ten
seconds a file. Whatever comes out must be an InferaError; whatever is opened must lie in the model's folder.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import numpy_helper
from rich.console import Console
from rich.progress import Progress

import infera_gpu
from infera_gpu.errors import InferaError, InvalidModel
from infera_gpu.spec import TensorSpec
from tests.fuzz_models import models

MEMORY, SECONDS = 4 << 30, 10
PEAK = 400 << 20
"""Bytes that one file may add to the most that the process ever had."""
LARGEST_INPUT = 1 << 16

OPERATORS = (
    *("Relu", "Identity", "Dropout", "BatchNormalization", "Conv", "Mul", "Add", "Clip", "Gemm", "MatMul", "Erf", "If"),
    *(
        "NonZero",
        "Unique",
        "Compress",
        "Softmax",
        "Transpose",
        "Squeeze",
        "Shape",
        "Reshape",
        "Expand",
        "Tile",
        "Split",
    ),
    *("Cast", "ReduceSum", "Einsum", "Where", "Concat", "Slice", "Pad", "TopK", "Gather", "Range", "Loop", "Split"),
)
SHAPES = ((), (0,), (1,), (2,), (3,), (1, 2), (2, 1), (2, 2), (1, 2, 1, 1), (2, 2, 1, 1), (2, 2, 3, 3), (2, 0, 1, 1))
DTYPES = ("float32", "float32", "float32", "float64", "float16", "int64", "int32", "bool", "uint8", "object")

NAMES = (
    "",
    "x",
    "y",
    "w",
    "a\0b",
    "\ud800",
    "../hidden-weights.bin",
    "/dev/zero",
    "x" * 300,
    "weights.bin",
    "hidden-weights",
)
NUMBERS = (0, 1, -1, 2, 3, 7, 15, 17, 255, 1 << 15, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 62, (1 << 63) - 1)
FLOATS = (0.0, -1.0, 1e30, float("nan"), float("inf"), 1e-40)


# ---- damage


def truncations(data: bytes, parts: int) -> Iterator[bytes]:
    """The file cut off, `parts` times at even distances, and after each of its last bytes."""
    step = max(1, len(data) // parts)
    yield from (data[:n] for n in range(0, len(data), step))
    yield from (data[:-n] for n in range(1, 8))


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A few bits or bytes are others."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(made))
        made[at] = made[at] ^ (1 << rng.randrange(8)) if rng.random() < 0.5 else rng.randrange(256)
    return bytes(made)


def spliced(data: bytes, rng: random.Random) -> bytes:
    """A stretch of bytes is left out, doubled, or copied over another."""
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return rng.choice((data[:a] + data[b:], data[:b] + data[a:], data[:a] + data[b:c] + data[a:], data[:c] + data[a:b]))


def rewritten(model: onnx.ModelProto, rng: random.Random) -> bytes:
    """Some fields of the protobuf are others: still a protobuf, hardly ever a model."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holders = [m for m in _messages(made) if m.ListFields()]
        _rewrite(rng.choice(holders), rng, [m for m in holders if m is not made])
    try:
        return bytes(made.SerializeToString())
    except (ValueError, RecursionError):  # a message put into itself
        return b""


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for child in value if field.is_repeated else (value,):
                yield from _messages(child)


def _rewrite(message: Message, rng: random.Random, others: list[Message]) -> None:
    field = rng.choice(message.DESCRIPTOR.fields if rng.random() < 0.2 else [f for f, _ in message.ListFields()])
    value = getattr(message, field.name)
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        alike = [m for m in others if m.DESCRIPTOR is field.message_type]
        if not field.is_repeated:
            if alike and rng.random() < 0.7:
                copy = type(alike[0])()
                copy.CopyFrom(rng.choice(alike))
                value.CopyFrom(copy)
            else:
                message.ClearField(field.name)
        elif value and rng.random() < 0.4:
            del value[rng.randrange(len(value))]
        elif alike:
            copy = type(alike[0])()
            copy.CopyFrom(rng.choice(alike))
            value.insert(rng.randrange(len(value) + 1), copy) if rng.random() < 0.7 else value.extend([copy] * 50)
        return
    new = _scalar(field, rng)
    if not field.is_repeated:
        setattr(message, field.name, new)
    elif value and rng.random() < 0.3:
        del value[rng.randrange(len(value))]
    elif value and rng.random() < 0.6:
        value[rng.randrange(len(value))] = new
    else:
        value.append(new)


def _scalar(field: FieldDescriptor, rng: random.Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.choice((b"", b"\xff\xfe", b"x" * 1000, rng.randbytes(rng.randrange(64))))
        case FieldDescriptor.CPPTYPE_STRING:
            return rng.choice(NAMES[:5] + NAMES[6:])
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice(FLOATS)
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice(field.enum_type.values).number
        case FieldDescriptor.CPPTYPE_INT32:
            return max(-(1 << 31), min((1 << 31) - 1, rng.choice(NUMBERS)))
        case FieldDescriptor.CPPTYPE_UINT32 | FieldDescriptor.CPPTYPE_UINT64:
            return abs(rng.choice(NUMBERS)) & 0xFFFFFFFF
        case _:
            return rng.choice(NUMBERS) if rng.random() < 0.8 else rng.randrange(-(1 << 63), 1 << 63)


def rewired(model: onnx.ModelProto, rng: random.Random) -> bytes:
    """Values read in other places, constants of other types and shapes, other operators: well formed, mostly wrong."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    nodes = [m for m in _messages(made) if isinstance(m, onnx.NodeProto)]
    names = [
        *(t.name for t in graph.initializer),
        *(i.name for i in graph.input),
        *(o for n in graph.node for o in n.output),
    ]
    for _ in range(rng.choice((1, 1, 2, 3))):
        node = rng.choice(nodes)
        match rng.randrange(7):
            case 0 | 1 if node.input:
                node.input[rng.randrange(len(node.input))] = rng.choice([*names, ""])
            case 2 if node.input:
                del node.input[rng.randrange(len(node.input)) :]
            case 3:
                node.op_type = rng.choice(OPERATORS)
            case 4:
                node.domain = rng.choice(("", "infera", "com.microsoft", "f"))
            case 5 if graph.input:
                value = graph.input[rng.randrange(len(graph.input))]
                graph.initializer.append(_constant(value.name, rng))
            case _ if graph.initializer:
                tensor = graph.initializer[rng.randrange(len(graph.initializer))]
                tensor.CopyFrom(_constant(tensor.name, rng))
    return bytes(made.SerializeToString())


def _constant(name: str, rng: random.Random) -> onnx.TensorProto:
    dtype = rng.choice(DTYPES)
    return numpy_helper.from_array(
        np.full(rng.choice(SHAPES), "a" if dtype == "object" else rng.randrange(3), dtype), name
    )


def damaged(rng: random.Random) -> Iterator[bytes]:
    """Files without end."""
    seeds = list(models())
    whole = [m.SerializeToString() for m in seeds]
    while True:
        i = rng.randrange(len(seeds))
        kind = rng.random()
        if kind < 0.35:
            yield rewired(seeds[i], rng)
        elif kind < 0.7:
            yield rewritten(seeds[i], rng)
        else:
            yield flipped(whole[i], rng) if kind < 0.87 else spliced(whole[i], rng)


# ---- trial


class TooSlow(BaseException):
    """A file took more than SECONDS. No Exception: nothing may take it for a reason to go on."""


class Leak(Exception):
    """A file outside of the model's folder was opened."""


class Trial:
    """Loads and runs files in a folder of its own, and watches what is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "model"
        self.folder.mkdir()
        (folder / "hidden-weights.bin").write_bytes(bytes(64))
        (self.folder / "weights.bin").write_bytes(bytes(32))
        (self.folder / "hidden-weights").symlink_to(folder / "hidden-weights.bin")
        self._watching = False
        self._opened: list[str] = []
        sys.addaudithook(self._watch)

    def _watch(self, event: str, args: tuple[Any, ...]) -> None:
        if self._watching and event == "open" and isinstance(args[0], str | os.PathLike):
            self._opened.append(os.fspath(args[0]))

    def __call__(self, data: bytes) -> str:
        """What came of the file: "ran", or the kind of error. Raises whatever is no InferaError, and Leak."""
        path = self.folder / "model.onnx"
        path.write_bytes(data)
        self._opened.clear()
        try:
            self._watching = True
            session = infera_gpu.load(path, device="cpu", threads=1)
        except InferaError as error:
            return type(error).__name__
        finally:
            self._watching = False
            own = (sys.prefix, sys.base_prefix, str(Path(infera_gpu.__file__).parent.parent), sys.pycache_prefix)
            code = tuple(filter(None, own))
            outside = [
                p
                for p in self._opened
                if "hidden-weights" in p or (os.path.isabs(p) and not p.startswith((str(self.folder), *code)))
            ]
            if outside:
                raise Leak(outside)
        with session:
            try:
                session.run({k: _feed(s) for k, s in session.inputs.items()})
            except InferaError as error:
                return f"{type(error).__name__} in a run"
        return "ran"


def _feed(spec: Any) -> Any:
    if not isinstance(spec, TensorSpec):
        return [np.ones(2, np.float32)]
    shape = tuple(d if isinstance(d, int) else 2 for d in spec.shape)
    if math.prod(max(d, 1) for d in shape) > LARGEST_INPUT:
        raise InvalidModel("its input is too large for this test")
    return np.full(shape, "a", object) if spec.dtype.kind == "O" else np.ones(shape, spec.dtype)


def _too_slow(*_: object) -> None:
    raise TooSlow(f"more than {SECONDS} seconds")


def limited() -> None:
    """Put this process under the limits."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _too_slow)


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attempt(trial: Callable[[bytes], str], data: bytes) -> tuple[str, str]:
    """("", what came of it), or what went wrong and where."""
    signal.alarm(SECONDS)
    try:
        return "", trial(data)
    except (Exception, TooSlow) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, TooSlow) and any(f.filename.endswith("ops/control.py") for f in frames):
            return "", "a loop without end, stopped in a run"
        ours = [f for f in frames if "infera" in f.filename] or frames
        return f"{type(error).__name__}: {error}", f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    finally:
        signal.alarm(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--files", type=int, help="stop after so many files instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to put files that went wrong")
    args = parser.parse_args()
    limited()
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: dict[tuple[str, str], bytes] = {}
    slowest = 0.0
    ends = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        trial = Trial(Path(folder))
        task = progress.add_task("files", total=args.files)

        def files() -> Iterator[bytes]:
            for model in models():
                yield from truncations(model.SerializeToString(), 10)
            yield from damaged(random.Random(args.seed))

        for n, data in enumerate(files()):
            if n >= args.files if args.files else time.monotonic() > ends:
                break
            began, before = time.monotonic(), peak()
            problem, outcome = attempt(trial, data)
            if not problem and peak() - before > PEAK:
                problem = f"{outcome}, with {peak() - before:,} bytes more"
            slowest = max(slowest, time.monotonic() - began)
            if problem:
                wrong.setdefault((problem.split(":")[0], outcome), data)
                outcomes[f"WRONG {problem[:150]} at {outcome}"] += 1
            else:
                outcomes[outcome] += 1
            progress.advance(task)
    for outcome, count in outcomes.most_common():
        print(f"{count:9,}  {outcome}")
    print(f"{outcomes.total():9,}  files, the slowest took {slowest:.1f} s, seed {args.seed}; {len(wrong)} went wrong")
    for i, data in enumerate(wrong.values()):
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            (args.keep / f"{i}.onnx").write_bytes(data)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

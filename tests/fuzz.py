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
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.progress import Progress

import infera_gpu
from infera_gpu.errors import InferaError, InvalidModel
from infera_gpu.spec import TensorSpec
from tests.text import parse

MEMORY, SECONDS = 4 << 30, 10
LARGEST_INPUT = 1 << 16

TEXTS = (
    """g (float[N,3,8,8] x) => (float[N,M] y) <float[4,3,3,3] w = {WEIGHTS}, float[4] b = {1,2,3,4}> {
        c = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w, b)  r = Relu(c)  p = MaxPool <kernel_shape = [2,2]> (r)
        y = Flatten(p)
    }""".replace("WEIGHTS", ",".join(["0.1"] * 108)),
    """g (float[N,4] x, bool c) => (float[N,4] y) {
        y = If (c) <
            then_branch = t () => (float[N,4] r) { e = Exp(x)  r = Neg(e) },
            else_branch = e () => (float[N,4] r) { r = Softmax <axis = -1> (x) }
        >
    }""",
    """g (int64 n, float[2] x) => (float[2] y, float[K,2] z) <bool go = {1}> {
        y, z = Loop (n, go, x) <
            body = b (int64 i, bool k, float[2] s) => (bool k2, float[2] s2, float[2] o) {
                k2 = Identity(k)  s2 = Add(s, s)  o = Identity(s2)
            }
        >
    }""",
    """g (float[N,M] x) => (float[K] y) <int64[1] shape = {-1}, int64[2] at = {0,1}, float s = {0.1}, uint8 z = {3}> {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  t = Transpose <perm = [1,0]> (d)
        f = Gather <axis = 1> (t, at)  y = Reshape(f, shape)
    }""",
    """g (float[N,5] x) => (float[A,B] y, int64[A,B] i) <int64[1] k = {2}, int64[1] a = {1}, float[5,5] w = {WEIGHTS}> {
        m = MatMul(x, w)  s = Unsqueeze(m, a)  u = Squeeze(s, a)  c = Concat <axis = 1> (u, x)
        y, i = TopK <axis = 1> (c, k)
    }""".replace("WEIGHTS", ",".join(["0.5"] * 25)),
    """g (seq(float[N]) xs) => (float[M] y) { y = ConcatFromSequence <axis = 0> (xs) }""",
    """g (string[N] x) => (float[M,K] y) { y = TfIdfVectorizer <max_gram_length = 1, max_skip_count = 0,
        min_gram_length = 1, mode = "TF", ngram_counts = [0], ngram_indexes = [0,1], pool_strings = ["a","b"]> (x) }""",
    """g (float[2,N] x) => (float[2,K] y) <int64[2] s = {2,4}, int64[1] e = {3}> {
        c = ConstantOfShape <value = float[1] {2.0}> (s)  p = MatMul(x, c)  t = Tile(p, s)  r = Expand(e, s)
        f = Cast <to = 1> (r)  z = ReduceSum(f)  y = Add(t, z)
    }""",
)

FUNCTION = """<ir_version: 10, opset_import: ["" : 17, "f" : 1]>
g (float[N] x) => (float[N] y) { t = f.a <k = 0.5> (x)  y = f.b(t) }
<domain: "f", opset_import: ["" : 17, "f" : 1]> a <k> (v) => (w) { u = LeakyRelu <alpha: float = @k> (v)  w = f.b(u) }
<domain: "f", opset_import: ["" : 11]> b (v) => (w) { c = Constant <value_float = 2.0> ()  w = Add(v, c) }"""

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


def models() -> Iterator[onnx.ModelProto]:
    """Small models that hold between them everything that a file can."""
    yield from (parse(text) for text in TEXTS)
    yield onnx.parser.parse_model(FUNCTION)
    external = parse("g (float[N,3] x) => (float[N,3] y) { y = Add(x, w) }")
    tensor = external.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[2, 3])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "8"), ("length", "24")):
        tensor.external_data.add(key=key, value=value)
    yield external
    sparse = parse("g (float[N,3] x) => (float[N,3] y) { y = Mul(x, w) }")
    made = sparse.graph.sparse_initializer.add(dims=[2, 3])
    made.values.CopyFrom(numpy_helper.from_array(np.ones(2, np.float32), "w"))
    made.indices.CopyFrom(numpy_helper.from_array(np.array([1, 5])))
    yield sparse
    yield _forest()


def _forest() -> onnx.ModelProto:
    attrs: dict[str, Any] = {
        "nodes_treeids": [0, 0, 0],
        "nodes_nodeids": [0, 1, 2],
        "nodes_featureids": [1, 0, 0],
        "nodes_values": [0.5, 0.0, 0.0],
        "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
        "nodes_truenodeids": [1, 0, 0],
        "nodes_falsenodeids": [2, 0, 0],
        "target_treeids": [0, 0],
        "target_nodeids": [1, 2],
        "target_ids": [0, 0],
        "target_weights": [1.0, 2.0],
        "n_targets": 1,
    }
    node = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", **attrs)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])
    graph = helper.make_graph([node], "g", [x], [y])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


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


def damaged(rng: random.Random) -> Iterator[bytes]:
    """Files without end."""
    seeds = list(models())
    whole = [m.SerializeToString() for m in seeds]
    while True:
        i = rng.randrange(len(seeds))
        kind = rng.random()
        if kind < 0.6:
            yield rewritten(seeds[i], rng)
        else:
            yield flipped(whole[i], rng) if kind < 0.85 else spliced(whole[i], rng)


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
            session = infera_gpu.load(path, device="cpu")
        except InferaError as error:
            return type(error).__name__
        finally:
            self._watching = False
            code = (sys.prefix, sys.base_prefix, str(Path(infera_gpu.__file__).parent.parent))
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
            began = time.monotonic()
            problem, outcome = attempt(trial, data)
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

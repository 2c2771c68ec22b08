"""A decoder of Llama's kind in float16 with random weights, as exporters for onnxruntime write it.

GroupQueryAttention with packed projections, rotary embedding and a cache as long as what is attended to; RMSNorm, a
gated SiLU, the token embedding tied to the output. The default sizes are those of Llama 3.2 1B. Matrices lie in a file
beside the model, which all its graphs share.

With `Sizes.bits` it is what onnxruntime-genai's builder writes: all matrices but the embedding are MatMulNBits' of so
many bits, symmetric in blocks; projections are apart, residuals added by SkipSimplifiedLayerNormalization.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

REVISION = 1
"""Of the weights; part of the file's name, to be raised when they change."""

_BLOCK = 1 << 20
"""Weights are drawn once, so many, and each matrix begins at another place among them."""

EPSILON, THETA = 1e-5, 500000.0

BLOCK_SIZE = 32
"""Weights of few bits that share a scale."""

_SKIP = "SkipSimplifiedLayerNormalization"
_MICROSOFT = frozenset({"GroupQueryAttention", "MatMulNBits", _SKIP})


class Stored(NamedTuple):
    """A tensor of the file: float16 of this mean and deviation, or bytes of any value."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Sizes:
    """What a decoder is as large as."""

    layers: int = 16
    hidden: int = 2048
    heads: int = 32
    groups: int = 8
    inner: int = 8192
    vocabulary: int = 128256
    bits: int | None = None
    """4 or 8 of each weight, None for float16."""

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def projections(self) -> tuple[tuple[str, int], ...]:
        """Names and columns of the projections to queries, keys and values."""
        if self.bits is None:
            return (("qkv", (self.heads + 2 * self.groups) * self.head),)
        return tuple(
            (name, n * self.head) for name, n in zip("qkv", (self.heads, self.groups, self.groups), strict=True)
        )

    @property
    def name(self) -> str:
        parts = (self.layers, self.hidden, self.heads, self.groups, self.inner, self.vocabulary)
        return f"llama-{'-'.join(map(str, parts))}{'' if self.bits is None else f'-int{self.bits}'}"

    def matrices(self) -> Iterator[tuple[str, int, int, float]]:
        """Name, rows, columns and the deviation of the elements, in the order of the file."""
        yield "embedding", self.vocabulary, self.hidden, 0.05
        for i in range(self.layers):
            yield from ((f"{name}_{i}", self.hidden, columns, 0.03) for name, columns in self.projections)
            yield f"out_{i}", self.heads * self.head, self.hidden, 0.02
            yield f"gate_{i}", self.hidden, self.inner, 0.02
            yield f"up_{i}", self.hidden, self.inner, 0.02
            yield f"down_{i}", self.inner, self.hidden, 0.02
        if self.bits is not None:
            yield "head", self.hidden, self.vocabulary, 0.05

    def tensors(self) -> Iterator[Stored]:
        """What the matrices are in the file."""
        for name, rows, columns, std in self.matrices():
            if self.bits is None or name == "embedding":
                yield Stored(name, np.dtype(np.float16), (rows, columns), std=std)
                continue
            blocks, scale = -(-rows // BLOCK_SIZE), std * 12**0.5 / (1 << self.bits)
            yield Stored(f"{name}.weight", np.dtype(np.uint8), (columns, blocks, BLOCK_SIZE * self.bits // 8))
            yield Stored(f"{name}.scales", np.dtype(np.float16), (columns, blocks), scale, 0.1 * scale)


ONE_BILLION = Sizes()


def _write_matrices(path: Path, sizes: Sizes, *, values: bool) -> None:
    """The file of matrices, unless it is there. Without `values` each is a hole, which reads as zeros, after a number
    of its own: equal matrices would be one.
    """
    if path.exists():
        return
    rng = np.random.default_rng(0)
    block, codes = rng.standard_normal(_BLOCK, np.float32), rng.integers(0, 256, _BLOCK, np.uint8)
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        for i, tensor in enumerate(sizes.tensors()):
            if not values:
                begin = file.tell()
                file.write(np.float16(i + 1).tobytes())
                file.truncate(begin + tensor.nbytes)
                file.seek(0, os.SEEK_END)
                continue
            drawn = np.roll(codes if tensor.dtype == np.uint8 else block, 7919 * i)
            if tensor.dtype != np.uint8:
                drawn = (drawn * np.float32(tensor.std) + np.float32(tensor.mean)).astype(tensor.dtype)
            for start in range(0, tensor.size, _BLOCK):
                file.write(drawn[: min(_BLOCK, tensor.size - start)].data)
    partial.replace(path)


def rotations(sizes: Sizes, length: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Cosines and sines of `length` positions, [length, head / 2], in float16."""
    rates = THETA ** -(np.arange(0, sizes.head, 2) / sizes.head)
    angles = np.arange(length)[:, None] * rates
    return np.cos(angles).astype(np.float16), np.sin(angles).astype(np.float16)


def matrices_of(folder: Path, sizes: Sizes, *, values: bool = True) -> Path:
    """The file of matrices that models in `folder` share."""
    return folder / f"{sizes.name}-{REVISION}{'' if values else '-zeros'}.bin"


def llama(
    folder: Path, *, tokens: int, past: int, room: int = 0, sizes: Sizes = ONE_BILLION, values: bool = True
) -> Path:
    """The file of a step over `tokens` new tokens after `past` ones, made in `folder` unless it is there.

    `input_ids` [N,tokens], `seqlens_k` [N] (the index of the last token), and where there is a past a cache of keys and
    values a layer, each [N,groups,past + room,head], to `logits` [N,1,vocabulary] of the last token and the caches with
    the new tokens: as long as they were, where there is room. Without `values` matrices are next to empty and take no
    room on the disk: enough to plan with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    matrices = matrices_of(folder, sizes, values=values)
    _write_matrices(matrices, sizes, values=values)
    path = matrices.with_name(f"{matrices.stem}-{tokens}-after-{past}{f'-of-{past + room}' if room else ''}.onnx")
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(_graph(sizes, tokens, past, room, matrices.name).SerializeToString())
        partial.replace(path)
    return path


def _graph(sizes: Sizes, tokens: int, past: int, room: int, location: str) -> onnx.ModelProto:
    initializers = list(_external(sizes, location))
    nodes: list[onnx.NodeProto] = []
    total = past + tokens

    def constant(name: str, value: Any, dtype: Any = np.float16) -> str:
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype), name))
        return name

    def op(kind: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes: Any) -> str:
        made = outputs or (f"{kind.lower()}_{len(nodes)}",)
        domain = "com.microsoft" if kind in _MICROSOFT else None
        nodes.append(helper.make_node(kind, list(inputs), list(made), name=made[0], domain=domain, **attributes))
        return made[0]

    rng = np.random.default_rng(1)
    shapes = {name: (rows, columns) for name, rows, columns, _ in sizes.matrices()}

    def scale(name: str) -> str:
        return constant(name, rng.normal(1.0, 0.1, sizes.hidden))

    def norm(x: str, name: str) -> str:
        kind = "RMSNormalization" if sizes.bits is None else "SimplifiedLayerNormalization"
        return op(kind, x, scale(name), axis=-1, epsilon=EPSILON)

    def product(x: str, name: str, *, outputs: tuple[str, ...] = ()) -> str:
        if sizes.bits is None:
            return op("MatMul", x, name)
        (k, n), given = shapes[name], (f"{name}.weight", f"{name}.scales")
        return op("MatMulNBits", x, *given, outputs=outputs, K=k, N=n, bits=sizes.bits, block_size=BLOCK_SIZE)

    def summed(terms: tuple[str, ...], name: str) -> tuple[str, str]:
        """The sum of one term or two, and its norm."""
        if sizes.bits is None or len(terms) == 1:
            total = op("Add", *terms) if len(terms) > 1 else terms[0]
            return total, norm(total, name)
        outputs = (f"{name}_normed", "", "", f"{name}_sum")
        return outputs[3], op(_SKIP, *terms, scale(name), outputs=outputs, epsilon=EPSILON)

    def last(x: str) -> str:
        return op("Gather", x, constant("last", [tokens - 1], np.int64), axis=1) if tokens > 1 else x

    cos, sin = (constant(name, x) for name, x in zip(("cos", "sin"), rotations(sizes, total), strict=True))
    length = constant("total", total, np.int32)
    caches: list[str] = []
    terms: tuple[str, ...] = (op("Gather", "embedding", "input_ids"),)
    for i in range(sizes.layers):
        pasts = [f"past_key_{i}", f"past_value_{i}"] if past else ["", ""]
        presents = (f"key_{i}", f"value_{i}")
        caches += presents
        x, y = summed(terms, f"first_{i}")
        projected = [product(y, f"{name}_{i}") for name, _ in sizes.projections]
        attended = op(
            "GroupQueryAttention",
            *projected,
            *[""] * (3 - len(projected)),
            *(*pasts, "seqlens_k", length, cos, sin),
            outputs=(f"attention_{i}", *presents),
            num_heads=sizes.heads,
            kv_num_heads=sizes.groups,
            do_rotary=1,
        )
        x, y = summed((x, product(attended, f"out_{i}")), f"second_{i}")
        gate = product(y, f"gate_{i}")
        gated = op("Mul", op("Mul", gate, op("Sigmoid", gate)), product(y, f"up_{i}"))
        terms = (x, product(gated, f"down_{i}"))
    if sizes.bits is None:
        x = norm(last(op("Add", *terms)), "final")
        op("MatMul", x, op("Transpose", "embedding", perm=[1, 0]), outputs=("logits",))
    else:
        product(last(op(_SKIP, *terms, scale("final"), epsilon=EPSILON)), "head", outputs=("logits",))
    return _assembled(sizes, tokens, past, room, nodes, initializers, caches)


def _external(sizes: Sizes, location: str) -> Iterator[TensorProto]:
    """The matrices as tensors whose data lies in the file."""
    at = 0
    for stored in sizes.tensors():
        kind = helper.np_dtype_to_tensor_dtype(stored.dtype)
        tensor = TensorProto(name=stored.name, data_type=kind, dims=stored.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", at), ("length", stored.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        at += stored.nbytes
        yield tensor


def _assembled(
    sizes: Sizes,
    tokens: int,
    past: int,
    room: int,
    nodes: list[onnx.NodeProto],
    initializers: list[TensorProto],
    caches: list[str],
) -> onnx.ModelProto:
    """A model of these nodes with the inputs and outputs of `llama`; `caches` are the names of the new ones."""

    def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    def cache(name: str, length: int) -> onnx.ValueInfoProto:
        return value(name, TensorProto.FLOAT16, "N", sizes.groups, length, sizes.head)

    inputs = [value("input_ids", TensorProto.INT64, "N", tokens), value("seqlens_k", TensorProto.INT32, "N")]
    if past:
        inputs += [cache(f"past_{name}", past + room) for name in caches]
    outputs = [value("logits", TensorProto.FLOAT16, "N", 1, sizes.vocabulary)]
    outputs += [cache(name, past + max(tokens, room)) for name in caches]
    graph = helper.make_graph(nodes, "llama", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def llama_feeds(batch: int, *, tokens: int, past: int, room: int = 0, sizes: Sizes = ONE_BILLION) -> Mapping[str, Any]:
    """What `llama` takes."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        "input_ids": rng.integers(0, sizes.vocabulary, (batch, tokens)),
        "seqlens_k": np.full(batch, past + tokens - 1, np.int32),
    }
    for i in range(sizes.layers if past else 0):
        for part in ("key", "value"):
            shape = (batch, sizes.groups, past + room, sizes.head)
            feeds[f"past_{part}_{i}"] = rng.standard_normal(shape, np.float32).astype(np.float16)
    return feeds

"""A decoder of Llama's kind in float16 with random weights, as exporters for onnxruntime write it.

GroupQueryAttention with packed projections, rotary embedding and a cache as long as what is attended to; RMSNorm, a
gated SiLU, the token embedding tied to the output. The default sizes are those of Llama 3.2 1B. Matrices lie in a file
beside the model, which all its graphs share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

REVISION = 1
"""Of the weights; part of the file's name, to be raised when they change."""

_BLOCK = 1 << 20
"""Weights are drawn once, so many, and each matrix begins at another place among them."""

EPSILON, THETA = 1e-5, 500000.0


@dataclass(frozen=True)
class Sizes:
    """What a decoder is as large as."""

    layers: int = 16
    hidden: int = 2048
    heads: int = 32
    groups: int = 8
    inner: int = 8192
    vocabulary: int = 128256

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def packed(self) -> int:
        """Columns of the projection to queries, keys and values."""
        return (self.heads + 2 * self.groups) * self.head

    @property
    def name(self) -> str:
        parts = (self.layers, self.hidden, self.heads, self.groups, self.inner, self.vocabulary)
        return f"llama-{'-'.join(map(str, parts))}"

    def matrices(self) -> Iterator[tuple[str, int, int, float]]:
        """Name, rows, columns and the deviation of the elements, in the order of the file."""
        yield "embedding", self.vocabulary, self.hidden, 0.05
        for i in range(self.layers):
            yield f"qkv_{i}", self.hidden, self.packed, 0.03
            yield f"out_{i}", self.heads * self.head, self.hidden, 0.02
            yield f"gate_{i}", self.hidden, self.inner, 0.02
            yield f"up_{i}", self.hidden, self.inner, 0.02
            yield f"down_{i}", self.inner, self.hidden, 0.02


ONE_BILLION = Sizes()


def _write_matrices(path: Path, sizes: Sizes, *, values: bool) -> None:
    """The file of matrices, unless it is there. Without `values` each is a hole, which reads as zeros, after a number
    of its own: equal matrices would be one.
    """
    if path.exists():
        return
    block = np.random.default_rng(0).standard_normal(_BLOCK, np.float32)
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        for i, (_, rows, columns, std) in enumerate(sizes.matrices()):
            count = rows * columns
            if not values:
                begin = file.tell()
                file.write(np.float16(i + 1).tobytes())
                file.truncate(begin + 2 * count)
                file.seek(0, os.SEEK_END)
                continue
            drawn = (np.roll(block, 7919 * i) * np.float32(std)).astype(np.float16)
            for start in range(0, count, _BLOCK):
                file.write(drawn[: min(_BLOCK, count - start)].data)
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
        nodes.append(helper.make_node(kind, list(inputs), list(made), name=made[0], **attributes))
        return made[0]

    rng = np.random.default_rng(1)

    def norm(x: str, name: str) -> str:
        weight = constant(name, rng.normal(1.0, 0.1, sizes.hidden))
        return op("RMSNormalization", x, weight, axis=-1, epsilon=EPSILON)

    cos, sin = (constant(name, x) for name, x in zip(("cos", "sin"), rotations(sizes, total), strict=True))
    length = constant("total", total, np.int32)
    caches: list[str] = []
    x = op("Gather", "embedding", "input_ids")
    for i in range(sizes.layers):
        pasts = [f"past_key_{i}", f"past_value_{i}"] if past else ["", ""]
        presents = (f"key_{i}", f"value_{i}")
        caches += presents
        attended = op(
            "GroupQueryAttention",
            op("MatMul", norm(x, f"first_{i}"), f"qkv_{i}"),
            *("", "", *pasts, "seqlens_k", length, cos, sin),
            outputs=(f"attention_{i}", *presents),
            domain="com.microsoft",
            num_heads=sizes.heads,
            kv_num_heads=sizes.groups,
            do_rotary=1,
        )
        x = op("Add", x, op("MatMul", attended, f"out_{i}"))
        y = norm(x, f"second_{i}")
        gate = op("MatMul", y, f"gate_{i}")
        gated = op("Mul", op("Mul", gate, op("Sigmoid", gate)), op("MatMul", y, f"up_{i}"))
        x = op("Add", x, op("MatMul", gated, f"down_{i}"))
    last = op("Gather", x, constant("last", [tokens - 1], np.int64), axis=1) if tokens > 1 else x
    op("MatMul", norm(last, "final"), op("Transpose", "embedding", perm=[1, 0]), outputs=("logits",))
    return assembled(sizes, tokens, past, room, nodes, initializers, caches)


def _external(sizes: Sizes, location: str) -> Iterator[TensorProto]:
    """The matrices as tensors whose data lies in the file."""
    at = 0
    for name, rows, columns, _ in sizes.matrices():
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=(rows, columns))
        tensor.data_location = TensorProto.EXTERNAL
        nbytes = 2 * rows * columns
        for key, value in (("location", location), ("offset", at), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        at += nbytes
        yield tensor


def assembled(
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

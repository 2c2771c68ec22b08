"""Architectures with seeded random weights: ResNet-50 v1.5, BERT-base and GPT-2, as exporters write them.

The weights are scaled so that activations keep their magnitude through the depth and the outputs vary with the input:
a comparison of outputs then notices a wrong layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Weights = np.ndarray[Any, np.dtype[Any]]


class Builder:
    """Appends nodes and initialisers; every method returns the name of the value that it made."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """One node with one output."""
        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """An initialiser."""
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype), name))
        return name

    def normal(self, *shape: int, std: float, mean: float = 0.0) -> str:
        """An initialiser of normally distributed values."""
        values = self.rng.standard_normal(shape, np.float32)
        return self.constant(values * np.float32(std) + np.float32(mean))

    def model(
        self,
        name: str,
        inputs: Sequence[tuple[str, int, Sequence[str | int]]],
        outputs: Sequence[tuple[str, int, Sequence[str | int]]],
        opset: int = 17,
    ) -> onnx.ModelProto:
        """The checked model; `inputs` and `outputs` are (name, TensorProto type, shape)."""
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(*value) for value in outputs],
            self.initializers,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.checker.check_model(made)
        return made


def resnet50(seed: int = 0) -> onnx.ModelProto:
    """ResNet-50 v1.5 (arXiv 1512.03385, with the stride on the 3x3): `image` [N,3,224,224] to `logits` [N,1000].

    BatchNormalization follows every convolution as in a model exported without folding.
    """
    b = Builder(seed)

    def conv_norm(x: str, channels: int, filters: int, kernel: int, stride: int = 1, gain: float = 1.0) -> str:
        std = (2.0 / (channels * kernel * kernel)) ** 0.5
        y = b.op(
            "Conv",
            x,
            b.normal(filters, channels, kernel, kernel, std=std),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
        )
        scale, bias = b.normal(filters, std=0.1 * gain, mean=gain), b.normal(filters, std=0.1)
        mean = b.normal(filters, std=0.1)
        variance = b.constant(1 + 0.2 * b.rng.random(filters, np.float32))
        return b.op("BatchNormalization", y, scale, bias, mean, variance, epsilon=1e-5)

    x = b.op("Relu", conv_norm("image", 3, 64, 7, 2))
    x = b.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for width, blocks, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            y = b.op("Relu", conv_norm(x, channels, width, 1))
            y = b.op("Relu", conv_norm(y, width, width, 3, stride))
            y = conv_norm(y, width, 4 * width, 1, gain=0.5)
            shortcut = conv_norm(x, channels, 4 * width, 1, stride) if block == 0 else x
            x = b.op("Relu", b.op("Add", y, shortcut))
            channels = 4 * width
    x = b.op("Flatten", b.op("GlobalAveragePool", x), axis=1)
    b.op("Gemm", x, b.normal(1000, 2048, std=0.02), b.normal(1000, std=0.1), output="logits", transB=1)
    return b.model(
        "resnet50",
        [("image", TensorProto.FLOAT, ["N", 3, 224, 224])],
        [("logits", TensorProto.FLOAT, ["N", 1000])],
    )


class Blocks:
    """What transformers of width `hidden` are made of, in basic operators, as PyTorch exports them at opset 17."""

    def __init__(self, b: Builder, hidden: int, heads: int, epsilon: float) -> None:
        self._b, self._hidden, self._epsilon = b, hidden, epsilon
        self._split = b.constant([0, 0, heads, hidden // heads], np.int64)
        self.merge = b.constant([0, 0, hidden], np.int64)
        self.one, self._half, self._root2 = b.constant(1.0), b.constant(0.5), b.constant(2.0**0.5)

    def linear(self, x: str, rows: int, columns: int, std: float = 0.02) -> str:
        b = self._b
        return b.op("Add", b.normal(columns, std=0.02), b.op("MatMul", x, b.normal(rows, columns, std=std)))

    def norm(self, x: str) -> str:
        scale, bias = self._b.normal(self._hidden, std=0.1, mean=1.0), self._b.normal(self._hidden, std=0.1)
        return self._b.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=self._epsilon)

    def project(self, x: str, std: float, permutation: Sequence[int]) -> str:
        """Heads apart, [N, T, heads, size] in the order of the permutation."""
        split = self._b.op("Reshape", self.linear(x, self._hidden, self._hidden, std), self._split)
        return self._b.op("Transpose", split, perm=permutation)

    def gelu(self, x: str) -> str:
        """By Erf."""
        erf = self._b.op("Erf", self._b.op("Div", x, self._root2))
        return self._b.op("Mul", self._b.op("Mul", x, self._b.op("Add", erf, self.one)), self._half)


def bert(
    seed: int = 0, *, layers: int = 12, hidden: int = 768, heads: int = 12, inner: int = 3072, vocabulary: int = 30522
) -> onnx.ModelProto:
    """BERT-base (arXiv 1810.04805): ids, mask and types [batch, sequence] to `last_hidden_state`; sequences up to 512.

    Attention, GELU (by Erf) and the mask are spelled out in basic operators, as PyTorch exports them at opset 17.
    """
    b = Builder(seed)
    size = hidden // heads
    blocks = Blocks(b, hidden, heads, epsilon=1e-12)
    linear, norm, project, gelu = blocks.linear, blocks.norm, blocks.project, blocks.gelu
    zero, axis1 = b.constant([0], np.int64), b.constant([1], np.int64)

    length = b.op("Slice", b.op("Shape", "input_ids"), axis1, b.constant([2], np.int64), zero)
    positions = b.op("Slice", b.constant(np.arange(512)[None], np.int64), zero, length, axis1)
    words = b.op("Gather", b.normal(vocabulary, hidden, std=0.05), "input_ids")
    types = b.op("Gather", b.normal(2, hidden, std=0.05), "token_type_ids")
    places = b.op("Gather", b.normal(512, hidden, std=0.05), positions)
    x = norm(b.op("Add", b.op("Add", words, types), places))

    visible = b.op("Cast", b.op("Unsqueeze", "attention_mask", b.constant([1, 2], np.int64)), to=TensorProto.FLOAT)
    bias = b.op("Mul", b.op("Sub", blocks.one, visible), b.constant(float(np.finfo(np.float32).min)))
    for _ in range(layers):
        # Wider query and key weights than the rest, so that attention is peaked instead of nearly an average.
        query, key = project(x, 0.05, [0, 2, 1, 3]), project(x, 0.05, [0, 2, 3, 1])
        scores = b.op("Div", b.op("MatMul", query, key), b.constant(size**0.5))
        attention = b.op("Softmax", b.op("Add", scores, bias), axis=-1)
        context = b.op("Transpose", b.op("MatMul", attention, project(x, 0.02, [0, 2, 1, 3])), perm=[0, 2, 1, 3])
        x = norm(b.op("Add", linear(b.op("Reshape", context, blocks.merge), hidden, hidden), x))
        x = norm(b.op("Add", linear(gelu(linear(x, hidden, inner)), inner, hidden), x))
    b.op("Identity", x, output="last_hidden_state")
    ids = [(n, TensorProto.INT64, ["batch", "sequence"]) for n in ("input_ids", "attention_mask", "token_type_ids")]
    return b.model("bert", ids, [("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", hidden])])


def gpt2_step(
    seed: int = 0, *, past: int = 255, layers: int = 12, hidden: int = 768, heads: int = 12, vocabulary: int = 50257
) -> onnx.ModelProto:
    """One step of GPT-2 (124M) after `past` tokens: `input_ids` [N,1] and a cache of keys and values a layer, each
    [N,heads,past,size], to `logits` [N,1,vocabulary] and the caches one token longer.

    The token embedding is tied to the output, attention and the GELU by tanh are spelled out, as PyTorch exports them.
    """
    b = Builder(seed)
    size = hidden // heads
    split, merge = b.constant([0, 0, heads, size], np.int64), b.constant([0, 0, hidden], np.int64)
    one, half, three = b.constant(1.0), b.constant(0.5), b.constant(3.0)
    cubic, root = b.constant(0.044715), b.constant((2 / np.pi) ** 0.5)

    def linear(x: str, rows: int, columns: int, std: float = 0.02) -> str:
        return b.op("Add", b.op("MatMul", x, b.normal(rows, columns, std=std)), b.normal(columns, std=0.02))

    def norm(x: str) -> str:
        scale, bias = b.normal(hidden, std=0.1, mean=1.0), b.normal(hidden, std=0.1)
        return b.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-5)

    def gelu(x: str) -> str:
        cube = b.op("Mul", b.op("Pow", x, three), cubic)
        gate = b.op("Tanh", b.op("Mul", b.op("Add", x, cube), root))
        return b.op("Mul", b.op("Mul", x, half), b.op("Add", gate, one))

    embedding = b.normal(vocabulary, hidden, std=0.05)
    place = b.op("Gather", b.normal(1024, hidden, std=0.02), b.constant([past], np.int64))
    x = b.op("Add", b.op("Gather", embedding, "input_ids"), place)
    caches: list[str] = []
    for i in range(layers):
        # Wide weights for queries and keys, so that attention is peaked instead of nearly an average.
        qkv = linear(norm(x), hidden, 3 * hidden, 0.05)
        parts = [f"{part}_{i}" for part in ("query", "new_key", "new_value")]
        b.nodes.append(helper.make_node("Split", [qkv, b.constant([hidden] * 3, np.int64)], parts, axis=-1))
        query, key, value = (b.op("Transpose", b.op("Reshape", p, split), perm=[0, 2, 1, 3]) for p in parts)
        key = b.op("Concat", f"past_key_{i}", key, axis=2, output=f"key_{i}")
        value = b.op("Concat", f"past_value_{i}", value, axis=2, output=f"value_{i}")
        caches += [f"key_{i}", f"value_{i}"]
        scores = b.op("MatMul", query, b.op("Transpose", key, perm=[0, 1, 3, 2]))
        weights = b.op("Softmax", b.op("Div", scores, b.constant(size**0.5)), axis=-1)
        context = b.op("Transpose", b.op("MatMul", weights, value), perm=[0, 2, 1, 3])
        x = b.op("Add", linear(b.op("Reshape", context, merge), hidden, hidden), x)
        x = b.op("Add", linear(gelu(linear(norm(x), hidden, 4 * hidden)), 4 * hidden, hidden), x)
    b.op("MatMul", norm(x), b.op("Transpose", embedding, perm=[1, 0]), output="logits")
    shape: tuple[str | int, ...] = ("N", heads, past, size)
    longer: tuple[str | int, ...] = ("N", heads, past + 1, size)
    return b.model(
        "gpt2_step",
        [
            ("input_ids", TensorProto.INT64, ("N", 1)),
            *((f"past_{c}", TensorProto.FLOAT, shape) for c in caches),
        ],
        [
            ("logits", TensorProto.FLOAT, ("N", 1, vocabulary)),
            *((c, TensorProto.FLOAT, longer) for c in caches),
        ],
    )

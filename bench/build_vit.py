"""ViT-B/16 (arXiv 2010.11929) with seeded random weights, as PyTorch exports it at opset 17."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from bench.build import Blocks, Builder


def vit(
    seed: int = 0, *, side: int = 224, patch: int = 16, layers: int = 12, hidden: int = 768, heads: int = 12
) -> onnx.ModelProto:
    """`image` [N,3,side,side] to `logits` [N,1000]; norms come first in each block, GELU is by Erf."""
    b = Builder(seed)
    size, patches = hidden // heads, (side // patch) ** 2
    blocks = Blocks(b, hidden, heads, epsilon=1e-6)
    linear, norm, project, gelu = blocks.linear, blocks.norm, blocks.project, blocks.gelu

    kernels = b.normal(hidden, 3, patch, patch, std=(3 * patch * patch) ** -0.5)
    x = b.op("Conv", "image", kernels, b.normal(hidden, std=0.02), kernel_shape=[patch, patch], strides=[patch, patch])
    x = b.op("Transpose", b.op("Reshape", x, b.constant([0, 0, patches], np.int64)), perm=[0, 2, 1])
    images = b.op("Slice", b.op("Shape", "image"), b.constant([0], np.int64), b.constant([1], np.int64))
    whole = b.op("Concat", images, b.constant([1, hidden], np.int64), axis=0)
    x = b.op("Concat", b.op("Expand", b.normal(1, 1, hidden, std=0.5), whole), x, axis=1)
    x = b.op("Add", x, b.normal(1, patches + 1, hidden, std=0.5))
    for _ in range(layers):
        y = norm(x)
        # Wider query and key weights than the rest, so that attention is peaked instead of nearly an average.
        query, key = project(y, 0.05, [0, 2, 1, 3]), project(y, 0.05, [0, 2, 3, 1])
        attention = b.op("Softmax", b.op("Div", b.op("MatMul", query, key), b.constant(size**0.5)), axis=-1)
        context = b.op("Transpose", b.op("MatMul", attention, project(y, 0.02, [0, 2, 1, 3])), perm=[0, 2, 1, 3])
        x = b.op("Add", linear(b.op("Reshape", context, blocks.merge), hidden, hidden), x)
        x = b.op("Add", linear(gelu(linear(norm(x), hidden, 4 * hidden)), 4 * hidden, hidden), x)
    one = b.constant([1], np.int64)
    first = b.op("Squeeze", b.op("Gather", norm(x), b.constant([0], np.int64), axis=1), one)
    b.op("Add", b.normal(1000, std=0.02), b.op("MatMul", first, b.normal(hidden, 1000, std=0.02)), output="logits")
    return b.model(
        "vit", [("image", TensorProto.FLOAT, ["N", 3, side, side])], [("logits", TensorProto.FLOAT, ["N", 1000])]
    )

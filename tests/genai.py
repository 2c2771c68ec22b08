"""A decoder with weights of few bits as onnxruntime-genai's builder exports it, small and random."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bench.build_llama import Sizes, assembled, llama_feeds, rotations
from infera_gpu.graph import HostArray

BLOCK = 32
EPSILON = 1e-5
SIZES = Sizes(layers=2, hidden=64, heads=4, groups=2, inner=96, vocabulary=50)
DECODER_OPS = ("MatMulNBits", "SkipSimplifiedLayerNormalization", "GroupQueryAttention")


def decoder(
    *, past: int, sizes: Sizes = SIZES, bits: int = 4, zeros: bool = False, biased: bool = False
) -> onnx.ModelProto:
    """A step over one token of each sequence after `past`: `input_ids` [N,1], `seqlens_k` [N] and the caches, to
    `logits` [N,1,vocabulary] and the caches with the new token, all float16."""
    initializers: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    rng = np.random.default_rng(0)

    def constant(name: str, value: Any, dtype: Any = np.float16) -> str:
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype), name))
        return name

    def op(kind: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes: Any) -> str:
        made = outputs or (f"{kind.lower()}_{len(nodes)}",)
        domain = "com.microsoft" if kind in DECODER_OPS else ""
        nodes.append(helper.make_node(kind, list(inputs), list(made), name=made[0], domain=domain, **attributes))
        return made[0]

    def product(x: str, name: str, depth: int, columns: int, *, bias: bool = False) -> str:
        blocks = -(-depth // BLOCK)
        given = [
            constant(f"{name}.weight", rng.integers(0, 256, (columns, blocks, BLOCK * bits // 8)), np.uint8),
            constant(f"{name}.scales", rng.uniform(0.2, 1, (columns, blocks)) / (1 << bits) / depth**0.5),
        ]
        if zeros:
            packed = -(-blocks * bits // 8)
            given.append(constant(f"{name}.zeros", rng.integers(0, 256, (columns, packed)), np.uint8))
        made = op("MatMulNBits", x, *given, K=depth, N=columns, bits=bits, block_size=BLOCK)
        return op("Add", made, constant(f"{name}.bias", rng.normal(0, 0.1, columns))) if bias else made

    def weight(name: str) -> str:
        return constant(name, rng.normal(1, 0.1, sizes.hidden))

    cos, sin = (constant(name, x) for name, x in zip(("cos", "sin"), rotations(sizes, past + 1), strict=True))
    length = constant("total", past + 1, np.int32)
    table = constant("embedding", rng.normal(0, 1, (sizes.vocabulary, sizes.hidden)))
    caches: list[str] = []
    total = op("Gather", table, "input_ids")
    x = op("SimplifiedLayerNormalization", total, weight("norm_0"), axis=-1, epsilon=EPSILON)
    for i in range(sizes.layers):
        presents = (f"key_{i}", f"value_{i}")
        caches += presents
        heads = zip(("q", "k", "v"), (sizes.heads, sizes.groups, sizes.groups), strict=True)
        attended = op(
            "GroupQueryAttention",
            *(product(x, f"{name}_{i}", sizes.hidden, n * sizes.head, bias=biased) for name, n in heads),
            *(*(f"past_{name}" for name in presents), "seqlens_k", length, cos, sin),
            outputs=(f"attention_{i}", *presents),
            num_heads=sizes.heads,
            kv_num_heads=sizes.groups,
            do_rotary=1,
        )
        made = product(attended, f"o_{i}", sizes.heads * sizes.head, sizes.hidden)
        outputs: tuple[str, ...] = (f"normed_{i}", "", "", f"sum_{i}")
        x = op("SkipSimplifiedLayerNormalization", total, made, weight(f"second_{i}"), outputs=outputs, epsilon=EPSILON)
        gate, up = (product(x, f"{name}_{i}", sizes.hidden, sizes.inner) for name in ("gate", "up"))
        gated = op("Mul", op("Mul", gate, op("Sigmoid", gate)), up)
        made = product(gated, f"down_{i}", sizes.inner, sizes.hidden)
        total, last = f"total_{i}", i == sizes.layers - 1
        outputs = (f"next_{i}",) if last else (f"next_{i}", "", "", total)
        x = op(
            "SkipSimplifiedLayerNormalization", f"sum_{i}", made, weight(f"first_{i}"), outputs=outputs, epsilon=EPSILON
        )
    op("Identity", product(x, "head", sizes.hidden, sizes.vocabulary), outputs=("logits",))

    return assembled(sizes, 1, past, 0, nodes, initializers, caches)


def feeds(batch: int, *, past: int, sizes: Sizes = SIZES) -> dict[str, HostArray]:
    """What `decoder` takes: it has the inputs of `bench.build_llama`."""
    return dict(llama_feeds(batch, tokens=1, past=past, sizes=sizes))

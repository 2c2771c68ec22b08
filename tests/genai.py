"""A decoder with weights of few bits as onnxruntime-genai's builder exports it, small and random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bench.build_llama import Sizes, llama, llama_feeds

SIZES = Sizes(layers=2, hidden=64, heads=4, groups=2, inner=96, vocabulary=50, bits=4)
GAIN = np.float16(6)
"""Of scales: matrices as small as these would add little to the embedding, and errors in them would not show."""


def decoder(
    folder: Path, *, past: int, tokens: int = 1, bits: int = 4, zeros: bool = False, biased: bool = False
) -> onnx.ModelProto:
    """`bench.build_llama`'s model of `SIZES` with these bits; with zero points, and with biases of queries, keys and
    values, where they are wanted."""
    model = onnx.load(llama(folder, tokens=tokens, past=past, sizes=replace(SIZES, bits=bits)))
    graph, rng = model.graph, np.random.default_rng(2)
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: Any, dtype: Any = np.float16) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    for scales in (t for t in graph.initializer if t.name.endswith(".scales")):
        scales.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales) * GAIN, scales.name))
    for n in graph.node:
        nodes.append(n)
        if n.op_type != "MatMulNBits":
            continue
        name, sizes = n.input[1].removesuffix(".weight"), {a.name: a.i for a in n.attribute}
        if zeros:
            packed = -(-sizes["K"] // sizes["block_size"] * bits // 8)
            n.input.append(constant(f"{name}.zeros", rng.integers(0, 256, (sizes["N"], packed)), np.uint8))
        if biased and name[:2] in ("q_", "k_", "v_"):
            out, n.output[0] = n.output[0], f"{n.output[0]}_unbiased"
            bias = constant(f"{name}.bias", rng.normal(0, 0.1, sizes["N"]))
            nodes.append(helper.make_node("Add", [n.output[0], bias], [out], name=f"{out}_bias"))
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def feeds(batch: int, *, past: int, tokens: int = 1) -> Mapping[str, Any]:
    """What `decoder` takes."""
    return llama_feeds(batch, tokens=tokens, past=past, sizes=SIZES)

"""The decoder of Llama's kind in PyTorch, as its users write it, with the weights of the ONNX model.

It keeps its cache as `transformers`' static cache does: as long as it will be, written in place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.build_llama import EPSILON, Sizes, rotations

Module = Any
Tensor = Any


def torch_llama(path: Path, *, tokens: int, past: int, sizes: Sizes) -> Module:
    """(input_ids, caches of keys and values in turn, layer by layer) to the logits of the last token.

    `path` is the file of matrices. Caches have room for the new tokens, which are written into them.
    """
    import torch
    from torch import nn
    from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

    count = sum(rows * columns for _, rows, columns, _ in sizes.matrices())
    data = torch.tensor(np.fromfile(path, np.float16, count))
    matrices: dict[str, Tensor] = {}
    for name, rows, columns, _ in sizes.matrices():
        matrix, data = data[: rows * columns].view(rows, columns), data[rows * columns :]
        matrices[name] = matrix if name == "embedding" else matrix.T.contiguous()
    rng = np.random.default_rng(1)
    heads, groups, head = sizes.heads, sizes.groups, sizes.head

    def kept(x: Tensor) -> Any:
        return nn.Parameter(x, requires_grad=False)

    def scale() -> Any:
        return kept(torch.tensor(rng.normal(1.0, 0.1, sizes.hidden).astype(np.float16)))

    class Layer(nn.Module):  # type: ignore[misc]
        def __init__(self, i: int) -> None:
            super().__init__()
            self.first, self.second = scale(), scale()
            self.qkv, self.out, self.gate, self.up, self.down = (
                kept(matrices.pop(f"{name}_{i}")) for name in ("qkv", "out", "gate", "up", "down")
            )

        def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], places: Tensor, caches: list[Tensor]) -> Tensor:
            def turned(y: Tensor) -> Tensor:
                a, b = y.chunk(2, -1)
                cos, sin = turns
                return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

            y = rms_norm(x, (sizes.hidden,), self.first, EPSILON) @ self.qkv.T
            parts = y.split([heads * head, groups * head, groups * head], -1)
            query, key, value = (p.view(*p.shape[:2], -1, head).transpose(1, 2) for p in parts)
            query, key = turned(query), turned(key)
            if caches:
                key, value = caches[0].index_copy_(2, places, key), caches[1].index_copy_(2, places, value)
            y = scaled_dot_product_attention(query, key, value, is_causal=not caches, enable_gqa=True)
            x = x + y.transpose(1, 2).flatten(2) @ self.out.T
            y = rms_norm(x, (sizes.hidden,), self.second, EPSILON)
            return x + (silu(y @ self.gate.T) * (y @ self.up.T)) @ self.down.T

    class Decoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embedding = kept(matrices.pop("embedding"))
            self.layers = nn.ModuleList(Layer(i) for i in range(sizes.layers))
            self.norm = scale()
            self.register_buffer("places", torch.arange(past, past + tokens))
            for name, table in zip(("cos", "sin"), rotations(sizes, past + tokens), strict=True):
                self.register_buffer(name, torch.tensor(table[past:]))

        def forward(self, ids: Tensor, *caches: Tensor) -> Tensor:
            x = self.embedding[ids]
            for i, layer in enumerate(self.layers):
                x = layer(x, (self.cos, self.sin), self.places, list(caches[2 * i : 2 * i + 2]))
            return rms_norm(x[:, -1:], (sizes.hidden,), self.norm, EPSILON) @ self.embedding.T

    return Decoder().eval()

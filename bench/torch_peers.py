"""The built architectures in PyTorch, as its users write them, with the weights of the ONNX models.

Attention is `scaled_dot_product_attention`, images are channels-last: what eager mode and torch.compile are fastest
with. Needs PyTorch, which is imported when a peer is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from bench.build import bert, gpt2_step, resnet50
from bench.build_vit import vit

Module = Any
Tensor = Any


def weights_of(model: onnx.ModelProto) -> Iterator[np.ndarray[Any, Any]]:
    """The model's weights in the order in which they were made; shapes, single values and positions are none."""
    for initializer in model.graph.initializer:
        array = numpy_helper.to_array(initializer)
        if array.size > 1 and array.dtype == np.float32:
            yield array


class Taking:
    """Hands out weights as parameters."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import torch

        self._torch, self._weights = torch, weights_of(model)

    def __call__(self) -> Tensor:
        return self._torch.nn.Parameter(self._torch.tensor(next(self._weights)), requires_grad=False)

    def done(self) -> None:
        """Raises AssertionError where weights are left: the peer is not the model."""
        assert next(self._weights, None) is None


def torch_resnet50(model: onnx.ModelProto | None = None) -> Module:
    """(N, 3, 224, 224) to logits. BatchNormalization is folded into convolutions, which torch.compile does not do on a
    GPU."""
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    take = Taking(model or resnet50())

    def conv_norm(channels: int, filters: int, kernel: int, stride: int = 1) -> Module:
        conv = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, bias=False)
        norm = nn.BatchNorm2d(filters, eps=1e-5)
        conv.weight, norm.weight, norm.bias = take(), take(), take()
        norm.running_mean, norm.running_var = take().data, take().data
        return fuse_conv_bn_eval(conv.eval(), norm.eval())

    class Bottleneck(nn.Module):  # type: ignore[misc]
        def __init__(self, channels: int, width: int, stride: int, *, projects: bool) -> None:
            super().__init__()
            self.first, self.second = conv_norm(channels, width, 1), conv_norm(width, width, 3, stride)
            self.third = conv_norm(width, 4 * width, 1)
            self.shortcut = conv_norm(channels, 4 * width, 1, stride) if projects else nn.Identity()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.third(self.relu(self.second(self.relu(self.first(x)))))
            return self.relu(y + self.shortcut(x))

    layers = [conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, stride if block == 0 else 1, projects=block == 0))
            channels = 4 * width
    head = nn.Linear(2048, 1000)
    head.weight, head.bias = take(), take()
    take.done()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def linear(take: Taking, *, bias_first: bool) -> Module:
    from torch import nn

    first, second = take(), take()
    bias, weight = (first, second) if bias_first else (second, first)
    made = nn.Linear(weight.shape[0], weight.shape[1])
    made.weight, made.bias = nn.Parameter(weight.data.T.contiguous(), requires_grad=False), bias
    return made


def norm(take: Taking, hidden: int, eps: float) -> Module:
    from torch import nn

    made = nn.LayerNorm(hidden, eps=eps)
    made.weight, made.bias = take(), take()
    return made


def torch_bert(model: onnx.ModelProto | None = None, *, layers: int = 12, hidden: int = 768, heads: int = 12) -> Module:
    """(input_ids, attention_mask, token_type_ids) to the last hidden state."""
    import torch
    from torch import nn

    take = Taking(model or bert())

    class Layer(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (linear(take, bias_first=True) for _ in range(4))
            self.first = norm(take, hidden, 1e-12)
            self.up = linear(take, bias_first=True)
            self.down = linear(take, bias_first=True)
            self.second = norm(take, hidden, 1e-12)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            def split(y: Tensor) -> Tensor:
                return y.view(*y.shape[:2], heads, hidden // heads).transpose(1, 2)

            attention = nn.functional.scaled_dot_product_attention(
                split(self.query(x)), split(self.key(x)), split(self.value(x)), attn_mask=mask
            )
            x = self.first(self.out(attention.transpose(1, 2).reshape(x.shape)) + x)
            return self.second(self.down(nn.functional.gelu(self.up(x))) + x)

    class Encoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.words, self.types, self.places = take(), take(), take()
            self.norm = norm(take, hidden, 1e-12)
            self.layers = nn.ModuleList(Layer() for _ in range(layers))

        def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
            x = self.norm(self.words[ids] + self.types[types] + self.places[: ids.shape[1]])
            visible = mask.bool()[:, None, None, :]
            bias = torch.zeros(visible.shape, dtype=x.dtype, device=x.device).masked_fill_(
                ~visible, torch.finfo(x.dtype).min
            )
            for layer in self.layers:
                x = layer(x, bias)
            return x

    made = Encoder().eval()
    take.done()
    return made


def torch_gpt2_step(
    model: onnx.ModelProto | None = None, *, past: int = 255, layers: int = 12, hidden: int = 768, heads: int = 12
) -> Module:
    """(input_ids, past keys and values in turn, layer by layer) to (logits, caches one token longer in turn)."""
    import torch
    from torch import nn

    take = Taking(model or gpt2_step(past=past))

    class Layer(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.qkv = norm(take, hidden, 1e-5), linear(take, bias_first=False)
            self.out = linear(take, bias_first=False)
            self.second, self.up = norm(take, hidden, 1e-5), linear(take, bias_first=False)
            self.down = linear(take, bias_first=False)

        def forward(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            parts = (
                p.view(*p.shape[:2], heads, hidden // heads).transpose(1, 2)
                for p in self.qkv(self.first(x)).chunk(3, -1)
            )
            query, new_key, new_value = parts
            key, value = torch.cat([key, new_key], 2), torch.cat([value, new_value], 2)
            attention = nn.functional.scaled_dot_product_attention(query, key, value)
            x = self.out(attention.transpose(1, 2).reshape(x.shape)) + x
            return self.down(nn.functional.gelu(self.up(self.second(x)), approximate="tanh")) + x, key, value

    class Step(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = take(), take()
            self.layers = nn.ModuleList(Layer() for _ in range(layers))
            self.norm = norm(take, hidden, 1e-5)

        def forward(self, ids: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
            x = self.words[ids] + self.places[past]
            longer: list[Tensor] = []
            for i, layer in enumerate(self.layers):
                x, key, value = layer(x, caches[2 * i], caches[2 * i + 1])
                longer += [key, value]
            return self.norm(x) @ self.words.T, *longer

    made = Step().eval()
    take.done()
    return made


def torch_vit(
    model: onnx.ModelProto | None = None,
    *,
    patch: int = 16,
    layers: int = 12,
    hidden: int = 768,
    heads: int = 12,
) -> Module:
    """(N, 3, side, side) to logits."""
    import torch
    from torch import nn

    take = Taking(model or vit())

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first = norm(take, hidden, 1e-6)
            self.query, self.key, self.value, self.out = (linear(take, bias_first=True) for _ in range(4))
            self.second = norm(take, hidden, 1e-6)
            self.up, self.down = linear(take, bias_first=True), linear(take, bias_first=True)

        def forward(self, x: Tensor) -> Tensor:
            def split(y: Tensor) -> Tensor:
                return y.view(*y.shape[:2], heads, hidden // heads).transpose(1, 2)

            y = self.first(x)
            attention = nn.functional.scaled_dot_product_attention(
                split(self.query(y)), split(self.key(y)), split(self.value(y))
            )
            x = self.out(attention.transpose(1, 2).reshape(x.shape)) + x
            return self.down(nn.functional.gelu(self.up(self.second(x)))) + x

    class Encoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, hidden, patch, patch)
            self.patches.weight, self.patches.bias = take(), take()
            self.token, self.places = take(), take()
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm, self.head = norm(take, hidden, 1e-6), linear(take, bias_first=True)

        def forward(self, image: Tensor) -> Tensor:
            x = self.patches(image).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
            return self.head(self.norm(self.blocks(x))[:, 0])

    made = Encoder().eval()
    take.done()
    return made


MODULES: Mapping[str, Callable[[onnx.ModelProto], Module]] = {
    "resnet50": torch_resnet50,
    "bert-base": torch_bert,
    "gpt2-step": torch_gpt2_step,
    "vit-b16": torch_vit,
}
"""By name."""

"""Networks on sequences for `bench.architectures_paddle`: of Paddle's layers, and written in its operators.

Needs PaddlePaddle 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import paddle
from paddle import nn
from paddle.nn import functional

from bench.architecture import HEADS, LAYERS, VOCABULARY, WIDTH

HEAD = WIDTH // HEADS


class Embedded(nn.Layer):
    """Words and places, normed."""

    def __init__(self, positions: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(positions, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, epsilon=1e-12)

    def forward(self, ids: Any) -> Any:
        ones = paddle.ones_like(ids)
        places = paddle.cumsum(ones, axis=1) - ones  # as PaddleNLP's encoders count them
        return self.norm(self.words(ids) + self.places(places))


class Bert(nn.Layer):
    """PaddleNLP's BERT and ERNIE: nn.TransformerEncoder, GELU, the mask as a large negative number, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded = Embedded()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.1, activation="gelu", normalize_before=False)
        self.encoder, self.pooler = nn.TransformerEncoder(layer, LAYERS), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
        bias = (1.0 - attention_mask.unsqueeze([1, 2]).astype("float32")) * -1e4
        x = self.encoder(self.embedded(input_ids), bias)
        return x, functional.tanh(self.pooler(x[:, 0]))


def gelu_new(x: Any) -> Any:
    """As PaddleNLP writes it; paddle2onnx writes `gelu(x, approximate=True)` as the exact one."""
    return 0.5 * x * (1.0 + paddle.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * paddle.pow(x, 3.0))))


class Gpt(nn.Layer):
    """Normed before, GELU (tanh), one product for queries, keys and values that is split, a triangular mask."""

    def __init__(self, attention: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.embedded, self.attention = Embedded(), attention
        self.norms = nn.LayerList([nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS + 1)])
        shapes = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH))
        self.products = nn.LayerList([nn.Linear(*shape) for _ in range(LAYERS) for shape in shapes])

    def forward(self, input_ids: Any) -> Any:
        x = self.embedded(input_ids)
        for i in range(LAYERS):
            qkv, out, up, down = self.products[4 * i : 4 * i + 4]
            y = qkv(self.norms[2 * i](x))
            q, k, v = (part.reshape((0, 0, HEADS, HEAD)) for part in y.chunk(3, axis=-1))
            x = x + out(self.attention(q, k, v).reshape((0, 0, WIDTH)))
            x = x + down(gelu_new(up(self.norms[2 * i + 1](x))))
        return paddle.matmul(self.norms[-1](x), self.embedded.words.weight, transpose_y=True)


def spelled_out(q: Any, k: Any, v: Any) -> Any:
    """PaddleNLP's core attention with a mask of `paddle.triu`, heads beside their elements before and after."""
    q, k, v = (part.transpose((0, 2, 1, 3)) for part in (q, k, v))
    scores = paddle.matmul(q * HEAD**-0.5, k, transpose_y=True)
    length = paddle.shape(q)[2]
    scores = scores + paddle.triu(paddle.full((length, length), -1e4), diagonal=1)
    return paddle.matmul(functional.softmax(scores, axis=-1), v).transpose((0, 2, 1, 3))


def fused(q: Any, k: Any, v: Any) -> Any:
    """`scaled_dot_product_attention`, which Paddle takes with heads beside their elements; `is_causal` needs a GPU."""
    length = paddle.shape(q)[1]
    mask = paddle.triu(paddle.full((length, length), -1e4), diagonal=1).unsqueeze([0, 1])
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class RmsNorm(nn.Layer):
    """PaddleNLP's LlamaRMSNorm without its kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.create_parameter((WIDTH,), default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x: Any) -> Any:
        variance = x.astype("float32").pow(2).mean(-1, keepdim=True)
        return paddle.rsqrt(variance + 1e-6) * x * self.weight


def half_rotated(x: Any) -> Any:
    first, second = x[..., : HEAD // 2], x[..., HEAD // 2 :]
    return paddle.concat([-second, first], axis=-1)


class LlamaLayer(nn.Layer):
    def __init__(self, key_heads: int) -> None:
        super().__init__()
        self.key_heads = key_heads
        shapes = ((WIDTH, WIDTH), (WIDTH, key_heads * HEAD), (WIDTH, key_heads * HEAD), (WIDTH, WIDTH))
        self.q, self.k, self.v, self.o = (nn.Linear(*shape, bias_attr=False) for shape in shapes)
        wide = ((WIDTH, 2 * WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH))
        self.gate, self.up, self.down = (nn.Linear(*shape, bias_attr=False) for shape in wide)
        self.before, self.after = RmsNorm(), RmsNorm()

    def forward(self, x: Any, bias: Any, cos: Any, sin: Any, past: Any) -> tuple[Any, Any, Any]:
        y = self.before(x)
        q = self.q(y).reshape((0, 0, HEADS, HEAD))
        k, v = (part(y).reshape((0, 0, self.key_heads, HEAD)) for part in (self.k, self.v))
        q, k = (part * cos + half_rotated(part) * sin for part in (q, k))
        if past:
            k, v = paddle.concat([past[0], k], axis=1), paddle.concat([past[1], v], axis=1)
        kept = k, v
        groups = HEADS // self.key_heads
        if groups > 1:
            k, v = (part.unsqueeze(3).expand((-1, -1, -1, groups, -1)).flatten(2, 3) for part in kept)
        q, k, v = (part.transpose((0, 2, 1, 3)) for part in (q, k, v))
        weights = functional.softmax(paddle.matmul(q / HEAD**0.5, k.transpose((0, 1, 3, 2))) + bias, axis=-1)
        x = x + self.o(paddle.matmul(weights, v).transpose((0, 2, 1, 3)).reshape((0, 0, WIDTH)))
        y = self.after(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y)), *kept


class Llama(nn.Layer):
    """As PaddleNLP writes it: RMS norms, rotary embeddings by positions, grouped heads, SwiGLU, a cache that grows."""

    def __init__(self, key_heads: int = HEADS, positions: int = 64) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(VOCABULARY, WIDTH), RmsNorm()
        self.layers = nn.LayerList([LlamaLayer(key_heads) for _ in range(LAYERS)])
        inverse = 1.0 / 10000.0 ** (paddle.arange(0, HEAD, 2, dtype="float32") / HEAD)
        angles = paddle.outer(paddle.arange(positions, dtype="float32"), inverse)
        angles = paddle.concat([angles, angles], axis=-1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *cache: Any) -> tuple[Any, ...]:
        length, total = paddle.shape(input_ids)[1], paddle.shape(attention_mask)[1]
        causal = paddle.arange(total).unsqueeze(0) <= paddle.arange(total - length, total).unsqueeze(1)
        seen = causal.unsqueeze([0, 1]) & attention_mask.astype("bool").unsqueeze([1, 2])
        bias = paddle.where(seen, paddle.zeros((1,)), paddle.full((1,), -1e9))
        cos, sin = (table[position_ids].unsqueeze(2) for table in (self.cos, self.sin))
        x, present = self.words(input_ids), []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, bias, cos, sin, cache[2 * i : 2 * i + 2])
            present += [k, v]
        return paddle.matmul(self.norm(x), self.words.weight, transpose_y=True), *present


class Recurrent(nn.Layer):
    """An LSTM in both directions, a GRU and a simple network over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH // 2, num_layers=2, direction="bidirect")
        self.gru, self.last = nn.GRU(WIDTH, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, input_ids: Any) -> tuple[Any, Any]:
        x, _ = self.gru(self.lstm(self.words(input_ids))[0])
        return x, self.last(x[:, -1])


class Recogniser(nn.Layer):
    """CRNN: convolutions, their columns through LSTMs in both directions, and a classifier for each."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[Any] = []
        for inside, outside, stride in ((1, 16, 2), (16, 32, (2, 1)), (32, WIDTH, (2, 1))):
            layers += [nn.Conv2D(inside, outside, 3, stride, 1, bias_attr=False), nn.BatchNorm2D(outside), nn.ReLU()]
        self.features, self.pool = nn.Sequential(*layers), nn.MaxPool2D((4, 1))
        self.lstm, self.head = nn.LSTM(WIDTH, WIDTH // 2, direction="bidirect"), nn.Linear(WIDTH, 40)

    def forward(self, image: Any) -> Any:
        x = self.pool(self.features(image)).squeeze(2).transpose((0, 2, 1))
        return functional.softmax(self.head(self.lstm(x)[0]), axis=2)


ACTIVATIONS: tuple[Callable[[Any], Any], ...] = (
    functional.relu6,
    functional.hardswish,
    functional.hardsigmoid,
    functional.hardtanh,
    functional.silu,
    functional.swish,
    functional.gelu,
    lambda x: functional.gelu(x, approximate=True),
    functional.mish,
    functional.elu,
    functional.selu,
    functional.softsign,
    functional.leaky_relu,
    functional.log_sigmoid,
    functional.tanhshrink,
    functional.softshrink,
    functional.hardshrink,
    lambda x: functional.glu(paddle.concat([x, 0.5 * x], axis=-1)),
    lambda x: x * functional.sigmoid(x),
    lambda x: x * functional.sigmoid(1.702 * x),
    lambda x: paddle.clip(x, -1.0, 2.0),
    lambda x: functional.softmax(x, axis=1),
    lambda x: functional.log_softmax(x, axis=-1),
)


def _rms(x: Any) -> Any:
    return x * paddle.rsqrt(paddle.mean(paddle.square(x), axis=-1, keepdim=True) + 1e-6)


def _layer_norm(x: Any) -> Any:
    centred = x - x.mean(axis=-1, keepdim=True)
    return centred / paddle.sqrt(centred.pow(2).mean(axis=-1, keepdim=True) + 1e-5)


def _by_var(x: Any) -> Any:
    return (x - x.mean(-1, keepdim=True)) / paddle.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)


def _softmax(x: Any) -> Any:
    powers = paddle.exp(x - x.max(axis=-1, keepdim=True))
    return powers / powers.sum(axis=-1, keepdim=True)


def _along_tokens(x: Any) -> Any:
    return functional.softmax(x, axis=1)


NORMS: tuple[Callable[[Any], Any], ...] = (
    _rms,
    _layer_norm,
    _by_var,
    _softmax,
    _along_tokens,
    lambda x: functional.normalize(x, axis=-1),
    lambda x: functional.normalize(x, axis=-1, p=1),
    lambda x: x / (paddle.norm(x, axis=-1, keepdim=True) + 1e-6),
    lambda x: x / paddle.sqrt(x.square().sum(-1, keepdim=True)).clip(min=1e-6),
    lambda x: functional.layer_norm(x, WIDTH),
)


class Norms(nn.Layer):
    """Every norm and every activation after a dense layer of its own, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.LayerList([nn.Linear(WIDTH, WIDTH) for _ in (*NORMS, *ACTIVATIONS)])

    def forward(self, x: Any) -> Any:
        for i, norm in enumerate(NORMS):
            x = x + norm(self.dense[i](x))
        return paddle.add_n([act(self.dense[len(NORMS) + i](x)) for i, act in enumerate(ACTIVATIONS)])

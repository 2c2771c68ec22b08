"""Networks on sequences for `bench.architectures_tf`: of Keras' layers, and written in TensorFlow's operators.

Needs TensorFlow 2.15 with Keras 2.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from bench.architecture import HEADS, LAYERS, VOCABULARY, WIDTH

keras: Any = tf.keras
layers: Any = tf.keras.layers
HEAD = WIDTH // HEADS


def _embedded(ids: Any, positions: int = 64) -> Any:
    places = layers.Embedding(positions, WIDTH)(tf.range(tf.shape(ids)[1]))
    return layers.Embedding(VOCABULARY, WIDTH)(ids) + places


def bert() -> Any:
    """An encoder of Keras' layers: MultiHeadAttention with a mask, GELU (erf), LayerNormalization after residuals."""
    ids, mask = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
    x = layers.LayerNormalization(epsilon=1e-12)(_embedded(ids))
    seen = tf.cast(mask[:, None, :], tf.bool)
    for _ in range(LAYERS):
        y = layers.MultiHeadAttention(HEADS, HEAD, dropout=0.1)(x, x, attention_mask=seen)
        x = layers.LayerNormalization(epsilon=1e-12)(layers.Add()([x, layers.Dropout(0.1)(y)]))
        y = layers.Dense(WIDTH)(layers.Dense(128, activation="gelu")(x))
        x = layers.LayerNormalization(epsilon=1e-12)(layers.Add()([x, y]))
    pooled = layers.Dense(WIDTH, activation="tanh")(x[:, 0])
    return keras.Model({"input_ids": ids, "attention_mask": mask}, {"last_hidden_state": x, "pooler_output": pooled})


def causal() -> Any:
    """A decoder of Keras' layers: `use_causal_mask`, normed before, GELU (tanh), words as the embedding's products."""
    ids = keras.Input((None,), dtype="int32")
    embedding = layers.Embedding(VOCABULARY, WIDTH)
    x = embedding(ids)
    for _ in range(LAYERS):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(HEADS, HEAD)(y, y, use_causal_mask=True)
        y = layers.LayerNormalization()(x)
        x = x + layers.Dense(WIDTH)(tf.nn.gelu(layers.Dense(128)(y), approximate=True))
    logits = tf.matmul(layers.LayerNormalization()(x), embedding.embeddings, transpose_b=True)
    return keras.Model({"input_ids": ids}, {"logits": logits})


class Llama(tf.Module):
    """A decoder in TensorFlow's operators: RMS norms, rotary embeddings, SwiGLU, keys and values that are kept."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"wq": (WIDTH, WIDTH), "wk": (WIDTH, WIDTH), "wv": (WIDTH, WIDTH), "wo": (WIDTH, WIDTH)}
        shapes |= {"gate": (WIDTH, 128), "up": (WIDTH, 128), "down": (128, WIDTH)}
        self.words = tf.Variable(tf.zeros((VOCABULARY, WIDTH)))
        self.layers = [{name: tf.Variable(tf.zeros(shape)) for name, shape in shapes.items()} for _ in range(LAYERS)]
        self.norms = [tf.Variable(tf.ones((WIDTH,))) for _ in range(2 * LAYERS + 1)]

    def norm(self, x: Any, i: int) -> Any:
        variance = tf.reduce_mean(tf.square(x), axis=-1, keepdims=True)
        return x * tf.math.rsqrt(variance + 1e-6) * self.norms[i]

    def heads(self, x: Any) -> Any:
        shape = tf.shape(x)
        return tf.transpose(tf.reshape(x, (shape[0], shape[1], HEADS, HEAD)), (0, 2, 1, 3))

    def __call__(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any) -> tuple[Any, Any]:
        """`cache` has keys and values of every layer; returned are the logits and those of all tokens."""
        x = tf.gather(self.words, input_ids)
        inverse = 10000.0 ** (-tf.range(0, HEAD, 2, dtype=tf.float32) / HEAD)
        angles = tf.cast(position_ids, tf.float32)[..., None] * inverse
        angles = tf.concat([angles, angles], axis=-1)[:, None]
        cos, sin = tf.cos(angles), tf.sin(angles)

        def rotated(v: Any) -> Any:
            first, second = tf.split(v, 2, axis=-1)
            return v * cos + tf.concat([-second, first], axis=-1) * sin

        length, total = tf.shape(input_ids)[1], tf.shape(attention_mask)[1]
        causal = tf.range(total)[None, :] <= tf.range(length)[:, None] + (total - length)
        seen = causal[None, None] & tf.cast(attention_mask[:, None, None, :], tf.bool)
        bias = (1.0 - tf.cast(seen, tf.float32)) * -1e9
        present = []
        for i, w in enumerate(self.layers):
            y = self.norm(x, 2 * i)
            q, k, v = (self.heads(tf.matmul(y, w[name])) for name in ("wq", "wk", "wv"))
            k, v = (tf.concat([old, new], axis=2) for old, new in zip(cache[i], (rotated(k), v), strict=True))
            scores = tf.matmul(rotated(q), k, transpose_b=True) / tf.sqrt(float(HEAD))
            y = tf.matmul(tf.nn.softmax(scores + bias, axis=-1), v)
            y = tf.reshape(tf.transpose(y, (0, 2, 1, 3)), tf.shape(x))
            x = x + tf.matmul(y, w["wo"])
            y = self.norm(x, 2 * i + 1)
            x = x + tf.matmul(tf.nn.silu(tf.matmul(y, w["gate"])) * tf.matmul(y, w["up"]), w["down"])
            present.append((k, v))
        return tf.matmul(self.norm(x, 2 * LAYERS), self.words, transpose_b=True), present


def recurrent() -> Any:
    """An LSTM in both directions, a GRU of each kind, a simple one, over masked tokens and without."""
    ids = keras.Input((None,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(ids)
    x = layers.Bidirectional(layers.LSTM(WIDTH // 2, return_sequences=True))(x)
    x = layers.GRU(WIDTH, return_sequences=True)(x)
    x = layers.GRU(WIDTH, reset_after=False, return_sequences=True)(x)
    x = layers.SimpleRNN(WIDTH, return_sequences=True)(x)
    last = layers.LSTM(WIDTH)(x)
    return keras.Model({"input_ids": ids}, {"states": x, "logits": layers.Dense(10)(last)})


def recogniser() -> Any:
    """Convolutions, their columns through LSTMs in both directions, and a classifier for each."""
    x = image = keras.Input((32, None, 1))
    for width in (16, 32):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = layers.MaxPooling2D(2)(layers.ReLU()(layers.BatchNormalization()(x)))
    x = layers.Permute((2, 1, 3))(x)
    x = layers.Reshape((-1, 8 * 32))(x)
    x = layers.Bidirectional(layers.LSTM(32, return_sequences=True))(x)
    return keras.Model(image, layers.Dense(40, activation="softmax")(x))


def norms() -> Any:
    """Every norm and activation that Keras and tf.nn have, around dense layers."""
    x = given = keras.Input((None, WIDTH))
    for norm in (
        layers.BatchNormalization(),
        layers.GroupNormalization(8),
        layers.UnitNormalization(),
        layers.LayerNormalization(axis=-1, scale=False),
        layers.LayerNormalization(axis=-1, center=False),
        lambda v: tf.nn.l2_normalize(v, axis=-1),
        lambda v: (v - tf.reduce_mean(v, -1, True)) / (tf.math.reduce_std(v, -1, True) + 1e-5),
        lambda v: tf.nn.batch_normalization(v, *tf.nn.moments(v, [-1], keepdims=True), None, None, 1e-5),
        lambda v: tf.nn.batch_normalization(v, *tf.nn.moments(v, [1], keepdims=True), None, None, 1e-5),
        lambda v: v / tf.norm(v, axis=-1, keepdims=True),
    ):
        x = norm(layers.Dense(WIDTH)(x))
    softmax: Any = lambda v: tf.exp(v - tf.reduce_max(v, -1, True))  # noqa: E731
    for activation in (
        "relu6", tf.nn.silu, lambda v: v * tf.sigmoid(1.702 * v), keras.activations.mish, "hard_sigmoid", "elu",
        "selu", "softplus", "softsign", "exponential", "gelu", lambda v: tf.nn.gelu(v, approximate=True),
        lambda v: v * tf.nn.relu6(v + 3) / 6, tf.nn.leaky_relu, "tanh", "sigmoid", tf.nn.log_softmax,
        lambda v: softmax(v) / tf.reduce_sum(softmax(v), -1, True), lambda v: tf.clip_by_value(v, -0.5, 0.5), "softmax",
    ):  # fmt: skip
        x = layers.Dense(WIDTH, activation=activation)(x)
    return keras.Model({"x": given}, {"y": x})

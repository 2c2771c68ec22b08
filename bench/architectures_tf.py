"""The architectures that `bench.exporters_tf` exports, as a table.

Every one is small and has random weights. Images have their channels last, as TensorFlow's do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bench import models_tf_hub as hub
from bench import models_tf_images as images
from bench import models_tf_text as text
from bench.architecture import (
    KEY_VALUE,
    LAYERS,
    WIDTH,
    Architecture,
    Input,
    Sizes,
    Tensors,
    cached,
    left_padded,
    normal,
    right_padded,
    stored,
    tokens,
)

OPSETS = ("tf2onnx13", "tf2onnx", "tf2onnx18")
IMAGES = (*OPSETS, "tf2onnx-nchw", "tflite")
ALL = (*IMAGES, "tflite-int8")
"""tf2onnx has none of TFLite's GELU, and TFLite none of free sizes beside the batch's where tokens are reshaped."""
_PICTURES = ({"batch": 2, "height": 64, "width": 64}, {"batch": 1, "height": 96, "width": 64})
_ODD = ({"batch": 2, "height": 40, "width": 56}, {"batch": 1, "height": 64, "width": 24})
_BATCHES = ({"batch": 2}, {"batch": 3})
_TEXTS = ({"batch": 2, "seq": 11}, {"batch": 3, "seq": 7})
_STEPS = ({"batch": 2, "past": 7, "seq": 3}, {"batch": 1, "past": 12, "seq": 1}, {"batch": 3, "past": 0, "seq": 5})


def _int32(given: Input) -> Input:
    return Input(lambda rng, shape: given.make(rng, shape).astype(np.int32), given.dims)


_IDS = {"input_ids": _int32(tokens("batch", "seq"))}
_TEXT = {**_IDS, "attention_mask": _int32(right_padded("batch", "seq"))}
_NEXT = {**_IDS, "attention_mask": _int32(left_padded("batch", "past+seq"))}
_PLACES = Input(lambda _, shape: np.zeros(shape, np.int32) + np.arange(shape[1], dtype=np.int32), ("batch", "seq"))


def _picture(model: Any, x: Tensors) -> Tensors:
    return {"y": model(x["image"], training=False)}


def _named(model: Any, x: Tensors) -> Tensors:
    return dict(model(x, training=False))


def _step(model: Any, x: Tensors) -> Tensors:
    x = dict(x)
    cache = [tuple(x.pop(f"past.{i}.{part}") for part in KEY_VALUE) for i in range(LAYERS)]
    logits, present = model(**x, cache=cache)
    made = {f"present.{i}.{part}": v for i, pair in enumerate(present) for part, v in zip(KEY_VALUE, pair, strict=True)}
    return {"logits": logits, **made}


def _image(
    summary: str, build: Callable[[], Any], exporters: tuple[str, ...] = OPSETS, sizes: tuple[Sizes, ...] = _PICTURES
) -> Architecture:
    """A picture with channels last, to probabilities or to a map of them."""
    inputs = {"image": normal("batch", "height", "width", 3)}
    return Architecture(summary, build, _picture, inputs, sizes, {"y": ()}, exporters)


def _text(
    summary: str,
    build: Callable[[], Any],
    inputs: Mapping[str, Input],
    *outputs: str,
    exporters: tuple[str, ...] = OPSETS,
) -> Architecture:
    return Architecture(summary, build, _named, inputs, _TEXTS, dict.fromkeys(outputs, ()), exporters)


ARCHITECTURES: Mapping[str, Architecture] = {
    "mobilenet-v2": _image("Keras', alpha 0.35", images.mobilenet_v2, ALL),
    "mobilenet-v3": _image("Keras' small, alpha 0.25", images.mobilenet_v3, IMAGES),
    "efficientnet": _image("Keras' V2-S, a quarter of its width, a third of its depth", images.efficientnet, IMAGES),
    "resnet": _image("Keras', 2 stages of 2 bottlenecks", images.resnet, ALL),
    "convnext": _image("2 stages of 1 and 2 blocks, widths 16 and 32", images.convnext, (*OPSETS, "tf2onnx-nchw")),
    "densenet": _image("Keras', 4 stages of 2 layers", images.densenet, IMAGES),
    "segmenter": _image("strides, dilations, upsampling, group norms", images.segmenter, IMAGES[:-1], _ODD),
    "classifier": _image("plain convolutions, one residual", images.classifier, ALL),
    "classifier-fake-quant": _image(
        "plain convolutions with FakeQuantWithMinMaxArgs", lambda: images.classifier(True), OPSETS
    ),
    "vit": Architecture(
        "2 layers of Keras' MultiHeadAttention, width 64, patches of 8, GELU by tanh",
        images.vit,
        _picture,
        {"image": normal("batch", 64, 64, 3)},
        _BATCHES,
        {"y": ()},
        OPSETS,
    ),
    "bert": _text(
        "2 layers of Keras' MultiHeadAttention, width 64, pooled",
        text.bert,
        _TEXT,
        "last_hidden_state",
        "pooler_output",
    ),
    "causal": _text(
        "2 layers of Keras' MultiHeadAttention with use_causal_mask, width 64", text.causal, _IDS, "logits"
    ),
    "llama": Architecture(
        "2 layers in TensorFlow's operators, width 64, KV cache",
        text.Llama,
        _step,
        {**_NEXT, "position_ids": _PLACES, **cached("past", "past")},
        _STEPS,
        {"logits": (), **stored("present", "past+seq")},
        OPSETS,
    ),
    "recurrent": _text(
        "LSTM both ways, GRU of both kinds, SimpleRNN, width 64", text.recurrent, _IDS, "states", "logits"
    ),
    "recogniser": Architecture(
        "columns of a small convolutional network through LSTMs both ways",
        text.recogniser,
        _picture,
        {"image": normal("batch", 32, "width", 1)},
        ({"batch": 2, "width": 64}, {"batch": 1, "width": 96}),
        {"y": ()},
        OPSETS,
    ),
    "norms": _text(
        "10 norms and 20 activations between dense layers", text.norms, {"x": normal("batch", "seq", WIDTH)}, "y"
    ),
    "bert-hub": Architecture(
        "transformers' TFBertModel, 2 layers, width 64, pooled",
        hub.bert,
        hub.encode_and_pool,
        {**_TEXT, "token_type_ids": _int32(Input(lambda rng, shape: rng.integers(0, 2, shape), ("batch", "seq")))},
        _TEXTS,
        {"last_hidden_state": (), "pooler_output": ()},
        OPSETS,
    ),
    "gpt2-hub": Architecture(
        "transformers' TFGPT2LMHeadModel, 2 layers, width 64, KV cache",
        hub.gpt2,
        hub.generate,
        {**_NEXT, "position_ids": _PLACES, **cached("past", "past")},
        _STEPS,
        {"logits": (), **stored("present", "past+seq")},
        OPSETS,
    ),
    "t5-encoder-hub": Architecture(
        "transformers' TFT5EncoderModel, 2 layers, width 64, gated GELU",
        hub.t5_encoder,
        hub.encode,
        _TEXT,
        _TEXTS,
        {"last_hidden_state": ()},
        OPSETS,
    ),
}

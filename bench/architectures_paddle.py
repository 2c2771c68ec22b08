"""The architectures that `bench.exporters_paddle` exports, as a table. Every one is small and has random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bench import models_paddle_images as images
from bench import models_paddle_text as text
from bench.architecture import (
    HEADS,
    WIDTH,
    Architecture,
    Input,
    Sizes,
    Tensors,
    left_padded,
    normal,
    pairs,
    right_padded,
    tokens,
)

_PICTURES = ({"batch": 2, "height": 64, "width": 64}, {"batch": 1, "height": 96, "width": 64})
_BATCHES = ({"batch": 2}, {"batch": 3})
_TEXTS = ({"batch": 2, "seq": 11}, {"batch": 3, "seq": 7})
_STEPS = ({"batch": 2, "past": 7, "seq": 3}, {"batch": 1, "past": 12, "seq": 1}, {"batch": 3, "past": 1, "seq": 5})
_IDS = {"input_ids": tokens("batch", "seq")}
_NEXT = {
    **_IDS,
    "attention_mask": left_padded("batch", "past+seq"),
    "position_ids": Input(lambda _, shape: np.zeros(shape, np.int64) + np.arange(shape[1]), ("batch", "seq")),
}


def _named(*names: str) -> Callable[[Any, Tensors], Tensors]:
    """A layer that takes the inputs in their order, and gives one tensor or a tuple of them."""

    def call(model: Any, x: Tensors) -> Tensors:
        made = model(*x.values())
        parts = made if len(names) > 1 else (made,)
        return {name: parts[i] for i, name in enumerate(names)}

    return call


def _layer(
    summary: str, build: Callable[[], Any], inputs: Mapping[str, Input], sizes: tuple[Sizes, ...], *outputs: str
) -> Architecture:
    return Architecture(summary, build, _named(*outputs), inputs, sizes, dict.fromkeys(outputs, ()))


def _picture(summary: str, build: Callable[[], Any]) -> Architecture:
    return _layer(summary, build, {"image": normal("batch", 3, "height", "width")}, _PICTURES, "y")


def _decoder(key_heads: int) -> Architecture:
    """Keys and values with heads beside their elements, as Paddle's attention takes them."""
    past, present = (("batch", length, key_heads, WIDTH // HEADS) for length in ("past", "past+seq"))
    cache = {name: normal(*dims) for name, dims in pairs("past", past).items()}
    return _layer(
        f"2 layers as PaddleNLP writes them, width 64, KV cache, {key_heads} heads of keys",
        lambda: text.Llama(key_heads),
        {**_NEXT, **cache},
        _STEPS,
        "logits",
        *pairs("present", present),
    )


def _causal(summary: str, attention: Callable[[Any, Any, Any], Any]) -> Architecture:
    return _layer(f"2 layers of width 64, GELU by tanh, {summary}", lambda: text.Gpt(attention), _IDS, _TEXTS, "logits")


ARCHITECTURES: Mapping[str, Architecture] = {
    "mobilenet-v3": _picture("4 blocks, hard sigmoid of slope 0.2", images.mobilenet_v3),
    "lcnet": _picture("PP-LCNet, 3 blocks", images.lcnet),
    "resnet-vd": _picture("4 bottlenecks, padded by layers of their own", images.resnet_vd),
    "detector": _picture("PaddleOCR's pyramid with upsampling in every mode", images.Detector),
    "image-norms": _picture("4 norms and 6 activations between convolutions", images.ImageNorms),
    "svtr": _layer(
        "PaddleOCR's, 2 layers of local and global mixing, width 64",
        images.Svtr,
        {"image": normal("batch", 3, 4 * images.Svtr.ROWS, 4 * images.Svtr.COLUMNS)},
        _BATCHES,
        "y",
    ),
    "bert": _layer(
        "nn.TransformerEncoder, 2 layers, width 64, pooled",
        text.Bert,
        {**_IDS, "attention_mask": right_padded("batch", "seq")},
        _TEXTS,
        "last_hidden_state",
        "pooler_output",
    ),
    "gpt": _causal("attention in operators", text.spelled_out),
    "gpt-sdpa": _causal("scaled_dot_product_attention with a mask", text.fused),
    "llama": _decoder(HEADS),
    "llama-grouped": _decoder(2),
    "recurrent": _layer("2 layers of LSTM both ways, GRU, width 64", text.Recurrent, _IDS, _TEXTS, "states", "logits"),
    "recogniser": _layer(
        "CRNN: columns of a small convolutional network through LSTMs both ways",
        text.Recogniser,
        {"image": normal("batch", 1, 32, "width")},
        ({"batch": 2, "width": 64}, {"batch": 1, "width": 96}),
        "y",
    ),
    "norms": _layer(
        "10 norms and 23 activations after dense layers",
        text.Norms,
        {"x": normal("batch", "seq", WIDTH)},
        _TEXTS,
        "y",
    ),
}

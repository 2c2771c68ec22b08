"""How PyTorch's models are called: transformers' with and without caches, diffusers' denoisers.

Needs diffusers and transformers, and with them PyTorch.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from bench.architecture import KEY_VALUE, LAYERS, Tensors


def classify(model: Any, x: Tensors) -> Tensors:
    return {"logits": model(**x).logits}


def encode(model: Any, x: Tensors) -> Tensors:
    return {"last_hidden_state": model(**x).last_hidden_state}


def encode_and_pool(model: Any, x: Tensors) -> Tensors:
    made = model(**x)
    return {"last_hidden_state": made.last_hidden_state, "pooler_output": made.pooler_output}


def _cache(x: Tensors, prefix: str) -> Any:
    return DynamicCache([tuple(x.pop(f"{prefix}.{i}.{part}") for part in KEY_VALUE) for i in range(LAYERS)])


def _contents(prefix: str, cache: Any) -> Tensors:
    return {
        f"{prefix}.{i}.{part}": tensor
        for i, layer in enumerate(cache.layers)
        for part, tensor in zip(KEY_VALUE, (layer.keys, layer.values), strict=True)
    }


def generate(model: Any, x: Tensors) -> Tensors:
    """A decoder's step over a cache of any length."""
    x = dict(x)
    made = model(**x | {"cache": _cache(x, "past")}, use_cache=True)
    return {"logits": made.logits, **_contents("present", made.cache)}


def start(model: Any, x: Tensors) -> Tensors:
    """The first step of an encoder-decoder's decoder: it computes the cache of the encoder's states too."""
    x = dict(x)
    made = model(**x | {"encoder_outputs": (x.pop("encoder_hidden_states"),)}, use_cache=True)
    cache = made.cache
    return {
        "logits": made.logits,
        **_contents("present", cache.self_attention_cache),
        **_contents("encoder", cache.cross_attention_cache),
    }


def proceed(model: Any, x: Tensors) -> Tensors:
    """A later step: the states of the encoder come from their cache."""
    x = dict(x)
    cache = EncoderDecoderCache(_cache(x, "past"), _cache(x, "encoder"))
    states = (x.pop("encoder_hidden_states"),)
    made = model(**x, encoder_outputs=states, cache=cache, use_cache=True)
    return {"logits": made.logits, **_contents("present", made.cache.self_attention_cache)}


def denoise(model: Any, x: Tensors) -> Tensors:
    return {"out_sample": model(**x, return_dict=False)[0]}


def choose_attention(model: Any, kind: str) -> None:
    """`eager` writes products and Softmax out, `sdpa` calls PyTorch's scaled_dot_product_attention."""
    if hasattr(model, "set_attn_processor"):
        model.set_attn_processor(AttnProcessor2_0() if kind == "sdpa" else AttnProcessor())
    else:
        model.set_attn_implementation(kind)

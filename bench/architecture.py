"""What an exported architecture is: how to build and call it, what goes in at which sizes.

Needs diffusers and transformers, and with them PyTorch, which nothing else in the repository imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Any]
Sizes = Mapping[str, int]
VOCABULARY = 300
LAYERS, WIDTH, HEADS = 2, 64, 4


@dataclass(frozen=True, slots=True)
class Input:
    """One input: an integer is a fixed dimension, a name a free one, `a+b` the sum of two free ones."""

    make: Callable[[np.random.Generator, tuple[int, ...]], Array]
    dims: tuple[int | str, ...]

    def array(self, rng: np.random.Generator, sizes: Sizes) -> Array:
        return self.make(rng, tuple(d if isinstance(d, int) else total(d, sizes) for d in self.dims))

    def free(self) -> dict[int, str]:
        """The free dimensions by axis."""
        return {axis: d for axis, d in enumerate(self.dims) if isinstance(d, str)}


def total(dim: str, sizes: Sizes) -> int:
    return sum(sizes[name] for name in dim.split("+"))


@dataclass(frozen=True, slots=True)
class Architecture:
    """`call(build(), tensors)` gives the outputs by name. The first of `sizes` is the one exported with."""

    summary: str
    build: Callable[[], Any]
    call: Callable[[Any, Tensors], Tensors]
    inputs: Mapping[str, Input]
    sizes: tuple[Sizes, ...]
    outputs: Mapping[str, tuple[int | str, ...]]
    """Dimensions, where the exporter is to be told which are free; the names of the outputs in their order."""
    attention: bool = True


# ---- inputs


def normal(*dims: int | str) -> Input:
    return Input(lambda rng, shape: rng.standard_normal(shape, np.float32), dims)


def tokens(*dims: int | str) -> Input:
    return Input(lambda rng, shape: rng.integers(2, VOCABULARY, shape), dims)


def steps(*dims: int | str) -> Input:
    return Input(lambda rng, shape: rng.integers(0, 1000, shape), dims)


def right_padded(*dims: int | str) -> Input:
    """Row i of the mask ends i tokens early, as an encoder's batch does."""
    return Input(lambda _, shape: _mask(shape, lambda i, n: np.arange(n) < max(n - i, 1)), dims)


def left_padded(*dims: int | str) -> Input:
    """Row i of the mask starts i tokens late, as a generated batch does."""
    return Input(lambda _, shape: _mask(shape, lambda i, n: np.arange(n) >= min(i, n - 1)), dims)


def _mask(shape: tuple[int, ...], row: Callable[[int, int], Array]) -> Array:
    return np.stack([row(i, shape[1]) for i in range(shape[0])]).astype(np.int64)


KEY_VALUE = ("key", "value")


def pairs(prefix: str, dims: tuple[int | str, ...], layers: int = LAYERS) -> dict[str, tuple[int | str, ...]]:
    return {f"{prefix}.{i}.{part}": dims for i in range(layers) for part in KEY_VALUE}


def cached(prefix: str, length: str, heads: int = HEADS) -> dict[str, Input]:
    """The keys and values of `length` tokens as inputs."""
    dims = ("batch", heads, length, WIDTH // HEADS)
    return {name: normal(*dims) for name in pairs(prefix, dims)}


def stored(prefix: str, length: str, heads: int = HEADS) -> dict[str, tuple[int | str, ...]]:
    """The keys and values of `length` tokens as outputs."""
    return pairs(prefix, ("batch", heads, length, WIDTH // HEADS))


# ---- calls


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

"""The architectures that `bench.exporters` exports, as a table: what is built, what goes in, what is called.

Every one is small and has random weights; depths and kinds of layers are those of the models that people export. Needs
PyTorch, transformers and diffusers, which nothing else in the repository imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import transformers as tf
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


# ---- the table

_T5: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": 128,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "feed_forward_proj": "gated-gelu",
}
_WHISPER: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 80,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_source_positions": 50,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
_STEPS = ({"batch": 2, "past": 7, "seq": 3}, {"batch": 1, "past": 12, "seq": 1}, {"batch": 3, "past": 0, "seq": 5})
_CROSS_STEPS = tuple({**sizes, "source": 5 + i} for i, sizes in enumerate(_STEPS))
_LATER_STEPS = _CROSS_STEPS[:2]
_STARTS = ({"batch": 2, "source": 9, "seq": 4}, {"batch": 3, "source": 5, "seq": 1})
_PICTURES = ({"batch": 2, "height": 64, "width": 64}, {"batch": 1, "height": 96, "width": 64})
_BATCHES = ({"batch": 2}, {"batch": 3})
_TEXTS = ({"batch": 2, "seq": 11}, {"batch": 3, "seq": 7})
_PIXELS = {"pixel_values": normal("batch", 3, "height", "width")}
_SQUARE = {"pixel_values": normal("batch", 3, 64, 64)}
_LOGITS: dict[str, tuple[int | str, ...]] = {"logits": ("batch", 1000)}
_WORDS: dict[str, tuple[int | str, ...]] = {"logits": ("batch", "seq", VOCABULARY)}
_STATES: dict[str, tuple[int | str, ...]] = {"last_hidden_state": ("batch", "seq", WIDTH)}
_TEXT = {"input_ids": tokens("batch", "seq"), "attention_mask": right_padded("batch", "seq")}
_NEXT = {
    "input_ids": tokens("batch", "seq"),
    "attention_mask": left_padded("batch", "past+seq"),
    "position_ids": Input(lambda _, shape: np.zeros(shape, np.int64) + np.arange(shape[1]), ("batch", "seq")),
}


def _t5(**more: Any) -> Any:
    return tf.T5Config(**_T5, **more)


ARCHITECTURES: Mapping[str, Architecture] = {
    "resnet50": Architecture(
        "all 50 layers, width a quarter",
        lambda: tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=16, hidden_sizes=[64, 128, 256, 512], num_labels=1000)
        ),
        classify,
        _PIXELS,
        _PICTURES,
        _LOGITS,
        attention=False,
    ),
    "vit": Architecture(
        "2 layers, width 64, patches of 8",
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                intermediate_size=128,
                image_size=64,
                patch_size=8,
                num_labels=1000,
            )
        ),
        classify,
        _SQUARE,
        _BATCHES,
        _LOGITS,
    ),
    "convnext": Architecture(
        "4 stages of 1, 1, 2, 1 blocks, widths 16 to 128",
        lambda: tf.ConvNextForImageClassification(
            tf.ConvNextConfig(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1], num_labels=1000)
        ),
        classify,
        _PIXELS,
        _PICTURES,
        _LOGITS,
        attention=False,
    ),
    "swin": Architecture(
        "2 stages of 2 blocks (shifted windows of 4), widths 32 and 64",
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(image_size=64, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=1000)
        ),
        classify,
        _SQUARE,
        _BATCHES,
        _LOGITS,
    ),
    "bert": Architecture(
        "2 layers, width 64, pooled",
        lambda: tf.BertModel(
            tf.BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                intermediate_size=128,
                max_position_embeddings=64,
            )
        ),
        encode_and_pool,
        {**_TEXT, "token_type_ids": Input(lambda rng, shape: rng.integers(0, 2, shape), ("batch", "seq"))},
        _TEXTS,
        {**_STATES, "pooler_output": ("batch", WIDTH)},
    ),
    "gpt2": Architecture(
        "2 layers, width 64, KV cache",
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
        ),
        generate,
        {**_NEXT, **cached("past", "past")},
        _STEPS,
        {**_WORDS, **stored("present", "past+seq")},
    ),
    "llama": Architecture(
        "2 layers, width 64, 4 heads over 2 of keys, KV cache",
        lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=128,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=2,
                max_position_embeddings=64,
            )
        ),
        generate,
        {**_NEXT, **cached("past", "past", 2)},
        _STEPS,
        {**_WORDS, **stored("present", "past+seq", 2)},
    ),
    "t5-encoder": Architecture(
        "2 layers, width 64, gated GELU",
        lambda: tf.T5EncoderModel(_t5()),
        encode,
        _TEXT,
        _TEXTS,
        _STATES,
    ),
    "t5-decoder": Architecture(
        "2 layers, width 64, first step",
        lambda: tf.T5ForConditionalGeneration(_t5()),
        start,
        {
            "decoder_input_ids": tokens("batch", "seq"),
            "encoder_hidden_states": normal("batch", "source", WIDTH),
            "attention_mask": right_padded("batch", "source"),
        },
        _STARTS,
        {**_WORDS, **stored("present", "seq"), **stored("encoder", "source")},
    ),
    "t5-decoder-past": Architecture(
        "2 layers, width 64, KV cache of both attentions",
        lambda: tf.T5ForConditionalGeneration(_t5()),
        proceed,
        {
            "decoder_input_ids": tokens("batch", "seq"),
            "encoder_hidden_states": normal("batch", "source", WIDTH),
            "attention_mask": right_padded("batch", "source"),
            **cached("past", "past"),
            **cached("encoder", "source"),
        },
        _LATER_STEPS,
        {**_WORDS, **stored("present", "past+seq")},
    ),
    "whisper-encoder": Architecture(
        "2 layers, width 64, 100 frames",
        lambda: tf.WhisperModel(tf.WhisperConfig(**_WHISPER)).encoder,
        encode,
        {"input_features": normal("batch", 80, 100)},
        _BATCHES,
        {"last_hidden_state": ("batch", 50, WIDTH)},
    ),
    "whisper-decoder": Architecture(
        "2 layers, width 64, first step",
        lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**_WHISPER)),
        start,
        {"decoder_input_ids": tokens("batch", "seq"), "encoder_hidden_states": normal("batch", "source", WIDTH)},
        _STARTS,
        {**_WORDS, **stored("present", "seq"), **stored("encoder", "source")},
    ),
    "whisper-decoder-past": Architecture(
        "2 layers, width 64, KV cache of both attentions",
        lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**_WHISPER)),
        proceed,
        {
            "decoder_input_ids": tokens("batch", "seq"),
            "encoder_hidden_states": normal("batch", "source", WIDTH),
            **cached("past", "past"),
            **cached("encoder", "source"),
        },
        _LATER_STEPS,
        {**_WORDS, **stored("present", "past+seq")},
    ),
    "unet": Architecture(
        "UNet2DConditionModel, widths 32 and 64, 1 layer a block, cross attention, latents of 4 channels",
        lambda: diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        denoise,
        {
            "sample": normal("batch", 4, "height", "width"),
            "timestep": steps("batch"),
            "encoder_hidden_states": normal("batch", "seq", WIDTH),
        },
        (
            {"batch": 2, "height": 16, "width": 16, "seq": 7},
            {"batch": 1, "height": 24, "width": 16, "seq": 11},
        ),
        {"out_sample": ("batch", 4, "height", "width")},
    ),
}

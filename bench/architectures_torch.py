"""The architectures that `bench.exporters_torch` exports, as a table.

Every one is small and has random weights; depths and kinds of layers are those of the models that people export.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import transformers as tf

from bench.architecture import (
    HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Architecture,
    Input,
    cached,
    left_padded,
    normal,
    right_padded,
    steps,
    stored,
    tokens,
)
from bench.calls_torch import classify, denoise, encode, encode_and_pool, generate, proceed, start

WITHOUT_ATTENTION = ("torchscript13", "torchscript", "dynamo", "dynamo23")
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
        exporters=WITHOUT_ATTENTION,
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
        exporters=WITHOUT_ATTENTION,
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

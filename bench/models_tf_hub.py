"""Transformers' models in TensorFlow for `bench.architectures_tf`, as small as those that PyTorch exports.

Needs TensorFlow 2.15 and transformers 4.37, which still has models in TensorFlow.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import transformers

from bench.architecture import HEADS, KEY_VALUE, LAYERS, VOCABULARY, WIDTH, Tensors


def _built(model: Any) -> Any:
    """With its weights, which a model has from its first call on."""
    model(model.dummy_inputs)
    return model


def bert() -> Any:
    about = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = transformers.BertConfig(VOCABULARY, **about, intermediate_size=128, max_position_embeddings=64)
    return _built(transformers.TFBertModel(config))


def gpt2() -> Any:
    config = transformers.GPT2Config(VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    return _built(transformers.TFGPT2LMHeadModel(config))


def t5_encoder() -> Any:
    sizes = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 128, "num_layers": LAYERS, "num_heads": HEADS}
    config = transformers.T5Config(VOCABULARY, **sizes, feed_forward_proj="gated-gelu")
    return _built(transformers.TFT5EncoderModel(config))


def encode(model: Any, x: Tensors) -> Tensors:
    return {"last_hidden_state": model(x, training=False).last_hidden_state}


def encode_and_pool(model: Any, x: Tensors) -> Tensors:
    made = model(x, training=False)
    return {"last_hidden_state": made.last_hidden_state, "pooler_output": made.pooler_output}


def generate(model: Any, x: Tensors) -> Tensors:
    """A decoder's step over a cache of any length: keys and values of a layer are one tensor in TensorFlow."""
    x = dict(x)
    past = [tf.stack([x.pop(f"past.{i}.{part}") for part in KEY_VALUE]) for i in range(LAYERS)]
    made = model(**x, past_key_values=past, use_cache=True, training=False)
    present = {
        f"present.{i}.{part}": tensor
        for i, layer in enumerate(made.past_key_values)
        for part, tensor in zip(KEY_VALUE, tf.unstack(layer), strict=True)
    }
    return {"logits": made.logits, **present}

"""Rows of networks: at the precisions and batches of the targets, beside their peers in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx

from bench.build import bert, gpt2_step, resnet50
from bench.build_llama import ONE_BILLION, Sizes, llama, llama_feeds, matrices_of
from bench.build_vit import vit
from bench.gpu_models import bert_feeds, images
from bench.gpu_peers import Feeds, Tensors, torch_type
from bench.gpu_rows import Row
from infera_gpu.fetch import cache_dir
from infera_gpu.passes import Precision
from infera_gpu.source import Source

VOCABULARY = 30522


def token_feeds(batch: int, past: int = 255) -> Feeds:
    """What `gpt2_step` takes."""
    rng = np.random.default_rng(0)
    caches = {
        f"past_{part}_{i}": rng.standard_normal((batch, 12, past, 64)).astype(np.float32)
        for i in range(12)
        for part in ("key", "value")
    }
    return {"input_ids": rng.integers(0, 50257, (batch, 1)), **caches}


@dataclass(frozen=True)
class Network:
    """A model, its inputs by batch, and its module in torch."""

    name: str
    build: Callable[[], onnx.ModelProto]
    feeds: Callable[[int], Feeds]
    module: str
    batches: Mapping[Precision, tuple[int, ...]]

    def rows(self) -> list[Row]:
        return [
            Row(
                "networks",
                f"{self.name} b{batch}",
                partial(self._made, batch),
                precision,
                {"torch": partial(_moved, self.module, precision)},
                network=True,
            )
            for precision, batches in self.batches.items()
            for batch in batches
        ]

    def _made(self, batch: int) -> tuple[Source, Feeds]:
        return _built(self.build), self.feeds(batch)


@lru_cache(maxsize=1)
def _built(build: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
    """Rows of one network follow each other."""
    return build()


def _moved(name: str, precision: Precision, torch: Any, source: Source, given: Tensors) -> Callable[[], Any]:
    """The network's peer on the GPU in the row's precision; images are channels-last there."""
    from bench.torch_peers import MODULES

    module = MODULES[name](cast(onnx.ModelProto, source)).to("cuda", torch_type(torch, precision))
    if given[0].ndim == 4:
        module = module.to(memory_format=torch.channels_last)
        given = [given[0].contiguous(memory_format=torch.channels_last)]
    return partial(module, *given)


NETWORKS = (
    Network("resnet50", resnet50, images, "resnet50", {"fp16": (1, 32, 128), "fp32": (1, 32)}),
    Network(
        "bert-base s128",
        bert,
        partial(bert_feeds, length=128, vocabulary=VOCABULARY),
        "bert-base",
        {"fp16": (1, 32), "fp32": (1, 32)},
    ),
    Network(
        "bert-base s512", bert, partial(bert_feeds, length=512, vocabulary=VOCABULARY), "bert-base", {"fp16": (8,)}
    ),
    Network("vit-b16", vit, images, "vit-b16", {"fp16": (1, 32)}),
    Network("gpt2-step", gpt2_step, token_feeds, "gpt2-step", {"fp16": (1, 32), "fp32": (1, 32)}),
)


@lru_cache(maxsize=1)
def _int8(build: Callable[[], onnx.ModelProto], calibration: Callable[[], Feeds]) -> onnx.ModelProto:
    from bench.build_int8 import quantised

    return quantised(build(), calibration())


@dataclass(frozen=True)
class Quantised:
    """A network in int8, calibrated with a batch of one."""

    name: str
    build: Callable[[], onnx.ModelProto]
    feeds: Callable[[int], Feeds]
    batches: tuple[int, ...] = (1, 32)

    def rows(self) -> list[Row]:
        return [
            Row("int8", f"{self.name} int8 b{batch}", partial(self._made, batch), "fp16", exact=self.build)
            for batch in self.batches
        ]

    def _made(self, batch: int) -> tuple[Source, Feeds]:
        return _int8(self.build, self._calibration), self.feeds(batch)

    def _calibration(self) -> Feeds:
        return self.feeds(1)


QUANTISED = (
    Quantised("resnet50", resnet50, images),
    Quantised("bert-base s128", bert, partial(bert_feeds, length=128, vocabulary=VOCABULARY)),
)


def integers() -> list[Row]:
    """ResNet-50 and BERT-base quantised ahead of time; what is not int8 is float16."""
    return [row for network in QUANTISED for row in network.rows()]


def networks() -> list[Row]:
    """ResNet-50, BERT-base, ViT-B/16 and a step of GPT-2."""
    return [row for network in NETWORKS for row in network.rows()]


# ---- a decoder of a billion weights

PREFILL, CONTEXT = 512, 512
SEQUENCES = (1, 16, 64)


def _folder() -> Path:
    return cache_dir() / "built"


def _decoder(batch: int, tokens: int, past: int, sizes: Sizes, *, values: bool) -> tuple[Source, Feeds]:
    """Caches have room for the new tokens."""
    how: dict[str, Any] = {"tokens": tokens, "past": past, "room": tokens if past else 0, "sizes": sizes}
    return llama(_folder(), **how, values=values), llama_feeds(batch, **how)


def _torch_decoder(
    tokens: int, past: int, sizes: Sizes, torch: Any, source: Source, given: Tensors
) -> Callable[[], Any]:
    """New tokens are written into the caches."""
    from bench.torch_llama import torch_llama

    module = torch_llama(matrices_of(_folder(), sizes), tokens=tokens, past=past, sizes=sizes).to("cuda")
    ids, _, *caches = given
    return partial(module, ids, *caches)


CASES = (
    ("prefill 512", 1, PREFILL, 0),
    *((f"step after {CONTEXT - 1}", batch, 1, CONTEXT - 1) for batch in SEQUENCES),
)
"""Name, sequences, new tokens of each, tokens before."""


def decoder(sizes: Sizes = ONE_BILLION) -> list[Row]:
    """Llama's shape of a billion weights: 512 tokens at once, and steps after 511 of several sequences."""
    return [
        Row(
            "decoder",
            f"llama-1b {name} b{batch}",
            partial(_decoder, batch, tokens, past, sizes, values=True),
            "fp16",
            {"torch": partial(_torch_decoder, tokens, past, sizes)},
            network=True,
            outline=partial(_decoder, batch, tokens, past, sizes, values=False),
            tolerance=5e-2,
            kept={f"{part}_{i}": f"past_{part}_{i}" for i in range(sizes.layers) for part in ("key", "value") if past},
        )
        for name, batch, tokens, past in CASES
    ]

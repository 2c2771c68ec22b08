"""The models by name: some built here with random weights, trained ones from the catalogue."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import onnx

from bench.build import bert, gpt2_step, resnet50
from bench.light import light
from infera_gpu.catalogue import CATALOGUE
from infera_gpu.fetch import cache_dir, fetch

BUILT: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "resnet50": resnet50,
    "bert-base": bert,
    "vgg19": partial(light, "vgg19"),
    "squeezenet": partial(light, "squeezenet"),
    "gpt2-step": gpt2_step,
    "deep-bert": partial(bert, layers=312, hidden=16, heads=2, inner=32),  # 5,000 nodes after fusion
}
REVISION = 1
"""Of the builders; part of the cached files' names, to be raised when a builder changes."""


def path_of(name: str) -> Path:
    """The model's file, built or fetched on first use. Raises KeyError for an unknown name, FetchError out of reach."""
    if name not in BUILT:
        if name not in CATALOGUE:
            raise KeyError(name)
        return fetch(name)
    path = cache_dir() / "built" / f"{name}-{REVISION}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        onnx.save(BUILT[name](), partial)
        partial.replace(path)
    return path

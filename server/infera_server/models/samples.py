"""The warm-up that Triton's configuration describes: sample requests, run before a model takes any."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from infera_gpu.errors import InputError
from infera_server import codec
from infera_server.errors import RequestError
from infera_server.models.modelconfig import ConfigError, ModelConfig, dtype_of, inside
from infera_server.runtime import Session
from infera_server.scheduling.rows import Arrays, HostArray

MAX_SAMPLE_BYTES = 1 << 30
MAX_RUNS = 1000


def run_samples(session: Session, config: ModelConfig | None, folder: Path | None) -> int:
    """Run the samples that the configuration gives. Returns how many runs that were.

    Raises ConfigError for a sample that cannot be made, and whatever a run raises.
    """
    runs = 0
    for sample in config.model_warmup if config is not None else ():
        feeds = _feeds(session, sample, config, folder)
        for _ in range(max(1, sample.count)):
            try:
                session.run(feeds)
            except InputError as error:
                raise ConfigError(f"warm-up sample '{sample.name}': {error}") from None
            runs += 1
            if runs > MAX_RUNS:
                raise ConfigError(f"warm-up sample '{sample.name}': over {MAX_RUNS} runs")
    return runs


def _feeds(session: Session, sample: Any, config: ModelConfig, folder: Path | None) -> Arrays:
    """One request; every row of a batch is the same."""
    missing = [name for name in session.inputs if name not in sample.inputs]
    if missing:
        raise ConfigError(f"warm-up sample '{sample.name}' has no input '{missing[0]}'")
    if config.max_batch_size and not 1 <= sample.batch_size <= config.max_batch_size:
        raise ConfigError(
            f"warm-up sample '{sample.name}': batch_size must be in [1, {config.max_batch_size}], "
            f"is {sample.batch_size}"
        )
    what, rows = f"warm-up sample '{sample.name}'", sample.batch_size if config.max_batch_size else 0
    one = {name: _array(what, name, sample.inputs[name], folder) for name in sample.inputs}
    if sum(array.nbytes for array in one.values()) * max(rows, 1) > MAX_SAMPLE_BYTES:
        raise ConfigError(f"{what} has over {MAX_SAMPLE_BYTES:,} bytes")
    return {name: np.repeat(array[None], rows, axis=0) for name, array in one.items()} if rows else one


def _array(sample: str, name: str, given: Any, folder: Path | None) -> HostArray:
    dtype, shape = dtype_of(given.data_type), tuple(given.dims)
    if dtype is None or any(d < 0 for d in shape):
        raise ConfigError(f"{sample}: input '{name}' needs a data_type and dims that are fixed")
    if math.prod(shape) * max(dtype.itemsize, 1) > MAX_SAMPLE_BYTES:
        raise ConfigError(f"{sample}: input '{name}' has over {MAX_SAMPLE_BYTES:,} bytes")
    kind = given.WhichOneof("input_data_type")
    if kind == "input_data_file":
        return _from_file(sample, name, given, dtype, shape, folder)
    if kind is None:
        raise ConfigError(f"{sample}: input '{name}' needs zero_data, random_data or input_data_file")
    return _random(shape, dtype) if kind == "random_data" else _zeros(shape, dtype)


def _from_file(
    sample: str, name: str, given: Any, dtype: np.dtype[Any], shape: tuple[int, ...], folder: Path | None
) -> HostArray:
    """The bytes of `warmup/FILE` in the model's folder, as a request would send them."""
    if folder is None:
        raise ConfigError(f"{sample}: input_data_file needs a model's folder")
    path = inside(folder, given.input_data_file, f"{sample}: input_data_file", below="warmup")
    if path.stat().st_size > MAX_SAMPLE_BYTES:
        raise ConfigError(f"{sample}: {path} has over {MAX_SAMPLE_BYTES:,} bytes")
    need = codec.nbytes_of(dtype, shape)
    if need is not None and path.stat().st_size != need:
        raise ConfigError(f"{sample}: {path} has {path.stat().st_size:,} bytes, input '{name}' needs {need:,}")
    try:
        return codec.from_bytes(path.read_bytes(), dtype, shape, name)
    except RequestError as error:
        raise ConfigError(f"{sample}: {path}: {error}") from None


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
    return np.full(shape, "", object) if dtype.hasobject else np.zeros(shape, dtype)


def _random(shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
    """The same values every time: small integers, which index any table; floats below 1."""
    rng = np.random.default_rng(0)
    if dtype.hasobject:
        return np.array([str(n) for n in rng.integers(0, 10, math.prod(shape))], object).reshape(shape)
    return rng.random(shape).astype(dtype) if dtype.kind not in "iu" else rng.integers(0, 2, shape).astype(dtype)

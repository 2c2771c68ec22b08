"""A module to stand in for torch with a GPU: what the peers of `bench.gpu_sets` use of it, on NumPy."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from infera_kernels.portable.conv import convolution


class Tensor(np.ndarray[Any, np.dtype[Any]]):
    def is_floating_point(self) -> bool:
        return self.dtype.kind == "f"

    def to(self, dtype: Any) -> Any:
        return self.astype(dtype)

    def float(self) -> Any:
        return self.astype(np.float32)

    def cpu(self) -> Any:
        return self

    def numpy(self) -> np.ndarray[Any, np.dtype[Any]]:
        return np.asarray(self)

    def permute(self, *axes: int) -> Any:
        return self.transpose(axes)

    def contiguous(self, memory_format: Any = None) -> Any:
        return self

    def copy_(self, source: Any) -> Any:
        self[...] = source
        return self


def tensor(value: Any, device: str) -> Any:
    assert device == "cuda"
    return np.array(value).view(Tensor)


def _wide(function: Callable[..., Any]) -> Callable[..., Any]:
    """In float32, the result in the first argument's type."""

    def call(x: Any, *more: Any, **options: Any) -> Any:
        given = [a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in (x, *more)]
        return function(*given, **options).astype(x.dtype).view(Tensor)

    return call


def _softmax(x: Any, axis: int) -> Any:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _attention(q: Any, k: Any, v: Any, *, is_causal: bool) -> Any:
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    if is_causal:
        scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, -np.inf)
    return _softmax(scores, -1) @ v


def _conv(x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    size = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, w.shape[2:], stride, strict=True)
    )
    pads = tuple((p, p) for p in padding)
    made = convolution(np, x, w, b, size, group=groups, strides=tuple(stride), pads=pads, dilations=tuple(dilation))
    return np.asarray(made)


def _layer_norm(x: Any, shape: Sequence[int], weight: Any, bias: Any) -> Any:
    assert tuple(shape) == x.shape[-1:]
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def _rms_norm(x: Any, shape: Sequence[int], weight: Any, epsilon: float) -> Any:
    assert tuple(shape) == x.shape[-1:]
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


class CudaGraph:
    """Replays what was called while it was recorded: nothing, since calls leave no trace here."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


@contextmanager
def _recording(graph: CudaGraph, stream: Any) -> Iterator[None]:
    yield


def module() -> types.ModuleType:
    """The stand-in."""
    made = types.ModuleType("torch")
    functional = types.SimpleNamespace(
        conv2d=_wide(_conv),
        silu=_wide(lambda x: x / (1 + np.exp(-x))),
        layer_norm=_wide(_layer_norm),
        rms_norm=_wide(_rms_norm),
        scaled_dot_product_attention=_wide(_attention),
        pad=lambda x, widths: np.pad(x, [(0, 0), (0, 0), widths[2:], widths[:2]]).view(Tensor),
    )
    attention = types.SimpleNamespace(
        sdpa_kernel=lambda backend: nullcontext(),
        SDPBackend=types.SimpleNamespace(FLASH_ATTENTION="flash", CUDNN_ATTENTION="cuDNN"),
    )
    made.__dict__.update(
        tensor=tensor,
        empty=lambda shape, dtype, device: np.empty(shape, dtype).view(Tensor),
        float16=np.dtype(np.float16),
        bfloat16=None,
        float32=np.dtype(np.float32),
        channels_last="channels last",
        matmul=_wide(np.matmul),
        softmax=_wide(_softmax),
        amax=lambda x, axis, out: np.amax(x, axis, out=out),
        _dynamo=types.SimpleNamespace(reset=lambda: None),
        _addmm_activation=_wide(lambda bias, a, b: np.maximum(a @ b + bias, 0)),
        cudnn_convolution_relu=_wide(lambda x, w, b, **where: np.maximum(_conv(x, w, b, **where), 0)),
        cudnn_convolution_add_relu=_wide(
            lambda x, w, z, alpha, b, **where: np.maximum(_conv(x, w, b, **where) + alpha * z, 0)
        ),
        nn=types.SimpleNamespace(functional=functional, attention=attention),
        compile=lambda function, **options: function,
        inference_mode=nullcontext,
        backends=types.SimpleNamespace(
            cuda=types.SimpleNamespace(matmul=types.SimpleNamespace()), cudnn=types.SimpleNamespace()
        ),
        cuda=types.SimpleNamespace(
            is_available=lambda: True,
            Stream=lambda: "a side stream",
            ExternalStream=lambda address: "the device's stream",
            stream=nullcontext,
            synchronize=lambda: None,
            CUDAGraph=CudaGraph,
            graph=_recording,
        ),
    )
    return made

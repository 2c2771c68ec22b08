"""Fourier transforms of real and complex signals, windows and mel filters. The last axis holds real and imaginary."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from infera_kernels.calls import Array


def _complex(x: Array) -> Array:
    """As complex numbers, in the precision of the input: (..., 1 or 2) -> (...)"""
    wide = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
    return wide[..., 0] if x.shape[-1] == 1 else wide[..., 0] + 1j * wide[..., 1]


def dft(xp: Any, x: Array, axis: int, length: int, *, inverse: bool, onesided: bool) -> Array:
    """The discrete Fourier transform along `axis`, cut or padded with zeros to `length`; the inverse is divided by it.

    `onesided`: the half of a real signal's spectrum, or, inverse, the real signal that has it.
    """
    signal = _complex(x)
    if inverse and onesided:
        return xp.fft.irfft(signal, n=length, axis=axis)[..., None].astype(x.dtype)
    if onesided:
        made = xp.fft.rfft(signal, n=length, axis=axis)
    else:
        made = (xp.fft.ifft if inverse else xp.fft.fft)(signal, n=length, axis=axis)
    return xp.stack((made.real, made.imag), axis=-1).astype(x.dtype)


def stft(xp: Any, x: Array, window: Array | None, length: int, step: int, frames: int, *, onesided: bool) -> Array:
    """Spectra of windows of the signal: (batch, samples, 1 or 2) -> (batch, frames, bins, 2)"""
    at = xp.arange(frames)[:, None] * step + xp.arange(length)
    cut = (x if x.ndim == 3 else x[..., None])[:, at]
    if window is not None:
        cut = cut * window[:, None]
    if onesided and cut.shape[-1] == 2:
        return dft(xp, cut, 2, length, inverse=False, onesided=False)[:, :, : length // 2 + 1].astype(x.dtype)
    return dft(xp, cut, 2, length, inverse=False, onesided=onesided).astype(x.dtype)


COSINES = {"Hann": (0.5, 0.5), "Hamming": (25 / 46, 21 / 46), "Blackman": (0.42, 0.5, 0.08)}
"""Windows as sums of cosines: a0 - a1 cos(x) + a2 cos(2x)."""


def window(xp: Any, name: str, size: int, *, periodic: bool) -> Array:
    """The window in float64. `periodic` ones would begin anew after `size` samples, others end as they begin."""
    angle = xp.arange(size, dtype=np.float64) * (2 * math.pi / max(size if periodic else size - 1, 1))
    terms = [(-1) ** i * a * xp.cos(i * angle) for i, a in enumerate(COSINES[name])]
    return sum(terms[1:], terms[0])


def mel_points(bins: int, length: int, rate: int, low: float, high: float) -> Any:
    """The spectrogram bins at which the triangles of the mel filters begin, peak and end: `bins` + 2 of them."""
    mel = [2595 * math.log10(1 + f / 700) for f in (low, high)]
    at = mel[0] + np.arange(bins + 2) * ((mel[1] - mel[0]) / (bins + 2))
    hertz = 700 * (10 ** (at / 2595) - 1)
    return np.floor((length + 1) * hertz / rate).astype(np.int64)


def mel_filters(points: Any, rows: int) -> Any:
    """Triangles over the spectrogram bins: (rows, filters), float64."""
    left, centre, right = points[:-2], points[1:-1], points[2:]
    j = np.arange(rows)[:, None]
    rise, fall = np.maximum(centre - left, 1), np.maximum(right - centre, 1)
    up = np.where((j >= left) & (j <= centre) & (centre > left), (j - left) / rise, 0.0)
    up = np.where((centre == left) & (j == centre), 1.0, up)
    return np.where((j >= centre) & (j < right) & (right > centre), (right - j) / fall, up)

"""When does somebody speak? Around the silero-vad model, which hears 32 ms at a time and remembers the rest.

Thresholds and durations are the defaults of `silero_vad.get_speech_timestamps`.
"""

from __future__ import annotations

import wave
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from examples.v2client import Array, Infer

RATE = 16_000
WINDOW, CONTEXT = 512, 64
"""Samples the model hears at a time, and samples of the window before that it is given again."""

ENTER, LEAVE = 0.5, 0.35
MIN_SPEECH_S, MIN_SILENCE_S, PAD_S = 0.25, 0.1, 0.03


def read_wav(path: Path) -> Array:
    """float32[samples] in -1..1. Raises ValueError for anything but 8 or 16 bits, one channel, RATE."""
    with wave.open(str(path), "rb") as file:
        form = (file.getnchannels(), file.getframerate(), file.getsampwidth())
        frames = file.readframes(file.getnframes())
    if form == (1, RATE, 1):
        return (np.frombuffer(frames, np.uint8).astype(np.float32) - 128) / 128
    if form == (1, RATE, 2):
        return np.frombuffer(frames, "<i2").astype(np.float32) / 32768
    raise ValueError(f"{path.name}: expected one channel, {RATE} Hz, 8 or 16 bits; it has {form}")


def probabilities(samples: Array, infer: Infer) -> list[float]:
    """The probability of speech in each window of 32 ms: one call a window, the state handed from one to the next."""
    state = np.zeros((2, 1, 128), np.float32)
    rate = np.array(RATE, np.int64)
    heard = np.zeros(CONTEXT + -(-len(samples) // WINDOW) * WINDOW, np.float32)
    heard[CONTEXT : CONTEXT + len(samples)] = samples
    found = []
    for at in range(0, len(heard) - CONTEXT, WINDOW):
        answer = infer({"input": heard[None, at : at + CONTEXT + WINDOW], "state": state, "sr": rate})
        state = answer["stateN"]
        found.append(float(answer["output"][0, 0]))
    return found


def segments(likely: Iterable[float], duration: float) -> list[tuple[float, float]]:
    """(start, end) in seconds of each stretch of speech in a recording of `duration` seconds.

    Speech starts at ENTER and ends where the probability stays below LEAVE for MIN_SILENCE_S; stretches shorter than
    MIN_SPEECH_S are dropped, the others widened by PAD_S on both sides.
    """
    step = WINDOW / RATE
    stretches: list[tuple[float, float]] = []
    start: float | None = None
    silent_since: float | None = None
    for index, p in enumerate(likely):
        now = index * step
        if p >= ENTER:
            silent_since = None
            start = now if start is None else start
        elif p < LEAVE and start is not None:
            silent_since = now if silent_since is None else silent_since
            if now - silent_since >= MIN_SILENCE_S:
                stretches.append((start, silent_since))
                start = silent_since = None
    if start is not None:
        stretches.append((start, duration))
    return [(max(0.0, a - PAD_S), min(duration, b + PAD_S)) for a, b in stretches if b - a > MIN_SPEECH_S]

"""A process that asks the real cuDNN for plans on an H200, which need not be there: what it takes of what it is asked.

cuDNN makes plans for a GPU that is elsewhere from what it has written down of it (its "deviceless" compilation, from
9.8 on). It wants a driver's library to be there all the same, which may do nothing. Prints a line a convolution.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator

import numpy as np

from infera_kernels.launch import cudnn
from infera_kernels.launch.cudnn import Graph, Place
from infera_kernels.launch.cudnn_graphs import ACTIVATIONS
from infera_kernels.launch.nvidia import LibraryError
from infera_kernels.triton.attention import Options
from infera_kernels.triton.conv import Finish, geometry
from infera_kernels.triton.dnn import convolution_of
from infera_kernels.triton.dnn_attention import attention_of

H200 = {
    "version": 1,
    "deviceName": "NVIDIA H200",
    "deviceVer": 900,
    "driverVer": 13000,
    "cudaDeviceId": 0,
    "pciDeviceId": 0,
    "isTccDriver": 0,
    "supportCoopLaunch": 1,
    "multiProcessorCount": 132,
    "smCountOrigin": 0,
    "warpSize": 32,
    "maxGridSize": [2**31 - 1, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64],
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "maxCtasPerSM": 32,
    "regsPerBlock": 65536,
    "maxRegistersPerSM": 65536,
    "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448,
    "reservedSharedMemoryPerBlock": 1024,
    "oversizedSharedMemoryPerBlock": 0,
    "totalGlobalMem": 150_754_820_096,
    "memoryBusWidth": 6144,
    "memClockRateKHz": 3_201_000,
    "smClockRateKHz": 1_980_000,
    "l2CacheSize": 62_914_560,
}

CASES: dict[str, tuple[int, tuple[int, ...], int, int, int, int, str]] = {
    # images, size, channels in and out, window, stride, what follows
    "3x3": (32, (56, 56), 64, 64, 3, 1, "bias relu"),
    "3x3, a residual": (1, (56, 56), 64, 64, 3, 1, "residual bias relu"),
    "1x1": (32, (56, 56), 256, 64, 1, 1, "bias relu"),
    "1x1, a residual": (32, (14, 14), 256, 1024, 1, 1, "residual bias relu"),
    "1x1, stride 2": (32, (28, 28), 512, 1024, 1, 2, "bias"),
    "7x7": (32, (224, 224), 4, 64, 7, 2, "bias relu"),
    "a line": (4, (100,), 64, 64, 3, 1, "bias relu"),
    "a volume": (2, (8, 9, 10), 64, 64, 3, 1, "bias relu"),
    "odd channels": (2, (9, 10), 23, 41, 3, 1, "residual bias relu"),
    "no terms": (2, (9, 10), 24, 40, 3, 1, ""),
    "no bias": (2, (20, 20), 24, 40, 3, 1, "residual"),
    "SiLU": (2, (20, 20), 24, 40, 3, 1, "residual bias silu"),
    "GELU": (2, (20, 20), 24, 40, 1, 1, "bias gelu"),
}

ATTENTIONS: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    # batch, heads of queries and of keys, queries, keys, size, whether it is causal
    "attention": (8, 12, 12, 512, 512, 64, False),
    "attention, causal": (8, 12, 12, 512, 512, 64, True),
    "attention, causal, after a past": (2, 12, 12, 128, 512, 64, True),
    "attention, repeated keys": (1, 32, 8, 512, 512, 64, False),
    "attention, long": (1, 16, 16, 16384, 16384, 128, True),
    "attention, odd lengths": (2, 4, 4, 37, 53, 64, False),
    "attention, odd lengths, causal": (2, 4, 4, 37, 53, 80, True),
    "attention, a step": (16, 32, 8, 1, 1024, 64, False),
    "attention, a step, causal": (16, 32, 8, 1, 1024, 128, True),
}


def aligned(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    nbytes = 2 * int(np.prod(shape))
    raw = np.empty(nbytes + 256, np.uint8)
    return raw[-raw.ctypes.data % 256 :][:nbytes].view(np.float16).reshape(shape)


def convolutions() -> Iterator[tuple[str, Graph | None]]:
    for name, (count, size, channels, filters, window, stride, terms) in CASES.items():
        axes, pad = len(size), window // 2
        made = [(n + 2 * pad - window) // stride + 1 for n in size]
        finish = Finish(
            aligned(filters) if "bias" in terms else None,
            aligned(count, *made, filters) if "residual" in terms else None,
            next((word for word in terms.split() if word in ACTIVATIONS), None),
        )
        where = geometry((window,) * axes, (stride,) * axes, (1,) * axes, ((pad, pad),) * axes)
        given = aligned(count, *size, channels), aligned(filters, *(window,) * axes, channels)
        yield name, convolution_of(*given, aligned(count, *made, filters), where, finish)


def attentions() -> Iterator[tuple[str, Graph | None]]:
    for name, (batch, heads, groups, queries, keys, size, causal) in ATTENTIONS.items():
        q, out = (aligned(batch, queries, heads, size).swapaxes(1, 2) for _ in range(2))
        k, v = (aligned(batch, groups, keys, size) for _ in range(2))
        yield name, attention_of(q, k, v, out, Options(0.125, right=0 if causal else None, before=keys - queries))


def main() -> int:
    found = cudnn.library()
    if found is None:
        print("not installed", file=sys.stderr)
        return 1
    known = cudnn.Object(
        found, 38, (2702, cudnn.Kind(24, ctypes.c_char), [bytes([c]) for c in json.dumps(H200).encode()])
    )
    place = Place((), ((204, cudnn.OBJECT, known),), ((407, cudnn.OBJECT, known),))
    for name, asked in (*convolutions(), *attentions()):
        assert asked is not None
        try:
            plans = [cudnn.plan_of(found, place, asked, way) for way in (1, 2)]
            again = [plan and cudnn.restored(found, place, plan.text(cudnn.WRITTEN)) for plan in plans]
            rooms = [[plan and plan.values(402, cudnn.INTEGER, 1) for plan in made] for made in (plans, again)]
            row: dict[str, object] = {
                "plans": sum(plan is not None for plan in plans),
                "restored": rooms[0] == rooms[1],
            }
        except LibraryError as error:
            row = {"error": str(error)}
        print(json.dumps({"name": name, **row}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

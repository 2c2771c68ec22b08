"""A process that asks the real cuDNN for plans on an H200, which need not be there: what it takes of what it is asked.

cuDNN makes plans for a GPU that is elsewhere from what it has written down of it (its "deviceless" compilation, from
9.8 on). It wants a driver's library to be there all the same, which may do nothing. Prints a line a convolution.
"""

from __future__ import annotations

import ctypes
import json
import sys

import numpy as np

from infera_kernels.launch import cudnn
from infera_kernels.launch.cudnn import Place
from infera_kernels.launch.nvidia import LibraryError
from infera_kernels.triton.conv import Finish, geometry
from infera_kernels.triton.dnn import convolution_of

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
}


def aligned(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    nbytes = 2 * int(np.prod(shape))
    raw = np.empty(nbytes + 256, np.uint8)
    return raw[-raw.ctypes.data % 256 :][:nbytes].view(np.float16).reshape(shape)


def main() -> int:
    found = cudnn.library()
    if found is None:
        print("not installed", file=sys.stderr)
        return 1
    known = cudnn._Object(
        found, 38, (2702, cudnn._Kind(24, ctypes.c_char), [bytes([c]) for c in json.dumps(H200).encode()])
    )
    place = Place((), ((204, cudnn._OBJECT, known),), ((407, cudnn._OBJECT, known),))
    for name, (count, size, channels, filters, window, stride, terms) in CASES.items():
        axes, pad = len(size), window // 2
        made = [(n + 2 * pad - window) // stride + 1 for n in size]
        finish = Finish(
            aligned(filters) if "bias" in terms else None,
            aligned(count, *made, filters) if "residual" in terms else None,
            "relu" if "relu" in terms else None,
        )
        where = geometry((window,) * axes, (stride,) * axes, (1,) * axes, ((pad, pad),) * axes)
        given = aligned(count, *size, channels), aligned(filters, *(window,) * axes, channels)
        asked = convolution_of(*given, aligned(count, *made, filters), where, finish)
        assert asked is not None
        try:
            plans: list[bool] | str = [cudnn.plan_of(found, place, asked, way) is not None for way in (1, 2, 3)]
        except LibraryError as error:
            plans = str(error)
        print(json.dumps({"name": name, "plans": plans}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

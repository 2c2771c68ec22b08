"""`python -m bench.gpu_check`: what can only be checked on a GPU, in one run of a few minutes.

Every Triton kernel and every portable operator on the device against NumPy, whole models against the CPU, memory, and
a short selection of the timings of `bench.gpu_speed`, by predicted tiles whatever has been measured on the machine.
Prints a table and writes bench/results/<gpu>-<time>.json, anew after each section: a kernel that takes its process
down, or never ends, is named, and the rest goes on in another. Exit code 0: nothing failed; 1: something did, or there
was time for nothing; 3: there is no GPU, nothing was run. Needs NumPy, CuPy, Triton and onnx; timings are compared
with torch's where it is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial

from bench import (
    gpu_ahead,
    gpu_batches,
    gpu_cudnn,
    gpu_models,
    gpu_networks,
    gpu_operators,
    gpu_speed,
    gpu_timings,
    gpu_tma,
)
from bench.gpu_command import command
from bench.gpu_report import Section

MINUTES = 7.5
_MODULES = (
    gpu_ahead,
    gpu_operators,
    gpu_models,
    gpu_networks,
    gpu_timings,
    gpu_batches,
    gpu_tma,
    gpu_cudnn,
)
_ALL: Mapping[str, Section] = {
    **{name: section for module in _MODULES for name, section in module.SECTIONS.items()},
    **gpu_speed.SHORT_SECTIONS,
}
SECONDS: Mapping[str, float] = {
    "facts": 20,
    "compiling": 100,
    "kernels": 90,
    "library": 20,
    "cudnn": 30,
    "models": 60,
    "replays": 20,
    "networks": 80,
    "products": 30,
    "attention": 30,
    "convolutions": 30,
    "bandwidth": 30,
    "faults": 40,
    "memory": 30,
    "tma": 60,
    "precisions": 45,
    "launches": 10,
    "latency": 25,
    "batches": 60,
    "portable": 60,
    "torch.compile": 120,
}
"""The most important first, and what each may take. What there is no time for is at the end, and torch.compile is for a
call of its own."""

SECTIONS: Mapping[str, Section] = {name: _ALL[name] for name in SECONDS}

main = partial(
    command,
    prog="bench.gpu_check",
    description="check and time infera on a GPU",
    sections=SECTIONS,
    minutes=MINUTES,
    seconds=SECONDS,
    measured=False,
)

if __name__ == "__main__":
    sys.exit(main())

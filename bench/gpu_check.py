"""`python -m bench.gpu_check`: what can only be checked on a GPU, in one run of a few minutes.

Every Triton kernel and every portable operator on the device against NumPy, whole models against infera's CPU and
onnxruntime's, memory, faults, and then a short selection of the timings of `bench.gpu_speed`, by predicted tiles
whatever has been measured on the machine.
Prints a table and writes bench/results/<gpu>-<time>.json, anew after each section: a kernel that takes its process
down, or never ends, is named, and the rest goes on in another. Exit code 0: nothing failed; 1: something did, or there
was time for nothing; 3: there is no GPU, nothing was run. Needs NumPy, CuPy, Triton and onnx; onnxruntime is compared
with where it is installed, and so are torch's timings.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial

from bench import (
    gpu_ahead,
    gpu_batches,
    gpu_cudnn,
    gpu_early,
    gpu_models,
    gpu_networks,
    gpu_operators,
    gpu_speed,
    gpu_timings,
    gpu_tma,
)
from bench.gpu_command import command
from bench.gpu_report import Section

MINUTES = 6.7
"""With what a section may take beyond them, and with what it takes to end its process, less than 8."""

_MODULES = (
    gpu_ahead,
    gpu_operators,
    gpu_models,
    gpu_networks,
    gpu_timings,
    gpu_batches,
    gpu_early,
    gpu_tma,
    gpu_cudnn,
)
_ALL: Mapping[str, Section] = {
    **{name: section for module in _MODULES for name, section in module.SECTIONS.items()},
    **gpu_speed.SHORT_SECTIONS,
}
CHECKS: Mapping[str, float] = {
    "facts": 10,
    "compiling": 75,
    "kernels": 60,
    "models": 35,
    "replays": 15,
    "memory": 15,
    "faults": 30,
    "early": 10,
    "precisions": 30,
    "library": 10,
    "cudnn": 15,
    "tma": 15,
    "trained": 10,
    "batches": 20,
    "portable": 20,
}
"""What says whether results are right, the most important first, and the seconds that each may take: together less than
there are."""

TIMINGS: Mapping[str, float] = {
    "products": 30,
    "attention": 30,
    "convolutions": 30,
    "bandwidth": 30,
    "networks": 80,
    "launches": 10,
    "latency": 25,
    "torch.compile": 120,
}
"""Behind them, in what time they leave. What there is none for is at the end, and torch.compile is for a call of its
own."""

SECONDS = {**CHECKS, **TIMINGS}
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

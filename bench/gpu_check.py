"""`python -m bench.gpu_check`: what can only be checked on a GPU, in one run of a few minutes.

Every Triton kernel and every portable operator on the device against NumPy, whole models against the CPU, memory, and
a short selection of the timings of `bench.gpu_speed`. Prints a table and writes bench/results/<gpu>-<time>.json. Exit
code 0: nothing failed; 1: something did, or there was time for nothing; 3: there is no GPU, nothing was checked. Needs
NumPy, CuPy, Triton and onnx; timings are compared with torch's where it is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial

from bench import gpu_batches, gpu_models, gpu_networks, gpu_operators, gpu_speed, gpu_timings, gpu_tuning
from bench.gpu_command import command
from bench.gpu_report import Section

MINUTES = 8.0
_MODULES = (gpu_operators, gpu_models, gpu_networks, gpu_timings, gpu_batches, gpu_tuning)
_ALL: Mapping[str, Section] = {
    **{name: section for module in _MODULES for name, section in module.SECTIONS.items()},
    **gpu_speed.SHORT_SECTIONS,
}
_ORDER = (
    *("facts", "kernels", "models", "memory", "replays", "precisions", "faults", "networks", "batches", "launches"),
    *("products", "bandwidth", "convolutions", "attention", "latency", "tuning", "portable"),
)
SECTIONS: Mapping[str, Section] = {name: _ALL[name] for name in _ORDER}
"""The most important first: what there is no time for is at the end."""

main = partial(
    command, prog="bench.gpu_check", description="check and time infera on a GPU", sections=SECTIONS, minutes=MINUTES
)

if __name__ == "__main__":
    sys.exit(main())

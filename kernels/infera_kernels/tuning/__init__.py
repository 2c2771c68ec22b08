"""Tiles chosen by what was measured on the device, or else by an estimate. Importing this loads no triton."""

from infera_kernels.tuning.choice import Family, Measured, Problem, Trial, Tuned, choose, numbers, source_of, tries
from infera_kernels.tuning.store import DeviceTiles, Run, Store, class_of

__all__ = [
    "DeviceTiles",
    "Family",
    "Measured",
    "Problem",
    "Run",
    "Store",
    "Trial",
    "Tuned",
    "choose",
    "class_of",
    "numbers",
    "source_of",
    "tries",
]

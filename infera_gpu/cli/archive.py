"""Outputs as .npz files that NumPy, and `infera run -i`, read back without pickle."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from infera_gpu.errors import InferaError
from infera_gpu.graph import HostArray


def write_npz(path: Path, arrays: Mapping[str, HostArray]) -> None:
    """Writes the arrays under their names. The file appears whole or not at all; what was there is then replaced.

    `numpy.savez` takes names as keywords, some of which it keeps for itself ("file", "allow_pickle").
    Raises InferaError where the file cannot be written.
    """
    target = path.resolve()  # a symbolic link stays one
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if target.exists() and not target.is_file():  # a device or a pipe: nothing to replace
            with target.open("wb") as file:
                _write(file, arrays)
            return
        try:
            with part.open("xb") as file:
                _write(file, arrays)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InferaError(f"{path} cannot be written: {error.strerror or error}") from error


def _write(file: IO[bytes], arrays: Mapping[str, HostArray]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, _storable(array), allow_pickle=False)


def _storable(array: HostArray) -> HostArray:
    """The array in a dtype that the format knows: strings in fixed width; bfloat16 and its like in float32, which
    holds them exactly."""
    if array.dtype.kind == "O":
        return array.astype(np.str_)
    return array.astype(np.float32) if array.dtype.kind == "V" else array

"""What shipped tiles compile to: as tiles.json says with its version of Triton, and never worse with another one.

`python -m tests.kernels.tile_table` shows what differs, with `--write` it becomes the table.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from infera_kernels.launch import nominal_target
from tests.kernels import tile_table
from tests.kernels.known_differences import Difference
from tests.kernels.support import ARCHITECTURES
from tests.kernels.tile_cases import CASES
from tests.kernels.tile_table import compiled, differences, names_for, read, text_of

pytestmark = pytest.mark.kernels

TABLE = read()
SOME = (
    "matmul half 16x32x128 w4 s4",
    "matmul half 128x128x32 w8 s4",
    "matmul tf32 64x64x32 w4 s4",
    "matmul ieee 64x64x16 w4 s3",
    "matmul int8 64x64x128 w4 s4",
    "conv half 128x64x64 w4 s4",
    "matvec half n 16x256 s3",
    "matvec half k 8x512 s3",
    "matvec ieee n 64x64 s5",
    "parts half 16",
    "join half",
    "attention half d64 128x64 w8 s3",
    "attention ieee d64 32x32 w4 s3",
)
"""Compiled in `make test-kernels`; all others are large."""


def chosen() -> list[Any]:
    return [
        pytest.param(name, arch, id=f"sm_{arch} {name}", marks=[] if name in SOME else [pytest.mark.large])
        for arch in ARCHITECTURES
        for name in names_for(arch)
    ]


@pytest.mark.parametrize(("name", "arch"), chosen())
def test_a_tile_compiles_to_what_the_table_says(name: str, arch: int, known: Difference) -> None:
    row = TABLE["rows"][f"sm_{arch}"][name]
    found = asdict(compiled(name, arch))
    if triton.__version__ == TABLE["triton"]:
        assert differences({name: row}, {name: found}) == []
        return
    if CASES[name].keeps(replace(nominal_target(arch), triton=triton.__version__)):
        assert found["spilled_bytes"] <= row["spilled_bytes"]
    assert found["tensor_cores"].keys() == row["tensor_cores"].keys()
    if known.occupancy is None:
        assert found["occupancy"] >= row["occupancy"]
    else:
        assert found["occupancy"] == known.occupancy < row["occupancy"]
    for column in ("asynchronous", "wide_loads"):
        assert bool(found[column]) >= bool(row[column])


def test_the_selection_is_of_shipped_tiles() -> None:
    assert set(SOME) <= CASES.keys()


def test_every_shipped_tile_is_in_the_table() -> None:
    """A new tile comes with `python -m tests.kernels.tile_table --write`."""
    for arch in ARCHITECTURES:
        assert TABLE["rows"][f"sm_{arch}"].keys() == set(names_for(arch))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_keeps_what_tiles_are_made_for(arch: int) -> None:
    for name, row in TABLE["rows"][f"sm_{arch}"].items():
        _, kind, *_ = name.split()
        if CASES[name].keeps(nominal_target(arch)):
            assert row["spilled_bytes"] == 0, name
        case = CASES[name]
        assert bool(row["tensor_cores"]) == (kind != "ieee" and case.multiplies), name
        assert row["blocks"] >= 1, name
        assert (row["asynchronous"] > 0) == case.ahead or " 1x" in name, name
        assert row["wide_loads"] > 0, name


# ---- the tool


def test_the_file_is_as_the_tool_writes_it() -> None:
    assert tile_table.PATH.read_text() == text_of(TABLE["triton"], TABLE["rows"])


def test_differences_name_the_column() -> None:
    old = {"a": {"registers": 90, "blocks": 2}, "b": {"registers": 1}}
    new = {"a": {"registers": 91, "blocks": 2}, "c": {"registers": 1}}
    assert differences(old, new) == [("b", "", "there", "gone"), ("a", "registers", "90", "91"), ("c", "", "", "new")]
    lines = tile_table.shown("sm_90", differences(old, new)).splitlines()
    assert lines[0] == "sm_90"
    assert lines[3].split() == ["a", "registers", "90", "91"]

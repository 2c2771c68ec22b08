"""`python -m tests.kernels.tile_table`: what every shipped tile compiles to on every architecture, against the table.

Registers, shared memory, spills, instructions, and the blocks that fit on a multiprocessor beside each other. Prints
what differs from tiles.json beside this file; `--write` makes it the table. tests/kernels/test_tile_table.py compares.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infera_kernels.launch import CompileLauncher, nominal_target
from infera_kernels.launch.devices import architecture_of
from infera_kernels.tuning.cost import resident
from tests.kernels.support import ARCHITECTURES, tensor_cores, wide_loads
from tests.kernels.tile_cases import CASES

PATH = Path(__file__).with_name("tiles.json")

Rows = Mapping[str, Mapping[str, Any]]
"""Of one architecture: the case's name -> its columns."""


@dataclass(frozen=True)
class Compiled:
    """What a case becomes. `blocks` fit on a multiprocessor beside each other, `occupancy` is their share of its warps.

    `wide_loads` are instructions that load 16 bytes, `asynchronous` those that load past registers, of any width.
    """

    warps: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    tensor_cores: Mapping[str, int]
    wide_loads: int
    asynchronous: int
    blocks: int
    occupancy: float


# ---- compiling


def names_for(arch: int) -> list[str]:
    """The cases whose tiles may be chosen on an architecture."""
    target = nominal_target(arch)
    return [name for name, case in CASES.items() if case.fits(target)]


def compiled(name: str, arch: int) -> Compiled:
    """What the case's kernel becomes."""
    launcher = CompileLauncher(arch)
    CASES[name].launch(launcher)
    found = launcher.compiled[CASES[name].kernel]
    spec, registers = found.binary.spec, found.registers
    warps = spec.threads // 32
    blocks = resident(warps, registers, spec.shared_bytes, launcher.target)
    return Compiled(
        warps=warps,
        registers=registers,
        shared_bytes=spec.shared_bytes,
        spilled_bytes=found.spilled_bytes,
        tensor_cores=tensor_cores(found),
        wide_loads=wide_loads(found),
        asynchronous=found.count("LDGSTS"),
        blocks=blocks,
        occupancy=round(blocks * warps / architecture_of(arch).warps, 3),
    )


def _columns(case: tuple[str, int]) -> dict[str, Any]:
    return asdict(compiled(*case))


def compile_all(wanted: Sequence[tuple[str, int]], jobs: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Architecture -> name -> columns."""
    made: dict[str, dict[str, dict[str, Any]]] = {}
    with ProcessPoolExecutor(jobs) as pool:
        for n, ((name, arch), columns) in enumerate(zip(wanted, pool.map(_columns, wanted), strict=True)):
            made.setdefault(f"sm_{arch}", {})[name] = columns
            print(f"\r{n + 1} of {len(wanted)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return made


# ---- the table


def read() -> dict[str, Any]:
    """Triton's version, and the rows of each architecture."""
    found: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {"triton": "", "rows": {}}
    return found


def text_of(triton: str, rows: Mapping[str, Rows]) -> str:
    """The file's contents: a row a line."""
    parts = []
    for arch in sorted(rows, key=lambda a: int(a[3:])):
        lines = [f"   {json.dumps(name)}: {json.dumps(rows[arch][name])}" for name in CASES if name in rows[arch]]
        parts.append(f"  {json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n  }")
    return f'{{\n "triton": {json.dumps(triton)},\n "rows": {{\n' + ",\n".join(parts) + "\n }\n}\n"


def differences(before: Rows, after: Rows) -> list[tuple[str, str, str, str]]:
    """Name, column, old and new value of what differs; rows that are new or gone have no column."""
    found = [(name, "", "there", "gone") for name in before if name not in after]
    for name, columns in after.items():
        if name not in before:
            found.append((name, "", "", "new"))
            continue
        old = before[name]
        found += [(name, c, str(old.get(c)), str(value)) for c, value in columns.items() if old.get(c) != value]
    return found


def shown(arch: str, rows: Sequence[tuple[str, str, str, str]]) -> str:
    """The differences, aligned."""
    lines = [("tile", "column", "table", "now"), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    body = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join([arch, *body])


def main() -> int:
    """1 where something differs from the table and was not written."""
    import triton

    parser = argparse.ArgumentParser("python -m tests.kernels.tile_table", description=__doc__)
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds it")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--write", action="store_true", help="make what was compiled the table")
    options = parser.parse_args()
    wanted = [(name, arch) for arch in options.arch for name in names_for(arch) if options.only in name]
    made = compile_all(wanted, options.jobs)
    table = read()
    changed = False
    for arch, rows in made.items():
        before = {name: row for name, row in table["rows"].get(arch, {}).items() if options.only in name}
        if found := differences(before, rows):
            changed = True
            print(shown(arch, found))
        kept = {n: r for n, r in table["rows"].get(arch, {}).items() if n not in before and n in CASES}
        table["rows"][arch] = {**kept, **rows}
    if options.write:
        PATH.write_text(text_of(triton.__version__, table["rows"]))
    print("nothing differs" if not changed else "written" if options.write else "not written: see --write")
    return int(changed and not options.write)


if __name__ == "__main__":
    sys.exit(main())

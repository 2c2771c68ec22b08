"""`python -m tests.kernels.tile_table`: what every shipped tile compiles to on every architecture, against the table.

Registers, shared memory, spills, instructions, and the blocks that fit on a multiprocessor beside each other. Prints
what differs from tiles.json beside this file; `--write` makes it the table. tests/kernels/test_tile_table.py compares.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from infera_kernels.launch import CompileLauncher, Target, nominal_target
from infera_kernels.launch.devices import architecture_of
from infera_kernels.triton import attention, attention_tiles, conv, matmul, quantized_conv, tiles
from infera_kernels.tuning.cost import resident
from tests.kernels.support import ARCHITECTURES, FakeArray, tensor_cores

PATH = Path(__file__).with_name("tiles.json")

WIDE = ("LDG.E.128", *(f"LDGSTS.E.{how}128" for how in ("", "LTC128B.", "BYPASS.", "BYPASS.LTC128B.")))
"""Loads of 16 bytes."""

Rows = Mapping[str, Mapping[str, Any]]
"""Of one architecture: the case's name -> its columns."""


@dataclass(frozen=True)
class Case:
    """A kernel with one of its tiles. `fits` says of a target whether the tile may be chosen there, and `keeps` whether
    all values are to stay in registers."""

    name: str
    launch: Callable[[CompileLauncher], object]
    fits: Callable[[Target], bool]
    keeps: Callable[[Target], bool]


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


# ---- cases


def _scratch(shape: Sequence[int], dtype: Any = "float32") -> FakeArray:
    return FakeArray(shape, dtype)


def _matmul(dtype: str, precision: str, tile: tiles.Tile) -> Callable[[CompileLauncher], object]:
    """1024 cubed, with a bias and ReLU."""

    def launch(launcher: CompileLauncher) -> object:
        a, b, out = (FakeArray((1024, 1024), dtype) for _ in range(3))
        bias = FakeArray((1024,), dtype)
        return matmul.matmul(a, b, out, launcher, bias=bias, activation="relu", precision=precision, tile=tile)

    return launch


def _conv(dtype: str, precision: str, tile: tiles.Tile) -> Callable[[CompileLauncher], object]:
    """3 x 3 over 8 x 56 x 56 x 64 to 256 channels, with a bias, a residual and ReLU."""

    def launch(launcher: CompileLauncher) -> object:
        x, y = FakeArray((8, 56, 56, 64), dtype), FakeArray((8, 56, 56, 256), dtype)
        w, finish = FakeArray((256, 3, 3, 64), dtype), conv.Finish(FakeArray((256,), dtype), y, "relu")
        where = conv.geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
        return conv.conv(x, w, y, launcher, where, finish=finish, precision=precision, tile=tile)

    return launch


def _attention(kind: str, size: int, tile: attention_tiles.Tile) -> Callable[[CompileLauncher], object]:
    """Causal, 512 keys and queries of 12 heads; one query for tiles of one row."""

    def launch(launcher: CompileLauncher) -> object:
        dtype = "float16" if kind == "half" else "float32"
        q = FakeArray((8, 12, 1 if tile.rows == 1 else 512, size), dtype)
        k, v = (FakeArray((8, 12, 512, size), dtype) for _ in range(2))
        alone = {kind: {size: (tile,)}}
        attention_tiles.predicted.cache_clear()
        with mock.patch.object(attention_tiles, "TILES", alone):
            calls = attention.attention(q, k, v, q, launcher, _scratch, attention.Options(right=0))
        attention_tiles.predicted.cache_clear()
        made = launcher.launches[0]
        assert (made.constexprs["BM"], made.constexprs["BN"]) == (tile.rows, tile.keys)
        assert (made.options["num_warps"], made.options["num_stages"]) == (tile.warps, tile.stages)
        return calls

    return launch


def _integers(tile: tiles.Tile) -> Callable[[CompileLauncher], object]:
    """1024 cubed, uint8 by int8, scaled and quantised again."""

    def launch(launcher: CompileLauncher) -> object:
        from infera_kernels.triton import integer_matmul, integer_sums, integer_weight

        packed = integer_weight.Weight(FakeArray((1024, 1024), "int8"), FakeArray((1024,), "int32"), unsigned=False)
        single, point = FakeArray((), "float32"), FakeArray((), "uint8")
        scaling = integer_sums.Scaling(single, FakeArray((1024,), "float32"), single, point)
        a, out = FakeArray((1024, 1024), "uint8"), FakeArray((1024, 1024), "uint8")
        return integer_matmul.integer_matmul(
            a, packed, out, launcher, a_zero=point, scaling=scaling, tile=tile, signed_zeros=True
        )

    return launch


def _quantized(tile: tiles.Tile, *, added: bool) -> Callable[[CompileLauncher], object]:
    """3 x 3 over 8 x 28 x 28 x 256 of int8, with a bias, a residual if it is `added`, and ReLU, quantised again."""

    def launch(launcher: CompileLauncher) -> object:
        x, out, residual = (FakeArray((8, 28, 28, 256), "int8") for _ in range(3))
        factor, bias = (FakeArray((256,), "float32") for _ in range(2))
        scale, zero = FakeArray((), "float32"), FakeArray((), "int8")
        finish = quantized_conv.Finish(factor, bias, activation="relu", scale=scale, zero=zero)
        if added:
            finish = replace(finish, residual=residual, residual_scale=scale, residual_zero=zero)
        where, weight = quantized_conv.Places((3, 3), pads=((1, 1), (1, 1))), FakeArray((256, 9, 256), "int8")
        return quantized_conv.quantized_conv(x, weight, out, launcher, where, finish, tile=tile)

    return launch


def _always(target: Target) -> bool:
    return True


def _text(tile: tiles.Tile) -> str:
    return f"{tile.m}x{tile.n}x{tile.k} w{tile.warps} s{tile.stages}"


def cases() -> Iterator[Case]:
    """Every shipped tile."""
    for kind in (tiles.HALF, tiles.TF32, tiles.TF32X3, tiles.IEEE):
        dtype, precision = ("float16", tiles.IEEE) if kind == tiles.HALF else ("float32", kind)
        for tile in tiles.TILES[kind]:
            limits = partial(tiles.fits, tile, kind), partial(tiles.keeps, tile, "")
            yield Case(f"matmul {kind} {_text(tile)}", _matmul(dtype, precision, tile), *limits)
            if kind in (tiles.HALF, tiles.IEEE):
                limits = limits[0], partial(conv.keeps, tile, tiles.LONG)
                yield Case(f"conv {kind} {_text(tile)}", _conv(dtype, precision, tile), *limits)
    for tile in tiles.TILES[tiles.INT8]:
        limits = partial(tiles.fits, tile, tiles.INT8), partial(tiles.keeps, tile, "")
        yield Case(f"matmul int8 {_text(tile)}", _integers(tile), *limits)
        for name, ending in (("quantized", ""), ("quantized+residual", tiles.LONG)):
            limits = limits[0], partial(quantized_conv.keeps, tile, ending)
            yield Case(f"{name} int8 {_text(tile)}", _quantized(tile, added=bool(ending)), *limits)
    for kind, sizes in attention_tiles.TILES.items():
        for size, some in sizes.items():
            for t in some:
                name = f"attention {kind} d{size} {t.rows}x{t.keys} w{t.warps} s{t.stages}"
                yield Case(name, _attention(kind, size, t), _always, _always)


CASES: Mapping[str, Case] = {case.name: case for case in cases()}


def names_for(arch: int) -> list[str]:
    """The cases whose tiles may be chosen on an architecture."""
    target = nominal_target(arch)
    return [name for name, case in CASES.items() if case.fits(target)]


# ---- compiling


def compiled(name: str, arch: int) -> Compiled:
    """What the case's first kernel becomes: what joins its parts is another's."""
    launcher = CompileLauncher(arch)
    CASES[name].launch(launcher)
    found = launcher.compiled[0]
    spec, registers = found.binary.spec, found.registers
    warps = spec.threads // 32
    blocks = resident(warps, registers, spec.shared_bytes, launcher.target)
    return Compiled(
        warps=warps,
        registers=registers,
        shared_bytes=spec.shared_bytes,
        spilled_bytes=found.spilled_bytes,
        tensor_cores=tensor_cores(found),
        wide_loads=sum(map(found.count, WIDE)),
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

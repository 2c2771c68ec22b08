"""Every tile that is shipped, as a launch to compile: the rows of tiles.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

from infera_kernels.launch import CompileLauncher, Target
from infera_kernels.triton import (
    attention,
    attention_tiles,
    conv,
    decode_attention,
    decode_tiles,
    gated,
    matmul,
    quantized_conv,
    skinny,
    tiles,
)
from infera_kernels.tuning.cost import ITEMSIZE, ROW_WARPS, Strip, resident
from tests.kernels.support import FakeArray


@dataclass(frozen=True)
class Case:
    """A kernel with one of its tiles. `fits` says of a target whether the tile may be chosen there, and `keeps` whether
    all values are to stay in registers."""

    name: str
    launch: Callable[[CompileLauncher], object]
    fits: Callable[[Target], bool]
    keeps: Callable[[Target], bool]
    kernel: int = 0
    """Which of its launches."""
    multiplies: bool = True
    """On tensor cores, where there are any for its type."""
    ahead: bool = True
    """Whether loads pass registers by, ahead of what needs them."""


def _scratch(shape: Sequence[int], dtype: Any = "float32") -> FakeArray:
    return FakeArray(shape, dtype)


def _matmul(dtype: str, precision: str, tile: tiles.Tile) -> Callable[[CompileLauncher], object]:
    """1024 cubed, with a bias and ReLU."""

    def launch(launcher: CompileLauncher) -> object:
        a, b, out = (FakeArray((1024, 1024), dtype) for _ in range(3))
        bias = FakeArray((1024,), dtype)
        return matmul.matmul(a, b, out, launcher, bias=bias, activation="relu", precision=precision, tile=tile)

    return launch


def _gated(dtype: str, precision: str, tile: tiles.Tile) -> Callable[[CompileLauncher], object]:
    """1024 cubed, twice, with SiLU."""

    def launch(launcher: CompileLauncher) -> object:
        a, gate, up, out = (FakeArray((1024, 1024), dtype) for _ in range(4))
        return gated.gated(a, gate, up, out, launcher, activation="silu", precision=precision, tile=tile)

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


def _decode(kind: str, size: int, tile: attention_tiles.Tile) -> Callable[[CompileLauncher], object]:
    """One token after 511, which is turned, against 8 heads; for tiles of more rows each for four of queries."""

    def launch(launcher: CompileLauncher) -> object:
        from tests.kernels.fake_steps import step_of

        dtype = "float16" if kind == "half" else "float32"
        step = step_of(dtype, size, 511, members=1 if tile.rows == 1 else 4)
        decode_tiles.predicted.cache_clear()
        with mock.patch.object(decode_tiles, "TILES", {kind: {size: (tile,)}}):
            calls = decode_attention.decode(step, launcher, _scratch)
        decode_tiles.predicted.cache_clear()
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


def _row(dtype: str, precision: str, layout: str, strip: Strip) -> Callable[[CompileLauncher], object]:
    """One row of 4096 times 4096 columns, with a bias, a residual and SiLU."""

    def launch(launcher: CompileLauncher) -> object:
        a, b, out = (FakeArray((rows, 4096), dtype, transposed=layout == "k" and rows > 1) for rows in (1, 4096, 1))
        with mock.patch.object(matmul, "choose", return_value=strip):
            calls = matmul.matmul(
                a, b, out, launcher, bias=FakeArray((4096,), dtype), residual=out, activation="silu",
                precision=precision,
            )  # fmt: skip
        made = launcher.launches[0].constexprs
        assert (made["BN"], made["BK"], made["STAGES"]) == (strip.n, strip.k, strip.stages)
        return calls

    return launch


def _gated_row(dtype: str, layout: str, strip: Strip) -> Callable[[CompileLauncher], object]:
    """One row of 2048 times 8192 columns of each matrix, with SiLU."""

    def launch(launcher: CompileLauncher) -> object:
        gate, up = (FakeArray((2048, 8192), dtype, transposed=layout == skinny.ALONG_K) for _ in range(2))
        a, out = FakeArray((1, 2048), dtype), FakeArray((1, 8192), dtype)
        with mock.patch.object(gated, "choose", return_value=strip):
            calls = gated.gated(a, gate, up, out, launcher, activation="silu")
        made = launcher.launches[0].constexprs
        assert (made["BN"], made["BK"], made["STAGES"]) == (strip.n // 2, strip.k, strip.stages)
        return calls

    return launch


def _parts(dtype: str, precision: str, count: int) -> Callable[[CompileLauncher], object]:
    """16 x 4096 times 4096 x 512, its sums in so many parts, with a bias, a residual and SiLU."""

    def launch(launcher: CompileLauncher) -> object:
        a, b, out = (FakeArray(shape, dtype) for shape in ((16, 4096), (4096, 512), (16, 512)))
        how: dict[str, Any] = {"residual": out, "activation": "silu", "precision": precision}
        partial = FakeArray((count, 16 * 512), "float32")
        return matmul.matmul(a, b, out, launcher, bias=FakeArray((512,), dtype), partial=partial, **how)

    return launch


def _join(dtype: str, precision: str) -> Callable[[CompileLauncher], object]:
    """3 x 3 over 7 x 7 x 512 to as many channels, in 16 parts, with a bias, a residual and ReLU."""

    def launch(launcher: CompileLauncher) -> object:
        x, y = (FakeArray((1, 7, 7, 512), dtype) for _ in range(2))
        w, finish = FakeArray((512, 3, 3, 512), dtype), conv.Finish(FakeArray((512,), dtype), y, "relu")
        where = conv.geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
        parts = FakeArray((16, 49, 512), "float32")
        return conv.conv(x, w, y, launcher, where, finish=finish, parts=parts, precision=precision)

    return launch


def _always(target: Target) -> bool:
    return True


def _strip_fits(strip: Strip, kind: str, target: Target) -> bool:
    bits = 8 * ITEMSIZE[kind]
    return resident(ROW_WARPS, strip.registers(bits), strip.held_bytes(bits), target) > 0


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
        for tile in gated.GATED_TILES.get(kind, ()):
            limits = partial(tiles.fits, tile, kind), partial(tiles.keeps, tile, "")
            yield Case(f"gated {kind} {_text(tile)}", _gated(dtype, precision, tile), *limits)
    for kind, dtype in ((tiles.HALF, "float16"), (tiles.IEEE, "float32")):
        how = dtype, tiles.IEEE
        for layout, shapes in skinny.SHAPES.items():
            for strip in (Strip(n, k, stages) for n, k in shapes for stages in skinny.STAGES):
                name = f"matvec {kind} {layout} {strip.n}x{strip.k} s{strip.stages}"
                fits = partial(_strip_fits, strip, kind)
                ahead = strip.stages > 1
                yield Case(name, _row(*how, layout, strip), fits, _always, multiplies=False, ahead=ahead)
            for strip in (Strip(*s, stages) for s in gated.gated_shapes(kind, layout) for stages in skinny.STAGES):
                name = f"gated_row {kind} {layout} {strip.n}x{strip.k} s{strip.stages}"
                fits = partial(_strip_fits, strip, kind)
                ahead = strip.stages > 1
                yield Case(name, _gated_row(dtype, layout, strip), fits, _always, multiplies=False, ahead=ahead)
        for count in (2, 16):
            name = f"parts {kind} {count}"
            yield Case(name, _parts(*how, count), _always, _always, kernel=1, multiplies=False, ahead=False)
        yield Case(f"join {kind}", _join(*how), _always, _always, kernel=1, multiplies=False, ahead=False)
    for tile in tiles.TILES[tiles.INT8]:
        limits = partial(tiles.fits, tile, tiles.INT8), partial(tiles.keeps, tile, "")
        yield Case(f"matmul int8 {_text(tile)}", _integers(tile), *limits)
        for name, ending in (("quantized", ""), ("quantized+residual", tiles.LONG)):
            limits = limits[0], partial(quantized_conv.keeps, tile, ending)
            yield Case(f"{name} int8 {_text(tile)}", _quantized(tile, added=bool(ending)), *limits)
    for word, launch, table in (
        ("attention", _attention, attention_tiles.TILES),
        ("decode", _decode, decode_tiles.TILES),
    ):
        for kind, sizes in table.items():
            for size, some in sizes.items():
                for t in some:
                    name = f"{word} {kind} d{size} {t.rows}x{t.keys} w{t.warps} s{t.stages}"
                    yield Case(name, launch(kind, size, t), _always, _always)


CASES: Mapping[str, Case] = {case.name: case for case in cases()}

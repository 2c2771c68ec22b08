"""The pure half of the kernels: walking shapes, choosing tiles, saying what is covered."""

from __future__ import annotations

import numpy as np
import pytest

from infera_kernels.launch import Const, RecordingLauncher, Target, nominal_target
from tests.kernels.support import FakeArray

pytest.importorskip("triton")

from infera_kernels.triton import (
    elementwise,
    layout,
    matmul,
    norm,
    pointwise,
    rows,
    softmax,
    tiles,
)

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize(
    ("shape", "strides", "dims", "walked"),
    [
        ((), [()], (1,), ((0,),)),
        ((1, 1), [(5, 5)], (1,), ((0,),)),
        ((2, 3, 4), [(12, 4, 1)], (24,), ((1,),)),
        ((2, 3, 4), [(12, 4, 1), (0, 4, 1)], (12, 2), ((1, 12), (1, 0))),
        ((2, 3, 4), [(12, 4, 1), (1, 2, 6)], (4, 3, 2), ((1, 4, 12), (6, 2, 1))),
        ((2, 1, 4), [(4, 99, 1)], (8,), ((1,),)),
        ((3, 4), [(0, 0)], (12,), ((0,),)),
    ],
)
def test_coalesce(
    shape: layout.Dims, strides: list[layout.Dims], dims: layout.Dims, walked: tuple[layout.Dims, ...]
) -> None:
    assert layout.coalesce(shape, strides) == (dims, walked)


def test_coalesce_walks_the_same_elements() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = tuple(rng.integers(1, 4, rng.integers(0, 6)).tolist())
        x = np.arange(4**6).reshape((4,) * 6)[tuple(slice(0, s) for s in shape) + (0,) * (6 - len(shape))]
        x = x.transpose(rng.permutation(x.ndim))
        dims, (walked,) = layout.coalesce(x.shape, [layout.element_strides(x)])
        offsets = sum(
            (np.arange(d).reshape((-1,) + (1,) * k) * s for k, (d, s) in enumerate(zip(dims, walked, strict=True))),
            np.zeros((), np.int64),
        )
        np.testing.assert_array_equal(np.ravel(offsets) + x.reshape(-1)[0], x.reshape(-1))


def test_broadcast_strides() -> None:
    x = np.zeros((3, 1, 5), np.float32)
    assert layout.broadcast_strides(x, (2, 3, 4, 5)) == (0, 5, 0, 1)
    with pytest.raises(ValueError, match=r"\(3, 1, 5\) does not broadcast to \(3, 4, 6\)"):
        layout.broadcast_strides(x, (3, 4, 6))
    with pytest.raises(ValueError, match="does not broadcast"):
        layout.broadcast_strides(x, (1, 5))


def test_rows_of() -> None:
    x = np.zeros((2, 3, 4, 5), np.float16)
    assert layout.rows_of(x) == (24, 5, 5)
    assert layout.rows_of(x, 2) == (6, 20, 20)
    assert layout.rows_of(x, 0) == (1, 120, 0)
    assert layout.rows_of(x[0, :, 0]) == (3, 5, 20)
    assert layout.rows_of(x[:1, :2, :, :3]) == (8, 3, 5)
    with pytest.raises(ValueError, match="evenly spaced"):
        layout.rows_of(x[:, :2])
    with pytest.raises(ValueError, match="not contiguous"):
        layout.rows_of(x.swapaxes(2, 3))


def test_only_zero_and_one_are_compiled_in() -> None:
    assert layout.fold((0, 1, 2, 16)) == (Const(0), Const(1), 2, 16)


@pytest.mark.parametrize(
    ("inner", "outer", "tile"),
    [
        (1, 1, (1, 1)),
        (3, 1000, (256, 4)),
        (127, 100, (8, 128)),
        (129, 100, (4, 256)),
        (768, 64, (4, 256)),
        (1024, 64, (1, 1024)),
        (1025, 64, (8, 128)),
        (5000, 2, (1, 1024)),
    ],
)
def test_pointwise_tiles(inner: int, outer: int, tile: tuple[int, int]) -> None:
    tiling = pointwise.pick_tiling((outer, inner), [(inner * 2, 1), (inner, 1)])
    assert tiling.tile == tile


def test_offsets_past_32_bits_are_seen() -> None:
    assert layout.span((2**16, 2**15), (2**15, 1)) == 2**31 - 1
    assert layout.span((3, 2), (-(2**30), 5)) == 2**31 + 5


@pytest.mark.parametrize(("rows_", "wide"), [(2**15, False), (2**15 + 1, True)])
def test_large_arrays_get_64_bit_offsets(rows_: int, wide: bool) -> None:
    recorder = RecordingLauncher()
    x, y, out = (FakeArray(s, "float16") for s in ((rows_, 2**16 - 1), (2**16 - 1,), (rows_, 2**16 - 1)))
    ((fn, args),) = elementwise.binary("add", x, y, out, recorder)
    fn(*args)
    assert recorder.launches[0].constexprs["WIDE"] is wide


def test_too_many_dimensions() -> None:
    shape = (2,) * 7
    strides = tuple(3**k for k in range(7))
    with pytest.raises(ValueError, match="needs 7 dimensions after merging, at most 6"):
        pointwise.pick_tiling(shape, [strides, (64, 32, 16, 8, 4, 2, 1)])


@pytest.mark.parametrize(
    ("count", "cols", "tile"),
    [
        (1, 1, rows.RowTile(1, 1, 4)),
        (1000, 5, rows.RowTile(128, 8, 4)),
        (3, 5, rows.RowTile(4, 8, 4)),
        (10, 1025, rows.RowTile(1, 2048, 4)),
        (10, 8192, rows.RowTile(1, 8192, 16)),
        (10, 16384, rows.RowTile(1, 16384, 16)),
        (10, 16385, None),
    ],
)
def test_row_tiles(count: int, cols: int, tile: rows.RowTile | None) -> None:
    assert rows.row_tile(count, cols) == tile


class TestPickTile:
    h100 = nominal_target(90)

    @pytest.mark.parametrize("m", [1, 8, 16])
    def test_few_rows_take_a_flat_tile(self, m: int) -> None:
        assert tiles.pick_tile(m, 4096, 4096, 1, "half", self.h100).m == 16

    def test_large_outputs_take_the_largest_tile(self) -> None:
        tile = tiles.pick_tile(8192, 8192, 8192, 1, "half", self.h100)
        assert (tile.m, tile.n) == (128, 256)

    def test_a_batch_counts_as_work(self) -> None:
        alone, batched = (tiles.pick_tile(128, 128, 768, b, "half", self.h100) for b in (1, 512))
        assert alone.m * alone.n < batched.m * batched.n

    @pytest.mark.parametrize("kind", tiles.TILES)
    def test_every_tile_chosen_fits_every_supported_gpu(self, kind: str) -> None:
        least = Target(86, 1, 99 * 1024)
        for m in (1, 17, 64, 200, 4096):
            for n in (1, 64, 130, 4096):
                assert tiles.pick_tile(m, n, 4096, 1, kind, least).shared_bytes(kind) <= least.shared_bytes

    @pytest.mark.parametrize("kind", tiles.TILES)
    def test_no_tile_is_beyond_the_largest_gpu(self, kind: str) -> None:
        assert all(t.shared_bytes(kind) <= self.h100.shared_bytes for t in tiles.TILES[kind])


def spec(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    return np.broadcast_to(np.zeros((), dtype), shape)


class TestSupports:
    def test_unary(self) -> None:
        assert elementwise.supports_unary("relu", spec((2, 3)), spec((2, 3)))
        assert not elementwise.supports_unary("relu", spec((2, 3)), spec((3, 2)))
        assert not elementwise.supports_unary("exp", spec((2,), "int32"), spec((2,), "int32"))
        assert not elementwise.supports_unary("relu", spec((2,)), spec((2,), "float16"))
        assert not elementwise.supports_unary("nosuch", spec((2,)), spec((2,)))
        assert not elementwise.supports_unary("relu", spec((2,) * 7), spec((2,) * 7))

    def test_binary(self) -> None:
        assert elementwise.supports_binary("less", spec((2, 1)), spec((3,)), spec((2, 3), "bool"))
        assert not elementwise.supports_binary("less", spec((2, 1)), spec((3,)), spec((2, 3)))
        assert not elementwise.supports_binary("add", spec((2,)), spec((2,), "float16"), spec((2,)))
        assert not elementwise.supports_binary("add", spec((2,)), spec((3,)), spec((3,)))

    def test_softmax(self) -> None:
        assert softmax.supports_softmax(spec((2, 3)), spec((2, 3)))
        assert not softmax.supports_softmax(spec(()), spec(()))
        assert not softmax.supports_softmax(spec((2,), "float64"), spec((2,), "float64"))

    def test_norm(self) -> None:
        assert norm.supports_norm(spec((2, 3, 4)), spec((2, 3, 4)), spec((3, 4)), axis=1)
        assert norm.supports_norm(spec((2, 4)), spec((2, 4)), None)
        assert norm.supports_norm(spec((2, 3, 4)), spec((2, 3, 4)), spec((4,)), axis=1)
        assert not norm.supports_norm(spec((2, 3, 4)), spec((2, 3, 4)), spec((5,)), axis=1)
        assert not norm.supports_norm(spec((2, 4)), spec((2, 4)), spec((4,)), axis=2)

    def test_matmul(self) -> None:
        assert matmul.supports_matmul(spec((2, 1, 3, 4)), spec((5, 4, 6)), spec((2, 5, 3, 6)), spec((6,)))
        assert matmul.supports_matmul(spec((3, 4)), spec((4, 6)), spec((3, 6)), None, spec((3, 1)), "gelu")
        assert not matmul.supports_matmul(spec((3, 4)), spec((5, 6)), spec((3, 6)))
        assert not matmul.supports_matmul(spec((4,)), spec((4, 6)), spec((6,)))
        assert not matmul.supports_matmul(spec((3, 4)), spec((4, 6)), spec((3, 6)), spec((3,)))
        assert not matmul.supports_matmul(spec((3, 4)), spec((4, 6)), spec((3, 6)), None, spec((2, 3, 6)))
        assert not matmul.supports_matmul(spec((3, 4), "int32"), spec((4, 6), "int32"), spec((3, 6), "int32"))

"""Products whose factors TMA reads, on a GPU against NumPy: by every tile, since nothing launches one that was not
measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from bench.gpu_operators import Checked, GuardedOutput, fetch, swept
from bench.gpu_report import Context, Section
from infera_gpu.op import Call
from infera_gpu.ops import registry
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.launch import Target, describes
from infera_kernels.triton.tiles import TmaTile, tma_tiles
from tests.cases import run

Result = tuple[str, Mapping[str, Any]]

DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_LARGEST = 2
"""Of values: sums of integers are exact, and so is what they are rounded to."""


@dataclass(frozen=True)
class Product:
    """A product by a tile, in a batch, with all that may follow; b may be `shared` by the batch. There are more tiles
    than programs, some past the end of a matrix."""

    tile: TmaTile
    turned: tuple[bool, bool]
    dtype: np.dtype[Any]
    shared: bool

    def bound(self, device: Any) -> tuple[list[Call], GuardedOutput, Array]:
        """Its calls, where the result goes, and the result."""
        from infera_kernels.triton.matmul import matmul

        random, tile = np.random.default_rng(self.tile.m + self.tile.n), self.tile
        m, n, k = tile.m + 5, tile.n + 24, 3 * tile.k + 8
        batch = device.launcher.target.multiprocessors + 1

        def values(*shape: int) -> Array:
            return random.integers(-_LARGEST, _LARGEST, shape, endpoint=True).astype(self.dtype)

        def factor(count: int, rows: int, columns: int, across: bool) -> tuple[Array, Any]:
            """An array, and one on the device that lies by columns where it is turned."""
            lines, size = (columns, rows) if across else (rows, columns)
            host = values(count, lines, -(-size // 8) * 8)
            there, host = device.constant(host, "device")[..., :size], host[..., :size]
            return (host.swapaxes(-1, -2), there.swapaxes(-1, -2)) if across else (host, there)

        a, left = factor(batch, m, k, self.turned[0])
        b, right = factor(1 if self.shared else batch, k, n, self.turned[1])
        bias, residual = values(n), values(batch, m, 1)
        wide = [x.astype(np.float32) for x in (a, b, bias, residual)]
        want = np.maximum(wide[0] @ wide[1] + wide[2] - 2 * wide[3], 0).astype(self.dtype)
        out = GuardedOutput(device, TensorSpec(want.shape, self.dtype))
        added = [device.constant(x, "device") for x in (bias, residual)]
        options: dict[str, Any] = {"bias": added[0], "residual": added[1], "beta": -2.0, "activation": "relu"}
        return matmul(left, right, out.array, device.launcher, tile=tile, **options), out, want

    def check(self, device: Any) -> int:
        """Runs it; the number of launches. Raises AssertionError."""
        calls, out, want = self.bound(device)
        run(calls)
        found = fetch(device, out.array)
        assert np.array_equal(found, want), f"{np.count_nonzero(found != want)} of {want.size} elements differ"
        out.check()
        return len(calls)


def products(target: Target) -> Iterator[Product]:
    """Every tile in two of four orders, all four by turns."""
    for i, tile in enumerate(t for t in tma_tiles(target.arch) if t.room <= target.shared_bytes):
        for shared in (False, True):
            j = i + 2 * shared
            yield Product(tile, (j % 4 in (1, 3), j % 4 in (2, 3)), DTYPES[(i + shared) % 2], shared)


def _checked(device: Any) -> Iterator[Checked]:
    op = next(op for op in registry() if op.qualified.startswith("MatMul-"))
    for p in products(device.launcher.target):
        order = "".join("NT"[t] for t in p.turned)
        yield op, f"{p.tile} {order} {p.dtype.name}", partial(p.check, device)


def tma(context: Context) -> Result:
    """Every tile whose factors TMA reads."""
    device = context.open()
    if not describes(device.launcher):
        return "no TMA here", {}
    with device.running():
        return swept(context, "tiles", _checked(device), "without_a_launch")


SECTIONS: Mapping[str, Section] = {"tma": tma}

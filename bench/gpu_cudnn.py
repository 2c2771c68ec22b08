"""Convolutions and attention by cuDNN, on a GPU against NumPy: by every plan that would be tried, since none is taken
that was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from infera_kernels.launch import cudnn_of
from infera_kernels.launch.cudnn import WORKSPACE
from tests.cases import run
from tests.kernels.attending import attended
from tests.kernels.windows import convolved

Result = tuple[str, Mapping[str, Any]]

WAYS = 6
"""`infera_kernels.triton.dnn.WAYS`, which cannot be imported where no Triton is installed."""

DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_LARGEST = 2
"""Of values: sums of integers are exact, and so is what they are rounded to."""


@dataclass(frozen=True)
class Convolution:
    """x (images, size..., channels) by filters of `window` on each axis, with `terms` after the sums."""

    images: int
    size: tuple[int, ...]
    channels: int
    filters: int
    window: int
    stride: int
    terms: tuple[str, ...]

    @property
    def label(self) -> str:
        size = "x".join(map(str, (self.images, *self.size, self.channels)))
        return " ".join((f"{size} by {self.filters} of {self.window}, stride {self.stride}", *self.terms))

    def bound(self, device: Any, way: int, dtype: np.dtype[Any]) -> tuple[Call | None, GuardedOutput, Array]:
        """Its call, None where cuDNN has no such plan, where the result goes, and the result."""
        from infera_kernels.triton.conv import Finish, geometry
        from infera_kernels.triton.dnn import by_cudnn

        random, axes, pad = np.random.default_rng(self.channels + way), len(self.size), self.window // 2
        made = tuple((n + 2 * pad - self.window) // self.stride + 1 for n in self.size)

        def values(*shape: int) -> Array:
            return random.integers(-_LARGEST, _LARGEST, shape, endpoint=True).astype(dtype)

        x, w = (
            values(self.images, *self.size, self.channels),
            values(self.filters, *(self.window,) * axes, self.channels),
        )
        added = {"residual": values(self.images, *made, self.filters), "bias": values(self.filters)}
        added = {name: value for name, value in added.items() if name in self.terms}
        total = convolved(x, w, (self.stride,) * axes, ((pad, pad),) * axes) + sum(
            value.astype(np.float64) for value in added.values()
        )
        want = (np.maximum(total, 0) if "relu" in self.terms else total).astype(dtype)
        out = GuardedOutput(device, TensorSpec(want.shape, dtype))
        given = {name: device.constant(value, "device") for name, value in (("x", x), ("w", w), *added.items())}
        finish = Finish(given.get("bias"), given.get("residual"), "relu" if "relu" in self.terms else None)
        where = geometry((self.window,) * axes, (self.stride,) * axes, (1,) * axes, ((pad, pad),) * axes)
        workspace = device.constant(np.zeros(WORKSPACE, np.uint8), "device")
        call = by_cudnn(given["x"], given["w"], out.array, device.launcher, where, finish, way, workspace)
        return call, out, want

    def check(self, device: Any, way: int, dtype: np.dtype[Any]) -> int:
        """Runs it; 0 where there is no such plan. Raises AssertionError."""
        call, out, want = self.bound(device, way, dtype)
        if call is None:
            return 0
        run([call])
        found = fetch(device, out.array)
        assert np.array_equal(found, want), f"{np.count_nonzero(found != want)} of {want.size} elements differ"
        out.check()
        return 1


CONVOLUTIONS = (
    Convolution(2, (28, 28), 64, 64, 3, 1, ("bias", "relu")),
    Convolution(2, (28, 28), 64, 96, 3, 1, ("residual", "bias", "relu")),
    Convolution(3, (14, 15), 256, 64, 1, 1, ("bias", "relu")),
    Convolution(3, (14, 15), 64, 256, 1, 1, ("residual", "bias", "relu")),
    Convolution(2, (28, 28), 128, 256, 1, 2, ("bias",)),
    Convolution(1, (56, 60), 4, 64, 7, 2, ("bias", "relu")),
    Convolution(2, (9, 10), 23, 41, 3, 2, ("residual", "bias", "relu")),
    Convolution(2, (100,), 64, 64, 3, 1, ("bias",)),
    Convolution(1, (6, 7, 8), 32, 48, 3, 1, ()),
)


@dataclass(frozen=True)
class Attention:
    """(batch, heads, queries, size) over keys of `groups` heads; queries are the last where it is `causal`."""

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    size: int
    causal: bool

    @property
    def label(self) -> str:
        shape = f"{self.batch}x{self.heads}x{self.queries}x{self.size} over {self.groups}x{self.keys}"
        return f"attention {shape}{' causal' if self.causal else ''}"

    def check(self, device: Any, way: int, dtype: np.dtype[Any]) -> int:
        """Runs it; 0 where there is no such plan. Raises AssertionError."""
        from infera_kernels.triton.attention import Options
        from infera_kernels.triton.dnn_attention import attention_by_cudnn

        random, before = np.random.default_rng(self.keys), self.keys - self.queries
        rows = (self.batch, self.queries, self.heads, self.size)
        q = random.standard_normal(rows).astype(dtype)
        k, v = (random.standard_normal((self.batch, self.groups, self.keys, self.size)).astype(dtype) for _ in range(2))
        want = attended(q.swapaxes(1, 2), k, v, self.size**-0.5, before if self.causal else None)
        out = GuardedOutput(device, TensorSpec(rows, dtype))
        given = [device.constant(value, "device") for value in (q, k, v)]
        call = attention_by_cudnn(
            *(given[0].swapaxes(1, 2), given[1], given[2], out.array.swapaxes(1, 2)),
            launcher=device.launcher,
            options=Options(self.size**-0.5, right=0 if self.causal else None, before=before),
            way=way,
            workspace=device.constant(np.zeros(WORKSPACE, np.uint8), "device"),
        )
        if call is None:
            return 0
        run([call])
        found, least = fetch(device, out.array).swapaxes(1, 2).astype(np.float64), TOLERANCES[dtype]
        np.testing.assert_allclose(found, want, rtol=least, atol=least)
        out.check()
        return 1


TOLERANCES = {DTYPES[0]: 3e-3, DTYPES[1]: 2e-2}
"""Weights are rounded to the type."""

ATTENTIONS = (
    Attention(2, 4, 4, 128, 128, 64, False),
    Attention(2, 4, 4, 128, 128, 64, True),
    Attention(1, 8, 2, 100, 100, 128, True),
    Attention(2, 4, 4, 64, 300, 64, True),
    Attention(2, 3, 3, 37, 53, 80, False),
    Attention(4, 8, 2, 1, 200, 64, False),
)


def _checked(device: Any) -> Iterator[Checked]:
    sets: Mapping[str, Sequence[Convolution | Attention]] = {"Conv-": CONVOLUTIONS, "Attention-": ATTENTIONS}
    for name, cases in sets.items():
        op = next(op for op in registry() if op.qualified.startswith(name))
        for i, made in enumerate(cases):
            for way in range(1, WAYS + 1):
                dtype = DTYPES[(i + way) % 2]
                yield op, f"{made.label} {dtype.name}, plan {way}", partial(made.check, device, way, dtype)


def cudnn(context: Context) -> Result:
    """Every plan that would be tried for some convolutions and some attention."""
    device = context.open()
    if cudnn_of(device.launcher) is None:
        return "cuDNN is not installed here", {}
    with device.running():
        return swept(context, "plans of cuDNN", _checked(device), "without_a_plan")


SECTIONS: Mapping[str, Section] = {"cudnn": cudnn}

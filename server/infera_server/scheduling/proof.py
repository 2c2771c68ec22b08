"""Whether rows are independent: random rows run together must equal the same rows run one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from infera_gpu.spec import Dim, TensorSpec
from infera_server.runtime import Session
from infera_server.scheduling.rows import Arrays, HostArray

ROW_SCALES = (1.0, 10.0, 0.1, 1.0, 3.0)
"""One row of the probe each. What is computed over all rows, such as a scale or a maximum, shows in the small ones."""

PROBE_SIZES = (8, 32, 224)
"""Sizes tried for the symbolic dimensions that are not the batch: a sequence, a small image, a large one."""

TOLERANCES = {"float64": 1e-6, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative to the largest magnitude of a row of an output: a batch may sum in another order than a row."""

SMALL_IDS, BYTE_IDS = 10, 128
"""Integers in every second row stay below these, where the graph does not say what they index."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The batch axes of the outputs, the sizes of the open dimensions, and why rows are not independent, if so."""

    outputs: Mapping[str, int]
    sizes: Mapping[str, int]
    refusal: str | None


def prove(
    session: Session,
    inputs: Mapping[str, int],
    outputs: Mapping[str, int] | None,
    shared: dict[str, HostArray] | None = None,
) -> Proof:
    """Run rows together and one by one; `inputs` and `outputs` are the batch axes.

    Without `outputs` they are the axes that grow with the rows. All rows have the `shared` inputs.
    """
    limits = session.facts().id_limits
    shared = shared or {}
    refusal = ""
    for size, wide in product(PROBE_SIZES, (True, False)):
        rng = np.random.default_rng(0)
        sizes: dict[str, int] = {}
        rows = []
        for i, scale in enumerate(ROW_SCALES):
            row = {}
            for name in inputs:
                spec = session.inputs[name]
                limit = limits.get(name) or _limit(spec.dtype) if wide and (i % 2 or name in limits) else 2
                row[name] = random_array(
                    rng, shape_at(spec, {inputs[name]: 1}, size, sizes), spec.dtype, scale=scale, limit=limit
                )
            rows.append(row)
        together = {n: np.concatenate([r[n] for r in rows], axis=axis) for n, axis in inputs.items()}
        try:
            whole = session.run(together | shared)
            singles = [session.run(row | shared) for row in rows]
        except Exception as error:  # whatever the model cannot do with random data, it is not proven
            refusal = f"the probe run failed: {type(error).__name__}: {error}"
            if not sizes and not wide:
                break
            continue
        axes = _growing(whole, singles) if outputs is None else outputs
        return Proof(axes, sizes, difference(whole, singles, axes))
    return Proof({}, {}, refusal)


def _growing(whole: Arrays, singles: Sequence[Arrays]) -> dict[str, int]:
    """The axis of every output along which rows lie one after the other; its rank where there is none, or several."""
    axes = {}
    for name, got in whole.items():
        want = singles[0][name].shape
        grown = [axis for axis, (a, b) in enumerate(zip(got.shape, want, strict=False)) if a != b]
        axes[name] = grown[0] if len(grown) == 1 else got.ndim
    return axes


def _limit(dtype: np.dtype[Any]) -> int:
    return BYTE_IDS if dtype.itemsize == 1 else SMALL_IDS


def difference(whole: Arrays, singles: Sequence[Arrays], axes: Mapping[str, int]) -> str | None:
    for name, axis in axes.items():
        got, parts = whole[name], [s[name] for s in singles]
        if axis >= got.ndim or got.shape[axis] != len(singles) or any(p.shape[axis] != 1 for p in parts):
            return f"output '{name}' is {list(got.shape)} for {len(singles)} rows and {list(parts[0].shape)} for one"
        for row, want in zip(np.split(got, len(singles), axis), parts, strict=True):
            if row.shape != want.shape or not close(row, want):
                return f"output '{name}' differs between {len(singles)} rows together and one by one"
        if got.dtype.name in TOLERANCES and got.size and not np.isfinite(got.astype(np.float64)).any():
            return f"output '{name}' is nowhere finite for random rows, which proves nothing"
    return None


def close(got: HostArray, want: HostArray) -> bool:
    """Equal within the dtype's tolerance; exactly where the dtype has none."""
    tolerance = TOLERANCES.get(got.dtype.name)
    if tolerance is None:
        return bool(np.array_equal(got, want))
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = b[np.isfinite(b)]
    scale = float(np.abs(finite).max()) if finite.size else 0.0
    return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True))


def random_array(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any], *, scale: float = 1.0, limit: int = 2
) -> HostArray:
    """Normal floats times `scale`; integers below `limit`; booleans; short strings."""
    if dtype.hasobject:
        return np.where(rng.integers(0, 2, shape) == 1, "a", "b").astype(object)
    if dtype.kind in "biu":
        most = 2 if dtype.kind == "b" else min(limit, np.iinfo(dtype).max)
        return np.asarray(rng.integers(0, most, shape)).astype(dtype)
    return np.asarray(rng.standard_normal(shape) * scale).astype(dtype)


def shape_at(
    spec: TensorSpec, fixed: Mapping[int, int], size: int, sizes: dict[str, int] | None = None
) -> tuple[int, ...]:
    """The spec's shape with `fixed` axes set and every other open dimension `size`, noted in `sizes`."""

    def resolve(axis: int, dim: Dim) -> int:
        if axis in fixed:
            return fixed[axis]
        if isinstance(dim, int):
            return dim
        if sizes is not None:
            sizes[dim or "?"] = size
        return size

    return tuple(resolve(axis, dim) for axis, dim in enumerate(spec.shape))

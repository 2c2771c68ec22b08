"""What the declarations of whole families of operators share. Declares no operators itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal

import ml_dtypes
import numpy as np

from infera_gpu.op import Bind, Buffers, Call, Case, Compute, Infer, Kernel, Launcher, Op, Site
from infera_gpu.spec import Array, DType, TensorSpec, dtype_of_onnx
from infera_kernels.calls import Split, one_after_the_other
from infera_kernels.cpu.parts import along, parts
from infera_kernels.portable.quant import bounds, is_integer

BOOL, INT32, INT64, FLOAT32 = (np.dtype(t) for t in (np.bool_, np.int32, np.int64, np.float32))


def i64(*values: int) -> np.ndarray[Any, np.dtype[Any]]:
    """A constant int64 input, for cases."""
    return np.array(values, np.int64)


def u8(*shape: int) -> TensorSpec:
    """A case's input of bytes."""
    return TensorSpec(shape, np.dtype(np.uint8))


def scales(*values: float) -> np.ndarray[Any, np.dtype[Any]]:
    """A case's scales, in float32: one is a scalar."""
    return points(*values, dtype=np.float32)


def points(*values: float, dtype: Any = np.uint8) -> np.ndarray[Any, np.dtype[Any]]:
    """A case's zero points: one is a scalar."""
    return np.array(values if len(values) > 1 else values[0], dtype)


def reads_floats(site: Site) -> bool:
    """Whether input 0 has elements, of float32 or float64."""
    return site.spec(0).size > 0 and site.spec(0).dtype in (np.float32, np.float64)


def drawn(seed: int, count: int) -> np.ndarray[Any, np.dtype[Any]]:
    """So many uint64, for cases: SplitMix64 (Steele, Lea and Flood, 2014).

    numpy.random takes as long to import as many operators together.
    """
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return state ^ (state >> np.uint64(31))


def integers(seed: int, dtype: Any, *shape: int, low: int = 0, high: int = 0) -> np.ndarray[Any, np.dtype[Any]]:
    """A constant input for cases: integers from `low` to `high`, all that the type has where both are 0."""
    if low == high:
        low, high = bounds(np.dtype(dtype))
    found = drawn(seed, math.prod(shape)) % np.uint64(high - low + 1)
    return (found.astype(np.int64) + low).astype(dtype).reshape(shape)


def uniform(seed: int, low: float, high: float, *shape: int) -> np.ndarray[Any, np.dtype[Any]]:
    """A constant float32 input for cases: numbers from `low` to `high`."""
    found = drawn(seed, math.prod(shape)).astype(np.float64) / 2**64
    return (low + (high - low) * found).astype(np.float32).reshape(shape)


ZERO: tuple[Literal["", "nan", "unseen"], ...] = ("", "nan", "unseen")
"""What the attribute `guarded` of infera.Attention says of rows without weights."""

NARROW = {
    np.dtype(t): since
    for since, types in (
        (19, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz)),
        (21, (ml_dtypes.uint4, ml_dtypes.int4)),
        (23, (ml_dtypes.float4_e2m1fn,)),
        (24, (ml_dtypes.float8_e8m0fnu,)),
        (25, (ml_dtypes.uint2, ml_dtypes.int2)),
    )
    for t in types
}
"""Types of at most eight bits that NumPy has not, and the opset from which ONNX has operators on them."""


@cache
def narrow(dtype: DType, *shape: int) -> np.ndarray[Any, np.dtype[Any]]:
    """A constant input of a type of `NARROW`, for cases: small values that it holds."""
    info = (ml_dtypes.iinfo if is_integer(dtype) else ml_dtypes.finfo)(dtype)
    return np.resize(np.clip([1, 0, 2, -1, 1, 0.5], float(info.min), float(info.max)).astype(dtype), shape)


def narrow_cases(shape: Sequence[int], *rest: Any, since: int = 19, **attrs: Any) -> tuple[Case, ...]:
    """A case of each type of `NARROW`: a tensor of `shape`, the other inputs, at the first opset that has them all."""
    return tuple(
        Case(dtype.name, (narrow(dtype, *shape), *rest), attrs, opset=max(since, opset))
        for dtype, opset in NARROW.items()
    )


def plain(fn: Callable[..., Any]) -> Compute:
    """`fn(xp, site, *ins)` as a compute function: silent about overflow and the like, always returning arrays."""

    def compute(xp: Any, site: Site, *ins: Array) -> Array | Sequence[Array]:
        with np.errstate(all="ignore"):
            made = fn(xp, site, *ins)
        return tuple(map(xp.asarray, made)) if isinstance(made, (tuple, list)) else xp.asarray(made)

    return compute


def is_native(dtype: DType) -> bool:
    """Whether it is a boolean, an integer or a float16 to float64: NumPy's own, not ml_dtypes', and not text."""
    return dtype.isbuiltin == 1 and dtype.kind in "biuf"


def native(site: Site) -> bool:
    """Whether every operand has a dtype with NumPy loops of its own."""
    return all(s is None or is_native(s.dtype) for s in (*site.ins, *site.outs))


def floating(site: Site) -> bool:
    """Whether every operand is float16, float32 or float64."""
    return all(s is None or (is_native(s.dtype) and s.dtype.kind == "f") for s in (*site.ins, *site.outs))


def movable(site: Site) -> bool:
    """Whether every operand is plain bytes: strings never lie in an arena."""
    return all(s is None or s.dtype.kind != "O" for s in (*site.ins, *site.outs))


def split_of(io: Buffers) -> Split:
    """How a kernel of `infera_kernels` may split its work."""
    return Split(io.threads, io.parallel, io.least_ns)


COPY_NS = 0.2
"""Nanoseconds that it takes to copy an element, about."""


def copies(pairs: Callable[[Site, Buffers], Sequence[tuple[Array, Array]]]) -> Kernel:
    """A kernel that copies views of inputs onto views of outputs: `pairs(site, io)` gives (destination, source)."""

    def bind(site: Site, io: Buffers) -> list[Call]:
        found = pairs(site, io)
        ns = COPY_NS * sum(target.size for target, _ in found)
        cut = [list(_copies(target, source, ns, split_of(io))) for target, source in found]
        return io.parallel([[c[i] for c in cut if i < len(c)] for i in range(max(map(len, cut), default=0))])

    return Kernel(bind=bind, supports=movable, strided=True, strided_out=True)


def _copies(target: Array, source: Array, ns: float, split: Split) -> Iterator[Call]:
    """The copy in parts along the first axis that is longer than 1."""
    axis = next((i - target.ndim for i, d in enumerate(target.shape) if d > 1), None)
    if axis is None:
        yield np.copyto, (target, source)
        return
    for part in parts(target.shape[axis], ns, split):
        yield np.copyto, (along(target, axis, part), along(source, axis, part))


class _Part:
    """The part of a kernel's buffers along an axis, counted from the end, of its outputs: implements op.Buffers."""

    threads = 1

    def __init__(self, io: Buffers, ins: tuple[Array | None, ...], outs: tuple[Array, ...]) -> None:
        self.ins, self.outs, self.xp = ins, outs, io.xp
        self.least_ns, self.strict, self.tf32 = io.least_ns, io.strict, io.tf32
        self.scratch, self.pack, self.constant = io.scratch, io.pack, io.constant
        self._whole = io

    @property
    def launcher(self) -> Launcher:
        return self._whole.launcher

    def parallel(self, made: Sequence[Iterable[Call]]) -> list[Call]:
        return one_after_the_other(made)


def _split(bind: Bind, ns: float) -> Bind:
    """`bind`, once a part: of the flat arrays where all lie dense, else along the first axis that is longer than 1."""

    def split(site: Site, io: Buffers) -> Sequence[Call]:
        if io.threads == 1:
            return bind(site, io)
        ins, outs = io.ins, io.outs
        shape = outs[0].shape
        if all(x is None or x.size == 1 or (x.shape == shape and x.flags.c_contiguous) for x in (*ins, *outs)):
            ins = tuple(None if x is None else x.reshape(() if x.shape != shape else -1) for x in ins)
            outs = tuple(y.reshape(-1) for y in outs)
            shape = outs[0].shape
        axis = next((i - len(shape) for i, d in enumerate(shape) if d > 1), -1)
        cuts = parts(shape[axis], outs[0].size * ns, split_of(io)) if shape else []
        if len(cuts) < 2:
            return bind(site, io)
        return io.parallel(
            [
                bind(
                    site,
                    _Part(
                        io,
                        tuple(None if x is None else along(x, axis, cut) for x in ins),
                        tuple(along(y, axis, cut) for y in outs),
                    ),
                )
                for cut in cuts
            ]
        )

    return split


PASS_NS, CHAIN_NS = 0.2, 1.0
"""Nanoseconds that an element takes in a ufunc and in a chain of them, about."""


def elementwise(
    bind: Bind, inplace: tuple[int, ...] = (0,), supports: Callable[[Site], bool] = native, *, ns: float = PASS_NS
) -> dict[str, Kernel]:
    """The `kernels` of an elementwise operator: any strides, the output may take over an input.

    `bind` must not look at the site's shapes: it is bound to parts of the arrays where the whole is worth several
    threads. `ns` are the nanoseconds that an element takes, about.
    """
    kernel = Kernel(bind=_split(bind, ns), supports=supports, inplace=inplace, strided=True, strided_out=True)
    return {"cpu": kernel}


def single(site: Site, i: int, name: str) -> int | None:
    """The integer that input i holds, None where it is left out. Raises PlanError where it holds more or fewer."""
    given = site.ints(i)
    if given is not None and len(given) != 1:
        raise site.fail(f"{name} (input {i}) has {len(given)} values {list(given)}, expected one")
    return None if given is None else given[0]


def element_type(site: Site, name: str, default: DType | None = None) -> DType:
    """The dtype that the attribute names, `default` where it is left out or 0. Raises PlanError for an unknown one."""
    code: Any = site.attrs.get(name)
    if not code and default is not None:
        return default
    try:
        return dtype_of_onnx(code)
    except (KeyError, TypeError):
        raise site.fail(f"{name}: element type {code} is not supported") from None


def requiring(infer: Infer, *inputs: int) -> Infer:
    """`infer`, after making sure that these inputs are present."""

    def checked(site: Site) -> Sequence[TensorSpec | None]:
        for i in inputs:
            site.spec(i)
        return infer(site)

    return checked


def numeric(infer: Infer) -> Infer:
    """`infer`, for operators that have no meaning for strings, which Python would join and compare."""

    def checked(site: Site) -> Sequence[TensorSpec | None]:
        for i, spec in enumerate(site.ins):
            if spec is not None and spec.dtype.kind == "O":
                raise site.fail(f"input {i} is {spec}, expected numbers")
        return infer(site)

    return checked


def shaped(shape: Callable[[Site], Sequence[int]], dtype: DType | None = None) -> Infer:
    """Output 0 has the shape that `shape(site)` gives, and input 0's dtype unless another is given."""

    def infer(site: Site) -> Sequence[TensorSpec]:
        return (TensorSpec(tuple(shape(site)), site.spec(0).dtype if dtype is None else dtype),)

    return infer


def reshapes_to(target: Sequence[int], source: Sequence[int], dims: Sequence[int]) -> bool:
    """Whether a Reshape of `source` to `target` has these dimensions, which have as many elements."""
    copied = [source[i] if size == 0 and i < len(source) else size for i, size in enumerate(target)]
    unlike = [size for size, d in zip(copied, dims, strict=False) if size != d]
    return len(target) == len(dims) and unlike in ([], [-1])


def normalized(site: Site, axes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Axes as non-negative numbers, in the order given. Raises PlanError where one is out of range or repeated."""
    for axis in axes:
        if not -rank <= axis < rank:
            raise site.fail(f"axis {axis} out of range for rank {rank}")
    found = tuple(axis % rank for axis in axes)
    if len(set(found)) != len(found):
        raise site.fail(f"axes {list(axes)} name an axis twice")
    return found


OPS: tuple[Op, ...] = ()

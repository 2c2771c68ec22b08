"""The "triton" kernels of products of quantised matrices. Declares no operators itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops import _triton_quant as quant
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable.matmul import transposed

if TYPE_CHECKING:
    from infera_kernels.triton.integer_sums import Scaling
    from infera_kernels.triton.integer_weight import Weight

Get = Callable[[int], Any]
"""An input as a parameter, of no dimension or of one, None where it is left out: its spec, or its array."""


@dataclass(frozen=True, slots=True)
class Form:
    """An operator's inputs: a, its zero point, b, its zero point; the scales, and the bias, if there are any."""

    operands: tuple[int, int, int, int]
    scales: Callable[[Site, Get], Scaling | None] = lambda site, get: None
    bias: int | None = None


def scaled(left: int, right: int, scale: int | None = None, zero: int | None = None) -> Callable[..., Scaling]:
    """The scales by input: of a, of b, and the output's with its zero point."""

    def scales(site: Site, get: Get) -> Scaling:
        from infera_kernels.triton.integer_sums import Scaling

        last = [None if i is None else get(i) for i in (scale, zero)]
        return Scaling(get(left), get(right), last[0], last[1], float(site.attrs.get("alpha", 1.0)))

    return scales


def spec_getter(site: Site) -> Get:
    def get(i: int) -> TensorSpec | None:
        if not site.has(i):
            return None
        spec = site.spec(i)
        return TensorSpec(() if spec.size == 1 else spec.dims, spec.dtype)

    return get


def array_getter(site: Site, io: Buffers) -> Get:
    def get(i: int) -> Array | None:
        if not site.has(i):
            return None
        array = io.ins[i]
        return array.reshape(()) if array.size == 1 else array

    return get


def _turned(spec: TensorSpec, flag: Any) -> TensorSpec:
    return TensorSpec((*spec.dims[:-2], *reversed(spec.dims[-2:])), spec.dtype) if flag else spec


def _vectors(*parameters: TensorSpec | None) -> bool:
    """Whether each has one value, or one dimension."""
    return all(p is None or p.ndim < 2 for p in parameters)


def _supports(site: Site, form: Form, left: TensorSpec | None = None) -> bool:
    """Whether the kernel takes the site, with `left` in the place of its first matrix, of a single zero point."""
    from infera_kernels.triton.integer_matmul import supports_integer_matmul

    a, a_zero, b, b_zero = form.operands
    get = spec_getter(site)
    scaling, point = form.scales(site, get), None if left else get(a_zero)
    given = () if scaling is None else (scaling.left, scaling.right, scaling.scale, scaling.zero)
    return _vectors(point, get(b_zero), *given) and supports_integer_matmul(
        _turned(left or site.spec(a), site.attrs.get("transA")),
        _turned(site.spec(b), site.attrs.get("transB")),
        site.outs[0],
        point,
        get(b_zero),
        scaling,
        site.spec(form.bias) if form.bias is not None and site.has(form.bias) else None,
    )


def weight(site: Site, io: Buffers, b: int) -> Array | Weight:
    """Input b, transposed with transB: packed where it is a constant matrix."""
    from infera_kernels.triton.integer_weight import Weight, column_sums, packed_weight

    turn = site.attrs.get("transB")
    if site.value(b) is None or site.spec(b).ndim != 2:
        return transposed(io.ins[b], turn)
    tag = "int8 transposed" if turn else "int8"
    packed = io.pack(b, tag, lambda w: packed_weight(transposed(w, turn)))
    sums = io.pack(b, f"{tag} sums", lambda w: column_sums(transposed(w, turn)))
    return Weight(packed, sums, site.spec(b).dtype == np.uint8)


def without_part(site: Site, b: int, zero: int) -> bool:
    """Whether the zero point of input b is known to be what weights that are read as signed ones have no part of."""
    point = site.value(zero)
    middle = 128 if site.spec(b).dtype == np.uint8 else 0
    return point is not None and bool((point == middle).all())


def _bind(site: Site, io: Buffers, form: Form) -> list[Call]:
    a, a_zero, *_ = form.operands
    get = array_getter(site, io)
    left = transposed(io.ins[a], site.attrs.get("transA"))
    return _product(site, io, form, left, get(a_zero), form.scales(site, get))


def _product(
    site: Site, io: Buffers, form: Form, left: Array, zero: Array | None, scaling: Scaling | None
) -> list[Call]:
    from infera_kernels.triton.integer_matmul import integer_matmul

    *_, b, b_zero = form.operands
    return integer_matmul(
        left,
        weight(site, io, b),
        io.outs[0],
        io.launcher,
        a_zero=zero,
        b_zero=array_getter(site, io)(b_zero),
        signed_zeros=without_part(site, b, b_zero),
        scaling=scaling,
        bias=io.ins[form.bias] if form.bias is not None and site.has(form.bias) else None,
        tuned=site.tuned,
    )


def product(form: Form) -> Kernels:
    """The kernels of a product of two quantised matrices."""
    return kernels(lambda site, io: _bind(site, io, form), lambda site: _supports(site, form), inplace=(), strided=True)


def dynamic_product(b: int, zero: int, scale: int, bias: int) -> Kernels:
    """The kernels of input 0, quantised over its own range, times the quantised input b."""

    def form(left: Any) -> Form:
        from infera_kernels.triton.integer_sums import Scaling

        return Form((0, -1, b, zero), lambda site, get: Scaling(left, get(scale)), bias)

    def supports(site: Site) -> bool:
        from infera_kernels.triton.dynamic import supports_dynamic

        x, single = site.spec(0), TensorSpec((), np.dtype(np.float32))
        quantised = TensorSpec(x.dims, np.dtype(np.uint8))
        whole = site.batch_invariant  # the range is that of the whole batch
        return not whole and supports_dynamic(x) and _supports(site, form(single), quantised)

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.dynamic import dynamic_quantise

        x = io.ins[0]
        q, factor, point = io.scratch(x.shape, np.uint8), io.scratch((), np.float32), io.scratch((), np.uint8)
        made = form(factor)
        calls = dynamic_quantise(x, q, factor, point, quant.ranges(x, io), io.launcher)
        return [*calls, *_product(site, io, made, q, point, made.scales(site, array_getter(site, io)))]

    def workspace(site: Site) -> int:
        return aligned(site.spec(0).size) + aligned(4) + aligned(1) + quant.range_bytes(site)

    return kernels(bind, supports, inplace=(), strided=False, workspace=workspace)


OPS: tuple[Op, ...] = ()

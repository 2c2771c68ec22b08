"""The operators' "jit" kernels: what numba compiles for the CPU. What wraps them says which shapes they cover.

numba is imported when a kernel is bound: only a device that runs such kernels asks. They take dense float32 arrays; for
the rest there are the "cpu" kernels. Declares no operators itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infera_gpu.op import Bind, Buffers, Call, Kernel, Site
from infera_gpu.ops._families import ZERO, split_of
from infera_gpu.spec import Array
from infera_kernels.cpu.elementwise import contiguous
from infera_kernels.cpu.matmul import WEIGHT_BYTES
from infera_kernels.cpu.parts import spans, worth
from infera_kernels.jit.codes import CODES

Kernels = dict[str, Kernel]

ELEMENT_NS, PRODUCT_NS = 0.5, 0.02
"""What an element of a compiled loop and a multiply-add of a product take, about."""


def product_ns(ns: float, weight: Array) -> float:
    """What a product takes whose multiply-adds take so long: few rows take as long as reading the weight does."""
    return max(ns, float(weight.nbytes) / WEIGHT_BYTES)


def _always(site: Site) -> bool:
    return True


def kernels(
    bind: Bind,
    supports: Callable[[Site], bool],
    inplace: tuple[int, ...] = (),
    *,
    strided: bool = False,
    pays: Callable[[Site], bool] = _always,
) -> Kernels:
    """A "jit" kernel for sites whose operands are all float32, some element each."""

    def checked(site: Site) -> bool:
        specs = [*(s for s in site.ins if s is not None), *site.outs]
        return all(s.dtype == np.float32 and s.size > 0 for s in specs) and supports(site)

    return {"jit": Kernel(bind, checked, inplace=inplace, strided=strided, pays=pays)}


def rows(io: Buffers, count: int, elements: int, part: Callable[[slice], list[Call]]) -> list[Call]:
    """The calls of `part` for ranges of `count` rows that have so many elements in all: one for each thread."""
    parts = min(max(count, 1), worth(ELEMENT_NS * elements, split_of(io)).threads)
    return io.parallel([part(slice(a, b)) for a, b in spans(count, parts)])


ACTIVATIONS = frozenset({"erf", "hard_sigmoid", "hard_swish", "sigmoid", "swish", "tanh"})
"""Those that win by being compiled, of infera_kernels.jit.codes.CODES: the others are one pass in NumPy too."""


def activation(name: Callable[[Site], str], given: Callable[[Site], Sequence[float]] = lambda site: ()) -> Kernels:
    """y = activation(x), elementwise."""

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.jit.epilogue import apply

        x, y = io.ins[0].reshape(-1), io.outs[0].reshape(-1)
        return rows(io, x.size, x.size, lambda part: apply(name(site), x[part], y[part], given(site)))

    return kernels(bind, lambda site: True, inplace=(0,))


def softmax(shape: Callable[[Site], tuple[int, int, int]]) -> Kernels:
    """Softmax of (outer, axis, inner) where inner is 1."""

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.jit.rows import softmax

        count, length, _ = shape(site)
        x, y = (a.reshape(count, length) for a in (io.ins[0], io.outs[0]))
        return rows(io, count, x.size, lambda part: softmax(x[part], y[part]))

    return kernels(bind, lambda site: shape(site)[2] == 1, inplace=(0,))


def standardize(view: Callable[[Site], tuple[int, int]], supports: Callable[[Site], bool]) -> Kernels:
    """Layer or RMS normalisation of (rows, length), with one output."""

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.jit.rows import standardize

        x, y = (a.reshape(view(site)) for a in (io.ins[0], io.outs[0]))
        scale, bias = vector(site, io, 1), vector(site, io, 2)
        epsilon = float(site.attrs["epsilon"])
        center = bool(site.attrs.get("center", site.node.op == "LayerNormalization"))
        return rows(
            io, len(x), x.size, lambda part: standardize(x[part], y[part], scale, bias, epsilon=epsilon, center=center)
        )

    return kernels(bind, lambda site: len(site.outs) == 1 and supports(site), inplace=(0,))


def product(
    multiply: Callable[..., list[Call]], name: Callable[[Site], str], supports: Callable[[Site], bool]
) -> Kernels:
    """activation(alpha A' @ B' + bias) + residual: a bias for each column, a residual of the output's shape.

    A constant matrix B is packed once, unless a single row reads it; other products are `multiply`'s.
    """

    def fits(site: Site) -> bool:
        (y,) = site.outs
        row = not site.has(2) or (site.spec(2).size == y.dims[-1] and site.spec(2).dims[-1:] == y.dims[-1:])
        same = not site.has(3) or site.spec(3).dims == y.dims
        attrs = site.attrs
        plain = float(attrs.get("alpha", 1)) == 1 and (not site.has(2) or float(attrs.get("beta", 1)) == 1)
        useful = site.has(2) or site.has(3) or bool(name(site)) or _packs(site)
        return y.ndim > 1 and row and same and plain and useful and name(site) in CODES and supports(site)

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.jit.epilogue import finish

        y = io.outs[0].reshape(-1, io.outs[0].shape[-1])
        activation, bias = name(site), vector(site, io, 2)
        if _packs(site) and not _is_read_once(site):
            low = 0.0 if activation == "relu" and (bias is None or site.value(2) is not None) else -np.inf
            folded = None if bias is None or site.value(2) is None else bias
            calls = _packed(site, io, y, folded is not None, low)
            bias = bias if folded is None else None
            activation = "" if low == 0 else activation
        else:
            calls = multiply(site, io)
        residual = None
        if bias is None and not activation and not site.has(3):
            return calls
        if site.has(3):
            residual, copied = contiguous(io.ins[3], io.scratch)
            residual = residual.reshape(y.shape)
            calls += copied

        def part(span: slice) -> list[Call]:
            after = None if residual is None else residual[span]
            return finish(y[span], bias=bias, after=after, activation=activation)

        return [*calls, *rows(io, len(y), y.size, part)]

    return kernels(bind, fits, strided=True)


def _packs(site: Site) -> bool:
    """Whether B is a constant matrix, and A has its rows one behind the other."""
    w = site.value(1)
    return w is not None and w.ndim == 2 and site.spec(0).ndim > 1 and not site.attrs.get("transA", 0)


LEAST_WEIGHTS = 1 << 18
"""Elements of a matrix that a single row is multiplied with from which on it is left as it lies."""


def _is_read_once(site: Site) -> bool:
    """Whether a constant matrix B is large and beside a single row, which BLAS reads once in any layout."""
    (y,) = site.outs
    return site.spec(1).size >= LEAST_WEIGHTS and y.size == y.dims[-1]


def _packed(site: Site, io: Buffers, y: Array, with_bias: bool, low: float) -> list[Call]:
    """y = max(A @ B' + bias, low)"""
    from infera_kernels.jit import gemm

    a, calls = contiguous(io.ins[0], io.scratch)
    flip = bool(site.attrs.get("transB", 0))
    weight = io.pack(1, f"panels{flip:d}", lambda w: gemm.pack(w.T if flip else w))
    bias = io.pack(2, "panels", gemm.pack_bias) if with_bias else None
    parts = worth(product_ns(PRODUCT_NS * y.size * a.shape[-1], weight), split_of(io)).threads
    return [*calls, *io.parallel(gemm.product(a.reshape(len(y), -1), weight, bias, y, low=low, parts=parts))]


def vector(site: Site, io: Buffers, i: int) -> Array | None:
    """Input i as a vector; a constant as a copy that may be written to: functions are compiled for either kind."""
    if not site.has(i):
        return None
    if site.value(i) is not None:
        return io.pack(i, "vector", lambda a: np.array(a).reshape(-1))
    return io.ins[i].reshape(-1)


def convolution(told: Callable[[Site, Buffers], dict[str, Any]]) -> Kernels:
    """A convolution with channels last, whose weight and bias are constant; `told` gives conv2d's arguments."""

    def fits(site: Site) -> bool:
        constant = site.value(1) is not None and (not site.has(2) or site.value(2) is not None)
        return constant and site.spec(0).ndim in (3, 4) and site.attrs["activation"] in CODES

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.jit.conv import conv2d

        def pack(tag: str, build: Callable[[Array], Array]) -> Array:
            return io.pack(1, tag, lambda w: build(w if w.ndim == 4 else w[:, :, None]))

        def pack_b(tag: str, build: Callable[[Array], Array]) -> Array:
            return io.pack(2, tag, build)

        return conv2d(**told(site, io), pack=pack, pack_b=pack_b)

    return kernels(bind, fits, pays=lambda site: not _suits_numpy(site))


LANES, PANEL = 16, 32
"""Channels of a vector with AVX-512, and of a panel of weights: what has others leaves parts of them empty."""

FULL, LARGE, LINE = 0.8, 28, 8
"""How full panels are that are worth it; pixels of an image's side, and of a line."""


def _suits_numpy(site: Site) -> bool:
    """Whether NumPy's kernels are faster: where vectors are largely empty, lines are short, or channels are no whole
    vectors, which the tiles of Winograd's convolution need here and not there."""
    outputs, inputs, *kernel = site.spec(1).dims
    if int(site.attrs["group"]) > 1:
        return inputs == 1 and outputs < LANES
    if math.prod(kernel) == 1:
        return outputs < FULL * PANEL * -(-outputs // PANEL)
    if outputs < LANES // 2 or (kernel[-1] > 1 and site.outs[0].dims[-2] < LINE):
        return True
    uneven = bool(outputs % LANES or inputs % LANES) and min(outputs, inputs) >= LANES
    once = all(int(v) == 1 for name in ("strides", "dilations") for v in site.attrs[name] or ())
    return uneven and once and kernel == [3, 3] and min(site.outs[0].dims[1:-1]) >= LARGE


def max_pool(told: Callable[[Site, Buffers], dict[str, Any]]) -> Kernels:
    """Maximum pooling with channels last; `told` gives max_pool's arguments."""

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.jit.windows import max_pool

        parts = worth(ELEMENT_NS * site.spec(0).size, split_of(io)).threads
        return io.parallel(max_pool(**told(site, io), parts=parts))

    return kernels(
        bind,
        lambda site: len(site.outs) == 1 and site.spec(0).ndim in (3, 4),
        pays=lambda site: site.spec(0).dims[-1] >= PANEL,
    )


SCORE_NS = 0.4
"""What a score takes from one product to the next, about."""

Operands = Callable[[Site, Buffers], tuple[tuple[Array, Array, Array, Array], list[Array], Array | None]]
"""Queries, transposed keys, values and the result of an attention; its masks; a condition."""


def attention(operands: Operands, supports: Callable[[Site], bool], pays: Callable[[Site], bool]) -> Kernels:
    """Scaled dot-product attention, without a condition."""

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.jit.attention import attention

        (q, kt, v, out), masks, _ = operands(site, io)
        scores = out.size // out.shape[-1] * kt.shape[-1]
        parts = worth(scores * (PRODUCT_NS * (q.shape[-1] + out.shape[-1]) + SCORE_NS), split_of(io)).threads
        scale, zero = float(site.attrs["scale"]), ZERO[site.attrs["guarded"]]
        first, spread = attention(q, kt, v, out, io.scratch, scale=scale, zero=zero, masks=masks, parts=parts)
        return [*first, *io.parallel(spread)]

    return {"jit": Kernel(bind, supports, strided=True, pays=pays)}

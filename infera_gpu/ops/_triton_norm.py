"""The "triton" kernels of normalisations, of one input and of sums. Declares no operators itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray
from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.spec import Array, DType, TensorSpec, spec_of
from infera_kernels.triton.terms import CAST, Term

Shape = tuple[int, ...]
Inputs = dict[str, tuple[int, Shape | None]]
"""Name -> the site's input, and the shape in which it broadcasts to x; None for one that does so as it is."""


LONGEST_ROW, MANY_ROWS = 16384, 128
"""Softmax reads a longer row twice, by one program, where there are so many: they keep a GPU busy."""


@dataclass(frozen=True)
class Rows:
    """A normalisation as `infera_kernels.triton.normalize` knows it: its kind, and x seen as `shape`, its rows along
    `axes`. `inputs` and `outputs` say which of the site's are the arrays of those names, and their shapes as they
    broadcast to x; a shape is None for an array that is as it should be."""

    kind: str
    shape: Shape
    axes: tuple[int, ...]
    epsilon: float = 0.0
    inputs: Inputs = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    activation: str | None = None
    codes: tuple[int, int] | None = None
    """The inputs that are scale and zero point of the output "codes"."""


def rows(of: Callable[[Site], Rows | None], *, inplace: tuple[int, ...] = (0,)) -> Kernels:
    """The kernels of normalisations that `of` describes; None where there is no kernel for a site."""

    def found(site: Site) -> Rows:
        made = of(site)
        assert made is not None
        return made

    def there(site: Site, made: Rows) -> Inputs:
        return {name: where for name, where in made.inputs.items() if site.has(where[0])}

    def statistics(site: Site, made: Rows) -> list[str]:
        return [n for n in ("center", "scale") if made.outputs.get(n, len(site.outs)) < len(site.outs)]

    def supports(site: Site) -> bool:
        from infera_kernels.triton.norm import supports_rows

        made = of(site)
        if made is None or any(site.outs[made.outputs[n]].dtype != np.float32 for n in statistics(site, made)):
            return False
        if made.codes is not None and site.outs[made.outputs["codes"]].dtype.name not in ("int8", "uint8"):
            return False
        x = TensorSpec(made.shape, site.spec(0).dtype)
        terms = [i for name, (i, _) in there(site, made).items() if name in ("skip", "plus")]
        if any(site.spec(i).dtype != x.dtype for i in terms):
            return False
        others = [TensorSpec(s or site.spec(i).dims, site.spec(i).dtype) for i, s in there(site, made).values()]
        return supports_rows(made.kind, x, TensorSpec(made.shape, site.outs[0].dtype), *others, axes=made.axes)

    def workspace(site: Site) -> int:
        from infera_kernels.triton.normalize import scratch_of

        made = found(site)
        x = TensorSpec(made.shape, site.spec(0).dtype)
        pieces = scratch_of(made.kind, x, made.axes, statistics(site, made), invariant=site.batch_invariant)
        return sum(aligned(math.prod(shape) * np.dtype(name).itemsize) for shape, name in pieces)

    def bind(site: Site, io: Buffers) -> Sequence[Call]:
        from infera_kernels.triton import functions
        from infera_kernels.triton.normalize import normalize

        made = found(site)
        arrays: dict[str, Array] = {n: _shaped(io.ins[i], s) for n, (i, s) in there(site, made).items()}
        arrays |= {n: io.outs[made.outputs[n]] for n in statistics(site, made)}
        if made.outputs.get("sums", len(io.outs)) < len(io.outs):
            arrays["sums"] = io.outs[made.outputs["sums"]].reshape(made.shape)
        if made.codes is not None:
            arrays["codes"] = io.outs[made.outputs["codes"]].reshape(made.shape)
            arrays |= zip(("codes_scale", "codes_zero"), (io.ins[i] for i in made.codes), strict=True)
        x, out = io.ins[0].reshape(made.shape), io.outs[0].reshape(made.shape)
        how: dict[str, Any] = {"eps": made.epsilon, "invariant": site.batch_invariant}
        if made.activation is not None:
            how["activation"] = getattr(functions, made.activation)
        return normalize(made.kind, x, made.axes, out, io.launcher, io.scratch, **how, **arrays)

    return kernels(bind, supports, inplace=inplace, strided=False, workspace=workspace)


def _shaped(array: Array, shape: Shape | None) -> Array:
    return array if shape is None else array.reshape(shape)


def _trailing(site: Site) -> Rows:
    x, axis = site.spec(0), site.axis()
    axes = tuple(range(axis, x.ndim))
    kind = "layer" if site.node.op == "LayerNormalization" else "rms"
    inputs: Inputs = {"weight": (1, None), "bias": (2, None)}
    return Rows(kind, x.dims, axes, float(site.attrs["epsilon"]), inputs, {"center": 1, "scale": 2})


NORM = rows(_trailing)
"""LayerNormalization and RMSNormalization."""


QUANTIZED = rows(lambda site: replace(_trailing(site), kind="layer", outputs={"codes": 1}, codes=(3, 4)), inplace=())
"""QuantizedLayerNormalization."""


SIMPLIFIED = rows(
    lambda site: Rows(
        "rms",
        site.spec(0).dims,
        (site.spec(0).ndim - 1,),
        float(site.attrs["epsilon"]),
        {"weight": (1, None)},
        {"scale": 1},
    )
)
"""RMSNormalization as onnxruntime writes it, over the last axis."""


def skip_norm(*, center: bool) -> Kernels:
    """The kernels of normalised sums: input, skip, scale, then the shift if `center`, and a bias added before."""

    def of(site: Site) -> Rows:
        x = site.spec(0)
        inputs: Inputs = {"skip": (1, None), "weight": (2, None)}
        inputs |= {"bias": (3, None), "plus": (4, None)} if center else {"plus": (3, None)}
        outputs = {"center": 1, "scale": 2, "sums": 3}
        return Rows("layer" if center else "rms", x.dims, (x.ndim - 1,), float(site.attrs["epsilon"]), inputs, outputs)

    return rows(of, inplace=())


def grouped(
    site: Site,
    groups: int,
    epsilon: float,
    *,
    last: bool = False,
    of_groups: bool = False,
    activation: str | None = None,
) -> Rows:
    """Layer normalisation of groups of channels, the second axis or the `last` one; inputs 1 and 2 scale and shift
    channels, or groups if `of_groups`."""
    dims = site.spec(0).dims
    channels = dims[-1 if last else 1]
    batch, inner, size = dims[0], math.prod(dims[1:]) // max(channels, 1), channels // groups
    shape, axes = ((batch, inner, groups, size), (1, 3)) if last else ((batch, groups, size, inner), (2, 3))
    wide = (groups, 1 if of_groups else size)
    factor = wide if last else (*wide, 1)
    inputs: Inputs = {"weight": (1, factor), "bias": (2, factor)}
    return Rows("layer", shape, axes, epsilon, inputs, activation=activation)


def along(site: Site, axis: int, kind: str, epsilon: float, inputs: Inputs | None = None) -> Rows:
    """The normalisation of x along one axis."""
    dims = site.spec(0).dims
    shape = math.prod(dims[:axis]), dims[axis] if dims else 1, math.prod(dims[axis + 1 :])
    return Rows(kind, shape, (1,), epsilon, inputs or {})


def affine(
    of: Callable[[Site], Rows],
    factors: Callable[[Site], tuple[HostArray, HostArray] | None],
    wide: Callable[[Site, Any], Any],
) -> Kernels:
    """The kernels of (x - mean) * scale / sqrt(variance + epsilon) + bias, for inputs x, scale, bias, mean, variance.

    Where `factors(site)`, which follow from the inputs from 1 on, are known they are x * a + b for these. `wide` gives
    an input, or its spec's zeros, as it broadcasts to x.
    """

    def supports(site: Site) -> bool:
        from infera_kernels.triton.elementwise import supports as covers
        from infera_kernels.triton.norm import supports_rows

        made, known = of(site), factors(site)
        if known is None:
            shapes = [site.spec(0), *(_broadcast_spec(site, i, wide) for i in range(1, 5))]
            return covers(_normalized(site), [*shapes, spec_of(_epsilon(site))], site.outs[0])
        x, out = (TensorSpec(made.shape, s.dtype) for s in (site.spec(0), site.outs[0]))
        return supports_rows(made.kind, x, out, *known, axes=made.axes)

    def bind(site: Site, io: Buffers) -> Sequence[Call]:
        from infera_kernels.triton.elementwise import expression
        from infera_kernels.triton.normalize import normalize

        made, known = of(site), factors(site)
        if known is None:
            operands = [io.ins[0], *(wide(site, a) for a in io.ins[1:5]), io.constant(_epsilon(site))]
            return expression(_normalized(site), operands, io.outs[0], io.launcher)
        source = " ".join(map(str, (len(made.shape), *site.node.inputs[2:], *sorted(site.attrs.items()))))
        factor, term = known
        weight, bias = io.pack(1, f"factor {source}", lambda _: factor), io.pack(1, f"term {source}", lambda _: term)
        x, out = io.ins[0].reshape(made.shape), io.outs[0].reshape(made.shape)
        return normalize(made.kind, x, made.axes, out, io.launcher, io.scratch, weight=weight, bias=bias)

    return kernels(bind, supports, inplace=(0,), strided=False)


def _broadcast_spec(site: Site, i: int, wide: Callable[[Site, Any], Any]) -> TensorSpec:
    spec = site.spec(i)
    return spec_of(wide(site, np.broadcast_to(np.zeros((), spec.dtype), spec.dims)))


def _wide_type(site: Site) -> DType:
    """What is computed in: float64 where an input is, else float32."""
    return np.dtype(np.float64 if any(site.spec(i).dtype == np.float64 for i in range(5)) else np.float32)


def _epsilon(site: Site) -> HostArray:
    return np.array(site.attrs["epsilon"], _wide_type(site))


def _normalized(site: Site) -> tuple[Term, ...]:
    """Over x, scale, bias, mean, variance and epsilon. What is narrow is cast first, and the result last."""
    dtype, terms = _wide_type(site), list[Term]()

    def add(name: str, *args: int, dtype: DType | None = None) -> int:
        terms.append(Term(name, args, dtype=None if dtype is None else dtype.name))
        return 5 + len(terms)

    given = (add(CAST, i, dtype=dtype) if site.spec(i).dtype != dtype else i for i in range(5))
    x, scale, bias, mean, variance = given
    factor = add("div", scale, add("sqrt", add("add", variance, 5)))
    made = add("add", add("mul", add("sub", x, mean), factor), bias)
    if site.outs[0].dtype != dtype:
        add(CAST, made, dtype=site.outs[0].dtype)
    return tuple(terms)


def local_response(params: Callable[[Site], dict[str, Any]], axis: int) -> Kernels:
    """The kernels of local response normalisation along `axis`, told its parameters."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.local_response import supports_local_response

        return supports_local_response(site.spec(0), site.outs[0])

    def bind(site: Site, io: Buffers) -> Sequence[Call]:
        from infera_kernels.triton.local_response import local_response

        return local_response(io.ins[0], io.outs[0], io.launcher, axis=axis % site.spec(0).ndim, **params(site))

    return kernels(bind, supports, inplace=(), strided=True, strided_out=True)


def softmax(shape: Callable[[Site], tuple[int, int, int]], kind: str) -> Kernels:
    """The kernels of "softmax", "log_softmax" or "hardmax" along the middle of `shape(site)`."""
    anywhere = rows(lambda site: Rows(kind, shape(site), (1,)))["triton"]

    def many_rows(site: Site) -> bool:
        outer, length, inner = shape(site)
        many = outer >= MANY_ROWS or site.batch_invariant
        return kind != "hardmax" and inner == 1 and (length <= LONGEST_ROW or many)

    def workspace(site: Site) -> int:
        return 0 if many_rows(site) or anywhere.workspace is None else anywhere.workspace(site)

    def bind(site: Site, io: Buffers) -> Sequence[Call]:
        if not many_rows(site):
            return anywhere.bind(site, io)
        from infera_kernels.triton.softmax import softmax

        x, out = (a.reshape(shape(site)[:2]) for a in (io.ins[0], io.outs[0]))
        return softmax(x, out, io.launcher, log=kind == "log_softmax", invariant=site.batch_invariant)

    return kernels(bind, anywhere.supports, inplace=(0,), strided=False, workspace=workspace)


OPS: tuple[Op, ...] = ()

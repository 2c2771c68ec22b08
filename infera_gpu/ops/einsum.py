"""Einsum."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Cases, Op, Site, f32
from infera_gpu.ops._families import plain
from infera_gpu.spec import Array, TensorSpec

_ELLIPSIS = "..."

_MOST_LABELS = 26
"""The work is the product of all labels' sizes: with many labels, tiny inputs ask for any amount of it."""

_MOST_OPERANDS = 32
"""The order in which they are multiplied is searched for."""


def _parse(equation: str) -> tuple[list[str], str]:
    """The operands' terms and the output's term, the latter made up by NumPy's rule where it is left out."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        counts = Counter(left.replace(_ELLIPSIS, "").replace(",", ""))
        once = "".join(sorted(label for label, n in counts.items() if n == 1))
        output = (_ELLIPSIS if _ELLIPSIS in left else "") + once
    return terms, output


def _einsum(xp: Any, site: Site, *ins: Array) -> Array:
    """Half-precision operands are added up in float32, and the result rounded once."""
    half = ins[0].dtype.itemsize == 2 and ins[0].dtype.kind not in "iu"
    wide = [x.astype(np.float32) for x in ins] if half else list(ins)
    return xp.einsum(str(site.attrs["equation"]), *wide, optimize=True).astype(ins[0].dtype)


def _einsum_spec(site: Site) -> tuple[TensorSpec]:
    equation = str(site.attrs["equation"])
    terms, output = _parse(equation)
    operands = [s for s in site.ins if s is not None]
    labels = Counter("".join(terms).replace(_ELLIPSIS, ""))
    if not all(label.isascii() and label.isalpha() for label in labels):
        raise site.fail(f"equation '{equation}': labels are letters")
    if len(labels) > _MOST_LABELS:
        raise site.fail(f"equation '{equation}' has {len(labels)} labels, at most {_MOST_LABELS} are accepted")
    if len(terms) > _MOST_OPERANDS:
        raise site.fail(f"equation has {len(terms)} operands, at most {_MOST_OPERANDS} are accepted")
    if len({s.dtype for s in operands}) > 1:
        raise site.fail(f"inputs {', '.join(map(str, operands))} differ in type; expected one type")
    if len(terms) != len(operands):
        raise site.fail(f"equation '{equation}' has {len(terms)} terms for {len(operands)} inputs")
    sizes: dict[str, int] = {}
    batch: tuple[int, ...] = ()
    for term, spec in zip(terms, operands, strict=True):
        before, dots, after = term.partition(_ELLIPSIS)
        free = spec.ndim - len(before) - len(after)
        if free < 0 or (free and not dots):
            raise site.fail(f"equation '{equation}': term '{term}' does not fit {spec}")
        dims = spec.dims
        for label, size in zip(before + after, dims[: len(before)] + dims[len(before) + free :], strict=True):
            known = sizes.setdefault(label, size)
            if known != size and 1 not in (known, size):
                raise site.fail(f"equation '{equation}': '{label}' is {known} and {size}")
            if known == 1:
                sizes[label] = size
        try:
            batch = np.broadcast_shapes(batch, dims[len(before) : len(before) + free])
        except ValueError:
            raise site.fail(f"equation '{equation}': the parts under '...' do not broadcast") from None
    before, dots, after = output.partition(_ELLIPSIS)
    unknown = sorted(set(before + after) - set(sizes))
    if len(set(before + after)) < len(before + after):
        raise site.fail(f"equation '{equation}': the output names a label twice")
    if unknown:
        raise site.fail(f"equation '{equation}': output label '{unknown[0]}' is in no input")
    shape = (*(sizes[k] for k in before), *(batch if dots else ()), *(sizes[k] for k in after))
    return (TensorSpec(shape, operands[0].dtype),)


OPS: tuple[Op, ...] = (
    Op(
        "Einsum",
        12,
        infer=_einsum_spec,
        compute=plain(_einsum),
        attrs={"equation": REQUIRED},
        cases=Cases(
            lambda: (
                Case("matmul", (f32(2, 3), f32(3, 4)), {"equation": "ij,jk->ik"}),
                Case("implicit", (f32(2, 3), f32(3, 4)), {"equation": "ij, jk"}),
                Case("batch", (f32(2, 3, 4), f32(5, 4)), {"equation": "bsd,ed->bse"}),
                Case("ellipsis", (f32(2, 3, 4), f32(2, 4, 5)), {"equation": "...ij,...jk->...ik"}),
                Case("transpose", (f32(2, 3),), {"equation": "ij->ji"}),
                Case("trace", (f32(3, 3),), {"equation": "ii"}),
                Case("outer", (f32(2), f32(3)), {"equation": "i,j->ij"}),
                Case("ellipsis_sum", (f32(2, 3, 4),), {"equation": "...i->..."}),
            )
        ),
    ),
)

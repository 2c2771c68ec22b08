"""Einsum."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from infera_gpu.graph import Attrs, HostArray, Node, made_name
from infera_gpu.op import REQUIRED, Case, Cases, Expansion, Op, Site, f32
from infera_gpu.ops._families import i64, plain
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


# ---- apart


@dataclass(frozen=True, slots=True)
class _Labelled:
    """A value, the labels of its axes and their sizes."""

    name: str
    labels: tuple[str, ...]
    dims: tuple[int, ...]

    def size(self, labels: Sequence[str]) -> int:
        return math.prod(self.dims[self.labels.index(label)] for label in labels)


_MOST_ROWS = 5
"""Axes of a product beside its columns': kernels walk six."""


@dataclass
class _Parts:
    """The nodes of an expansion as they are made, of the site's opset."""

    site: Site
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, HostArray] = field(default_factory=dict)

    def add(self, op: str, *inputs: str, attrs: Attrs | None = None) -> str:
        node, number = self.site.node, len(self.nodes)
        made = made_name(node.outputs[0], op.lower(), number)
        name = f"{node.name}/{op.lower()}"
        self.nodes.append(Node(op, inputs, (made,), attrs or {}, name=name))
        return made

    def constant(self, value: HostArray) -> str:
        name = made_name(self.site.node.outputs[0], "constant", len(self.constants))
        self.constants[name] = value
        return name

    def reshaped(self, name: str, dims: Sequence[int], wanted: Sequence[int]) -> str:
        return name if tuple(dims) == tuple(wanted) else self.add("Reshape", name, self.constant(i64(*wanted)))

    def turned(self, x: _Labelled, labels: tuple[str, ...]) -> _Labelled:
        """Its axes in another order."""
        if labels == x.labels:
            return x
        perm = tuple(map(x.labels.index, labels))
        name = self.add("Transpose", x.name, attrs={"perm": perm})
        return _Labelled(name, labels, tuple(x.dims[i] for i in perm))

    def without(self, x: _Labelled, labels: Sequence[str]) -> _Labelled:
        """Axes of size 1 left out."""
        kept = [i for i, label in enumerate(x.labels) if label not in labels]
        dims = tuple(x.dims[i] for i in kept)
        return _Labelled(self.reshaped(x.name, x.dims, dims), tuple(x.labels[i] for i in kept), dims)

    def summed(self, x: _Labelled, labels: Sequence[str]) -> _Labelled:
        """The sums along some axes."""
        axes = tuple(i for i, label in enumerate(x.labels) if label in labels)
        if not axes:
            return x
        if self.site.opset < 13:
            name = self.add("ReduceSum", x.name, attrs={"axes": axes, "keepdims": 0})
        else:
            name = self.add("ReduceSum", x.name, self.constant(i64(*axes)), attrs={"keepdims": 0})
        left = [i for i in range(len(x.dims)) if i not in axes]
        return _Labelled(name, tuple(x.labels[i] for i in left), tuple(x.dims[i] for i in left))

    def scaled(self, a: _Labelled, b: _Labelled, wanted: tuple[str, ...]) -> None:
        """Every element of one with every element of the other; axes that both have go together."""
        names = []
        for x in (a, b):
            turned = self.turned(x, tuple(label for label in wanted if label in x.labels))
            wide = [turned.size([label]) if label in x.labels else 1 for label in wanted]
            names.append(self.reshaped(turned.name, turned.dims, wide))
        self.add("Mul", *names)

    def multiplied(self, a: _Labelled, b: _Labelled, wanted: tuple[str, ...]) -> None:
        """One product of matrices: `a`'s axes alone are its rows, `b`'s its columns."""
        batch = tuple(label for label in wanted if label in a.labels and label in b.labels)
        rows = tuple(label for label in wanted if label in a.labels and label not in batch)
        columns = tuple(label for label in wanted if label in b.labels and label not in batch)
        if rows and columns and wanted.index(columns[0]) < wanted.index(rows[0]):
            a, b, rows, columns = b, a, columns, rows
        inner = tuple(label for label in max(a, b, key=lambda x: math.prod(x.dims)).labels if label not in wanted)
        left, right = self.turned(a, (*batch, *rows, *inner)), self.turned(b, (*batch, *inner, *columns))
        made = (*batch, *rows, *columns)
        dims = tuple((left if label in left.labels else right).size([label]) for label in made)
        lead, m, k, n = dims[: len(batch)], left.size(rows), left.size(inner), right.size(columns)
        above = (*lead, m)
        if not batch and 1 < len(rows) <= _MOST_ROWS:  # beside one matrix rows may have axes of their own
            above = dims[: len(rows)]
        elif len(lead) > _MOST_ROWS - 1:
            lead = (math.prod(lead),)
            above = (*lead, m)
        factors = self.reshaped(left.name, left.dims, (*above, k)), self.reshaped(right.name, right.dims, (*lead, k, n))
        product = self.reshaped(self.add("MatMul", *factors), (*above, n), dims)
        self.turned(_Labelled(product, made, dims), wanted)

    def finished(self) -> Expansion:
        outputs = self.site.node.outputs
        if not self.nodes:
            return Expansion((Node("Identity", self.site.node.inputs, outputs, name=self.site.node.name),))
        last = replace(self.nodes[-1], outputs=outputs, name=self.site.node.name)
        return Expansion((*self.nodes[:-1], last), self.constants)


def _labels(term: str, ndim: int) -> tuple[str, ...]:
    """The labels of a term's axes, those under "..." numbered from the last."""
    before, dots, after = term.partition(_ELLIPSIS)
    free = ndim - len(before) - len(after) if dots else 0
    return (*before, *(f"{_ELLIPSIS}{i}" for i in reversed(range(free))), *after)


_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


def _expand(site: Site) -> Expansion | None:
    """One operand's sums and another order of its axes, or two operands' product, by operators that have kernels.

    Not diagonals, and in two bytes not what would be rounded between sums and a product.
    """
    (out,) = _einsum_spec(site)
    terms, output = _parse(str(site.attrs["equation"]))
    specs = [s for s in site.ins if s is not None]
    if len(specs) > 2 or out.dtype.name not in _FLOATS or 0 in (out.size, *(s.size for s in specs)):
        return None
    operands = [
        _Labelled(name, _labels(term, spec.ndim), spec.dims)
        for name, term, spec in zip(site.node.inputs, terms, specs, strict=True)
    ]
    if any(len(set(x.labels)) < len(x.labels) for x in operands):
        return None
    wanted, parts = _labels(output, out.ndim), _Parts(site)
    if len(operands) == 1:
        summed = parts.summed(operands[0], [label for label in operands[0].labels if label not in wanted])
        parts.turned(summed, wanted)
        return parts.finished()
    for i in (0, 1):  # an axis of size 1 beside a longer one repeats
        x, other = operands[i], operands[1 - i]
        stretched = [
            label for label in x.labels if label in other.labels and x.size([label]) == 1 < other.size([label])
        ]
        operands[i] = parts.without(x, stretched)
    for i in (0, 1):
        x, other = operands[i], operands[1 - i]
        alone = [label for label in x.labels if label not in wanted and label not in other.labels]
        if alone and out.dtype.itemsize == 2:
            return None
        operands[i] = parts.summed(x, alone)
    a, b = operands
    if any(label not in wanted and label in b.labels for label in a.labels):
        parts.multiplied(a, b, wanted)
    else:
        parts.scaled(a, b, wanted)
    return parts.finished()


OPS: tuple[Op, ...] = (
    Op(
        "Einsum",
        12,
        infer=_einsum_spec,
        compute=plain(_einsum),
        expand=_expand,
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
                Case("heads", (f32(2, 3, 4, 5), f32(4, 5, 7)), {"equation": "abcd,cde->abe"}),
                Case("turned", (f32(3, 5, 2), f32(4, 5, 2)), {"equation": "ikb,jkb->jbi"}),
                Case("outer_batch", (f32(3, 2), f32(2, 5)), {"equation": "ib,bj->jbi"}),
                Case("stretched", (f32(2, 1, 4), f32(2, 3, 4)), {"equation": "bsd,bsd->bs"}),
                Case("stretched_ellipsis", (f32(3, 1, 2, 4), f32(5, 4, 3)), {"equation": "...ij,...jk->...ki"}),
                Case("sums_alone", (f32(2, 3, 4), f32(4, 5)), {"equation": "bij,jk->bk"}),
                Case("scalar", (f32(4), f32(4)), {"equation": "i,i->"}),
                Case("batches", (f32(2, 3, 4, 5, 6), f32(2, 3, 4, 6, 7)), {"equation": "abcij,abcjk->abcik"}),
                Case(
                    "many_batches",
                    (f32(2, 1, 2, 1, 3, 4, 5), f32(2, 1, 2, 1, 3, 5, 6)),
                    {"equation": "abcdeij,abcdejk->abcdeik"},
                ),
                Case("many_rows", (f32(2, 1, 2, 3, 1, 2, 4), f32(4, 5)), {"equation": "abcdefg,gh->abcdefh"}),
            )
        ),
    ),
)

"""What the steps of a plan do, counted from their declarations: operations of products, and bytes.

Operations are the multiplications and additions of products, convolutions, attention and recurrences; what else a step
computes is hidden behind its memory and not counted. Bytes are those of every operand once, read or written, whatever a
kernel reads again: the least that the step must move. Of a table that is looked up, as much as comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from infera_gpu.op import Site
from infera_gpu.plan import Plan, Step

HALF, TF32, IEEE, INT8 = "half", "tf32", "ieee", "int8"
"""What multiplies: tensor cores on halves, on float32 rounded to 10 bits, or on bytes; float32 as it is, without."""

Count = Callable[[Site], int]


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step. `arithmetic` is one of the four where there are operations, else empty. `before` are those of the
    bytes that are moved by a launch before the one that computes."""

    label: str
    arithmetic: str
    operations: int
    nbytes: int
    launches: int = 1
    before: int = 0


def visible(queries: int, keys: int, *, causal: bool) -> int:
    """Pairs of a query and a key that it may see; where causal, the last query sees every key."""
    if not causal:
        return queries * keys
    rows = min(queries, keys)
    return rows * keys - rows * (rows - 1) // 2


def _product(site: Site) -> int:
    """Two for each element of the result and of the depth."""
    a = site.spec(0).dims
    depth = a[-2] if site.attrs.get("transA") and len(a) > 1 else a[-1]
    return 2 * site.outs[0].size * depth


def _gated(site: Site) -> int:
    """Two products."""
    return 2 * _product(site)


def _convolution(weight: int) -> Count:
    """Two for each element of the result and of a filter, (outputs, inputs / groups, window...)."""
    return lambda site: 2 * site.outs[0].size * math.prod(site.spec(weight).dims[1:])


def _transposed_convolution(site: Site) -> int:
    return 2 * site.spec(0).size * math.prod(site.spec(1).dims[1:])


def _attended(queries: int, keys: int, size: int, *, causal: bool) -> int:
    """Scores and weighted values: `size` elements of queries and results together, in `queries` rows a head."""
    return 2 * (size // max(queries, 1)) * visible(queries, keys, causal=causal)


def _fused_attention(site: Site) -> int:
    q, keys = site.spec(0), site.spec(2).dims[-2]
    return _attended(q.dims[-2], keys, q.size + site.outs[0].size, causal=False)


def _attention(site: Site) -> int:
    """ONNX's, of three axes or four; a past comes before the keys."""
    q = site.spec(0)
    keys = site.spec(1).dims[-2] + (site.spec(4).dims[-2] if site.has(4) else 0)
    return _attended(q.dims[-2], keys, q.size + site.outs[0].size, causal=bool(site.attrs["is_causal"]))


def _grouped_attention(site: Site) -> int:
    """Of com.microsoft: the number of keys is the value of an input."""
    (total,) = site.ints(6) or (site.spec(0).dims[1],)
    return _attended(site.spec(0).dims[1], total, 2 * site.outs[0].size, causal=True)


def _recurrence(gates: int) -> Count:
    """Inputs and states times their weights, every step and direction: X (steps, batch, inputs), R (directions, gates
    times hidden, hidden)."""

    def count(site: Site) -> int:
        steps, batch, inputs = site.spec(0).dims
        directions, _, hidden = site.spec(2).dims
        return 2 * steps * batch * directions * gates * hidden * (inputs + hidden)

    return count


OPERATIONS: Mapping[str, Count] = {
    **dict.fromkeys(
        (
            *("MatMul", "infera.FusedMatMul", "infera.NarrowMatMul", "Gemm", "com.microsoft.FusedGemm"),
            *("com.microsoft.FusedMatMul", "MatMulInteger", "QLinearMatMul", "com.microsoft.MatMulIntegerToFloat"),
            *("com.microsoft.DynamicQuantizeMatMul", "com.microsoft.QGemm", "com.microsoft.MatMulNBits"),
            *("infera.QuantizedMatMul", "infera.NormalizedMatMul", "infera.FusedMatMulNBits"),
        ),
        _product,
    ),
    "infera.GatedMatMul": _gated,
    **dict.fromkeys(
        (
            *("Conv", "ConvInteger", "infera.FusedConv", "infera.FusedConvNHWC", "com.microsoft.FusedConv"),
            *("infera.QuantizedConv", "infera.QuantizedConvNHWC"),
        ),
        _convolution(1),
    ),
    **dict.fromkeys(("QLinearConv", "com.microsoft.QLinearConv"), _convolution(3)),
    **dict.fromkeys(("ConvTranspose", "infera.ConvTransposeNHWC"), _transposed_convolution),
    "infera.Attention": _fused_attention,
    "Attention": _attention,
    "com.microsoft.GroupQueryAttention": _grouped_attention,
    "LSTM": _recurrence(4),
    "GRU": _recurrence(3),
    "RNN": _recurrence(1),
}
"""By the operator's domain and name."""

TABLES: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Gather", "GatherND", "GatherElements"), (0,)),
    "infera.Lookup": (1,),
    "infera.EmbeddedNormalization": (1, 3, 5),
    "com.microsoft.EmbedLayerNormalization": (2, 3, 4),
}
"""Operator -> the inputs of which it reads no more than comes out."""


APPENDED: Mapping[str, Callable[[Site], float]] = {
    "com.microsoft.GroupQueryAttention": lambda site: site.spec(0).dims[1] / site.outs[1].dims[2],
}
"""Operator -> the share of an output in the place of an input that it writes: of caches, the new tokens."""


BEFORE = frozenset({"infera.NormalizedMatMul", "infera.GatedMatMul"})
"""Operators that may prepare input 0 in a launch of its own: it is written, and read again."""


def arithmetic_of(dtype: np.dtype[np.generic], *, tf32: bool) -> str:
    """What multiplies operands of a type."""
    if dtype.itemsize == 1:
        return INT8
    if dtype.itemsize == 2:
        return HALF
    return TF32 if tf32 else IEEE


def _name_of(step: Step) -> str:
    """The step's operator, by domain and name."""
    if step.placed is None:
        return ""
    op = step.placed.op
    return f"{op.domain}.{op.name}" if op.domain else op.name


def work_of(step: Step, launches: int, *, tf32: bool = False, kept: Collection[str] = ()) -> Work:
    """What a step does; with `tf32` its products of float32 are rounded to that. What lies in the blocks of memory that
    are `kept` is in the place of an input."""
    read = {(o.root, o.offset, o.shape, o.strides): o.nbytes for o in step.ins if o is not None}
    name = _name_of(step)
    appended = APPENDED[name](step.placed.site) if step.placed is not None and name in APPENDED else 1.0
    written = round(sum(o.nbytes * (appended if o.root in kept else 1) for o in step.outs))
    operations, arithmetic, before = 0, "", 0
    if step.placed is not None:
        for table in (step.ins[i] for i in TABLES.get(name, ()) if i < len(step.ins)):
            if table is not None:
                read[table.root, table.offset, table.shape, table.strides] = min(table.nbytes, written)
        count = OPERATIONS.get(name)
        if count is not None:
            operations = count(step.placed.site)
            arithmetic = arithmetic_of(step.placed.site.spec(0).dtype, tf32=tf32)
            if name in BEFORE and launches > 1:
                spec = step.placed.site.spec(0)
                before = 2 * spec.size * spec.dtype.itemsize
    return Work(step.label, arithmetic, operations, sum(read.values()) + written + before, launches, before)


def works_of(
    plan: Plan, launches: Sequence[int], *, tf32: bool = False, kept: Collection[str] = ()
) -> tuple[Work, ...]:
    """Of all steps of a plan, each of so many launches; outputs that are `kept` lie in the place of inputs."""
    roots = {plan.outputs[name].root for name in kept}
    return tuple([work_of(step, n, tf32=tf32, kept=roots) for step, n in zip(plan.steps, launches, strict=True)])


def launches_of(works: Iterable[Work]) -> int:
    return sum(w.launches for w in works)


def operations_of(works: Iterable[Work]) -> int:
    return sum(w.operations for w in works)


def bytes_of(works: Iterable[Work]) -> int:
    return sum(w.nbytes for w in works)

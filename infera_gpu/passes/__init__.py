"""Rewrites of the graph, once a model: what pays on every device, each provably safe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import numpy as np

from infera_gpu.graph import Graph, Node
from infera_gpu.op import Registry
from infera_gpu.passes import (
    activation,
    attention,
    attention_forms,
    axis_norm,
    centre,
    columns,
    conv,
    dilated,
    embedding,
    expanded,
    gated,
    gates,
    gelu,
    group,
    group_last,
    head_attention,
    heads,
    heads_last,
    lookup,
    masked,
    matmul,
    nbits,
    nhwc,
    norm,
    norm_affine,
    norm_apart,
    norm_batch,
    norm_factors,
    normalized,
    pad,
    pairs,
    products,
    products_integer,
    products_nbits,
    quant,
    quant_bias,
    quantized,
    quantized_finish,
    quantized_pad,
    quantized_pool,
    repeated,
    rotary,
    rows,
    scale,
    sinking,
    softmax,
    standard_attention,
    there_and_back,
    transposed,
    unit,
    unread,
    weights,
    windows,
)
from infera_gpu.passes.chains import chained, may_chain
from infera_gpu.passes.draft import Draft
from infera_gpu.passes.engine import Fusions, exhaust
from infera_gpu.passes.fold import drop_dead, fold_constants
from infera_gpu.passes.half import BFLOAT16, FLOAT16, halved
from infera_gpu.passes.int8 import quantised
from infera_gpu.passes.known import Known
from infera_gpu.passes.layout import convert
from infera_gpu.passes.quantized_norm import quantized_norms
from infera_gpu.passes.same import drop_outputs, remove_identities, share_values
from infera_gpu.passes.siblings import Siblings, joined
from infera_gpu.passes.signed import signed
from infera_gpu.passes.skipped import apart
from infera_gpu.spec import DType, OptionalSpec

Precision: TypeAlias = Literal["fp32", "tf32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

HALVES: Mapping[str, DType] = MappingProxyType({"fp16": FLOAT16, "bf16": BFLOAT16})
"""The precisions whose values take two bytes."""

QUANTIZED = Fusions(
    *quantized_pad.EARLY, *quantized.FUSIONS, *quantized_finish.EARLY, *quantized_pool.FUSIONS, *quant.FUSIONS
)
"""Applied first of all, where there are kernels for products of integers."""

FUSIONS = Fusions(
    *dilated.FUSIONS,
    *transposed.FUSIONS,
    *nhwc.FUSIONS,
    *group_last.FUSIONS,
    *scale.FUSIONS,
    *sinking.FUSIONS,
    *there_and_back.FUSIONS,
    *pairs.FUSIONS,
    *pad.FUSIONS,
    *quantized_pad.LATE,
    *norm_factors.FUSIONS,
    *norm.FUSIONS,
    *norm_batch.FUSIONS,
    *norm_affine.FUSIONS,
    *group.FUSIONS,
    *axis_norm.FUSIONS,
    *unit.FUSIONS,
    *softmax.FUSIONS,
    *gelu.FUSIONS,
    *activation.FUSIONS,
    *rotary.FUSIONS,
    *heads.FUSIONS,
    *head_attention.FUSIONS,
    *masked.FUSIONS,
    *standard_attention.FUSIONS,
    *windows.FUSIONS,
    *attention_forms.FUSIONS,
    *attention.FUSIONS,
    *heads_last.FUSIONS,
    *expanded.FUSIONS,
    *repeated.FUSIONS,
    *gates.FUSIONS,
    *lookup.FUSIONS,
    *embedding.FUSIONS,
    *rows.FUSIONS,
    *columns.FUSIONS,
    matmul.GEMM_OF_NUMBER,
    matmul.BIAS,
    conv.BIAS,
    *weights.FUSIONS,
    *conv.FUSIONS,
    *norm_apart.FUSIONS,
    *centre.FUSIONS,
    *quant_bias.FUSIONS,
    *quantized_finish.LATE,
    *matmul.FUSIONS,
    *nbits.FUSIONS,
    *unread.FUSIONS,
    *gated.FUSIONS,
)
"""In the order in which they are applied."""

SIBLINGS: tuple[Siblings, ...] = products.SIBLINGS + products_integer.SIBLINGS + products_nbits.SIBLINGS
"""Applied to what fusions leave."""

LAST = Fusions(*normalized.FUSIONS)
"""Applied to what those leave."""


@dataclass(frozen=True, slots=True)
class Fired:
    """A pass that changed a graph: how often it did, and how many nodes of which operators the graph had before and
    after."""

    name: str
    times: int
    before: Counter[str]
    after: Counter[str]


Report = Callable[[Fired], None]


@dataclass(frozen=True, slots=True)
class _Passes:
    registry: Registry
    report: Report | None
    strict: bool
    kinds: tuple[str, ...]
    channels_last: bool

    def run(self, graph: Graph, precision: Precision = "fp32") -> Graph:
        """The graph after every pass. Its subgraphs stay in float32."""
        if any(n.subgraphs for n in graph.nodes):
            graph = replace(graph, nodes=tuple(map(self.inside, graph.nodes)))
        if precision == "int8":
            graph = self.changed("int8", graph, quantised(graph))
        if not quant.INTEGERS.isdisjoint(self.kinds):
            integers = "cpu" not in self.kinds
            if integers:
                graph = self.changed("signed", graph, signed(graph))
            graph = self.fused(graph, QUANTIZED)
            graph = self.alive(self.changed("centred", graph, centre.centred(graph, integers=integers)))
        known: dict[str, Known] = {}
        early: tuple[tuple[str, Callable[[Graph], Graph]], ...] = (
            ("fold_constants", lambda g: drop_dead(fold_constants(g, self.registry, known))),
            ("remove_identities", lambda g: drop_outputs(remove_identities(g, known))),
            ("share_values", lambda g: share_values(g, self.registry)),
        )
        for name, rewritten in early:
            before, graph = graph, rewritten(graph)
            self.tell(name, len(before.nodes) - len(graph.nodes), self.ops(before), self.ops(graph))
        if "triton" in self.kinds and not self.strict:
            graph = self.changed("skipped_norms", graph, apart(graph))
        graph = self.fused(graph, FUSIONS, known)
        for siblings in SIBLINGS:
            if siblings.fits(self.strict, self.kinds):
                before, (graph, times) = graph, joined(graph, siblings)
                self.tell(siblings.name, times, self.ops(before), self.ops(graph))
        graph = self.fused(graph, LAST)
        if "triton" in self.kinds and not self.strict:
            graph = self.changed("quantized_norms", graph, quantized_norms(graph))
        if precision in HALVES:
            graph = self.changed(precision, graph, halved(graph, HALVES[precision]))
        if self.channels_last:
            moved = convert(graph, self.registry, "triton" if "triton" in self.kinds else "cpu")
            graph = self.changed("channels_last", graph, moved)
        if not {"cpu", "triton"}.isdisjoint(self.kinds) and may_chain(graph):
            draft = Draft(graph)
            ops = self.ops(draft)
            self.tell("elementwise_chains", chained(draft, self.kinds), ops, self.ops(draft))
            graph = self.alive(draft.finished())
        return graph

    def fused(self, graph: Graph, fusions: Fusions, known: dict[str, Known] | None = None) -> Graph:
        """The graph after these fusions, in order. `known`: see `Facts`."""
        among = fusions.among({n.qualified for n in graph.nodes})
        fitting = [(f, i in among) for i, f in enumerate(fusions) if among and f.fits(self.strict, self.kinds)]
        if not any(may for _, may in fitting):
            return self.alive(graph)
        draft, changed = Draft(graph, known), False
        for fusion, may in fitting:
            if may or changed:  # what one makes may be what another looks for
                ops = self.ops(draft)
                times = exhaust(draft, fusion)
                changed = changed or times > 0
                self.tell(fusion.name, times, ops, self.ops(draft))
        return self.alive(draft.finished())

    def inside(self, node: Node) -> Node:
        """The node with its subgraphs rewritten."""
        if not node.subgraphs:
            return node
        return replace(node, attrs={**node.attrs, **{k: self.body(g) for k, g in node.subgraphs}})

    def body(self, graph: Graph) -> Graph:
        """A subgraph after every pass. It runs on what it is given: what its inputs declare does not count."""
        rewritten = self.run(replace(graph, inputs=dict.fromkeys(graph.inputs, OptionalSpec())))
        return replace(rewritten, inputs=graph.inputs)

    def changed(self, name: str, before: Graph, after: Graph) -> Graph:
        """The graph after a pass that looks at the whole of it."""
        self.tell(name, int(after is not before), self.ops(before), self.ops(after))
        return after

    def alive(self, graph: Graph) -> Graph:
        """The graph without what no output needs."""
        before, graph = graph, drop_dead(graph)
        self.tell("drop_dead", len(before.nodes) - len(graph.nodes), self.ops(before), self.ops(graph))
        return graph

    def ops(self, graph: Graph | Draft) -> Counter[str]:
        """How many nodes there are of each operator, where somebody wants to know."""
        if self.report is None:
            return Counter()
        if isinstance(graph, Draft):
            return Counter({op: len(slots) for op, slots in graph.by_op.items()})
        return Counter(n.qualified for n in graph.nodes)

    def tell(self, name: str, times: int, before: Counter[str], after: Counter[str]) -> None:
        if times and self.report is not None:
            self.report(Fired(name, times, before, after))


def optimize(
    graph: Graph,
    registry: Registry,
    report: Report | None = None,
    *,
    strict: bool = False,
    kinds: Sequence[str] = ("cpu",),
    channels_last: bool = False,
    precision: Precision = "fp32",
) -> Graph:
    """The graph after every pass, its subgraphs first. `report` is told what each pass that changed something did.

    `strict` leaves out the fusions that change the order of operations. `kinds` are the kinds of kernels that the
    device runs, `channels_last` says that it prefers convolutions whose channels are the last axis, `precision` in what
    float32 graphs are computed.
    """
    with np.errstate(all="ignore"):  # what is computed in advance may overflow as it would in a run
        return _Passes(registry, report, strict, tuple(kinds), channels_last).run(graph, precision)

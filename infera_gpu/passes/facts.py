"""What is known of values before any shape is: element types, ranks, and dimensions where they follow.

Only what the inputs and constants say counts, which every run is held to; what a file claims of other values does not.
A dimension that is not known is named by the value that it is met in, so that equal names are equal sizes (`sizes`).
A value without a rule (`rules`) is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping

from infera_gpu.graph import Graph, HostArray, Node, made_name
from infera_gpu.passes import sizes
from infera_gpu.passes.known import Known, Rule
from infera_gpu.passes.rules import RULES
from infera_gpu.spec import TensorSpec, spec_of


class Facts:
    """The types of a graph's values, found out when they are asked for. `producers` may change as long as the values
    of a name stay alike. `known` is what has been found out before of values of these names, and is added to."""

    def __init__(self, graph: Graph, producers: Mapping[str, Node], known: dict[str, Known] | None = None) -> None:
        self._graph, self.producers = graph, producers
        self._known = {} if known is None else known
        self._sizes: dict[str, sizes.Sizes | None] = {}

    def constant(self, value: str) -> HostArray | None:
        return self._graph.constants.get(value)

    def spec(self, value: str) -> Known:
        """What is known of a value; None where not even its element type is."""
        known, producers, todo = self._known, self.producers, [value]
        while todo:
            asked = todo[-1]
            n = None if asked in known else producers.get(asked)
            if n is not None:
                rule = RULES.get(n.qualified) if n.outputs[0] == asked or n.op == "Split" else None
                missing = [] if rule is None else [i for i in n.inputs if i and i not in known]
                if missing:
                    known.update({i: self._given(i) for i in missing if i not in producers})
                    todo += [i for i in missing if i not in known]
                    continue
                known[asked] = None if rule is None else self._applied(rule, n, asked)
            elif asked not in known:
                known[asked] = self._given(asked)
            todo.pop()
        return known[value]

    def sizes(self, value: str) -> sizes.Sizes | None:
        """The elements of a shape that the graph computes; None where not even their count is known, or they are
        floats, which no operator takes for a shape."""
        spec = self.spec(value)
        return None if spec is not None and spec.dtype.kind == "f" else sizes.sizes(self, value, self._sizes)

    def _given(self, value: str) -> Known:
        constant = self.constant(value)
        if constant is not None:
            return spec_of(constant)
        spec = self._graph.inputs.get(value)
        return _with_names(spec, value) if isinstance(spec, TensorSpec) else None

    def _applied(self, rule: Rule, n: Node, value: str) -> Known:
        try:
            made = rule(self, n, [self._known.get(i) if i else None for i in n.inputs])
            return made if made is None else _with_names(made, value)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return None


def _with_names(spec: TensorSpec, value: str) -> TensorSpec:
    """Each dimension that is not known has a name: that of the value and its axis."""
    if None not in spec.shape:
        return spec
    shape = tuple([made_name(value, str(i)) if d is None else d for i, d in enumerate(spec.shape)])
    return TensorSpec(shape, spec.dtype, spec.ranked)

"""ONNX file -> Graph. With schemas, source, tensors and wellformed, the only modules that import onnx."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infera_gpu.errors import InvalidModel
from infera_gpu.functions import Function, Key, Reference, constants_first, inline
from infera_gpu.graph import EMPTY, Graph, HostArray, Node, made_name, ordered
from infera_gpu.source import Bodies, Room, Source, read_model, usual_room
from infera_gpu.spec import Dim, DType, MapSpec, OptionalSpec, SequenceSpec, TensorSpec, ValueSpec, dtype_of_onnx
from infera_gpu.tensors import Tensors
from infera_gpu.wellformed import check_ir_version, check_node, domain_name, opset_versions, text, value_name

if TYPE_CHECKING:
    import onnx


def load_graph(source: Source, mapped: bool = True, room: Room = usual_room) -> Graph:
    """The graph of an ONNX model: a path, serialised bytes or a ModelProto.

    External data beside a path is mapped, or read where `mapped` is not set. Large initialisers of a file are read to
    `room`.

    Nodes are put in topological order: ONNX asks for it, and not every file has it. Model-local functions are inlined,
    Constant nodes become constants and sparse tensors dense ones. Raises InvalidModel for anything that is not a
    complete ONNX model, naming what is wrong.
    """
    model, name, bodies = read_model(source, room=room)
    tensors = Tensors(Path(os.fsdecode(source)) if isinstance(source, str | os.PathLike) else None, mapped)
    try:
        check_ir_version(model.ir_version)
        opsets = opset_versions(model.opset_import)
        reader = _Reader(opsets, tensors)
        graph = inline(reader.graph(model.graph, name, bodies), _functions(model, reader))
        graph = constants_first(graph, _constant)
        if model.ir_version < 4:  # such files list every initialiser as an input
            graph = replace(graph, overridable={})
        if not graph.outputs:
            raise InvalidModel("the graph has no outputs")
        return graph.check()
    except InvalidModel as error:
        raise InvalidModel(f"{name}: {error}") from None
    except RecursionError:
        raise InvalidModel(f"{name}: its graphs are nested too deep") from None


def _functions(model: onnx.ModelProto, reader: _Reader) -> dict[Key, Function]:
    found: dict[Key, Function] = {}
    shared = dict(reader.opsets)
    for f in model.functions:
        key = (domain_name(f.domain), text(f.name), text(f.overload))
        label = ".".join(filter(None, key))
        if key in found:
            raise InvalidModel(f"the function {label} is defined twice")
        try:
            own = ChainMap(opset_versions(f.opset_import, required=False), shared)
            found[key] = _Reader(own, reader.tensors, in_function=True).function(f)
        except InvalidModel as error:
            raise InvalidModel(f"in the function {label}: {error}") from None
    return found


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads what one list of imported operator sets covers."""

    opsets: Mapping[str, int]
    tensors: Tensors
    in_function: bool = False

    def graph(self, proto: onnx.GraphProto, name: str = "", bodies: Bodies | None = None) -> Graph:
        """`bodies` holds the raw data of initialisers that are empty in `proto`, by their number."""
        constants: dict[str, HostArray] = {}

        def new(label: str, kind: str) -> str:
            if _named(label, kind) in constants:
                raise InvalidModel(f"initialiser '{label}' is given twice")
            return f"{kind} '{label}'"

        for i, tensor in enumerate(proto.initializer):
            constants[tensor.name] = self.tensors.array(
                tensor, new(tensor.name, "initialiser"), bodies.get(i) if bodies else None
            )
        for sparse in proto.sparse_initializer:
            label = sparse.values.name
            constants[label] = self.tensors.sparse(sparse, new(label, "sparse initialiser"))
        inputs: dict[str, ValueSpec] = {}
        overridable: dict[str, ValueSpec] = {}
        for v in proto.input:
            _named(v.name, "input")
            if v.name in inputs or v.name in overridable:
                raise InvalidModel(f"input '{v.name}' is given twice")
            (overridable if v.name in constants else inputs)[v.name] = _spec(v, "input")
        nodes = [self.node(n) for n in proto.node]
        outputs: dict[str, ValueSpec] = {}
        for v in proto.output:
            outputs[_copied(_named(v.name, "output"), outputs, nodes)] = _spec(v, "output")
        return Graph(
            nodes=ordered(nodes),
            inputs=inputs,
            outputs=outputs,
            constants=constants,
            opsets=self.opsets,
            name=name or proto.name,
            overridable=overridable,
        )

    def function(self, proto: onnx.FunctionProto) -> Function:
        unknown = TensorSpec((), np.dtype(np.float32), ranked=False)
        nodes = [self.node(n) for n in proto.node]
        outputs: dict[str, ValueSpec] = {}
        for name in proto.output:
            outputs[_copied(_named(name, "output"), outputs, nodes)] = unknown
        if len(set(proto.input)) < len(proto.input):
            raise InvalidModel("it gives two inputs one name")
        inputs = {_named(name, "input"): unknown for name in proto.input}
        body = Graph(ordered(nodes), inputs, outputs, opsets=self.opsets, name=proto.name)
        defaults = {a.name: self.attribute(a, lambda: proto.name) for a in proto.attribute_proto}
        body = constants_first(body, _constant)
        body.check()
        return Function(body, frozenset((*map(text, proto.attribute), *defaults)), defaults)

    def node(self, proto: onnx.NodeProto) -> Node:
        op, domain, name = text(proto.op_type), domain_name(proto.domain), proto.name
        inputs, outputs = tuple(map(value_name, proto.input)), tuple(map(value_name, proto.output))

        def label() -> str:
            return f"{op} '{name or (outputs[0] if outputs else '')}'"

        check_node(proto, op, domain, self.opsets.get(domain, 1), len(inputs), len(outputs), label)
        if not any(outputs):
            raise InvalidModel(f"{label()} has no outputs")
        attrs: dict[str, Any] = {}
        for a in proto.attribute:
            key = text(a.name)
            if key in attrs:
                raise InvalidModel(f"{label()}: attribute '{key}' is given twice")
            attrs[key] = self.attribute(a, label)
        return Node(op, inputs, outputs, attrs or EMPTY, domain, text(name), text(proto.overload))

    def attribute(self, a: onnx.AttributeProto, label: Callable[[], str]) -> Any:
        """Its value. `label` names who has it."""
        refers = a.ref_attr_name
        if not refers and (plain := _PLAIN.get(a.type)):
            return plain(a)
        from onnx import AttributeProto as A

        what = f"{label()}: attribute '{a.name}'"
        if refers:
            if not self.in_function:
                raise InvalidModel(f"{what} refers to an attribute of a function, and is in none")
            kind = A.AttributeType.Name(a.type)
            if not a.type:
                raise InvalidModel(f"{what} refers to '{text(a.ref_attr_name)}' without saying of which type that is")
            return Reference(text(a.ref_attr_name), kind)
        match a.type:
            case A.TENSOR:
                return self.tensors.array(a.t, what)
            case A.SPARSE_TENSOR:
                return self.tensors.sparse(a.sparse_tensor, what)
            case A.GRAPH:
                return self.graph(a.g)
            case A.TYPE_PROTO:
                return _type(a.tp, what)
            case A.TENSORS:
                return tuple(self.tensors.array(t, what) for t in a.tensors)
            case A.GRAPHS:
                return tuple(self.graph(g) for g in a.graphs)
            case other:
                raise InvalidModel(f"{what} has type {A.AttributeType.Name(other)}, not supported")


def _copied(name: str, outputs: Mapping[str, ValueSpec], nodes: list[Node]) -> str:
    """The name under which an output is given: a graph may give one value twice, and a copy gets a name of its own."""
    if name not in outputs:
        return name
    copy = made_name(name, len(outputs))
    nodes.append(Node("Identity", (name,), (copy,)))
    return copy


def _named(name: str, what: str) -> str:
    if not value_name(name):
        raise InvalidModel(f"an {what} has no name")
    return name


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


_PLAIN: Mapping[int, Callable[[onnx.AttributeProto], Any]] = {
    1: lambda a: float(a.f),
    2: lambda a: int(a.i),
    3: lambda a: _text(a.s),
    6: lambda a: tuple(map(float, a.floats)),
    7: lambda a: tuple(map(int, a.ints)),
    8: lambda a: tuple(map(_text, a.strings)),
}
"""Values of attributes by AttributeProto.AttributeType: FLOAT, INT, STRING, FLOATS, INTS, STRINGS."""

_CONSTANT_DTYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_string": object,
    "value_strings": object,
}


def _constant(node: Node) -> HostArray:
    if len(node.attrs) != 1:
        raise InvalidModel(f"{node}: exactly one value attribute is expected, it has {len(node.attrs)}")
    ((kind, value),) = node.attrs.items()
    if kind in ("value", "sparse_value"):
        return value  # type: ignore[no-any-return]
    if kind not in _CONSTANT_DTYPES:
        raise InvalidModel(f"{node}: a constant given as '{kind}' is not supported")
    try:
        return np.array(value, dtype=_CONSTANT_DTYPES[kind])
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidModel(f"{node}: its attribute '{kind}' is no constant: {error}") from None


def _spec(value: onnx.ValueInfoProto, what: str) -> ValueSpec:
    return _type(value.type, f"{what} '{value.name}'") or TensorSpec((), np.dtype(np.float32), ranked=False)


def _type(proto: onnx.TypeProto, what: str) -> ValueSpec | None:
    """None where nothing is said."""
    kind = proto.WhichOneof("value")
    match kind:
        case None:
            return None
        case "tensor_type":
            tensor = proto.tensor_type
            dtype = _element(tensor.elem_type, what) if tensor.elem_type else np.dtype(np.float32)
            return TensorSpec(tuple(_dim(d) for d in tensor.shape.dim), dtype, ranked=tensor.HasField("shape"))
        case "sequence_type":
            return SequenceSpec(_type(proto.sequence_type.elem_type, what))
        case "optional_type":
            return OptionalSpec(_type(proto.optional_type.elem_type, what))
        case "map_type":
            return MapSpec(_element(proto.map_type.key_type, what), _type(proto.map_type.value_type, what))
        case _:
            raise InvalidModel(f"{what} is a {kind.removesuffix('_type')}, which is not supported")


def _element(code: int, what: str) -> DType:
    try:
        return dtype_of_onnx(code)
    except KeyError:
        raise InvalidModel(f"{what} has the unknown element type {code}") from None


def _dim(d: onnx.TensorShapeProto.Dimension) -> Dim:
    if d.WhichOneof("value") == "dim_value":
        return int(d.dim_value) if d.dim_value >= 0 else None
    return text(d.dim_param) or None

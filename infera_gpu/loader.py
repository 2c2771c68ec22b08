"""ONNX file -> Graph. With wellformed, its checks, the only module that imports onnx."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from infera_gpu.errors import ModelError
from infera_gpu.graph import Graph, HostArray, Node
from infera_gpu.spec import Dim, DType, MapSpec, OptionalSpec, SequenceSpec, TensorSpec, ValueSpec, dtype_of_onnx
from infera_gpu.wellformed import check_node, domain_name, inlined, opset_versions

if TYPE_CHECKING:
    import onnx

Source: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | onnx.ModelProto"


def load_graph(source: Source) -> Graph:
    """The graph of an ONNX model: a path (external data beside it is read), serialised bytes or a ModelProto.

    Model-local functions are inlined and Constant nodes become constants. Raises ModelError for anything that is not
    a complete ONNX model, naming what is wrong.
    """
    model, name = _read(source)
    try:
        model = inlined(model)
        opsets = opset_versions(model)
        graph = _graph(model.graph, opsets, name=name)
        if not graph.outputs:
            raise ModelError("the graph has no outputs")
        return graph.check()
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
    except RecursionError:
        raise ModelError(f"{name}: its graphs are nested too deep") from None


def _read(source: Source) -> tuple[onnx.ModelProto, str]:
    import onnx
    from google.protobuf.message import DecodeError

    if isinstance(source, onnx.ModelProto):
        return source, source.graph.name or "model"
    if isinstance(source, bytes | bytearray | memoryview):
        name, payload = "model", bytes(source)
    elif not isinstance(source, str | os.PathLike) or "\0" in os.fspath(source):
        raise ModelError(f"a model is a path, bytes or an onnx.ModelProto, not {source!r:.60}")
    else:
        path = Path(source)
        name = path.name
        try:
            payload = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror or error}") from None
    if not payload:
        raise ModelError(f"{name}: the file is empty")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(payload)
    except DecodeError:
        raise ModelError(
            f"{name}: not an ONNX model, or a truncated one ({len(payload):,} bytes do not parse)"
        ) from None
    if not model.ir_version or not model.HasField("graph"):
        raise ModelError(f"{name}: not an ONNX model ({len(payload):,} bytes parse, but hold no graph)")
    if isinstance(source, str | os.PathLike):
        try:
            onnx.load_external_data_for_model(model, str(Path(source).parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise ModelError(f"{name}: its external data cannot be read: {error}") from None
    return model, name


def _graph(proto: onnx.GraphProto, opsets: Mapping[str, int], name: str = "") -> Graph:
    constants: dict[str, HostArray] = {}
    for t in proto.initializer:
        if t.name in constants:
            raise ModelError(f"initialiser '{t.name}' is given twice")
        constants[t.name] = _array(t, f"initialiser '{t.name}'")
    if proto.sparse_initializer:
        raise ModelError(f"sparse initialiser '{proto.sparse_initializer[0].values.name}' is not supported")
    inputs: dict[str, ValueSpec] = {}
    for v in proto.input:
        if v.name in inputs:
            raise ModelError(f"input '{v.name}' is given twice")
        if v.name not in constants:
            inputs[v.name] = _spec(v, "input")
    nodes: list[Node] = []
    for n in proto.node:
        node = _node(n, opsets)
        if not any(node.outputs):
            raise ModelError(f"{node.qualified} '{node.name}' has no outputs")
        if node.op == "Constant" and not node.domain:
            if node.outputs[0] in constants or node.outputs[0] in inputs:
                raise ModelError(f"{node}: its output '{node.outputs[0]}' is made twice")
            constants[node.outputs[0]] = _constant(node)
        else:
            nodes.append(node)
    outputs: dict[str, ValueSpec] = {}
    for v in proto.output:
        name_of_output = v.name
        while name_of_output in outputs:  # a branch may give one value twice
            name_of_output += "'"
        if name_of_output != v.name:
            nodes.append(Node("Identity", (v.name,), (name_of_output,)))
        outputs[name_of_output] = _spec(v, "output")
    return Graph(
        nodes=tuple(nodes),
        inputs=inputs,
        outputs=outputs,
        constants=constants,
        opsets=opsets,
        name=name or proto.name,
    )


def _array(tensor: onnx.TensorProto, what: str) -> HostArray:
    from onnx import TensorProto, numpy_helper

    if any(d < 0 for d in tensor.dims):
        raise ModelError(f"{what} has the shape {list(tensor.dims)}")
    if tensor.data_location == TensorProto.EXTERNAL:
        raise ModelError(f"{what} lies in an external file; load the model from its path instead of from bytes")
    try:
        array: HostArray = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{what} is damaged: {error}") from None
    array.flags.writeable = False
    return array


def _node(proto: onnx.NodeProto, opsets: Mapping[str, int]) -> Node:
    check_node(proto, opsets)
    domain = domain_name(proto.domain)
    label = f"{proto.op_type} '{proto.name or (proto.output[0] if proto.output else '')}'"
    return Node(
        op=proto.op_type,
        inputs=tuple(proto.input),
        outputs=tuple(proto.output),
        attrs={a.name: _attribute(a, opsets, label) for a in proto.attribute},
        domain=domain,
        name=proto.name,
    )


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _attribute(a: onnx.AttributeProto, opsets: Mapping[str, int], label: str) -> Any:
    from onnx import AttributeProto as A

    match a.type:
        case A.FLOAT:
            return float(a.f)
        case A.INT:
            return int(a.i)
        case A.STRING:
            return _text(a.s)
        case A.TENSOR:
            return _array(a.t, f"{label}: attribute '{a.name}'")
        case A.GRAPH:
            return _graph(a.g, opsets)
        case A.TYPE_PROTO:
            return _type(a.tp, f"{label}: attribute '{a.name}'")
        case A.FLOATS:
            return tuple(float(v) for v in a.floats)
        case A.INTS:
            return tuple(int(v) for v in a.ints)
        case A.STRINGS:
            return tuple(_text(v) for v in a.strings)
        case A.TENSORS:
            return tuple(_array(t, f"{label}: attribute '{a.name}'") for t in a.tensors)
        case A.GRAPHS:
            return tuple(_graph(g, opsets) for g in a.graphs)
        case other:
            raise ModelError(f"{label}: attribute '{a.name}' has type {A.AttributeType.Name(other)}, not supported")


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
        raise ModelError(f"{node}: exactly one value attribute is expected, it has {len(node.attrs)}")
    ((kind, value),) = node.attrs.items()
    if kind == "value":
        return value  # type: ignore[no-any-return]
    if kind not in _CONSTANT_DTYPES:
        raise ModelError(f"{node}: a constant given as '{kind}' is not supported")
    return np.array(value, dtype=_CONSTANT_DTYPES[kind])


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
            raise ModelError(f"{what} is a {kind.removesuffix('_type')}, which is not supported")


def _element(code: int, what: str) -> DType:
    try:
        return dtype_of_onnx(code)
    except KeyError:
        raise ModelError(f"{what} has the unknown element type {code}") from None


def _dim(d: onnx.TensorShapeProto.Dimension) -> Dim:
    if d.WhichOneof("value") == "dim_value":
        return int(d.dim_value) if d.dim_value >= 0 else None
    return d.dim_param or None


def read_metadata(source: Source) -> dict[str, Any]:
    """What a model says about itself, by the names of onnxruntime's ModelMetadata. External data is not read."""
    import onnx

    if isinstance(source, bytes | bytearray | memoryview):
        model = onnx.load_model_from_string(bytes(source))
    else:
        model = source if isinstance(source, onnx.ModelProto) else onnx.load(source, load_external_data=False)
    return {
        "custom_metadata_map": {p.key: p.value for p in model.metadata_props},
        "description": model.doc_string,
        "domain": model.domain,
        "graph_description": model.graph.doc_string,
        "graph_name": model.graph.name,
        "producer_name": model.producer_name,
        "version": int(model.model_version),
    }

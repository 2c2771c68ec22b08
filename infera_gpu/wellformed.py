"""Whether a model keeps the rules of its file format: what is checked before it becomes a Graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from infera_gpu.errors import ModelError

if TYPE_CHECKING:
    import onnx


def domain_name(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


MAX_NODES = 1_000_000
"""Nodes that model-local functions may expand to: a few of them that call each other twice can ask for any number."""


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions of its own. Raises ModelError for functions that call themselves, or explode."""
    if not model.functions:
        return model
    from onnx import checker, inliner

    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int | None] = {}

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for n in nodes:
            key = (n.domain, n.op_type)
            if key not in functions:
                total += 1 + sum(size(a.g.node) for a in n.attribute if a.HasField("g"))
                continue
            if key not in sizes:
                sizes[key] = None
                sizes[key] = size(functions[key].node)
            inner = sizes[key]
            if inner is None:
                raise ModelError(f"the function {n.op_type} calls itself")
            total += inner
        return total

    count = size(model.graph.node)
    if count > MAX_NODES:
        raise ModelError(f"its functions expand to {count:,} nodes, at most {MAX_NODES:,} are accepted")
    try:
        return inliner.inline_local_functions(model)
    except (checker.ValidationError, RuntimeError, ValueError) as error:
        raise ModelError(f"its functions cannot be inlined: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def opset_versions(model: onnx.ModelProto) -> dict[str, int]:
    import onnx

    opsets = {domain_name(o.domain): int(o.version) for o in model.opset_import}
    if not opsets:
        raise ModelError("the model imports no operator set; it is not a complete ONNX model")
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opsets.get("", 1) <= newest:
        raise ModelError(f"opset {opsets['']} is unknown; this version of onnx knows 1 to {newest}")
    return opsets


def check_node(proto: onnx.NodeProto, opsets: Mapping[str, int]) -> None:
    """Raises ModelError where a standard operator has too few or too many inputs or outputs, or a wrong attribute."""
    import onnx

    domain = domain_name(proto.domain)
    version = opsets.get(domain, 1)
    try:
        schema = onnx.defs.get_schema(proto.op_type, version, domain)
    except onnx.defs.SchemaError:
        return  # not a standard operator: the registry knows it, or lists it as unsupported
    label = f"{proto.op_type} '{proto.name or (proto.output[0] if proto.output else '')}'"
    for what, given, least, most in (
        ("inputs", len(proto.input), schema.min_input, schema.max_input),
        ("outputs", len(proto.output), schema.min_output, schema.max_output),
    ):
        if not least <= given <= most:
            expected = str(least) if least == most else f"{least} to {most}" if most < 1 << 20 else f"{least} or more"
            raise ModelError(f"{label} has {given} {what}, expected {expected}")
    for a in proto.attribute:
        declared: Any = schema.attributes.get(a.name)
        if declared is not None and int(declared.type.value) != a.type and not a.ref_attr_name:
            got = onnx.AttributeProto.AttributeType.Name(a.type)
            raise ModelError(f"{label}: attribute '{a.name}' is {got}, expected {declared.type.name}")

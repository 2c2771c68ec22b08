"""Whether a model keeps the rules of its file format: what is checked before it becomes a Graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from infera_gpu.errors import InvalidModel
from infera_gpu.graph import JOINT
from infera_gpu.schemas import rules_of

if TYPE_CHECKING:
    import onnx


def text(value: str | bytes) -> str:
    """A name of the file. Raises InvalidModel where it is none: protobuf gives bytes for what is no UTF-8."""
    if not isinstance(value, str):
        raise InvalidModel(f"the name {value!r:.80} is no text")
    return value


def value_name(name: str | bytes) -> str:
    """The name of a value, "" where it is left out. Raises InvalidModel for one that is like those made here."""
    if type(name) is str and JOINT not in name:
        return name
    found = text(name)
    if JOINT in found:
        raise InvalidModel(f"the name {found!r:.80} has the character {JOINT!r}, which names of values may not have")
    return found


def domain_name(domain: str) -> str:
    domain = text(domain)
    return "" if domain == "ai.onnx" else domain


def check_ir_version(version: int) -> None:
    import onnx

    if version > onnx.IR_VERSION:
        raise InvalidModel(
            f"the file's IR version is {version}, this version of onnx knows {onnx.IR_VERSION}: install a newer one"
        )


def opset_versions(imports: Iterable[onnx.OperatorSetIdProto], *, required: bool = True) -> dict[str, int]:
    """Versions by domain. Raises InvalidModel where there is none and one is `required`, or one is unknown."""
    import onnx

    opsets = {domain_name(o.domain): int(o.version) for o in imports}
    if required and not opsets:
        raise InvalidModel("the model imports no operator set; it is not a complete ONNX model")
    wrong = next((f"{domain or 'ai.onnx'} {v}" for domain, v in opsets.items() if not 1 <= v < 1 << 31), None)
    if wrong:
        raise InvalidModel(f"the imported operator set {wrong} has a version that none can have")
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opsets.get("", 1) <= newest:
        raise InvalidModel(f"opset {opsets['']} is unknown; this version of onnx knows 1 to {newest}")
    return opsets


def check_node(
    proto: onnx.NodeProto, op: str, domain: str, version: int, inputs: int, outputs: int, label: Callable[[], str]
) -> None:
    """Raises InvalidModel where a standard operator has too few or too many inputs or outputs, or a wrong attribute.

    `version` is that of the node's domain; `label` names the node.
    """
    rules = rules_of(op, version, domain)
    if rules is None:
        return  # not a standard operator: the registry knows it, or lists it as unsupported
    for what, given, (least, most) in (("inputs", inputs, rules.inputs), ("outputs", outputs, rules.outputs)):
        if not least <= given <= most:
            expected = str(least) if least == most else f"{least} to {most}" if most < 1 << 20 else f"{least} or more"
            raise InvalidModel(f"{label()} has {given} {what}, expected {expected}")
    for a in proto.attribute:
        declared = rules.attributes.get(a.name)
        if declared is not None and declared != a.type:
            got, wanted = map(_type_name, (a.type, declared))
            raise InvalidModel(f"{label()}: attribute '{a.name}' is {got}, expected {wanted}")


def _type_name(number: int) -> str:
    import onnx

    return str(onnx.AttributeProto.AttributeType.Name(number))

"""What ONNX says of its operators, from a table: to register them takes onnx longer than a small model takes to load.

`python -m infera_gpu.ops` writes _schemas.py, from the installed onnx.
"""

from __future__ import annotations

import textwrap
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from infera_gpu._schemas import SCHEMAS

if TYPE_CHECKING:
    from onnx.defs import OpSchema

UNLIMITED = (1 << 31) - 1
"""How many inputs an operator has, at most, where ONNX sets no bound."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How many inputs and outputs an operator has, at least and at most, and its attributes' types, as numbers of
    AttributeProto.AttributeType."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    attributes: Mapping[str, int]


@lru_cache(maxsize=1024)
def rules_of(name: str, version: int, domain: str) -> Rules | None:
    """Of an operator at a version of its domain; None for what is no standard operator."""
    newest, lines = _domains().get(domain, (UNLIMITED, ""))
    if version > newest:  # a newer onnx than the table's
        return _asked(name, version, domain)
    found: list[str] = []
    start = f"\n{name} "
    at = bisect_left(range(len(lines) - 1), name, key=lambda i: _name_at(lines, i))
    while lines.startswith(start, at):  # the oldest first
        end = lines.find("\n", at + 1)
        fields = lines[at + len(start) : end].split()
        if int(fields[0]) > version:
            break
        found, at = fields, end
    if not found:
        return None
    _, inputs, outputs, *attributes = found
    named = (a.rpartition(":") for a in attributes)
    return Rules(_range(inputs), _range(outputs), {k: int(v) for k, _, v in named})


def _name_at(lines: str, i: int) -> str:
    """The operator of the line that position i is in; the end of a line belongs to the next one.

    Lines are in the order of these names: bisection finds the first of an operator.
    """
    start = lines.rfind("\n", 0, i + 1) + 1
    return lines[start : lines.find(" ", start)]


@cache
def _domains() -> Mapping[str, tuple[int, str]]:
    """By domain: the newest version that the table knows, and its lines, each between two ends of lines."""
    found: dict[str, tuple[int, str]] = {}
    for part in f"\n{SCHEMAS}".split("\ndomain ")[1:]:
        head, end, lines = part.partition("\n")
        version, _, domain = head.partition(" ")
        found[domain] = int(version), f"{end}{lines}{end}"
    return found


def _range(text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    return int(least), int(most) if most else UNLIMITED


def _asked(name: str, version: int, domain: str) -> Rules | None:
    """What the installed onnx says."""
    import onnx

    try:
        return _rules(onnx.defs.get_schema(name, version, domain))
    except onnx.defs.SchemaError:
        return None


def _rules(schema: OpSchema) -> Rules:
    declared: Mapping[str, Any] = schema.attributes
    return Rules(
        (schema.min_input, schema.max_input),
        (schema.min_output, schema.max_output),
        {k: int(a.type.value) for k, a in declared.items()},
    )


def _line(schema: OpSchema) -> str:
    rules = _rules(schema)
    ranges = (f"{least}-{'' if most == UNLIMITED else most}" for least, most in (rules.inputs, rules.outputs))
    attributes = (f"{k}:{v}" for k, v in sorted(rules.attributes.items()))
    return " ".join((schema.name, str(schema.since_version), *ranges, *attributes))


def _text(schemas: Iterable[OpSchema], newest: Mapping[str, int]) -> Iterable[str]:
    ordered = sorted(schemas, key=lambda s: (s.domain, s.name, s.since_version))
    for domain in sorted({s.domain for s in ordered}):
        yield f"domain {newest[domain]} {domain}".strip()
        yield from (_line(s) for s in ordered if s.domain == domain)


def table() -> str:
    """The text of _schemas.py."""
    import onnx

    schemas = onnx.defs.get_all_schemas_with_history()
    newest: dict[str, int] = {}
    for s in schemas:
        newest[s.domain] = max(newest.get(s.domain, 1), s.since_version)
    newest[""] = onnx.defs.onnx_opset_version()
    made = (textwrap.fill(line, 118, break_long_words=False, break_on_hyphens=False) for line in _text(schemas, newest))
    lines = (line.replace("\n", " \\\n") for line in made)
    return HEAD.format(onnx.__version__) + "\n".join(lines) + '\n"""\n'


HEAD = '''"""The operators of onnx {}, by `python -m infera_gpu.ops`.

A domain and its newest version; then name, since, inputs, outputs, attribute:type.
"""

SCHEMAS = """\\
'''

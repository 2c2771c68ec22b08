"""The table of ONNX's operators says what the installed onnx says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from infera_gpu import _schemas, schemas
from infera_gpu.schemas import Rules, rules_of

ALL = onnx.defs.get_all_schemas_with_history()


def test_the_table_is_that_of_the_onnx_it_names() -> None:
    text = Path(_schemas.__file__).read_text()
    assert f"onnx {onnx.__version__}," not in text or text == schemas.table(), "run: python -m infera_gpu.ops"


@pytest.mark.parametrize("domain", sorted({s.domain for s in ALL}))
def test_every_operator_at_every_version_is_as_onnx_says(domain: str) -> None:
    newest = max(s.since_version for s in ALL if s.domain == domain)
    for name in sorted({s.name for s in ALL if s.domain == domain}):
        for version in range(1, newest + 2):
            try:
                schema = onnx.defs.get_schema(name, version, domain)
            except onnx.defs.SchemaError:
                assert rules_of(name, version, domain) is None
                continue
            attributes: Mapping[str, Any] = schema.attributes
            assert rules_of(name, version, domain) == Rules(
                (schema.min_input, schema.max_input),
                (schema.min_output, schema.max_output),
                {k: int(a.type.value) for k, a in attributes.items()},
            ), (name, version)


def test_what_is_no_standard_operator_has_no_rules() -> None:
    assert rules_of("Gelu", 1, "com.microsoft") is None
    assert rules_of("NoSuch", 18, "") is None
    for name in ("", "A", "Conv 1", "Conv\n", "\n", "zz"):  # a file may have any name
        assert rules_of(name, 18, "") is None

"""docs/operators.md is what the declarations say."""

from __future__ import annotations

from pathlib import Path

from infera_gpu import ops
from infera_gpu.cli.ops import PAGE, markdown, support
from infera_gpu.ops import registry
from infera_gpu.ops.__main__ import index

ROOT = Path(__file__).parent.parent


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "operators.md").read_text()
    assert page == PAGE + markdown(support(registry())), "run: infera ops --markdown > docs/operators.md"


def test_the_index_of_files_is_current() -> None:
    assert (Path(ops.__file__).parent / "_index.py").read_text() == index(), "run: python -m infera_gpu.ops"


def test_versions_of_an_operator_share_a_row() -> None:
    rows = {(domain, name): opsets for domain, name, opsets, *_ in support(registry())}
    assert rows["ai.onnx", "Softmax"].startswith("1, ")
    assert len(rows) == len({(op.domain, op.name) for op in registry()})

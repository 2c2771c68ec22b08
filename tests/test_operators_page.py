"""docs/operators.md is what the declarations say."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from infera_gpu import ops
from infera_gpu.cli.ops import DECIDING, PAGE, WAYS, markdown, support
from infera_gpu.ops import registry
from infera_gpu.ops.__main__ import index
from tests.commandline import infera

ROOT = Path(__file__).parent.parent


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "operators.md").read_text()
    assert page == PAGE + markdown(support(registry())), "run: infera ops --markdown > docs/operators.md"


def test_the_index_of_files_is_current() -> None:
    assert (Path(ops.__file__).parent / "_index.py").read_text() == index(), "run: python -m infera_gpu.ops"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_device_is_told_of_by_how_operators_run_there(device: str) -> None:
    status, out, _ = infera("ops", "--device", device)
    assert status == 0
    title, *lines, last = filter(None, map(str.strip, out.splitlines()))
    counted = {way: int(count) for count, way in re.findall(r"(\d+) (\w+)", title.partition(": ")[2])}
    ways = [line.split()[-1] for line in lines[2:]]
    assert counted == Counter(ways)
    assert title.startswith(f"{len(ways)} operators: ")
    assert list(dict.fromkeys(ways)) == [way for way in WAYS if way in counted]
    assert {"kernel", "host"} <= counted.keys() <= set(WAYS)
    assert last == DECIDING
    assert infera("ops")[1].endswith(f"{DECIDING}\n")


def test_versions_of_an_operator_share_a_row() -> None:
    rows = {(domain, name): opsets for domain, name, opsets, *_ in support(registry())}
    assert rows["ai.onnx", "Softmax"].startswith("1, ")
    assert len(rows) == len({(op.domain, op.name) for op in registry()})

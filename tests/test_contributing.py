"""The worked examples of CONTRIBUTING.md, done in a copy of the tree, with the tests that they promise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python file=(\S+)(?: (after|replace)=\"([^\"]+)\")?\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with every block of CONTRIBUTING.md applied, in order."""
    copy = tmp_path_factory.mktemp("contributing")
    for name in ("infera_gpu", "kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert len(blocks) >= 8
    for name, how, anchor, body in blocks:
        path = copy / name
        if not how:
            assert not path.exists()
            path.write_text(body)
            continue
        text = path.read_text()
        assert text.count(anchor) == 1, f"{name}: '{anchor}' stands {text.count(anchor)} times"
        path.write_text(text.replace(anchor, body.rstrip("\n") if how == "replace" else f"{anchor}\n{body.rstrip()}"))
    return copy


@pytest.mark.parametrize(
    ("suite", "select", "at_least"),
    [("tests/test_ops.py", "SoftThreshold", 6), ("tests/test_passes.py", "soft_threshold", 2)],
)
def test_the_examples_pass_the_tests_that_they_promise(tree: Path, suite: str, select: str, at_least: int) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "kernels")))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", suite, "-k", select]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= at_least, done.stdout

"""`infera pull`."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.commandline import assert_explained, assert_fails, infera, save_relu


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    return save_relu(tmp_path)


def test_pull_copies_and_checks(relu: Path, tmp_path: Path) -> None:
    assert infera("pull", relu) == (0, f"{relu}\n", "")
    folder = tmp_path / "models"
    folder.mkdir()
    assert infera("pull", relu, "-o", folder) == (0, f"{folder / 'relu.onnx'}\n", "")
    made = tmp_path / "new" / "models"
    assert infera("pull", relu, "-o", f"{made}/") == (0, f"{made / 'relu.onnx'}\n", "")
    assert infera("pull", relu, "-o", tmp_path / "b.onnx")[0] == 0
    assert (folder / "relu.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes() == relu.read_bytes()
    assert_fails(infera("pull", relu, "--sha256", "0" * 64), "SHA-256", "expected 0000")
    assert_fails(infera("pull", "ftp://host/x.onnx"), "cannot fetch from 'ftp://'")


def test_pull_lists_the_catalogue() -> None:
    from infera_gpu.catalogue import CATALOGUE

    status, out, _ = infera("pull")
    assert status == 0
    assert all(name in out for name in CATALOGUE)


def test_pull_onto_itself_is_explained(relu: Path) -> None:
    before = relu.read_bytes()
    assert_explained(infera("pull", relu, "-o", relu), "are the same file")
    assert relu.read_bytes() == before


@pytest.mark.parametrize(
    "url", ["https://[::1/x", f"https://{'a' * 80}.invalid/x", "http://localhost:abc/x", "https://a b/x"]
)
def test_pull_explains_a_malformed_url(url: str) -> None:
    result = infera("pull", url)
    assert_explained(result, "not a URL that can be asked")
    assert "network" not in result[2]


def test_pull_takes_a_url_as_it_is_written() -> None:
    closed = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    closed.server_close()
    assert_explained(infera("pull", f"http://localhost:{closed.server_port}/é"), "no answer", "/é")

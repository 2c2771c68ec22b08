"""Compiled kernels on disk: found again, repaired, shared by processes."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infera_kernels.disk import default_directory
from infera_kernels.launch import CompileLauncher, CudaLauncher, KernelCache, nominal_target
from infera_kernels.launch.compile import Binary, KernelSpec, cache_key, compiler_options
from infera_kernels.launch.signature import bind
from tests.kernels.support import FakeArray
from tests.kernels.test_launch import STREAM, FakeDriver

pytest.importorskip("triton")

from infera_kernels.triton import elementwise, pointwise, softmax

pytestmark = pytest.mark.kernels

BINARY = Binary(KernelSpec("k", ("*fp32", "i32"), 128, 0, 90, "3.6.0"), b"\x7fELF\n\x00\n", "ptx")


def relu(directory: Path) -> int:
    """Loads one kernel through a launcher that has just started; how often it compiled."""
    driver = FakeDriver()
    launcher = CudaLauncher(0, STREAM, driver=driver, cache=KernelCache(directory))
    for _ in range(2):
        elementwise.unary("relu", FakeArray((64,), "float32"), FakeArray((64,), "float32"), launcher)
    assert driver.loaded == ["pointwise_kernel"]
    return launcher.compiled


def test_a_kernel_is_compiled_once(tmp_path: Path) -> None:
    assert [relu(tmp_path) for _ in range(3)] == [1, 0, 0]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: data.replace(b"pointwise_kernel", b"another_kernelxx", 1),
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: b"\xff" + data[1:],
    ],
    ids=["empty", "cut", "header only", "spec changed", "bit flipped", "not text"],
)
def test_a_damaged_entry_is_compiled_again(
    damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    relu(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert relu(tmp_path) == 1
    assert path.read_bytes() == whole
    assert "will be compiled again" in caplog.text


def test_round_trip(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "made" / "when needed")
    assert cache.get("a") is None
    cache.put("a", BINARY)
    assert cache.get("a") == Binary(BINARY.spec, BINARY.cubin)
    assert cache.get("b") is None


def test_a_directory_that_cannot_be_made_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = KernelCache(tmp_path / "file" / "kernels")
    with caplog.at_level(logging.WARNING):
        cache.put("a", BINARY)
        cache.put("b", BINARY)
    assert len(caplog.records) == 1
    assert "set INFERA_CACHE_DIR" in caplog.text


def test_directories() -> None:
    assert default_directory({"INFERA_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a/kernels")
    assert default_directory({"INFERA_CACHE_DIR": "~/a"}) == Path.home() / "a/kernels"
    assert default_directory({"XDG_CACHE_HOME": "/b"}) == Path("/b/infera-gpu/kernels")
    assert default_directory({}) == Path.home() / ".cache/infera-gpu/kernels"


WRITER = """
import sys
from pathlib import Path
from infera_kernels.launch.cache import KernelCache
from infera_kernels.launch.compile import Binary, KernelSpec
cache = KernelCache(Path(sys.argv[1]))
binary = Binary(KernelSpec("k", ("*fp32",), 128, 0, 90, "3.6.0"), bytes([65]) * 300_000)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(60):
    cache.put("k", binary)
    assert cache.get("k") == binary
"""


def test_writers_and_readers_at_once(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert (writer.returncode, errors) == (0, ""), "a reader saw half a file"
    assert [p.name for p in tmp_path.iterdir()] == ["k.kernel"]


# Keys


def key(arch: int = 90, *, cols: int = 64, dtype: str = "float32", log: bool = False, **options: Any) -> str:
    x = FakeArray((4, cols), dtype)
    args = {"x": x, "out": x, "rows": 4, "cols": cols, "x_stride": cols, "out_stride": cols}
    binding = bind(softmax.softmax_kernel, args, {"LOG": log, "ROWS": 4, "COLS": 64})
    return cache_key(softmax.softmax_kernel, binding, compiler_options(options, nominal_target(arch)), arch)


def test_a_key_depends_on_what_the_binary_depends_on() -> None:
    keys = [
        key(),
        key(80),
        key(dtype="float16"),
        key(cols=63),
        key(log=True),
        key(num_warps=8),
        key(enable_fp_fusion=False),
    ]
    assert len(set(keys)) == len(keys)
    assert key(cols=48) == key(), "another value, the same alignment"


def test_a_key_depends_on_functions_passed_as_constants(tmp_path: Path) -> None:
    driver = FakeDriver()
    launcher = CudaLauncher(0, STREAM, driver=driver, cache=KernelCache(tmp_path))
    for op in ("relu", "neg"):
        elementwise.unary(op, FakeArray((64,), "float32"), FakeArray((64,), "float32"), launcher)
    assert len(driver.loaded) == 2


FUNCTION = """
import triton

@triton.jit
def changed(x, alpha, beta):
    return x + {}
"""


def test_functions_are_known_by_their_source_not_by_their_name(tmp_path: Path) -> None:
    """By Triton's own cache too, which is asked where ours has nothing."""
    found = []
    for number in (1.0, 2.0):
        path = tmp_path / str(number) / "changed.py"
        path.parent.mkdir()
        path.write_text(FUNCTION.format(number))
        spec = importlib.util.spec_from_file_location("changed", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        launcher, x = CompileLauncher(90), FakeArray((64,), "float32")
        pointwise.pointwise((pointwise.Applied(module.changed, (0,)),), (x,), x, launcher)
        found.append(launcher.compiled[0].binary.cubin)
    assert found[0] != found[1]


def test_a_key_depends_on_the_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", os.devnull)
    assert key() != before

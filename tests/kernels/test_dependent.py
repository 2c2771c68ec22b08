"""Programmatic dependent launch: how kernels begin, how they are launched, and that it is tried before it is used."""

from __future__ import annotations

import ctypes
import logging
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from infera_gpu.devices import dependent as trial
from infera_gpu.errors import OutOfMemoryError
from infera_kernels.launch import CompileLauncher, CudaLauncher, KernelCache, LaunchError, nominal_target
from infera_kernels.launch.dependent import OFF, compiled_waiting, driver_launch, waiting, waits
from tests import fake_cupy
from tests.kernels.support import EVERY_ARCH, FakeArray, execute
from tests.kernels.test_launch import FUNCTION, STREAM, FakeDriver

pytest.importorskip("triton")

from infera_kernels.triton import ahead, conv, gated, matmul, softmax

pytestmark = pytest.mark.kernels

CONFIG = struct.Struct("<7I4xQQI4x")
"""CUlaunchConfig: grid, block, shared bytes, stream, attributes, their number."""


class EarlyDriver(FakeDriver):
    """Records what cuLaunchKernelEx is given, as the driver would read it."""

    def __init__(self, arch: int = 90, release: int = 13000) -> None:
        super().__init__(nominal_target(arch))
        self._release = release
        self.launch_early = self._early
        self.attributes: list[tuple[int, int]] = []

    def version(self) -> int:
        return self._release

    def _early(self, config: int, function: int, parameters: int, extra: int) -> None:
        *sizes, shared, stream, attributes, count = CONFIG.unpack(ctypes.string_at(config, CONFIG.size))
        assert count == 1
        self.attributes.append(struct.unpack("<Iii", ctypes.string_at(attributes, 12))[::2])
        self._launch(function, *sizes, shared, stream, parameters, extra)


def launcher_of(driver: FakeDriver, folder: Path, **options: Any) -> CudaLauncher:
    return CudaLauncher(0, STREAM, driver=driver, cache=KernelCache(folder), **options)


def test_a_kernel_is_launched_with_the_attribute(tmp_path: Path) -> None:
    driver, plain = EarlyDriver(), FakeDriver()
    x = FakeArray((100, 48), "float32")
    for made, early in ((driver, True), (plain, False)):
        launcher = launcher_of(made, tmp_path)
        made.sizes = [8, 8, 4, 4, 4, 4, 8, 8]
        execute(softmax.softmax(x, x, launcher))
        assert launcher.target.pdl == early
        assert [loaded.binary.spec.pdl for loaded in launcher._loaded.values()] == [early]
    assert driver.attributes == [(6, 1)]
    assert (driver.launches, driver.parameters) == (plain.launches, plain.parameters)
    assert driver.launches[0][0] == FUNCTION + 1


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        (EarlyDriver(arch=89), {}),
        (EarlyDriver(release=12020), {}),
        (EarlyDriver(), {"pdl": False}),
    ],
    ids=["before Hopper", "an old driver", "not wanted"],
)
def test_elsewhere_kernels_are_launched_as_ever(driver: EarlyDriver, options: Any, tmp_path: Path) -> None:
    launcher = launcher_of(driver, tmp_path, **options)
    x = FakeArray((100, 48), "float32")
    driver.sizes = [8, 8, 4, 4, 4, 4, 8, 8]
    execute(softmax.softmax(x, x, launcher))
    assert not launcher.target.pdl
    assert (len(driver.launches), driver.attributes) == (1, [])


def test_a_launcher_can_leave_it_with_the_same_kernels(tmp_path: Path) -> None:
    driver, x = EarlyDriver(), FakeArray((100, 48), "float32")
    launcher = launcher_of(driver, tmp_path)
    driver.sizes = [8, 8, 4, 4, 4, 4, 8, 8]
    execute(softmax.softmax(x, x, launcher))
    launcher.launch_early = None
    execute(softmax.softmax(x, x, launcher))
    assert driver.attributes == [(6, 1)]
    assert driver.launches == driver.launches[:1] * 2


@pytest.mark.parametrize("arch", EVERY_ARCH)
def test_kernels_wait_before_they_touch_memory(arch: int) -> None:
    """Those of tensor cores too, which begin with barriers of their own."""
    launcher = CompileLauncher(arch)
    a = FakeArray((512, 512), "float16")
    softmax.softmax(a, a, launcher)
    matmul.matmul(a, a, a, launcher)
    row = FakeArray((1, 512), "float16")
    matmul.matmul(row, a, row, launcher)
    assert launcher.target.pdl == (arch >= 90)
    assert [made.binary.spec.pdl for made in launcher.compiled] == [arch >= 90] * 3
    assert [made.waits_first for made in launcher.compiled] == [arch >= 90] * 3


PTX = """.version 8.0
.visible .entry first(
	.param .u64 first_param_0
)
.reqntid 128
{
	.reg .b32 	%r<3>;
$L__func_begin0:
	.loc	1 29 0                          // a.py:29:0

// %bb.0:
	mov.u32 	%r1, %tid.x;
	ret;
}
"""


def test_waiting_comes_before_the_first_instruction() -> None:
    made = waiting(PTX)
    before, behind = made.split("\tgriddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;\n")
    assert before.endswith("// %bb.0:\n")
    assert behind.startswith("\tmov.u32")
    assert before + behind == PTX
    assert waits(made)
    assert not waits(PTX)


@pytest.mark.parametrize("written", ["griddepcontrol.wait;", "griddepcontrol.wait ;"])
def test_a_kernel_that_waits_where_it_wants_to_is_left_alone(written: str) -> None:
    ptx = PTX.replace("ret;", f"{written}\n\tret;")
    assert waiting(ptx) == ptx


@pytest.mark.parametrize("ptx", ["", PTX + PTX], ids=["none", "two"])
def test_ptx_with_another_number_of_kernels_is_refused(ptx: str) -> None:
    with pytest.raises(LaunchError, match=r"[02] kernels in the PTX, expected one"):
        waiting(ptx)


def test_stages_are_changed_for_one_thread_and_not_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    asked: list[Any] = []

    def others(*given: Any) -> tuple[str, str]:
        asked.append(given)
        return "key", "hash"

    def compiled() -> str:
        stages = {"ptx": lambda source, metadata: PTX}
        knobs.runtime.add_stages_inspection_hook("backend", stages, "options", "language", 90)
        return stages["ptx"]("", {})

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", others)
    elsewhere: list[str] = []
    with compiled_waiting():
        thread = threading.Thread(target=lambda: elsewhere.append(compiled()))
        thread.start()
        thread.join()
        assert waits(compiled())
        assert knobs.runtime.add_stages_inspection_hook() == ("key", "hash")
    assert (elsewhere, len(asked)) == ([PTX], 3)
    assert knobs.runtime.add_stages_inspection_hook is others


def test_without_a_driver_or_by_the_environment_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    library = SimpleNamespace(cuLaunchKernelEx=SimpleNamespace())
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    launch = driver_launch(asked.append)
    assert launch is library.cuLaunchKernelEx
    launch.errcheck(700, launch, ())
    assert asked == [700]
    monkeypatch.setenv(OFF, "0")
    assert driver_launch(asked.append) is None
    monkeypatch.delenv(OFF)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert driver_launch(asked.append) is None


# The trial


class Adding:
    """A launcher whose kernels add on the fake's stream; of some launches `lost`, nothing comes."""

    pdl, lost = True, 0

    def __init__(self, index: int, stream: fake_cupy.Stream) -> None:
        self.target, self.stream, self.made = SimpleNamespace(pdl=self.pdl), stream, 0

    def call(self, x: Any, one: Any, out: Any) -> Any:
        def added() -> None:
            self.made += 1
            if self.made != type(self).lost:
                np.add(np.asarray(x), np.asarray(one), out=np.asarray(out))

        return lambda: self.stream.put("launch", added), ()


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    fake = fake_cupy.install(monkeypatch)
    monkeypatch.setattr(trial, "CudaLauncher", Adding)
    monkeypatch.setattr(trial, "_works", {})
    monkeypatch.setattr(
        "infera_kernels.triton.elementwise.binary", lambda op, x, one, out, launcher: [launcher.call(x, one, out)]
    )

    def works(**settings: Any) -> bool:
        for name, value in settings.items():
            monkeypatch.setattr(Adding, name, value)
        return trial.works(fake, 0, fake.cuda.MemoryPool().malloc)

    return works


def test_what_adds_up_is_used(tried: Callable[..., bool], caplog: pytest.LogCaptureFixture) -> None:
    assert tried()
    assert tried(lost=3), "it is tried once"
    assert caplog.messages == []


def test_what_loses_a_sum_is_not_used(tried: Callable[..., bool], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not tried(lost=100)
    assert caplog.messages == ["cuda:0: no programmatic dependent launch, kernels did not wait: [255]"]


def test_what_fails_is_not_used(
    tried: Callable[..., bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Adding, *_: Any) -> Any:
        raise fake_cupy.CUDADriverError(400)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Adding, "call", broken)
        assert not tried()
    assert caplog.messages == ["cuda:0: no programmatic dependent launch, trying it failed: cudaError 400"]
    assert not tried()


def test_where_memory_was_short_it_is_tried_again(
    tried: Callable[..., bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (fake_cupy.PoolError(64), OutOfMemoryError("temporaries", needed=64, available=0)):

        def short(self: Adding, *_: Any, error: Exception = error) -> Any:
            raise error

        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(Adding, "call", short)
            assert not tried()
    assert len(caplog.messages) == 2
    assert tried()


def test_where_there_is_none_nothing_is_said(tried: Callable[..., bool], caplog: pytest.LogCaptureFixture) -> None:
    assert not tried(pdl=False)
    assert caplog.messages == []


# What is fetched before


def fetching(arch: int, rows: int, *, transposed: bool = False, invariant: bool = False) -> CompileLauncher:
    launcher = CompileLauncher(arch)
    x, out = FakeArray((rows, 2048), "float16"), FakeArray((rows, 1024), "float16")
    matmul.matmul(x, FakeArray((2048, 1024), "float16", transposed=transposed), out, launcher, invariant=invariant)
    return launcher


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_few_rows_fetch_weights_before_they_wait(transposed: bool, rows: int, arch: int) -> None:
    launcher = fetching(arch, rows, transposed=transposed)
    (made,) = launcher.compiled
    if arch < 90:
        assert launcher.launches[0].constexprs["AHEAD"] is None
        return
    before, waited, behind = made.sass.partition("ACQBULK")
    assert waited
    assert made.waits_first
    assert "CCTL.E.PF2" in before
    assert "CCTL.E.PF2" not in behind
    assert before.count("PREEXIT") == 0, "one kernel at a time is to fetch ahead"
    assert behind.count("PREEXIT") == 1
    assert made.spilled_bytes == 0


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("rows", [1, 16, 512])
def test_gated_products_fetch_of_both_matrices(rows: int, arch: int) -> None:
    launcher = CompileLauncher(arch)
    x, out = FakeArray((rows, 2048), "float16"), FakeArray((rows, 8192), "float16")
    gate, up = FakeArray((2048, 8192), "float16"), FakeArray((2048, 8192), "float16", address=0x7E0000000000)
    gated.gated(x, gate, up, out, launcher, activation="swish")
    (made,) = launcher.compiled
    assert made.waits_first
    assert ("CCTL.E.PF2" in made.sass.partition("ACQBULK")[0]) == (rows < 512)
    assert made.sass.count("ACQBULK") == 1
    assert made.spilled_bytes == 0


def test_others_do_not() -> None:
    """Many rows take longer than the weights; what is to be the same binary in every batch is."""
    for launcher in (fetching(90, 512), fetching(90, 16, invariant=True)):
        assert launcher.launches[0].constexprs["AHEAD"] is None
        assert launcher.compiled[0].waits_first


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("images", [1, 32])
def test_convolutions_of_an_image_fetch_weights(images: int, arch: int) -> None:
    launcher = CompileLauncher(arch)
    x, w = FakeArray((images, 14, 14, 256), "float16"), FakeArray((128, 3, 3, 256), "float16")
    where = conv.geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    conv.conv(x, w, FakeArray((images, 14, 14, 128), "float16"), launcher, where)
    (made,) = launcher.compiled
    assert made.waits_first
    assert ("CCTL.E.PF2" in made.sass.partition("ACQBULK")[0]) == (images == 1)
    assert made.spilled_bytes == 0


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("axis", ["k", "n"])
@pytest.mark.parametrize("wide", [4, 16, 32, 64, 128, 256])
def test_pieces_are_a_few_hundred_and_lie_in_the_columns(wide: int, axis: str, itemsize: int) -> None:
    launcher = CompileLauncher(90)
    for programs in (1, 100, 1000, 100_000):
        made = ahead.ahead(launcher, programs, wide, itemsize, axis)
        assert made is not None
        rows, columns, step_k, step_n = made
        assert ahead.LEAST <= rows * columns <= ahead.MOST
        assert rows & (rows - 1) == columns & (columns - 1) == 0
        assert columns * step_n <= max(wide, ahead.PIECE // itemsize)
        assert {step_k, step_n} == {1, ahead.PIECE // itemsize}
    assert ahead.ahead(CompileLauncher(80), 100, wide, itemsize, axis) is None
    assert ahead.ahead(launcher, 100, wide, itemsize, axis, invariant=True) is None
    assert ahead.ahead(launcher, 100, wide, itemsize, "-") is None

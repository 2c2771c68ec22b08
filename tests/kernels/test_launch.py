"""What reaches the driver: argument bytes, grids, shared memory, lifetimes. The driver is a fake that records."""

from __future__ import annotations

import ctypes
import gc
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from infera_kernels.launch import (
    CompileLauncher,
    Const,
    CudaLauncher,
    InterpreterLauncher,
    KernelCache,
    Launch,
    LaunchError,
    RecordingLauncher,
    Target,
    Unhinted,
    nominal_target,
)
from infera_kernels.launch.abi import Address, check_abi, pack, ptx_parameter_sizes
from infera_kernels.launch.descriptors import Encode
from infera_kernels.launch.signature import bind
from tests.kernels.support import FakeArray, execute

if TYPE_CHECKING:
    import triton.language as tl

pytest.importorskip("triton")

from infera_kernels.triton import elementwise, matmul, norm, softmax, tiles
from infera_kernels.triton.terms import Term

pytestmark = pytest.mark.kernels

STREAM = 0x5150
FUNCTION = 0x3000


class FakeDriver:
    """Records cuLaunchKernel's arguments, the parameters read through the pointers as CUDA would."""

    def __init__(self, target: Target | None = None) -> None:
        self._target = target or nominal_target(90)
        self.loaded: list[str] = []
        self.allowed: list[tuple[int, int]] = []
        self.launches: list[tuple[int, ...]] = []
        self.parameters: list[list[bytes]] = []
        self.sizes: list[int] = []
        self.encode: Encode | None = None
        self.launch_early: Callable[..., object] | None = None

    def version(self) -> int:
        return 13000

    def target(self, device_id: int) -> Target:
        return self._target

    def load(self, device_id: int, cubin: bytes, name: str) -> Address:
        assert cubin[:4] == b"\x7fELF"
        self.loaded.append(name)
        return Address.of(FUNCTION + len(self.loaded), cubin)

    def allow_shared(self, function: int, nbytes: int) -> None:
        self.allowed.append((function, nbytes))

    @property
    def launch(self) -> Callable[..., object]:
        return self._launch

    def _launch(self, *args: int) -> None:
        *config, parameters, extra = args
        assert extra == 0
        pointers = (ctypes.c_void_p * len(self.sizes)).from_address(parameters)
        self.launches.append(tuple(config))
        self.parameters.append([ctypes.string_at(p or 0, n) for p, n in zip(pointers, self.sizes, strict=True)])


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def launcher(driver: FakeDriver, tmp_path: Path) -> CudaLauncher:
    return CudaLauncher(0, STREAM, driver=driver, cache=KernelCache(tmp_path))


def test_argument_bytes_grid_and_block(launcher: CudaLauncher, driver: FakeDriver) -> None:
    x, out = FakeArray((100, 48), "float32", address=0x7F0000001000), FakeArray((100, 48), "float32")
    driver.sizes = [8, 8, 4, 4, 4, 4, 8, 8]
    execute(softmax.softmax(x, out, launcher))
    reference = CompileLauncher(90)
    softmax.softmax(x, out, reference)
    shared = reference.compiled[0].binary.spec.shared_bytes
    assert driver.launches == [(FUNCTION + 1, 7, 1, 1, 128, 1, 1, shared, STREAM)]
    values = b"".join(driver.parameters[0])
    assert values == struct.pack("<QQiiiiQQ", 0x7F0000001000, 0x7F0000000000, 100, 48, 48, 48, 0, 0)


def test_wide_integers_and_tuples(launcher: CudaLauncher, driver: FakeDriver) -> None:
    x, out = FakeArray((2**16, 2**16), "float16"), FakeArray((2**16, 2**16), "float16")
    driver.sizes = [8, 8, 8, 4, 8, 8]
    execute(elementwise.unary("hard_sigmoid", x, out, launcher, alpha=0.25, beta=0.5))
    assert driver.launches[0][1:4] == (2**22, 1, 1)
    a, o, size, rows, *scratch = driver.parameters[0]
    assert (a, o) == (struct.pack("<Q", 0x7F0000000000),) * 2
    assert size == struct.pack("<q", 2**32)
    assert rows == struct.pack("<i", 1)
    assert scratch == [bytes(8)] * 2


def test_floats(launcher: CudaLauncher, driver: FakeDriver) -> None:
    x = FakeArray((64, 256), "float16")
    calls = norm.rms_norm(x, None, x, launcher, eps=0.25)
    (loaded,) = launcher._loaded.values()
    driver.sizes = [8 if type.startswith("*") else 4 for type in (*loaded.binary.spec.types, "*i8", "*i8")]
    execute(calls)
    assert struct.pack("<f", 0.25) in driver.parameters[0]


def test_a_kernel_that_is_told_functions_numbers_and_types(launcher: CudaLauncher, driver: FakeDriver) -> None:
    """All of them are part of the name under which the binary is kept."""
    x, out = FakeArray((64,), "float32"), FakeArray((64,), "float32")
    driver.sizes = [8, 8, 4, 4, 8, 8]
    for alpha, dtype in ((0.25, "float16"), (0.5, "float16"), (0.5, "bfloat16"), (0.5, "bfloat16")):
        terms = (Term("leaky_relu", (0,), alpha), Term("cast", (1,), dtype=dtype), Term("cast", (2,), dtype="float32"))
        execute(elementwise.expression(terms, (x,), out, launcher))
    assert len(driver.launches) == 4
    assert len(driver.loaded) == 3


LARGE = tiles.Tile(128, 128, 64, 8, 4)
"""128 KiB of half inputs."""


def test_more_than_48_kib_is_asked_for(launcher: CudaLauncher, driver: FakeDriver) -> None:
    a = FakeArray((1024, 1024), "float16")
    ((_, args),) = matmul.matmul(a, a, a, launcher, tile=LARGE)
    assert driver.allowed == [(FUNCTION + 1, 131072)]
    assert args[7] == 131072


def test_a_device_with_too_little_shared_memory(tmp_path: Path) -> None:
    driver = FakeDriver(Target(90, 132, 99 * 1024))
    launcher = CudaLauncher(3, STREAM, driver=driver, cache=KernelCache(tmp_path))
    a = FakeArray((1024, 1024), "float16")
    with pytest.raises(LaunchError, match=r"needs 131,072 bytes of shared memory a block, device 3 \(sm_90\) has 101,"):
        matmul.matmul(a, a, a, launcher, tile=LARGE)
    assert driver.loaded == []
    matmul.matmul(a, a, a, launcher)
    assert len(driver.loaded) == 1


def test_an_empty_grid_does_nothing(launcher: CudaLauncher, driver: FakeDriver) -> None:
    x = FakeArray((4, 4), "float32")
    args = {"x": x, "out": x, "rows": 4, "cols": 4, "x_stride": 4, "out_stride": 4}
    execute([launcher.launch(softmax.softmax_kernel, (0,), args, {"LOG": False, "ROWS": 4, "COLS": 4})])
    assert (driver.loaded, driver.launches) == ([], [])


def test_one_binary_serves_alike_arguments(launcher: CudaLauncher, driver: FakeDriver) -> None:
    out = FakeArray((64, 64), "float32")
    for address in (0x7F0000000000, 0x7F0000000100):
        elementwise.unary("relu", FakeArray((64, 64), "float32", address=address), out, launcher)
    assert len(driver.loaded) == 1
    elementwise.unary("relu", FakeArray((64, 64), "float32", address=0x7F0000000104), out, launcher)
    assert len(driver.loaded) == 2


def test_a_call_keeps_its_arrays_and_parameters(launcher: CudaLauncher, driver: FakeDriver) -> None:
    x = FakeArray((64,), "float32", address=0x7F00AA000000)
    seen = weakref.ref(x)
    calls = elementwise.unary("relu", x, FakeArray((64,), "float32"), launcher)
    del x
    gc.collect()
    assert seen() is not None
    driver.sizes = [8, 8, 4, 4, 8, 8]
    execute(calls)
    assert driver.parameters[0][0] == struct.pack("<Q", 0x7F00AA000000)
    del calls
    gc.collect()
    assert seen() is None


def test_stream_may_be_an_object(driver: FakeDriver, tmp_path: Path) -> None:
    class Stream:
        ptr = 0x77

    launcher = CudaLauncher(0, Stream(), driver=driver, cache=KernelCache(tmp_path))
    ((_, args),) = elementwise.unary("relu", FakeArray((8,), "float32"), FakeArray((8,), "float32"), launcher)
    assert args[8] == 0x77


@pytest.mark.parametrize("grid", [(2**31,), (1, 65536), (1, 1, 65536), (-1,), (1, 1, 1, 1)])
def test_grids_beyond_cuda(grid: tuple[int, ...], launcher: CudaLauncher) -> None:
    with pytest.raises(LaunchError, match="outside CUDA's limits"):
        launcher.launch(softmax.softmax_kernel, grid, {}, {})


# Signatures


def kernel(x: Any, n: Any, strides: Any, scale: Any = None, FLAG: tl.constexpr = False) -> None:
    """Stands for a Triton kernel where only the signature matters."""


X = FakeArray((4,), "float16")


def test_alignment_is_that_of_the_values() -> None:
    near = FakeArray((4,), "float16", address=0x7F0000000008)
    assert bind(kernel, {"x": X, "n": 32, "strides": (16, 17, 0)}, {}).aligned() == ((0,), (1,), (2, 0), (2, 2))
    assert bind(kernel, {"x": near, "n": 8, "strides": ()}, {}).aligned() == ()


def test_no_hint_is_given_of_what_the_kernel_excludes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "do_not_specialize_on_alignment", ("n", "strides"), raising=False)
    assert bind(kernel, {"x": X, "n": 32, "strides": (16, 17)}, {}).aligned() == ((0,),)


def test_types_and_constants() -> None:
    binding = bind(kernel, {"x": X, "n": 2**31, "strides": (1, Const(1)), "scale": None}, {"FLAG": True})
    assert binding.types() == {
        "x": "*fp16",
        "n": "i64",
        "strides": ("i32", "constexpr"),
        "scale": "constexpr",
        "FLAG": "constexpr",
    }
    assert binding.constants() == {(2, 1): 1, (3,): None, (4,): True}
    assert [leaf.type for leaf in binding.runtime()] == ["*fp16", "i64", "i32"]
    assert bind(kernel, {"x": X, "n": 1, "strides": (), "scale": 1e300}, {}).runtime()[-1].value == np.inf
    one = bind(kernel, {"x": X, "n": np.int64(1), "strides": (), "scale": np.float32(0.5)}, {})
    assert one.types()["n"] == "i32", "1 is specialised only by Const"
    assert one.types()["scale"] == "fp32"


def test_an_integer_may_give_no_hint() -> None:
    one, other = (bind(kernel, {"x": X, "n": Unhinted(n), "strides": (16, Unhinted(n))}, {}) for n in (16, 17))
    assert one.types() == other.types()
    assert one.aligned() == other.aligned() == ((0,), (2, 0))
    assert [leaf.value for leaf in other.runtime()[1:]] == [17, 16, 17]


@pytest.mark.parametrize(
    ("args", "constexprs", "message"),
    [
        ({"x": X, "n": 1}, {}, "kernel: 'strides' is missing"),
        ({"x": X, "n": 1, "strides": (), "m": 2}, {}, "no parameter 'm'; it has x, n, strides, scale, FLAG"),
        ({"x": X, "n": 1, "strides": ()}, {"n": 1}, "'n' is in both args and constexprs"),
        ({"x": X, "n": 1, "strides": (), "FLAG": True}, {}, "'FLAG' is declared tl.constexpr"),
        (
            {"x": "text", "n": 1, "strides": ()},
            {},
            "'x': expected an array, a number, None or a tuple of .* got str",
        ),
        ({"x": FakeArray((1,), "complex64"), "n": 1, "strides": ()}, {}, "no Triton type for dtype complex64"),
    ],
)
def test_arguments_that_do_not_fit(args: dict[str, Any], constexprs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        bind(kernel, args, constexprs)


def test_integers_beyond_64_bits() -> None:
    with pytest.raises(LaunchError, match="does not fit in 64 bits"):
        bind(kernel, {"x": X, "n": 2**63, "strides": ()}, {})


# The parameter block


def test_pack_refuses_a_wrong_count_and_a_value_out_of_range() -> None:
    with pytest.raises(ValueError, match="zip"):
        pack(["i32"], [1, 2])
    with pytest.raises(struct.error):
        pack(["i32"], [2**31])


PTX = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u32 k_param_1,
	.param .align 64 .b8 k_param_2[128],
	.param .f32 k_param_3,
	.param .u64 .ptr .global .align 1 k_param_4,
	.param .u64 .ptr .global .align 1 k_param_5
)
.reqntid 128
{
"""


def test_ptx_parameters() -> None:
    assert ptx_parameter_sizes(PTX) == [8, 4, 128, 4, 8, 8]
    with pytest.raises(LaunchError, match=r"no \.visible \.entry"):
        ptx_parameter_sizes("")


def test_another_abi_is_noticed() -> None:
    plain = PTX.replace("\t.param .align 64 .b8 k_param_2[128],\n", "")
    check_abi("k", ["*fp32", "i32", "fp32"], 128, plain)
    with pytest.raises(LaunchError, match=r"k: parameter sizes \[8, 4, 8, 8\] expected, the PTX has"):
        check_abi("k", ["*fp32", "i32"], 128, plain)
    with pytest.raises(LaunchError, match="256 threads a block expected, the PTX requires 128"):
        check_abi("k", ["*fp32", "i32", "fp32"], 256, plain)


# Other launchers


def test_recording_happens_when_the_call_runs() -> None:
    recorder = RecordingLauncher()
    x, out = np.zeros((3, 5), np.float32), np.zeros((3, 5), np.float32)
    calls = softmax.softmax(x, out, recorder)
    assert recorder.launches == []
    execute(calls * 2)
    assert len(recorder.launches) == 2
    launch = recorder.launches[0]
    assert isinstance(launch, Launch)
    assert (launch.kernel, launch.grid) == ("softmax_kernel", (1, 1, 1))
    assert launch.args["x"] is x
    assert launch.constexprs == {"LOG": False, "ROWS": 4, "COLS": 8}
    assert launch.options == {"num_warps": 4}
    with pytest.raises(TypeError, match="'out' is missing"):
        recorder.launch(softmax.softmax_kernel, (1,), {"x": x}, {})


def test_the_interpreter_needs_its_own_process() -> None:
    with pytest.raises(LaunchError, match="set TRITON_INTERPRET=1 before importing kernels"):
        softmax.softmax(np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32), InterpreterLauncher())


def test_importing_the_launchers_loads_neither_triton_nor_cupy() -> None:
    code = (
        "import sys, infera_kernels, infera_kernels.launch; sys.exit('triton' in sys.modules or 'cupy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Products whose factors TMA reads, as they reach the driver: maps, argument bytes, lifetimes, and who gets none. Both
the driver and its cuTensorMapEncodeTiled are stand-ins."""

from __future__ import annotations

import gc
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from bench.gpu_absent import AbsentDriver
from infera_kernels.launch import CudaLauncher, Descriptor, KernelCache, LaunchError, RecordingLauncher, nominal_target
from infera_kernels.launch.abi import check_abi
from infera_kernels.launch.compile import KernelSpec
from infera_kernels.launch.descriptors import (
    ALIGNED,
    BYTES,
    TYPES,
    Encoding,
    described,
    driver_encode,
    encoded,
    rank_of,
)
from infera_kernels.launch.signature import bind
from infera_kernels.triton import matmul, tiles
from tests.kernels.support import Array, FakeArray, execute, random
from tests.kernels.tensor_maps import Encoder, decoded
from tests.kernels.test_launch import STREAM, FakeDriver

pytestmark = pytest.mark.kernels

TILE = tiles.TmaTile(64, 128, 64, 4, 4, 1)


class DescribingDriver(FakeDriver):
    def __init__(self, arch: int = 90) -> None:
        super().__init__(nominal_target(arch))
        self.encoder = Encoder()
        self.encode = self.encoder.function


def aligned(shape: tuple[int, ...], dtype: Any = np.float16, seed: int = 0) -> Array:
    """An array of random values that begins on 64 bytes."""
    values = random(shape, dtype, seed=seed)
    room = np.empty(values.nbytes + 64, np.uint8)
    array = room[-room.ctypes.data % 64 :][: values.nbytes].view(values.dtype).reshape(shape)
    array[...] = values
    return array


def launched(a: Array, b: Array, out: Array, folder: Path, **options: Any) -> tuple[DescribingDriver, list[bytes]]:
    driver = DescribingDriver()
    launcher = CudaLauncher(0, STREAM, driver=driver, cache=KernelCache(folder))
    calls = matmul.matmul(a, b, out, launcher, tile=TILE, **options)
    assert driver.encoder.calls == 2
    gc.collect()
    (spec,) = (loaded.binary.spec for loaded in launcher._loaded.values())
    driver.sizes = []
    for type in (*spec.types, "*i8", "*i8"):
        rank = rank_of(type)
        driver.sizes += [BYTES, *[4] * rank, *[8] * rank] if rank else [8 if type.startswith("*") else 4]
    execute(calls * 2)
    assert driver.encoder.calls == 2, "maps are made once"
    assert driver.parameters[0] == driver.parameters[1]
    return driver, driver.parameters[0]


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_bytes_of_a_launch(turned: tuple[bool, bool], tmp_path: Path) -> None:
    a, b = aligned((104, 72)[:: -1 if turned[0] else 1]), aligned((72, 136)[:: -1 if turned[1] else 1], seed=1)
    out = aligned((104, 136), seed=2)
    driver, bytes_ = launched(a.T if turned[0] else a, b.T if turned[1] else b, out, tmp_path)
    (launch,) = set(driver.launches)
    assert launch[1:7] == (4, 1, 1, 128, 1, 1), "one program for each of 2 x 2 tiles"
    assert launch[8] == STREAM
    at = 0
    blocks = [(64, 64), (64, 128)]
    for array, block, is_turned in zip((a, b), blocks, turned, strict=True):
        lines = block[is_turned]
        raw, *sizes, line, one = bytes_[at : at + 5]
        assert sizes == [struct.pack("<i", n) for n in array.shape]
        assert (line, one) == (struct.pack("<q", array.shape[1]), struct.pack("<q", 1))
        found = decoded(raw)
        assert (found.address, found.dtype) == (array.ctypes.data, array.dtype)
        assert (found.shape, found.strides) == (array.shape, array.strides[:-1])
        assert found.box == (lines, 64)
        assert (found.swizzle, found.promotion) == (3, 2), "128 bytes of each"
        start = (lines, 0)
        want = np.zeros(found.box, np.float16)
        inside = array[start[0] :, :64]
        want[: inside.shape[0], : inside.shape[1]] = inside[: found.box[0]]
        np.testing.assert_array_equal(found.load(start), want)
        at += 5
    rest = b"".join(bytes_[at:])
    assert rest == struct.pack("<QiiiiQQ", out.ctypes.data, 104, 136, 72, 136, 0, 0)


def test_a_batch_has_maps_of_three_dimensions_and_what_is_shared_of_two(tmp_path: Path) -> None:
    a, b = aligned((3, 72, 64)), aligned((64, 128), seed=1)
    out = aligned((3, 2, 72, 128))[:, 0]  # its matrices lie apart: a batch, with one b
    _, bytes_ = launched(a, b, out, tmp_path)
    found = decoded(bytes_[0])
    assert (found.shape, found.strides, found.box) == ((3, 72, 64), a.strides[:-1], (1, 64, 64))
    np.testing.assert_array_equal(found.load((2, 64, 0))[0, :8], a[2, 64:])
    assert decoded(bytes_[7]).shape == (64, 128)


def test_a_map_lives_as_long_as_its_call(tmp_path: Path) -> None:
    driver = DescribingDriver()
    launcher = CudaLauncher(0, STREAM, driver=driver, cache=KernelCache(tmp_path))
    driver.sizes = [BYTES]
    calls = matmul.matmul(aligned((64, 64)), aligned((64, 128)), aligned((64, 128)), launcher, tile=TILE)
    for _ in range(50):
        matmul.matmul(aligned((64, 64)), aligned((64, 128)), aligned((64, 128)), launcher, tile=TILE)
    gc.collect()
    execute(calls)
    assert decoded(driver.parameters[0][0]).load((0, 0)).shape == (64, 64)


def test_a_kept_binary_is_launched_alike(tmp_path: Path) -> None:
    a, b, out = aligned((104, 72)), aligned((72, 136), seed=1), aligned((104, 136))
    first, before = launched(a, b, out, tmp_path)
    again, after = launched(a, b, out, tmp_path)
    assert before == after
    assert first.launches == again.launches


def test_specs_are_kept_with_encodings() -> None:
    spec = KernelSpec("k", ("tensordesc<fp16[64, 64]>",), 128, 0, 90, "3.9.0", (Encoding((64, 64), 3),))
    assert KernelSpec.from_json(spec.to_json()) == spec
    older = KernelSpec("k", ("*fp16",), 128, 0, 90, "3.9.0").to_json().replace('"encodings": [], ', "")
    assert KernelSpec.from_json(older).encodings == ()


def test_types_of_elements_are_those_that_triton_has_encoded() -> None:
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    assert {TMA_DTYPE_DEVICE_TO_HOST[n] for n in (6, 7, 10)} == set(TYPES.values())


def test_a_refusal_of_the_driver_is_told() -> None:
    given = Descriptor(aligned((8, 12)), (8, 12), (12, 1), (8, 8))
    encoder = Encoder()
    with pytest.raises(LaunchError, match=r"error 1 for float16\[8, 12\], strides \[12, 1\], at .* boxes of \[8, 8\]"):
        encoded(encoder.function, given, given.array.ctypes.data, Encoding((8, 8), 3), 90)
    assert encoder.refused == "strides"


def test_maps_lie_as_the_header_of_cuda_asks() -> None:
    """The header that comes with Triton; and where they are made, which by chance may be right."""
    import triton.backends.nvidia as nvidia

    header = (Path(next(iter(nvidia.__path__))) / "include" / "cuda.h").read_text(errors="replace")
    asked = re.search(r"struct CUtensorMap_st \{.*?alignas\((\d+)\)", header, re.DOTALL)
    assert asked is not None
    assert ALIGNED % int(asked[1]) == 0
    given, encoder = Descriptor(aligned((8, 16)), (8, 16), (16, 1), (8, 8)), Encoder()
    kept = []
    for i in range(30):
        kept.append(bytes(48 * i))
        encoded(encoder.function, given, given.array.ctypes.data, Encoding((8, 8), 3), 90)


@pytest.mark.parametrize(
    ("arch", "rows", "line", "marked"),
    [
        (100, 8, 16, False),
        (103, 8, 64, False),
        (120, 512, 128, False),
        (100, 513, 128, True),
        (100, 9, 8192, True),
        (90, 8, 16, True),
    ],
)
def test_blackwells_maps_of_small_arrays_lose_the_bit_that_drivers_set_amiss(
    arch: int, rows: int, line: int, marked: bool
) -> None:
    """128 KiB are 512 rows of 128 float16."""
    given, encoder = Descriptor(aligned((8, 16)), (rows, 16), (line, 1), (8, 8)), Encoder()
    made = encoded(encoder.function, given, given.array.ctypes.data, Encoding((8, 8), 3), arch)
    found = decoded(made)
    assert found.marked is marked
    assert (found.shape, found.strides, found.swizzle, found.box) == ((rows, 16), (2 * line,), 3, (8, 8))


@pytest.mark.parametrize(
    ("address", "shape", "strides", "itemsize", "holds"),
    [
        (0x1000, (5, 7), (8, 1), 2, True),
        (0x1000, (5, 9), (8, 1), 2, False),
        (0x1008, (5, 7), (8, 1), 2, False),
        (0x1000, (5, 7), (12, 1), 2, False),
        (0x1000, (5, 7), (12, 1), 4, True),
        (0x1000, (5, 7), (8, 2), 2, False),
        (0x1000, (3, 5, 7), (40, 8, 1), 2, True),
        (0x1000, (3, 5, 7), (32, 8, 1), 2, False),
        (0x1000, (3, 5, 7), (44, 8, 1), 2, False),
        (0x1000, (0, 7), (8, 1), 2, False),
        (0x1000, (5, 7), (2**39, 1), 2, False),
    ],
)
def test_what_can_be_described(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, holds: bool
) -> None:
    assert described(address, itemsize, shape, strides) is holds


def test_descriptors_in_a_signature() -> None:
    def kernel(x: Any, n: Any) -> None: ...

    given = Descriptor(aligned((8, 16)), (8, 16), (16, 1), (64, 32))
    binding = bind(kernel, {"x": given, "n": 3}, {})
    assert binding.types() == {"x": "tensordesc<fp16[64, 32]>", "n": "i32"}
    assert binding.aligned() == ()
    assert [rank_of(t) for t in ("tensordesc<fp16[64, 32]>", "tensordesc<bf16[1, 64, 32]>", "*fp16")] == [2, 3, 0]
    ptx = ".visible .entry k(\n.param .align 64 .b8 a[128],\n.param .u32 b,\n.param .u32 c,\n.param .u64 d,\n"
    ptx += ".param .u64 e,\n.param .u32 n,\n.param .u64 f,\n.param .u64 g\n)\n"
    check_abi("k", ["tensordesc<fp16[64, 32]>", "i32"], 128, ptx)
    with pytest.raises(LaunchError, match="another Triton ABI"):
        check_abi("k", ["tensordesc<fp16[1, 64, 32]>", "i32"], 128, ptx)


def asked(launcher: Any, a: Any, b: Any, out: Any, **options: Any) -> str:
    """The layout of the problem by which a product's tile is chosen."""
    from infera_kernels.tuning import Trial, Tuned

    trial = Trial(Tuned(launcher.target), {})
    matmul.matmul(a, b, out, launcher, tuned=trial, **options)
    ((_, problem, tile),) = trial.asked.values()
    assert not isinstance(tile, tiles.TmaTile), "never predicted"
    return problem.layout


def half(*shape: int, **options: Any) -> FakeArray:
    return FakeArray(shape, "float16", **options)


def test_who_may_have_descriptors() -> None:
    operands = half(128, 64), half(64, 128), half(128, 128)
    assert asked(RecordingLauncher(), *operands) == "@kn"
    assert asked(RecordingLauncher(nominal_target(80)), *operands) == "kn"
    none = DescribingDriver()
    assert CudaLauncher(0, 0, driver=none).describes
    none.encode = None
    assert not CudaLauncher(0, 0, driver=none).describes
    assert not CudaLauncher(0, 0, driver=DescribingDriver(80)).describes
    assert CudaLauncher(0, 0, driver=AbsentDriver(nominal_target(90), 13000)).describes


@pytest.mark.parametrize(
    ("a", "b", "layout"),
    [
        (half(128, 64), half(64, 128, transposed=True), "@kk"),
        (half(64, 64, transposed=True), half(64, 128), "@mn"),
        (half(128, 60), half(60, 128), "kn"),
        (half(128, 64, address=0x7F0000000008), half(64, 128), "kn"),
        (half(128, 64), half(64, 100), "kn"),
        (half(3, 128, 64), half(3, 64, 128), "@kn"),
        (half(3, 128, 64), half(1, 64, 128), "@kn"),
        (FakeArray((128, 64), "float32"), FakeArray((64, 128), "float32"), "kn"),
    ],
    ids=["b by columns", "a by columns", "narrow", "misaligned", "narrow b", "batch", "shared b", "float32"],
)
def test_whose_factors_tma_reads(a: FakeArray, b: FakeArray, layout: str) -> None:
    lead = max(a.shape[:-2], b.shape[:-2])
    out = FakeArray((*lead, a.shape[-2], b.shape[-1]), a.dtype)
    assert asked(RecordingLauncher(), a, b, out) == layout
    if not layout.startswith("@"):
        with pytest.raises(ValueError, match="TMA does not read these factors"):
            matmul.matmul(a, b, out, RecordingLauncher(), tile=TILE)


@pytest.mark.parametrize(
    ("a", "b", "layout"),
    [
        (half(1 << 29, 65, 8), half(1 << 29, 8, 8), "@kn"),
        (half(1 << 30, 65, 8), half(1 << 30, 8, 8), "kn"),
        (half(2, (1 << 30) - 64, 8), half(8, 8), "kn"),
        (half((1 << 30) - 64, 8), half(8, 8), "@kn"),
    ],
    ids=["2^30 tiles", "2^31 tiles", "rows past the last", "2^30 rows"],
)
def test_tiles_and_rows_are_as_few_as_int32_counts(a: FakeArray, b: FakeArray, layout: str) -> None:
    out = FakeArray((*a.shape[:-1], b.shape[-1]), a.dtype)
    assert asked(RecordingLauncher(), a, b, out) == layout


def test_rows_that_keep_their_bits_have_none() -> None:
    launcher = RecordingLauncher()
    execute(matmul.matmul(half(128, 64), half(64, 128), half(128, 128), launcher, invariant=True))
    assert launcher.launches[0].kernel == "matmul_kernel"


def test_without_a_driver_there_is_no_function() -> None:
    found = driver_encode()
    assert found is None or callable(found)


def test_descriptors_are_refused_before_sm_90() -> None:
    from infera_kernels.launch.compile import compile_kernel, compiler_options
    from infera_kernels.triton.tma_kernel import tma_kernel

    launcher = RecordingLauncher()
    execute(matmul.matmul(half(128, 64), half(64, 128), half(128, 128), launcher, tile=TILE))
    (launch,) = launcher.launches
    binding = bind(tma_kernel, launch.args, launch.constexprs)
    with pytest.raises(LaunchError, match="takes tensor descriptors, which sm_80 does not have"):
        compile_kernel(tma_kernel, binding, compiler_options(launch.options, nominal_target(80)), 80)

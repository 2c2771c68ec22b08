"""CUDA C++ in this repository: one kernel, of `bench.gpu_check`; it is compiled where NVRTC is installed."""

from __future__ import annotations

import ctypes
import ctypes.util
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.gpu_networks import POKE

ROOT = Path(__file__).parent.parent
MAKERS = ("RawKernel", "RawModule", "ElementwiseKernel", "ReductionKernel", "load_inline")
"""What compiles CUDA C++ in CuPy and PyTorch."""


def nvrtc() -> ctypes.CDLL | None:
    """NVRTC, from NVIDIA's wheels or the system."""
    found = find_spec("nvidia")
    folders = [Path(p) for p in found.submodule_search_locations or ()] if found else []
    paths = [str(p) for folder in folders for p in sorted(folder.glob("*/lib/libnvrtc.so*"))]
    for name in (*paths, ctypes.util.find_library("nvrtc")):
        if name:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
    return None


def test_the_packages_have_no_cuda_sources() -> None:
    """Triton makes their kernels: `make test-kernels` compiles each."""
    for package in ("infera_gpu", "kernels", "server"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not [name for name in MAKERS if f"{name}(" in text or "__global__" in text], path


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_100"])
def test_the_kernel_that_faults_compiles(architecture: str) -> None:
    library = nvrtc()
    if library is None:
        pytest.skip("NVRTC is not installed: pip install 'infera-gpu[kernels]'")
    program = ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), POKE.encode(), b"poke.cu", 0, None, None) == 0
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
        status = library.nvrtcCompileProgram(program, 1, options)
        size = ctypes.c_size_t()
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        assert status == 0, log.value.decode()
        assert library.nvrtcGetPTXSize(program, ctypes.byref(size)) == 0
        ptx = ctypes.create_string_buffer(size.value)
        assert library.nvrtcGetPTX(program, ptx) == 0
        assert b".entry poke" in ptx.value
        assert library.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
        cubin = ctypes.create_string_buffer(size.value)
        assert library.nvrtcGetCUBIN(program, cubin) == 0
        assert cubin.raw.startswith(b"\x7fELF")
        assert b".text.poke" in cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))

"""First timings on a GPU: launches, matrix products, rows. Peers are timed where they are installed.

Times are of the GPU, by events around as many calls as take a few milliseconds, the least of several rounds; what a
kernel computes is compared with CuPy first, so that no wrong answer is fast.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from bench.gpu_report import CheckFailed, Context, Section
from infera_gpu.op import Call
from tests.cases import run

Result = tuple[str, Mapping[str, Any]]

ROUNDS, ROUND_SECONDS = 5, 0.01
PRODUCTS = ((1024, 1024, 1024), (1024, 3072, 768), (4096, 4096, 4096), (1, 4096, 4096), (64, 1024, 4096))
"""(M, N, K): square ones, a layer of BERT-base at 8 x 128 tokens, one token and a few."""

ROWS = ((8192, 128), (8192, 768), (2048, 4096), (64, 32768))
PRECISIONS: Mapping[str, tuple[tuple[str, float], ...]] = {
    "float16": (("ieee", 2e-3),),
    "float32": (("ieee", 1e-5), ("tf32x3", 1e-5), ("tf32", 3e-3)),
}
"""dtype -> the kernel's precisions, and how far from CuPy's product each may be, of the peak."""


def gpu_seconds(device: Any, call: Callable[[], object]) -> float:
    """Of one call on the current stream."""
    cuda = device.xp.cuda
    begin, end = cuda.Event(), cuda.Event()

    def timed(times: int) -> float:
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return float(cuda.get_elapsed_time(begin, end)) / 1000 / times

    timed(3)
    times = max(1, min(1000, int(ROUND_SECONDS / max(timed(3), 1e-7))))
    return min(timed(times) for _ in range(ROUNDS))


def normal(device: Any, *shape: int, dtype: str) -> Any:
    """Standard normal values, on the device."""
    host = np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape, np.float32)
    return device.constant(host.astype(dtype), "device")


def distance(xp: Any, got: Any, want: Any) -> float:
    """max |got - want| of the peak."""
    wide = want.astype(xp.float64)
    return float(abs(got.astype(xp.float64) - wide).max() / abs(wide).max())


def torch_tensors(*arrays: Any) -> Any:
    """torch and the arrays as its tensors, without a copy; None where it is not installed or has no GPU."""
    if find_spec("torch") is None:
        return None
    torch = import_module("torch")
    return (torch, *map(torch.from_dlpack, arrays)) if torch.cuda.is_available() else None


def torch_seconds(device: Any, torch: Any, call: Callable[[], object]) -> float:
    """`gpu_seconds` with this device's stream as torch's."""
    with torch.cuda.stream(torch.cuda.ExternalStream(device.xp.cuda.get_current_stream().ptr)), torch.inference_mode():
        return gpu_seconds(device, call)


def launches(context: Context) -> Result:
    """What one launch costs the host, and a small kernel the GPU."""
    from infera_kernels.triton import elementwise

    device = context.open()
    with device.running():
        x = normal(device, 1024, dtype="float32")
        ((fn, args),) = elementwise.unary("relu", x, device.xp.empty_like(x), device.launcher)
        fn(*args)
        device.synchronize()
        host = []
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(100):
                fn(*args)
            host.append((time.perf_counter() - began) / 100)
            device.synchronize()
        gpu = gpu_seconds(device, lambda: fn(*args))
    found = {"host_seconds": statistics.median(host), "gpu_seconds": gpu}
    return f"{found['host_seconds'] * 1e6:.2f} µs on the host, {gpu * 1e6:.2f} µs back to back", found


def products(context: Context) -> Result:
    """Matrix products against cuBLAS (through CuPy, and torch if present)."""
    from infera_kernels.triton.matmul import matmul

    device = context.open()
    found: dict[str, Any] = {}
    wrong: list[str] = []
    with device.running():
        for m, n, k in PRODUCTS:
            for dtype, precisions in PRECISIONS.items():
                if context.left() <= 0:
                    break
                a, b = normal(device, m, k, dtype=dtype), normal(device, k, n, dtype=dtype)
                out, want = device.xp.empty((m, n), dtype), device.xp.matmul(a, b)
                row: dict[str, Any] = {"cupy": gpu_seconds(device, partial(device.xp.matmul, a, b, out=out))}
                tensors = torch_tensors(a, b)
                if tensors:
                    torch, ta, tb = tensors
                    row["torch"] = torch_seconds(device, torch, partial(torch.matmul, ta, tb))
                for precision, tolerance in precisions:
                    calls = matmul(a, b, out, device.launcher, precision=precision)
                    run(calls)
                    error = distance(device.xp, out, want)
                    row[f"triton_{precision}"] = gpu_seconds(device, partial(run, calls))
                    row[f"triton_{precision}_error"] = error
                    if not error <= tolerance:
                        wrong.append(f"{m}x{n}x{k} {dtype} {precision} is off by {error:.2g}")
                found[f"{m}x{n}x{k} {dtype}"] = row
    if wrong:
        raise CheckFailed("; ".join(wrong), found)
    shown = found.get("4096x4096x4096 float16")
    if shown is None:
        return f"{len(found)} products", found
    triton, cublas = (2 * 4096**3 / shown[name] / 1e12 for name in ("triton_ieee", "cupy"))
    return f"4096 x 4096 x 4096 in float16: Triton {triton:.0f}, cuBLAS {cublas:.0f} TFLOP/s", found


def rows(context: Context) -> Result:
    """Softmax and layer normalisation, in bytes read and written a second, against torch if present."""
    from infera_kernels.triton.norm import layer_norm
    from infera_kernels.triton.softmax import softmax

    device = context.open()
    found: dict[str, Any] = {}
    with device.running():
        for count, length in ROWS:
            for dtype in ("float32", "float16"):
                if context.left() <= 0:
                    break
                x, w = normal(device, count, length, dtype=dtype), normal(device, length, dtype=dtype)
                out = device.xp.empty_like(x)
                made: dict[str, list[Call]] = {
                    "softmax": softmax(x, out, device.launcher),
                    "layer_norm": layer_norm(x, w, w, out, device.launcher),
                }
                moved = 2 * x.nbytes
                row = {name: moved / gpu_seconds(device, partial(run, calls)) for name, calls in made.items()}
                tensors = torch_tensors(x, w)
                if tensors:
                    torch, tx, tw = tensors
                    nn = torch.nn.functional
                    peers = {
                        "softmax": partial(nn.softmax, tx, dim=-1),
                        "layer_norm": partial(nn.layer_norm, tx, tw.shape, tw, tw),
                    }
                    for name, call in peers.items():
                        row[f"{name}_torch"] = moved / torch_seconds(device, torch, call)
                found[f"{count}x{length} {dtype}"] = row
    best = {name: max((r[name] for r in found.values()), default=0.0) for name in ("softmax", "layer_norm")}
    return f"up to {best['softmax'] / 1e9:,.0f} GB/s softmax, {best['layer_norm'] / 1e9:,.0f} GB/s layer norm", found


SECTIONS: Mapping[str, Section] = {"launches": launches, "products": products, "rows": rows}

"""What numba compiles, on plain arrays against float64: awkward shapes, poisoned outputs, parts in any order.

Operators run these kernels on their own cases in tests/test_ops.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx.numpy_helper import from_array

import infera_gpu
from infera_gpu.devices import open_device
from infera_gpu.errors import DeviceError
from infera_kernels import jit
from infera_kernels.calls import Call, Split
from infera_kernels.cpu.conv import conv2d as channels_first
from tests.text import parse

if not jit.installed():
    pytest.skip("needs numba: pip install 'infera-gpu[jit]'", allow_module_level=True)

import numba

from infera_kernels.jit import epilogue, gemm, rows
from infera_kernels.jit.compiling import bound, bound_by_address
from infera_kernels.jit.conv import border_of, conv2d, writes_rows
from infera_kernels.jit.microkernel import TILE

Array = np.ndarray[Any, np.dtype[Any]]


def run(calls: Sequence[Call]) -> None:
    for fn, args in calls:
        fn(*args)


def backwards(parts: Sequence[Iterable[Call]]) -> list[Call]:
    """Part after part, the last first."""
    return [call for part in reversed(parts) for call in part]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def poisoned(shape: Sequence[int], dtype: Any = np.float32) -> Array:
    """Scratch: what is read before it is written shows."""
    dtype = np.dtype(dtype)
    return np.full(shape, np.nan if dtype.kind == "f" else -1, dtype)


@pytest.mark.parametrize("m", [1, 2, 3, TILE.rows - 1, TILE.rows, TILE.rows + 1, 5 * TILE.rows + 7, 700])
@pytest.mark.parametrize("n", [1, TILE.lanes, TILE.lanes + 1, TILE.columns, 3 * TILE.columns - 5])
@pytest.mark.parametrize("k", [1, 37, 1000])
def test_product(m: int, n: int, k: int) -> None:
    a, w, b = normal(m, k), normal(k, n, seed=1), normal(n, seed=2)
    want = np.maximum(a.astype(np.float64) @ w + b, -0.5)
    tolerance = 1e-6 * (np.abs(a) @ np.abs(w)).max()
    for parts in (1, 3):
        wide = np.full((m, n + 9), np.nan, np.float32)
        y = wide[:, 4 : n + 4]
        run(backwards(gemm.product(a, gemm.pack(w), gemm.pack_bias(b), y, low=-0.5, parts=parts)))
        np.testing.assert_allclose(y, want, rtol=0, atol=tolerance)
        assert np.isnan(np.delete(wide, range(4, n + 4), axis=1)).all(), "written beside the product"


@pytest.mark.parametrize("m", [TILE.rows + 1, 132, 300])
@pytest.mark.parametrize("n", [TILE.lanes - 3, 3 * TILE.columns - 5])
def test_product_in_ranges_of_many_rows_of_the_weight(m: int, n: int) -> None:
    """All columns are multiplied with one range before the next, and clamped once they are complete."""
    a, w, b = normal(m, 2500), normal(2500, n, seed=1), normal(n, seed=2)
    a[m // 2, 2000] = np.nan
    y = poisoned((m, n))
    run(backwards(gemm.product(a, gemm.pack(w), gemm.pack_bias(b), y, low=-0.5, high=20.0)))
    want = np.clip(a.astype(np.float64) @ w + b, -0.5, 20)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-6 * np.nanmax(np.abs(a) @ np.abs(w)))


def test_products_of_several_images_have_a_weight_each() -> None:
    x, w = normal(5, 150, 600), normal(5, 600, 2 * TILE.columns + 3, seed=1)
    y = poisoned((5, 3, 50, w.shape[2]))
    call, args = gemm.multiply(
        x, gemm.pack_each(list(w)), None, y, steps=(x.strides[0], 50 * x.strides[1], x.strides[1]), run=600
    )
    call(*args)
    np.testing.assert_allclose(y.reshape(5, 150, -1), x.astype(np.float64) @ w, rtol=0, atol=2e-3)


def test_product_with_narrow_weights() -> None:
    a, w = normal(19, 100), np.random.default_rng(1).integers(-128, 128, (100, 3 * TILE.columns - 5), np.int8)
    y = np.empty((19, w.shape[1]), np.float32)
    run(backwards(gemm.product(a, gemm.pack(w), None, y, parts=2)))
    np.testing.assert_allclose(y, a.astype(np.float64) @ w, rtol=0, atol=1e-6 * (np.abs(a) @ np.abs(w * 1.0)).max())


def test_a_nan_stays_in_its_row() -> None:
    a, w = normal(20, 30), normal(30, 40, seed=1)
    a[7, 3] = np.nan
    y = np.empty((20, 40), np.float32)
    run(backwards(gemm.product(a, gemm.pack(w), None, y, low=0.0)))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(a).any(1, keepdims=True).repeat(40, 1))


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 9, 10, 3), (5, 3, 3, 3), {"pads": ((1, 1), (1, 1))}),
    "stem": ((1, 31, 33, 3), (8, 3, 7, 7), {"strides": (2, 2), "pads": ((3, 3), (3, 3))}),
    "uneven": ((3, 8, 7, 4), (40, 4, 3, 2), {"strides": (2, 3), "pads": ((1, 0), (0, 2))}),
    "dilated": ((1, 12, 12, 6), (9, 6, 3, 3), {"pads": ((2, 2), (3, 3)), "dilations": (2, 3)}),
    "many-taps": ((1, 20, 21, 24), (40, 24, 5, 5), {"pads": ((4, 4), (4, 4)), "dilations": (2, 2)}),
    "grouped": ((2, 9, 8, 6), (9, 2, 3, 3), {"group": 3, "pads": ((1, 1), (1, 1))}),
    "pointwise": ((2, 5, 7, 5), (4, 5, 1, 1), {}),
    "pointwise-strided": ((2, 5, 6, 5), (4, 5, 1, 1), {"strides": (2, 3)}),
    "past-the-padding": ((1, 5, 5, 2), (2, 2, 1, 1), {"strides": (3, 3), "pads": ((2, 2), (2, 2))}),
    "many-slabs": ((1, 70, 60, 64), (24, 64, 5, 5), {"pads": ((2, 2), (2, 2))}),
    "depthwise": ((2, 9, 10, 24), (24, 1, 3, 3), {"group": 24, "strides": (2, 1), "pads": ((1, 1), (1, 1))}),
    "depthwise-5x7": ((1, 11, 30, 40), (40, 1, 5, 7), {"group": 40, "pads": ((2, 2), (3, 3))}),
    "depthwise-few": ((2, 9, 10, 7), (7, 1, 3, 3), {"group": 7, "pads": ((1, 1), (1, 1))}),
    "depthwise-column": ((2, 20, 1, 24), (24, 1, 5, 1), {"group": 24, "strides": (2, 1), "pads": ((2, 1), (0, 0))}),
    "column": ((2, 20, 1, 6), (9, 6, 3, 1), {"strides": (2, 1), "pads": ((1, 2), (0, 0))}),
    "column-grouped": ((1, 23, 1, 6), (10, 3, 4, 1), {"group": 2, "dilations": (3, 1)}),
    "winograd": ((2, 13, 18, 16), (32, 16, 3, 3), {"pads": ((1, 1), (1, 1))}),
    "winograd-uneven": ((1, 30, 29, 64), (48, 64, 3, 3), {"pads": ((1, 2), (1, 0))}),
    "winograd-unpadded": ((1, 14, 15, 16), (16, 16, 3, 3), {}),
    "winograd-blocks": ((1, 130, 120, 64), (64, 64, 3, 3), {"pads": ((1, 1), (1, 1))}),
}


def convolution(name: str) -> tuple[tuple[Array, Array, Array], tuple[int, int], Any]:
    """Image, weights and bias; height and width of what comes out; the options."""
    shape, weights, given = CONVOLUTIONS[name]
    options: Any = {"strides": (1, 1), "pads": ((0, 0), (0, 0)), "dilations": (1, 1), "group": 1, **given}
    height, width = (
        (d + sum(p) - (k - 1) * r - 1) // s + 1
        for d, k, p, r, s in zip(
            shape[1:3], weights[2:], options["pads"], options["dilations"], options["strides"], strict=True
        )
    )
    return (normal(*shape), normal(*weights, seed=1), normal(weights[0], seed=2)), (height, width), options


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, ("relu",), ("clip", -0.5, 1.5), ("leaky_relu", 0.1)], ids=str)
def test_convolution(name: str, with_residual: bool, activation: tuple[Any, ...] | None) -> None:
    (x, w, b), out, options = convolution(name)
    shape, weights = x.shape, w.shape
    residual = normal(shape[0], *out, weights[0], seed=3) if with_residual else None
    want = np.full((shape[0], weights[0], *out), np.nan)
    wide = [np.ascontiguousarray(np.moveaxis(a, 3, 1), np.float64) for a in (x, residual) if a is not None]
    run(
        channels_first(
            wide[0], w.astype(np.float64), b.astype(np.float64), want, poisoned, activation=activation,
            residual=wide[1] if with_residual else None, **options,
        )
    )  # fmt: skip
    for threads in (1, 3):
        y = poisoned((shape[0], *out, weights[0]))
        run(
            conv2d(
                x, w, b, y, poisoned, Split(threads, backwards), activation=activation, residual=residual,
                pack=lambda tag, build: build(w), pack_b=lambda tag, build: build(b), **options,
            )
        )  # fmt: skip
        # sums of so many products of normal numbers have a spread of its root, and a peak of several of it
        peak = 4 * np.sqrt(w[0].size)
        np.testing.assert_allclose(np.moveaxis(y, 3, 1), want, rtol=0, atol=5e-6 * peak)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_between_borders(name: str, threads: int) -> None:
    """From an image within the border that is wanted, to one with gaps in rows, or pixels: the same bits as without."""
    (x, w, b), out, options = convolution(name)
    shape, weights = x.shape, w.shape

    def made(x: Array, y: Array, **more: Any) -> Array:
        run(
            conv2d(
                x, w, b, y, poisoned, Split(threads, backwards), activation=("relu",),
                pack=lambda tag, build: build(w), pack_b=lambda tag, build: build(b), **{**options, **more},
            )
        )  # fmt: skip
        return y

    want = made(x, poisoned((shape[0], *out, weights[0])))
    wanted = border_of((shape[1], shape[2]), weights, shape[0], out, **options)
    if wanted is not None:
        assert all(a >= p for a, p in zip(wanted, options["pads"], strict=True))
        whole = np.pad(x, ((0, 0), *wanted, (0, 0)))
        y = poisoned(want.shape)
        np.testing.assert_array_equal(made(whole, y, pads=((0, 0), (0, 0))), want)
    if writes_rows(weights, options["group"], "relu", residual=False):
        whole = poisoned((shape[0], out[0] + 1, out[1] + 3, weights[0]))
        inner = whole[:, 1:, 2:-1]
        np.testing.assert_array_equal(made(x, inner), want)
        assert np.isnan(whole).sum() == whole.size - want.size
        whole = poisoned((*want.shape[:3], 3 + weights[0] + 2))
        np.testing.assert_array_equal(made(x, whole[..., 3:-2]), want)
        assert np.isnan(whole).sum() == whole.size - want.size


def test_strict_sessions_run_nothing_compiled() -> None:
    assert open_device("cpu", strict=True).kinds == ("cpu",)
    assert open_device("cpu").kinds == ("jit", "cpu")
    with pytest.raises(DeviceError, match="is not for accuracy='strict'"):
        open_device("cpu", strict=True, jit=True)


@pytest.mark.parametrize("length", [768, 1001])
def test_rows_of_large_numbers_that_are_alike_are_normalised(length: int) -> None:
    x = np.float32(1000) + normal(64, length)
    y = poisoned(x.shape)
    run(rows.standardize(x, y, None, None, epsilon=1e-5))
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, exact, atol=1.5e-5 * abs(exact).max())  # 3e-5 with a mean summed once


def test_softmax_of_awkward_rows() -> None:
    x = normal(6, 37) * 40
    x[0, 5] = np.nan
    x[1] = -np.inf
    x[2, :20] = -np.inf
    x[3, 4] = np.inf
    x[4] = np.finfo(np.float32).min
    with np.errstate(all="ignore"):
        powers = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
        want = powers / powers.sum(1, keepdims=True)
    for source, y in ((x, np.full_like(x, np.nan)), (same := x.copy(), same)):
        run(rows.softmax(source, y))
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "sigmoid", "swish", "tanh", "erf", "hard_swish"])
def test_activation_is_exact_to_rounding(activation: str) -> None:
    from infera_kernels.portable.activation import activation as portable

    x = np.concatenate([np.linspace(-12, 12, 100_001), [0, -0.0, 1e-30, -1e-30, 89, -89, 1e30, -1e30]])
    attributes = {"alpha": 1.0} if activation == "swish" else {}
    x = x.astype(np.float32)
    with np.errstate(over="ignore"):
        want = portable(np, activation, x.astype(np.float64), **attributes)
    y = np.empty_like(x)
    run(epilogue.apply(activation, x, y))
    # a gate that is nearly 0 is 1 minus nearly 1: its error is that of 1, times x
    bound = 3e-7 * (np.abs(want) + np.clip(np.abs(x), 1, 12))
    assert (np.abs(y - want) <= bound).all(), (np.abs(y - want) / bound).max()


def test_a_nan_comes_out_of_every_activation() -> None:
    x = np.array([1, np.nan, -1], np.float32)
    for activation in ("relu", "gelu", "gelu_tanh", "sigmoid", "swish", "tanh", "erf", "hard_swish"):
        y = np.empty(3, np.float32)
        run(epilogue.apply(activation, x, y))
        assert np.isnan(y).tolist() == [False, True, False], activation


MODEL = """
g (float[N, 8] x) => (float[N, 5] y) <float[8, 5] w> {
    t = MatMul(x, w)
    y = Softmax(t)
}"""


def test_sessions_take_it_where_it_is_installed_and_wanted() -> None:
    model = parse(MODEL.replace("float[8, 5] w", f"float[8, 5] w = {{{', '.join(f'{v:.3f}' for v in normal(40))}}}"))
    x = normal(3, 8)
    found: dict[bool | None, tuple[set[str], Array]] = {}
    for wanted in (None, True, False):
        with infera_gpu.load(model, device="cpu", jit=wanted) as session:
            found[wanted] = (
                {s.via.split()[0] for s in session.plan_for({"x": (3, 8)}).steps},
                session.run({"x": x})["y"],
            )
    assert [kinds for kinds, _ in found.values()] == [{"jit"}, {"jit"}, {"cpu"}]
    np.testing.assert_allclose(found[True][1], found[False][1], rtol=2e-6)


LARGE = """
g (float[N, 640] x) => (float[N, 512] y) <float[640, 512] w, float[512] b> {
    s = MatMul(x, w)
    t = Add(s, b)
    y = Tanh(t)
}"""


@pytest.mark.parametrize(("rows", "panels"), [(1, 0), (2, 1), (700, 1)])
def test_large_weights_are_packed_unless_one_row_reads_them(
    rows: int, panels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[Array]()

    def pack(w: Array, real: Any = gemm.pack) -> Array:
        made.append(w)
        return np.asarray(real(w))

    monkeypatch.setattr(gemm, "pack", pack)
    model, w = parse(LARGE), normal(640, 512) / 25
    model.graph.initializer.append(from_array(w, "w"))
    model.graph.initializer.append(from_array(normal(512), "b"))
    x = normal(rows, 640)
    with infera_gpu.load(model, device="cpu", threads=2, jit=True) as session:
        np.testing.assert_allclose(session.run({"x": x})["y"], np.tanh(x @ w + normal(512)), rtol=1e-4, atol=1e-4)
        assert "1 steps in parts" in session.plan_for({"x": x}).headline
    assert len(made) == panels


def test_without_numba_it_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infera_gpu.devices.installed", lambda: False)
    with pytest.raises(DeviceError, match=r"pip install 'infera-gpu\[jit\]'"):
        infera_gpu.load(parse(MODEL.replace(" <float[8, 5] w>", "").replace("x) =>", "x, float[8, 5] w) =>")), jit=True)


def test_numba_is_imported_by_the_first_kernel_and_not_before() -> None:
    script = "import sys, infera_gpu; infera_gpu.devices.open_device('cpu', jit=True); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def elsewhere(script: str, cache: Path) -> tuple[str, str]:
    """What it says and what it is warned of in a process of its own, which keeps what it compiles in `cache`."""
    env = {**os.environ, "INFERA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


SOFTMAX = """
import sys, numpy as np
from infera_kernels.jit import rows
x, y = np.ones((1, 4), np.float32), np.empty((1, 4), np.float32)
for f, a in rows.softmax(x, y): f(*a)
assert (y == 0.25).all()
"""


def test_a_directory_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    elsewhere(SOFTMAX, blocked)


def test_outputs_of_one_pixel_have_any_stride() -> None:
    """Images of one value, whose axes of one element have the stride 0."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 1, 1, 32)).astype(np.float32), rng.standard_normal((32, 32)).astype(np.float32)
    y = np.full((2, 32), np.nan, np.float32)
    call, args = gemm.multiply(x, gemm.pack(w)[None], None, y[:, None, None], steps=(128, 0, 0), run=32)
    call(*args)
    np.testing.assert_allclose(y, x.reshape(2, 32) @ w, rtol=1e-4, atol=1e-4)


def test_sessions_that_bind_at_the_same_time_compile_a_function_once() -> None:
    """Whoever comes while another thread compiles it waits for that."""
    function = numba.njit(lambda x: x.sum())
    start, x = threading.Barrier(4), np.ones((2, 3), np.float32)

    def bind(_: int) -> object:
        start.wait()
        call, args = bound_by_address(function, x)
        return call(*args)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(bind, range(4))) == [6.0] * 4
    assert len(function.signatures) == 1


def test_a_function_is_compiled_when_it_is_bound_for_every_kind_of_argument() -> None:
    function = numba.njit(lambda x, n: x.sum() * n)
    x = np.ones((2, 3), np.float32)
    frozen = x.copy()
    frozen.flags.writeable = False
    for args in ((x, 1), (x[:1], 2), (x, np.float32(1)), (x.T, 1), (x[:, ::2], 1), (frozen, 1), (x.astype(int), 1)):
        call, bound_to = bound(function, *args)
        known = len(function.signatures)
        assert call(*bound_to) == args[0].sum() * args[1]
        assert len(function.signatures) == known
    assert len(function.signatures) == 6


def test_what_versions_compiled_that_nobody_starts_goes(tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    old, recent = (kernels / f"numba-{name}" for name in ("old", "recent"))
    for folder, days in ((old, 31), (recent, 29)):
        (folder / "inside").mkdir(parents=True)
        os.utime(folder, (time.time() - days * 86400,) * 2)
    script = "import infera_kernels.jit.rows, infera_kernels.jit.compiling as c; print(c._directory())"

    def own() -> Path:
        return Path(elsewhere(script, tmp_path)[0].strip())

    made = own()
    assert {*kernels.iterdir()} == {made, recent}
    os.utime(made, (0, 0))
    assert own().stat().st_mtime > 0


def test_what_was_compiled_before_is_had_without_all_that_compiling_needs(tmp_path: Path) -> None:
    """... which is there as soon as a function must be compiled."""
    told = "print('numba.typed.typeddict' in sys.modules)\n"
    more = "for f, a in rows.standardize(x, y, None, None, epsilon=1.0): f(*a)\nassert (y == 0).all()\n"

    def registered(script: str) -> list[str]:
        return elsewhere(script, tmp_path)[0].split()

    assert registered(SOFTMAX + told) == ["True"]
    assert registered(SOFTMAX + told + more + told) == ["False", "True"]
    assert registered(SOFTMAX + told + more + told) == ["False", "False"]


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_what_is_damaged_is_compiled_anew(ending: str, tmp_path: Path) -> None:
    assert not elsewhere(SOFTMAX, tmp_path)[1]
    (kept,) = tmp_path.rglob(f"*.{ending}")
    kept.write_bytes(kept.read_bytes()[:20])
    assert "_softmax is compiled anew" in elsewhere(SOFTMAX, tmp_path)[1]

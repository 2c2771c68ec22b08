"""Convolutions by cuDNN: what its descriptors say, computed by a stand-in. Nothing here runs on a GPU."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from infera_gpu.op import Call
from infera_kernels.launch import CudaLauncher, RecordingLauncher, cudnn, nominal_target
from infera_kernels.launch.cache import PlanCache
from infera_kernels.launch.cudnn import REMEMBERED, WORKSPACE, Cudnn
from infera_kernels.launch.cudnn_graphs import ACTIVATIONS
from infera_kernels.launch.nvidia import LibraryError, loads
from infera_kernels.triton.conv import Finish, geometry
from infera_kernels.triton.dnn import by_cudnn, convolution_of
from tests.cudnn_support import BFLOAT, HALF, run, workspace
from tests.cudnn_support import launcher as launcher
from tests.cudnn_support import library as library
from tests.fake_cudnn import FUNCTIONS, FakeCudnn, with_cudnn

pytestmark = pytest.mark.kernels


def array(rng: np.random.Generator, shape: Sequence[int], dtype: Any = HALF, apart: int = 0) -> Any:
    """Random numbers with channels last, the image a part of a larger one."""
    whole = rng.standard_normal((*shape[:1], *(n + apart for n in shape[1:])))
    made = whole.astype(dtype)
    return made[(slice(None), *(slice(apart, None) for _ in shape[1:]))]


def want(x: Any, w: Any, out: Any, where: Any, groups: int, finish: Finish) -> Any:
    """Summed window by window in float64, channels last."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    axes = x.ndim - 2
    kernel, strides, dilations, pads = (
        v[3 - axes :] for v in (where.kernel, where.strides, where.dilations, where.pads)
    )
    total = np.zeros(out.shape)
    share, part = x.shape[-1] // groups, out.shape[-1] // groups
    for place in np.ndindex(*out.shape[1:-1]):
        for tap in np.ndindex(*kernel):
            at = [p * s + t * d - b for p, s, t, d, b in zip(place, strides, tap, dilations, pads, strict=True)]
            if all(0 <= i < n for i, n in zip(at, x.shape[1:-1], strict=True)):
                for g in range(groups):
                    inside = x[(slice(None), *at, slice(g * share, (g + 1) * share))]
                    to = slice(g * part, (g + 1) * part)
                    total[(slice(None), *place, to)] += inside @ w[(to, *tap)].T
    total += 0 if finish.residual is None else finish.residual.astype(np.float64)
    total += 0 if finish.bias is None else finish.bias.astype(np.float64)
    return total if finish.activation is None else FUNCTIONS[ACTIVATIONS[finish.activation]](total)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one pixel": {"kernel": (1, 1), "pads": ((0, 0), (0, 0))},
    "strides": {"strides": (2, 3)},
    "dilations": {"dilations": (2, 1), "pads": ((2, 2), (1, 1))},
    "uneven pads": {"pads": ((0, 2), (1, 0))},
    "a window that leaves pixels over": {"size": (8, 9), "strides": (2, 2), "pads": ((0, 0), (0, 0)), "kernel": (3, 4)},
    "groups": {"groups": 3},
    "a line": {"size": (9,), "kernel": (3,), "pads": ((1, 1),), "strides": (2,), "dilations": (1,)},
    "a volume": {"size": (4, 5, 3), "kernel": (3, 1, 2), "pads": ((1, 1), (0, 0), (1, 0)), "strides": (1, 2, 1)},
    "one channel in": {"channels": 1},
    "one channel out": {"filters": 1},
    "one image of one line": {"count": 1, "size": (1, 6), "kernel": (1, 3), "pads": ((0, 0), (1, 1))},
    "parts of larger images": {"apart": 2},
}


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
@pytest.mark.parametrize("terms", ["", "bias", "residual", "residual bias relu", "relu", "bias silu", "bias gelu_tanh"])
@pytest.mark.parametrize("case", CASES)
def test_convolutions(library: FakeCudnn, launcher: Any, case: str, terms: str, dtype: Any) -> None:
    rng, given = np.random.default_rng(len(case + terms)), CASES[case]
    size, kernel = given.get("size", (6, 7)), given.get("kernel", (3, 3))
    axes = len(size)
    strides, dilations = given.get("strides", (1,) * axes), given.get("dilations", (1,) * axes)
    pads = given.get("pads", ((1, 1),) * axes)
    groups, apart, count = given.get("groups", 1), given.get("apart", 0), given.get("count", 2)
    channels, filters = given.get("channels", 6), given.get("filters", 9)
    made = [
        (n + b + a - d * (k - 1) - 1) // s + 1
        for n, (b, a), d, k, s in zip(size, pads, dilations, kernel, strides, strict=True)
    ]
    x, w = array(rng, (count, *size, channels), dtype, apart), array(rng, (filters, *kernel, channels // groups), dtype)
    bias = array(rng, (filters,), dtype) if "bias" in terms else None
    residual = array(rng, (count, *made, filters), dtype, apart) if "residual" in terms else None
    out = array(rng, (count, *made, filters), dtype, apart)
    around = out.base.copy() if apart else None
    where = geometry(kernel, strides, dilations, pads)
    activation = next((name for name in ACTIVATIONS if name in terms.split()), None)
    finish = Finish(bias, residual, activation)
    call = by_cudnn(x, w, out, launcher, where, finish, 1, workspace())
    assert call is not None
    run([call])
    tolerance = {HALF: 2e-3, BFLOAT: 2e-2}[dtype]
    wanted = want(x, w, out, where, groups, finish)
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
    assert len(library.asked) == 1
    if around is not None:
        out[...] = around[(slice(None), *(slice(apart, None) for _ in made), slice(apart, None))]
        np.testing.assert_array_equal(out.base, around)


def test_what_reaches_farther_than_it_may_count_is_left_to_kernels_of_ours(library: FakeCudnn, launcher: Any) -> None:
    made = convolution_of(*some(np.random.default_rng(0)))
    assert made is not None
    count, apart = made.x.sizes[0], made.x.strides[0]
    for far, has in ((2**31 - apart, True), (2**31, False)):
        asked = made._replace(x=made.x._replace(strides=(far // (count - 1), *made.x.strides[1:])))
        assert (launcher.cudnn.call(asked, 1, workspace()) is not None) is has
    assert library.plans == 1


def bound(given: tuple[Any, ...], launcher: Any, way: int = 1) -> Call | None:
    """`some`, by a way of the library's."""
    x, w, out, where, finish = given
    return by_cudnn(x, w, out, launcher, where, finish, way, workspace())


def some(rng: np.random.Generator, **changed: Any) -> tuple[Any, ...]:
    """x, w, out, geometry and what follows, of a small convolution."""
    arrays = {
        "x": array(rng, (2, 4, 5, 8)),
        "w": array(rng, (16, 3, 3, 8)),
        "out": array(rng, (2, 4, 5, 16)),
        "bias": array(rng, (16,)),
        **changed,
    }
    where = geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    return arrays["x"], arrays["w"], arrays["out"], where, Finish(arrays["bias"], arrays.get("residual"), "relu")


@pytest.mark.parametrize("name", ["x", "w", "out", "residual"])
@pytest.mark.parametrize("how", ["channels first", "every second channel", "backwards", "one image for all"])
def test_what_lies_otherwise_is_left_to_kernels_of_ours(launcher: Any, name: str, how: str) -> None:
    rng = np.random.default_rng(0)
    shape = {"x": (2, 4, 5, 8), "w": (16, 3, 3, 8)}.get(name, (2, 4, 5, 16))
    makers: Mapping[str, Callable[[], Any]] = {
        "channels first": lambda: np.moveaxis(array(rng, (shape[0], shape[3], *shape[1:3])), 1, -1),
        "every second channel": lambda: array(rng, (*shape[:3], 2 * shape[3]))[..., ::2],
        "backwards": lambda: array(rng, shape)[:, ::-1],
        "one image for all": lambda: np.broadcast_to(array(rng, (1, *shape[1:])), shape),
    }
    x, w, out, where, finish = some(rng, **{name: makers[how]()})
    assert convolution_of(x, w, out, where, finish) is None
    assert by_cudnn(x, w, out, launcher, where, finish, 1, workspace()) is None


def test_a_bias_in_pieces_is_left_to_kernels_of_ours() -> None:
    rng = np.random.default_rng(0)
    assert convolution_of(*some(rng, bias=array(rng, (32,))[::2])) is None
    assert convolution_of(*some(rng, bias=array(rng, (16,)))) is not None


def test_engines_that_round_otherwise_or_differ_from_run_to_run_are_passed_by(
    library: FakeCudnn, launcher: Any
) -> None:
    rng = np.random.default_rng(0)
    given = some(rng)
    for way, place in ((1, 0), (2, 2), (3, 4)):
        call = bound(given, launcher, way)
        assert call is not None
        plan = call[1][0]
        assert library.alive[plan.at.value].one(401).attributes[0][0] == place
    assert bound(given, launcher, 4) is None


@pytest.mark.parametrize("what", ["graph", "engine", "workspace", "library"])
def test_what_it_does_not_take_is_left_to_kernels_of_ours(library: FakeCudnn, launcher: Any, what: str) -> None:
    given = some(np.random.default_rng(0))
    if what == "graph":
        library.status["cudnnBackendFinalize"] = 3000
    elif what == "engine":
        library.unprepared = {0}
    elif what == "workspace":
        library.workspace = WORKSPACE + 1
    else:
        library.status["cudnnCreate"] = 1001
    assert bound(given, launcher) is None
    library.status.clear()
    assert (bound(given, launcher, 2) is not None) is (what in ("graph", "engine"))


def test_plans_are_remembered(library: FakeCudnn, launcher: Any) -> None:
    rng = np.random.default_rng(0)
    x, w, out, where, finish = some(rng)
    for _ in range(3):
        by_cudnn(array(rng, x.shape), w, out, launcher, where, finish, 1, workspace())
    assert library.plans == 1
    near = np.empty(x.size + 8, HALF)[1:][: x.size].reshape(x.shape)
    by_cudnn(near, w, out, launcher, where, finish, 1, workspace())
    assert library.plans == 2, "of another alignment"
    by_cudnn(x, w, out, launcher, where, replace(finish, activation=None), 1, workspace())
    by_cudnn(x, w, out, launcher, where, finish, 2, workspace())
    assert library.plans == 4


def test_plans_are_not_remembered_without_end(library: FakeCudnn, launcher: Any) -> None:
    x, w, out, where, finish = some(np.random.default_rng(0))
    launcher.cudnn._plans.update(dict.fromkeys(range(REMEMBERED)))
    by_cudnn(x, w, out, launcher, where, finish, 1, workspace())
    assert len(launcher.cudnn._plans) == 1


def opened_again(library: FakeCudnn, folder: Path, where: str = "9.28.1 on a card") -> Any:
    """A launcher of another process, as far as plans are kept on disk."""
    launcher = with_cudnn(RecordingLauncher(), library)
    launcher.cudnn = Cudnn(library, 0, 0x50, kept=PlanCache(folder), where=where)
    return launcher


def test_plans_are_kept_on_disk(library: FakeCudnn, tmp_path: Path) -> None:
    given = some(np.random.default_rng(0))
    results = []
    for _ in range(2):
        given[2][...] = np.nan
        call = bound(given, opened_again(library, tmp_path))
        assert call is not None
        run([call])
        results.append(given[2].copy())
    np.testing.assert_array_equal(*results)
    assert not np.isnan(results[0]).any()
    assert (library.plans, len(library.asked), len([*tmp_path.iterdir()])) == (1, 2, 1)
    bound(given, opened_again(library, tmp_path, "9.28.1 on another card"))
    bound(given, opened_again(library, tmp_path), 2)
    assert (library.plans, len([*tmp_path.iterdir()])) == (3, 3)


@pytest.mark.parametrize("how", ["damaged", "refused"])
def test_a_plan_that_is_kept_and_of_no_use_is_made_anew(
    library: FakeCudnn, tmp_path: Path, how: str, caplog: Any
) -> None:
    given = some(np.random.default_rng(0))
    bound(given, opened_again(library, tmp_path))
    (path,) = tmp_path.iterdir()
    if how == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        library.written.clear()
    assert bound(given, opened_again(library, tmp_path)) is not None
    assert library.plans == 2
    assert ("unreadable" if how == "damaged" else "does not take it") in caplog.text
    assert bound(given, opened_again(library, tmp_path)) is not None
    assert library.plans == 2


def test_a_plan_that_cannot_be_kept_is_used(library: FakeCudnn, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").touch()
    assert bound(some(np.random.default_rng(0)), opened_again(library, tmp_path / "file" / "plans")) is not None
    assert "plans of cuDNN are not kept" in caplog.text


def test_nothing_of_the_librarys_stays_but_its_handle(library: FakeCudnn, launcher: Any) -> None:
    rng = np.random.default_rng(0)
    given = some(rng)
    bound(given, launcher)
    del launcher.cudnn
    gc.collect()
    (handle,) = library.alive.values()
    assert handle == {"stream": 0x50}
    other = Cudnn(library, 0, 0x60)
    made = convolution_of(*given)
    assert made is not None
    other.call(made, 1, workspace())
    assert handle == {"stream": 0x60}
    assert sum(isinstance(found, dict) for found in library.alive.values()) == 1


class Collecting(dict[int, Any]):
    """`what` is collected as garbage whenever a list of handles is asked for."""

    def __init__(self, what: list[Cudnn]) -> None:
        self._what = what

    def setdefault(self, *args: Any) -> Any:
        self._what.clear()
        return super().setdefault(*args)


def test_handles_come_back_while_others_are_taken(library: FakeCudnn, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = [Cudnn(library, 0, 0x50)]
    assert gone[0]._opened() is not None
    monkeypatch.setattr(cudnn, "_idle", made := Collecting(gone))
    made[0] = []
    taking = threading.Thread(target=Cudnn(library, 0, 0x60)._opened, daemon=True)
    taking.start()
    taking.join(10)
    assert not taking.is_alive()
    assert [found["stream"] for found in library.alive.values()] == [0x60]


def test_a_library_that_would_end_the_process_is_not_used(
    library: FakeCudnn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[Any, ...]] = []
    there = ["libcudnn_graph.so.9", "libcublasLt.so.13"]
    monkeypatch.setattr(cudnn, "find", lambda name, off="": library if name == "cudnn" else None)

    def loads(*given: Any) -> bool:
        asked.append(given)
        return given[0] in there

    monkeypatch.setattr(cudnn, "loads", loads)
    assert cudnn.library.__wrapped__() is library
    at = [str(folder) for folder in asked[1][1:]]
    assert at == ["/site/nvidia/cudnn/lib", "/site/nvidia/cublas/lib", "/site/nvidia/cu13/lib"]
    for lacking in ("libcublasLt.so.13", "libcudnn_graph.so.9"):
        there.remove(lacking)
        assert cudnn.library.__wrapped__() is None
        assert f"cuDNN is not used: {library._name} is there, but nowhere the {lacking}" in caplog.text


def test_libraries_are_loaded_from_where_they_are(tmp_path: Path) -> None:
    import _ctypes

    assert not loads("libinfera_none.so.1", tmp_path)
    (tmp_path / "libinfera_none.so.1").write_bytes(Path(_ctypes.__file__).read_bytes())
    assert loads("libinfera_none.so.1", tmp_path / "elsewhere", tmp_path)


def test_a_convolution_that_fails_says_so(library: FakeCudnn, launcher: Any) -> None:
    given = some(np.random.default_rng(0))
    call = bound(given, launcher)
    assert call is not None
    library.status["cudnnBackendExecute"] = 5000
    with pytest.raises(LibraryError, match="cudnnBackendExecute failed with status 5000; INFERA_CUDNN=0"):
        run([call])


def test_a_launcher_has_it_where_it_is_installed_and_asked_for(monkeypatch: Any, library: FakeCudnn) -> None:
    driver: Any = SimpleNamespace(version=lambda: 13000, target=lambda device: nominal_target(90), launch_early=None)

    def made(**options: Any) -> CudaLauncher:
        return CudaLauncher(0, 0x50, driver=driver, **options)

    monkeypatch.setattr(cudnn, "library", lambda: None)
    assert (made(libraries=True).cudnn, made(libraries=True).target.cudnn, cudnn.installed()) == (None, "", "")
    monkeypatch.setattr(cudnn, "library", lambda: library)
    assert (made().cudnn, made().target.cudnn) == (None, "")
    assert made(libraries=True).cudnn is not None
    assert made(libraries=True).target.cudnn == cudnn.installed() == "9.28.1"

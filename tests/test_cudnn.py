"""Convolutions and attention by cuDNN: what its descriptors say, computed by a stand-in. Nothing here runs on a GPU."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton")

from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.loader import load_graph
from infera_gpu.op import Call
from infera_gpu.session import Session
from infera_kernels.launch import CudaLauncher, RecordingLauncher, cudnn, nominal_target
from infera_kernels.launch.cache import PlanCache
from infera_kernels.launch.cudnn import REMEMBERED, WORKSPACE, Cudnn
from infera_kernels.launch.cudnn_graphs import ACTIVATIONS
from infera_kernels.launch.nvidia import LibraryError, loads
from infera_kernels.triton import dnn_attention
from infera_kernels.triton.attention import Options
from infera_kernels.triton.conv import Finish, geometry
from infera_kernels.triton.dnn import WAY, WAYS, Way, by_cudnn, convolution_of, way_of
from infera_kernels.triton.dnn_attention import attention_by_cudnn, attention_of, attention_way
from infera_kernels.tuning import DeviceTiles, Family, Measured, Store, Trial, Tuned, source_of
from tests.fake_cudnn import FUNCTIONS, FakeCudnn, with_cudnn
from tests.kernels.attending import attended
from tests.text import parse

pytestmark = pytest.mark.kernels

HALF, BFLOAT = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeCudnn:
    """One with no handles yet."""
    monkeypatch.setattr(cudnn, "_idle", {})
    return FakeCudnn()


@pytest.fixture
def launcher(library: FakeCudnn) -> Any:
    return with_cudnn(RecordingLauncher(), library)


def array(rng: np.random.Generator, shape: Sequence[int], dtype: Any = HALF, apart: int = 0) -> Any:
    """Random numbers with channels last, the image a part of a larger one."""
    whole = rng.standard_normal((*shape[:1], *(n + apart for n in shape[1:])))
    made = whole.astype(dtype)
    return made[(slice(None), *(slice(apart, None) for _ in shape[1:]))]


def workspace() -> Any:
    return np.empty(WORKSPACE, np.uint8)


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


def run(calls: Sequence[Call]) -> None:
    for fn, args in calls:
        fn(*args)


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
    driver: Any = SimpleNamespace(version=lambda: 13000, target=lambda device: nominal_target(90))

    def made(**options: Any) -> CudaLauncher:
        return CudaLauncher(0, 0x50, driver=driver, **options)

    monkeypatch.setattr(cudnn, "library", lambda: None)
    assert (made(libraries=True).cudnn, made(libraries=True).target.cudnn, cudnn.installed()) == (None, "", "")
    monkeypatch.setattr(cudnn, "library", lambda: library)
    assert (made().cudnn, made().target.cudnn) == (None, "")
    assert made(libraries=True).cudnn is not None
    assert made(libraries=True).target.cudnn == cudnn.installed() == "9.28.1"


# ---- the choice


def measured(way: int, family: Family[Any] = WAY, release: str = "9.28.1") -> Tuned:
    """That a way is fastest for the convolution of MODEL."""
    target = replace(nominal_target(90), cudnn=release)
    sizes = {"m": 2 * 5 * 6, "batch": 1, "n": 16, "k": 72}
    known = family.class_of(family.problem("half", sizes, "9.28.1 3x3 1x1 1x1 bias relu"))
    return Tuned(target, {known: Measured(known, (way,), 1e-6, (0,), 2e-6, source_of(family))})


WINDOW = {"kernel": (3, 3), "strides": (1, 1), "dilations": (1, 1)}


def ask(tuned: Tuned | None, dtype: Any = HALF, activation: str | None = "relu", **options: Any) -> int:
    kernel, strides, dilations = (options.get(name, usual) for name, usual in WINDOW.items())
    w, out = np.empty((16, *kernel, 8), dtype), np.empty((options.get("images", 2), 5, 6, 16), dtype)
    where = geometry(kernel, strides, dilations, ((1, 1), (1, 1)))
    terms, parameters = options.get("terms", ["bias"]), options.get("parameters", ())
    return way_of(w, out, where, 1, terms=terms, activation=activation, parameters=parameters, tuned=tuned)


def test_only_what_was_measured_is_its() -> None:
    assert ask(measured(3)) == 3
    assert ask(measured(0)) == 0
    assert ask(None) == ask(Tuned(replace(nominal_target(90), cudnn="9.28.1"))) == 0
    assert ask(measured(3, release="9.19.0")) == 0, "plans of another release are others"
    assert ask(measured(3, release="")) == 0
    assert ask(measured(WAYS + 1)) == 0, "no way of the family's"
    assert ask(measured(3), terms=["residual", "bias"]) == 0, "what follows sums matters"
    for name, changed in (("kernel", (1, 9)), ("kernel", (9, 1)), ("strides", (1, 2)), ("dilations", (2, 2))):
        options: dict[str, Any] = {name: changed}
        assert ask(measured(3), **options) == 0, "plans are others for another window"


def test_what_it_cannot_compute_is_never_asked_for() -> None:
    for given in ({"dtype": np.float32}, {"activation": "leaky_relu"}, {"activation": "silu", "parameters": (1.5,)}):
        trial = Trial(measured(3), {})
        assert ask(trial, **given) == 0
        assert not trial.asked
    trial = Trial(measured(3), {})
    assert ask(trial, activation="silu", parameters=(1.0,)) == 0
    assert trial.asked, "its own SiLU has that factor"


def test_ways_are_called_by_their_numbers() -> None:
    assert [WAY.described((way,)) for way in (0, 2)] == ["ours", "plan 2"]
    assert WAY.candidates(WAY.problem("half", dict.fromkeys(WAY.sizes, 1)), nominal_target(90))[0] == Way(0)


MODEL = """
    g (float16[N, 5, 6, C] x) => (float16[N, 5, 6, 16] y) {
        a = Transpose <perm = [0, 3, 1, 2]> (x)
        b = Conv <pads = [P, P, P, P]> (a, w, v)
        c = Relu (b)
        y = Transpose <perm = [0, 2, 3, 1]> (c)
    }"""


def model(channels: int = 8, window: int = 3) -> Any:
    import onnx

    text = MODEL.replace("C]", f"{channels}]").replace("P", str(window // 2), 4)
    made, rng = parse(text), np.random.default_rng(0)
    for name, shape in (("w", (16, channels, window, window)), ("v", (16,))):
        values = rng.standard_normal(shape).astype(np.float16)
        made.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return made


def feeds(n: int = 2, channels: int = 8) -> dict[str, Any]:
    return {"x": np.random.default_rng(n).standard_normal((n, 5, 6, channels)).astype(np.float16)}


def opened(library: FakeCudnn, store: Store | None = None, made: Any = None, **options: Any) -> Session:
    device = RecordingDevice(**options)
    with_cudnn(device.launcher, library)
    device.tiles = DeviceTiles(device.launcher.target, store)  # type: ignore[attr-defined]
    return Session(load_graph(made or model()), device)


class Timer:
    """Makes the calls; those of a plan of cuDNN's take `seconds`, launches 10 us."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, calls: Sequence[Call]) -> float:
        run(calls)
        plans = [args[0] for fn, args in calls if getattr(fn, "__name__", "") == "_run"]
        return self.seconds[f"way{len(plans)}"] if plans else 1e-5


def test_tuning_finds_it_last_and_the_next_plan_goes_by_it(library: FakeCudnn, tmp_path: Path) -> None:
    store = Store("h200", "3.9.0", shipped=None, own=tmp_path)
    session = opened(library, store)
    before = session.run(feeds())["y"]
    assert not library.asked
    found = session.tune(feeds(), timer=Timer(way1=1e-6))
    assert found[-1].problem.family == "conv_way", "between the best of others"
    assert found[-1].choice == (1,)
    assert [m.problem.family for m in found[:-1]].count("conv") == 1
    for other in (session, opened(library, store)):
        (step,) = (s for s in other.plan_for({"x": (2, 5, 6, 8)}).steps if s.workspace)
        assert step.workspace is not None
        assert step.workspace.nbytes >= WORKSPACE
        del library.asked[:]
        np.testing.assert_array_equal(other.run(feeds())["y"], before)
        assert len(library.asked) == 1


def test_tuning_leaves_what_is_slower(library: FakeCudnn) -> None:
    session = opened(library)
    found = session.tune(feeds(), timer=Timer(way1=1e-4))
    assert found[-1].choice == found[-1].predicted == (0,)
    del library.asked[:]
    session.run(feeds())
    assert not library.asked


def test_a_plan_that_is_not_there_is_not_measured(library: FakeCudnn) -> None:
    """Kernels of ours would be in its name, which may seem faster than they are in their own."""
    library.notes = ((0,),)
    times = (1e-5 * 0.9**i for i in range(10_000))
    found = opened(library).tune(feeds(), timer=lambda calls: next(times))
    assert (found[-1].problem.family, found[-1].choice) == ("conv_way", (1,))
    library.notes = ()
    found = opened(library).tune(feeds(), timer=lambda calls: next(times))
    assert [m.choice for m in found if m.problem.family == "conv_way"] == [(0,)]


def test_a_plan_that_is_no_longer_there_is_no_failure(library: FakeCudnn, tmp_path: Path) -> None:
    store = Store("h200", "3.9.0", shipped=None, own=tmp_path)
    before = opened(library, store).run(feeds())["y"]
    opened(library, store).tune(feeds(), timer=Timer(way1=1e-6))
    library.notes = ()
    session = opened(library, store)
    np.testing.assert_array_equal(session.run(feeds())["y"], before)
    assert session.tune(feeds(), timer=Timer(), again=True)


def test_a_plan_that_does_not_depend_on_the_batch_is_never_its(library: FakeCudnn, tmp_path: Path) -> None:
    store = Store("h200", "3.9.0", shipped=None, own=tmp_path)
    opened(library, store).tune(feeds(), timer=Timer(way1=1e-6))
    del library.asked[:]
    session = opened(library, store, batch_invariant=True)
    session.run(feeds())
    assert not library.asked


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("window", [1, 3])
def test_models_go_by_it(library: FakeCudnn, channels: int, window: int) -> None:
    """Channels that are padded for kernels of ours are so for it; a window of one pixel is no other case."""
    session = opened(library, made=model(channels, window))
    session.tune(feeds(channels=channels), timer=Timer(way1=1e-6))
    del library.asked[:]
    session.run(feeds(channels=channels))
    (graph,) = library.asked
    assert graph.attributes[801][0].one(704).attributes[902] == [
        2,
        4 if (channels, window) == (3, 3) else channels,
        5,
        6,
    ]


@pytest.mark.parametrize("window", [1, 3])
def test_what_it_computes_reaches_the_output(library: FakeCudnn, window: int) -> None:
    session = opened(library, made=model(8, window))
    before = session.run(feeds())["y"]
    session.tune(feeds(), timer=Timer(way1=1e-6))
    session.device.wrap = lambda step, calls, ins, outs: calls  # type: ignore[method-assign]
    np.testing.assert_allclose(session.run(feeds())["y"], before, rtol=2e-3, atol=2e-3)


# ---- attention


def lying(rng: np.random.Generator, shape: Sequence[int], how: str, dtype: Any) -> Any:
    """Random numbers (..., heads, rows, size): heads first, or rows first with others between them."""
    if how == "heads":
        return rng.standard_normal(shape).astype(dtype)
    *lead, heads, rows, size = shape
    made = rng.standard_normal((*lead, rows, 3, heads, size)).astype(dtype)[..., 1, :, :]
    return made.swapaxes(-2, -3)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
@pytest.mark.parametrize("how", ["heads", "rows"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(
    ("lead", "groups", "m", "n", "sizes"),
    [
        ((2, 3), (2, 3), 5, 5, (8, 8)),
        ((2, 3), (2, 1), 4, 7, (16, 8)),
        ((2, 2, 3), (2, 2, 1), 5, 6, (8, 16)),
        ((1, 2, 2), (1, 2, 1), 1, 9, (8, 8)),
        ((2, 1), (2, 1), 3, 3, (24, 8)),
    ],
)
def test_attention(
    library: FakeCudnn,
    launcher: Any,
    lead: Any,
    groups: Any,
    m: int,
    n: int,
    sizes: Any,
    causal: bool,
    how: str,
    dtype: Any,
) -> None:
    rng = np.random.default_rng(m + n)
    q, k = lying(rng, (*lead, m, sizes[0]), how, dtype), lying(rng, (*groups, n, sizes[0]), how, dtype)
    v, out = lying(rng, (*groups, n, sizes[1]), how, dtype), lying(rng, (*lead, m, sizes[1]), how, dtype)
    options = Options(0.3, right=0 if causal else None, before=n - m)
    call = attention_by_cudnn(q, k, v, out, launcher, options, 1, workspace())
    if how == "rows" and len(lead) == 3 and lead[1] > 1:  # heads that are not evenly spaced
        assert call is None
        return
    assert call is not None
    gc.collect()
    run([call])
    tolerance = {HALF: 2e-3, BFLOAT: 2e-2}[dtype]
    wanted = attended(q, k, v, 0.3, n - m if causal else None)
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=tolerance, atol=tolerance)
    assert len(library.asked) == 1


def ask_attention(tuned: Tuned | None, options: Options | None = None, **changed: Any) -> int:
    shapes = {"q": (2, 3, 4, 8), "k": (2, 3, 6, 8), "v": (2, 3, 6, 8), "out": (2, 3, 4, 8), **changed}
    dtype, others = shapes.pop("dtype", HALF), shapes.pop("others", False)
    q, k, v, out = (np.empty(shapes[name], dtype) for name in ("q", "k", "v", "out"))
    return attention_way(q, k, v, out, options or Options(), others=others, tuned=tuned)


def attention_measured(way: int, layout: str = "9.28.1") -> Tuned:
    sizes = {"queries": 4, "matrices": 6, "keys": 6, "size": 8, "repeats": 1}
    family = dnn_attention.WAY
    known = family.class_of(family.problem("half", sizes, layout))
    found = Measured(known, (way,), 1e-6, (0,), 2e-6, source_of(family))
    return Tuned(replace(nominal_target(90), cudnn="9.28.1"), {known: found})


def test_only_attention_that_was_measured_is_its() -> None:
    assert ask_attention(attention_measured(2)) == 2
    assert ask_attention(None) == 0
    assert ask_attention(attention_measured(2), Options(right=0, before=2)) == 0
    assert ask_attention(attention_measured(2, "9.28.1 causal"), Options(right=0, before=2)) == 2


def test_attention_is_asked_of_releases_that_have_it_right() -> None:
    for release, way in (("9.8.0", 0), ("9.10.1", 0), ("9.10.2", 2), ("9.19.0", 2), ("10.0.0", 2)):
        tuned = attention_measured(2, release)
        assert ask_attention(Tuned(replace(tuned.target, cudnn=release), tuned.measured)) == way


@pytest.mark.parametrize(
    "options",
    [
        {"cap": 5.0},
        {"left": 3},
        {"right": 1},
        {"ahead": 1.0},
        {"right": 0, "before": 1},
        {"right": 0, "before": 2, "from_end": True},
        {"more": 1},
    ],
    ids=str,
)
def test_attention_that_it_may_take_otherwise_is_never_asked_for(options: dict[str, Any]) -> None:
    trial = Trial(attention_measured(2), {})
    assert ask_attention(trial, Options(**options)) == 0
    assert not trial.asked


@pytest.mark.parametrize(
    "changed",
    [
        {"others": True},
        {"dtype": np.float32},
        {"q": (2, 3, 4, 6), "k": (2, 3, 6, 6)},
        {"v": (2, 3, 6, 264), "out": (2, 3, 4, 264)},
        {"q": (3, 4, 8), "k": (3, 6, 8), "v": (3, 6, 8), "out": (3, 4, 8)},
        {"out": (0, 3, 4, 8)},
    ],
    ids=str,
)
def test_attention_that_it_has_not_is_never_asked_for(changed: dict[str, Any]) -> None:
    trial = Trial(attention_measured(2), {})
    assert ask_attention(trial, **changed) == 0
    assert not trial.asked


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize("how", ["every second element", "backwards", "one for all", "a head for all"])
def test_attention_that_lies_otherwise_is_left_to_kernels_of_ours(name: str, how: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((2, 3, 4, 8)).astype(HALF) for name in ("q", "k", "v", "out")}
    changed: Mapping[str, Callable[[], Any]] = {
        "every second element": lambda: rng.standard_normal((2, 3, 4, 16)).astype(HALF)[..., ::2],
        "backwards": lambda: arrays[name][:, ::-1],
        "one for all": lambda: np.broadcast_to(arrays[name][:1], (2, 3, 4, 8)),
        "a head for all": lambda: np.broadcast_to(arrays[name][:, :1], (2, 3, 4, 8)),
    }
    assert attention_of(**arrays, options=Options()) is not None
    arrays[name] = changed[how]()
    assert attention_of(**arrays, options=Options()) is None


ATTENTION = """
    g (float16[N, 2, 6, 8] q, float16[N, 2, 6, 8] k, float16[N, 2, 6, 8] v) => (float16[N, 2, 6, 8] y) {
        y = Attention <is_causal = 1> (q, k, v)
    }"""


def test_tuning_finds_attention_too(library: FakeCudnn) -> None:
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((3, 2, 6, 8)).astype(HALF) for name in "qkv"}
    session = opened(library, made=parse(ATTENTION, 23))
    before = session.run(given)["y"]
    found = session.tune(given, timer=Timer(way1=1e-6))
    assert (found[-1].problem.family, found[-1].choice) == ("attention_way", (1,))
    del library.asked[:]
    session.device.wrap = lambda step, calls, ins, outs: calls  # type: ignore[method-assign]
    np.testing.assert_allclose(session.run(given)["y"], before, rtol=2e-3, atol=2e-3)
    assert len(library.asked) == 1


def test_tiles_are_measured_without_it(library: FakeCudnn) -> None:
    """Where a way is known, but the kernels that it was compared with are others now."""
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((3, 2, 6, 8)).astype(HALF) for name in "qkv"}
    tile, way = opened(library, made=parse(ATTENTION, 23)).tune(given, timer=Timer(way1=1e-6))
    session = opened(library, made=parse(ATTENTION, 23))
    session.device.tiles.learn([way], {})  # type: ignore[union-attr]
    assert [m.problem for m in session.tune(given, timer=Timer())] == [tile.problem]
    del library.asked[:]
    session.run(given)
    assert len(library.asked) == 1


def test_what_has_to_be_compiled_is_for_the_sizes_that_were_measured() -> None:
    lengths = [dnn_attention.WAY.problem("half", dict.fromkeys(dnn_attention.WAY.sizes, n)) for n in (200, 201)]
    assert len(set(map(dnn_attention.WAY.class_of, lengths))) == 2
    trial = Trial(measured(3), {})
    for activation in (None, "relu", "silu"):
        for images in (100, 101):
            ask(trial, activation=activation, images=images)
    assert len(trial.asked) == 1 + 1 + 2

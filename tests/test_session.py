from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import infera_gpu
from infera_gpu import devices, lease, stages
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.errors import DeviceError, InputError, ModelError, OutOfMemoryError, PlanError, UnsupportedOperatorError
from infera_gpu.graph import Graph
from infera_gpu.layout import Space
from infera_gpu.lease import MAX_BOUND, SHRINK_ABOVE, SHRINK_AFTER
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from infera_gpu.stages import MAX_STAGES
from tests.allocations import transient
from tests.text import parse

CHAIN = "g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y) { a = Mul(x, z) b = Exp(a) c = Add(b, x) y = Neg(c) }"
BRANCH = """
g (float[N] x, int64 flag) => (float[N] y) <int64 one = {1}> {
    doubled = Add(x, x)
    c = Equal(flag, one)
    t = If (c) <
        then_branch = yes () => (float[N] p) { p = Neg(doubled) },
        else_branch = no () => (float[N] q) { q = Mul(doubled, x) }
    >
    y = Add(t, doubled)
}"""
DYNAMIC = """
g (float[N, M] x, float[N, M] w) => (float[K] y, float[N, M] early) {
    early = Mul(x, w)
    at = NonZero(early)
    t = Transpose <perm = [1, 0]> (at)
    picked = GatherND(x, t)
    y = Mul(picked, picked)
}"""


@pytest.fixture(params=["cpu", "recording"])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def feeds(*names: str, shape: tuple[int, ...] = (3, 4), seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(shape).astype(np.float32) for n in names}


def test_runs_at_any_size_of_a_symbolic_dimension(device: str) -> None:
    session = infera_gpu.load(parse(CHAIN), device=device)
    for n in (1, 5, 0, 5):
        f = feeds("x", "z", shape=(n, 4), seed=n)
        want = -(np.exp(f["x"] * f["z"]) + f["x"])
        np.testing.assert_allclose(session.run(f)["y"], want, rtol=1e-6)


def test_accepts_a_path_bytes_and_a_proto(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(parse(CHAIN), path)
    data = path.read_bytes()
    f = feeds("x", "z")
    for source in (path, data, parse(CHAIN)):
        assert infera_gpu.load(source, device="cpu").run(f)["y"].shape == (3, 4)


def test_constants_that_passes_replace_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
    g (float[1, 2, 5, 5] x) => (float[1, 3, 3, 3] y)
    <float[3, 2, 3, 3] w, float[3] s = {1, 2, 3}, float[3] b = {4, 5, 6}, float[3] m = {1, 0, 1},
     float[3] v = {1, 2, 1}>
    {
        c = Conv(x, w)
        y = BatchNormalization(c, s, b, m, v)
    }""".replace("w,", "w = {" + ", ".join(str(i % 7) for i in range(54)) + "},", 1)
    path = tmp_path / "m.onnx"
    onnx.save(parse(text), path)
    kept: list[weakref.ref[Any]] = []

    def load(source: Any, *how: Any) -> Graph:
        graph = load_graph(source, *how)
        kept.append(weakref.ref(graph.constants["w"]))
        return graph

    monkeypatch.setattr("infera_gpu.opening.load_graph", load)
    monkeypatch.chdir(tmp_path)
    gc.disable()  # nor kept until the next collection
    try:
        sessions = [infera_gpu.load(source, device="cpu") for source in ("m.onnx", path.read_bytes())]
        assert [ref() is None for ref in kept] == [True, False]
    finally:
        gc.enable()
    monkeypatch.chdir("/")
    for session in sessions:
        np.testing.assert_array_equal(session.loaded.constants["w"].reshape(-1), np.arange(54) % 7)
    outs = [session.run({"x": np.ones((1, 2, 5, 5), np.float32)})["y"] for session in sessions]
    np.testing.assert_array_equal(*outs)


def test_elementwise_results_reuse_the_memory_of_what_dies() -> None:
    plan = infera_gpu.load(parse(CHAIN), device="cpu", fuse=False).plan_for({"x": (64, 4), "z": (64, 4)})
    assert plan.arena_bytes == plan.lower_bound == 3 * 1024  # x, z and one intermediate
    text = str(plan)
    assert "in place" in text
    assert "lower bound 3,072" in text


def test_inputs_are_never_written_to() -> None:
    session = infera_gpu.load(
        parse("g (float[N] x) => (float[N] y, float[N] z) { y = Neg(x) z = Exp(x) }"), device="cpu"
    )
    x = np.arange(4, dtype=np.float32)
    out = session.run({"x": x})
    np.testing.assert_array_equal(x, np.arange(4))
    np.testing.assert_allclose(out["z"], np.exp(x))


JOINED = "g (float[N, 4] x, float[N, 4] z) => (float[N, 8] y) { y = Concat<axis = 1>(x, z) }"


def lying(array: np.ndarray, how: str) -> np.ndarray:
    """An equal array, whose elements lie otherwise."""
    if how == "backwards":
        return np.ascontiguousarray(array[::-1])[::-1]
    if how == "apart":
        return np.repeat(array, 2, axis=-1)[..., ::2]
    return np.frombuffer(b"?" + array.tobytes(), array.dtype, array.size, 1).reshape(array.shape)


@pytest.mark.parametrize("how", ["backwards", "apart", "unaligned"])
@pytest.mark.parametrize(("text", "names"), [(CHAIN, "xz"), (JOINED, "xz"), (BRANCH, "x"), (DYNAMIC, "xw")])
def test_feeds_may_lie_anyhow(device: str, text: str, names: str, how: str) -> None:
    session = infera_gpu.load(parse(text), device=device)
    given = feeds(*names, shape=(5,) if names == "x" else (5, 4))
    flag = {"flag": np.array(1)} if names == "x" else {}
    want = session.run(given | flag)
    for _ in range(2):
        got = session.run({k: lying(a, how) for k, a in given.items()} | flag)
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array)


def test_views_take_no_step_and_no_memory(device: str) -> None:
    model = parse(
        """
        g (float[2, 3, 4] x) => (float[4, 6] y, float[2, 12] z) <int64[2] s = {4, 6}, int64[2] t = {2, 12}> {
            a = Transpose <perm = [2, 0, 1]> (x)
            b = Neg(a)
            y = Reshape(b, s)
            c = Reshape(x, t)
            z = Exp(c)
        }"""
    )
    session = infera_gpu.load(model, device=device)
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    out = session.run({"x": x})
    np.testing.assert_array_equal(out["y"], -x.transpose(2, 0, 1).reshape(4, 6))
    np.testing.assert_allclose(out["z"], np.exp(x.reshape(2, 12)), rtol=1e-6)
    assert not any("Reshape" in s.label for s in session.plan_for({"x": (2, 3, 4)}).steps)


def test_a_branch_is_planned_when_its_condition_is_known(device: str) -> None:
    session = infera_gpu.load(parse(BRANCH), device=device)
    x = np.array([1, 2, 3], np.float32)
    for _ in range(2):
        np.testing.assert_array_equal(session.run({"x": x, "flag": np.int64(1)})["y"], 2 * x - 2 * x)
        np.testing.assert_array_equal(session.run({"x": x, "flag": np.int64(0)})["y"], 2 * x * x + 2 * x)
    assert "the rest is planned when known" in str(session.plan_for({"x": (3,), "flag": ()}))


def test_branches_may_use_one_name_for_different_values(device: str) -> None:
    model = parse(
        """
        g (float[N] x, bool c, bool d) => (float[N] y) {
            a = If (c) <
                then_branch = one () => (float[N] p) <float k = {2.0}> { q = Mul(x, k) p = Neg(q) },
                else_branch = two () => (float[N] p) { q = Exp(x) p = Neg(q) }
            >
            b = If (d) <
                then_branch = three () => (float[N] p) <float k = {5.0}> {
                    q = Add(x, k)
                    p = If (c) <
                        then_branch = four () => (float[N] r) { r = Mul(q, k) },
                        else_branch = five () => (float[N] r) { r = Sub(q, k) }
                    >
                },
                else_branch = six () => (float[N] p) { p = Identity(x) }
            >
            y = Add(a, b)
        }"""
    )
    session = infera_gpu.load(model, device=device)
    x = np.array([1, 2], np.float32)
    for c in (True, False):
        for d in (True, False):
            a = -2 * x if c else -np.exp(x)
            b = ((x + 5) * 5 if c else x) if d else x
            got = session.run({"x": x, "c": np.bool_(c), "d": np.bool_(d)})["y"]
            np.testing.assert_allclose(got, a + b, rtol=1e-6)


def test_what_a_shape_folded_is_let_go_with_its_plan() -> None:
    model = parse(
        """g (float[N] x) => (float[N] y) <float[1] one = {1.0}> {
            s = Shape(x)
            e = Expand(one, s)
            y = Add(x, e)
        }"""
    )
    session = infera_gpu.load(model, device="cpu")
    for n in range(1, 2 * MAX_STAGES):
        assert session.run({"x": np.zeros(n, np.float32)})["y"].sum() == n
    assert len(session._stages) == len(session._stages._first) == MAX_STAGES
    assert len(next(iter(session._leases.values()))._bound) <= MAX_BOUND
    assert session._constants.nbytes <= sum(a.nbytes for a in session.graph.constants.values())


def test_plans_share_a_budget_for_what_was_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(
        """g (float[N] x) => (float[N] y) {
            n = Shape(x)
            ones = ConstantOfShape <value = float[1] {1}> (n)
            y = Add(x, ones)
        }"""
    )
    each, kept = 4000, 3
    for module in (stages, lease):
        monkeypatch.setattr(module, "MAX_FOLDED", kept * each + 100)
    session = infera_gpu.load(model, device="cpu")
    for n in range(each // 4, each // 4 - 10, -1):
        assert session.run({"x": np.zeros(n, np.float32)})["y"].sum() == n
    assert len(session._stages) == len(session._stages._first) == kept
    assert len(next(iter(session._leases.values()))._bound) == kept
    big = np.zeros(10 * each, np.float32)
    assert session.run({"x": big})["y"].sum() == big.size
    assert len(session._stages) == len(next(iter(session._leases.values()))._bound) == 1
    assert session.run({"x": big[:3]})["y"].sum() == 3
    assert len(session._stages) == 1


def test_the_memory_of_one_huge_request_is_given_back() -> None:
    session = infera_gpu.load(parse(CHAIN), device="cpu")
    session.run(feeds("x", "z", shape=(3_000_000, 4)))
    lease = next(iter(session._leases.values()))
    assert lease.nbytes > SHRINK_ABOVE
    f = feeds("x", "z")
    for _ in range(2 * SHRINK_AFTER):
        out = session.run(f)
    assert lease.nbytes == session.plan_for(f).arena_bytes
    np.testing.assert_allclose(out["y"], -(np.exp(f["x"] * f["z"]) + f["x"]), rtol=1e-6)


def test_an_arena_that_could_not_grow_leaves_a_session_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    session = infera_gpu.load(parse(CHAIN), device="cpu")
    session.run(feeds("x", "z"))
    alloc = session.device.alloc

    def refuse(nbytes: int, space: Space) -> object:
        raise OutOfMemoryError("the arena", needed=nbytes, available=0)

    monkeypatch.setattr(session.device, "alloc", refuse)
    with pytest.raises(OutOfMemoryError):
        session.run(feeds("x", "z", shape=(5000, 4)))
    monkeypatch.setattr(session.device, "alloc", alloc)
    f = feeds("x", "z")
    np.testing.assert_allclose(session.run(f)["y"], -(np.exp(f["x"] * f["z"]) + f["x"]), rtol=1e-6)


def test_shapes_that_depend_on_data(device: str) -> None:
    session = infera_gpu.load(parse(DYNAMIC), device=device)
    for seed, keep in ((0, 0.5), (1, 0.0), (2, 1.0), (0, 0.5)):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((3, 4)).astype(np.float32)
        w = (rng.random((3, 4)) < keep).astype(np.float32)
        out = session.run({"x": x, "w": w})
        np.testing.assert_allclose(out["y"], x[(x * w) != 0] ** 2, rtol=1e-6)
        np.testing.assert_array_equal(out["early"], x * w)


def test_a_warm_run_allocates_its_results_and_nothing_else() -> None:
    session = infera_gpu.load(parse(CHAIN), device="cpu")
    f = feeds("x", "z", shape=(5000, 4))
    out = {"y": np.empty((5000, 4), np.float32)}
    session.run(f)
    session.run(f, out=out)

    def peak(**kwargs: object) -> int:
        return transient(lambda: session.run(f, **kwargs))  # type: ignore[arg-type]

    assert 80_000 <= peak() < 84_000
    assert peak(out=out) < 4_000
    np.testing.assert_array_equal(out["y"], session.run(f)["y"])


def test_threads_share_a_session() -> None:
    session = infera_gpu.load(parse(CHAIN), device="cpu", max_concurrency=2)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(30):
                f = feeds("x", "z", shape=(1 + (seed + i) % 7, 4), seed=seed * 100 + i)
                np.testing.assert_allclose(session.run(f)["y"], -(np.exp(f["x"] * f["z"]) + f["x"]), rtol=1e-6)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert len(session._leases) <= 2


def test_a_device_plan_shows_its_transfers_and_answers_right() -> None:
    device = RecordingDevice()
    session = Session(load_graph(parse(DYNAMIC)), device)
    f = {"x": np.ones((2, 2), np.float32), "w": np.eye(2, dtype=np.float32)}
    np.testing.assert_array_equal(session.run(f)["y"], [1, 1])
    kinds = {e.kind for e in device.events}
    assert {"alloc", "transfer"} <= kinds
    assert kinds & {"compute", "kernel"}


def test_closing_refuses_later_runs() -> None:
    session = infera_gpu.load(parse(CHAIN), device="cpu")
    with session:
        session.run(feeds("x", "z"))
    with pytest.raises(DeviceError, match="closed"):
        session.run(feeds("x", "z"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "input 'x' is missing; the"),
        ({"X": 1, **feeds("z")}, "input 'x' is missing, but 'X' given; the model's inputs are"),
        ({**feeds("x", "z"), "q": 1}, "'q' is not an input"),
        ({**feeds("x"), "z": np.zeros((3, 4))}, "input 'z' is float64, expected float32"),
        ({**feeds("x"), "z": np.zeros((3, 5), np.float32)}, r"'z' has shape \[3, 5\], expected float32\[N, 4\]"),
        ({**feeds("x"), "z": np.zeros((2, 4), np.float32)}, "'N' is 2 there but 3 in 'x'"),
        ({**feeds("x"), "z": np.zeros(4, np.float32)}, "'z' has 1 dimension "),
        ({**feeds("x"), "z": "no"}, r"input 'z' is str, expected float32\[N, 4\]$"),
        ({**feeds("x"), "z": [[1j] * 4] * 3}, r"'z' is complex128, expected .*numpy.array\(\.\.\., 'float32'\)"),
        ({**feeds("x"), "z": [[2**70] * 4] * 3}, r"'z' is object, expected float32\[N, 4\]$"),
        ([1, 2], "feeds are a mapping from input names to arrays, not list"),
    ],
)
def test_a_feed_that_does_not_fit_is_named(bad: dict[str, object], message: str) -> None:
    session = infera_gpu.load(parse(CHAIN), device="cpu")
    with pytest.raises(InputError, match=message):
        session.run(bad)
    assert session.run(feeds("x", "z"))["y"].shape == (3, 4)


def test_stages_are_bounded_however_many_values_a_run_depends_on() -> None:
    model = parse(
        """g (float[N] x, bool[N] a) => (float[K] y) {
            p = Compress(x, a)
            q = Exp(p)
            b = Less(p, q)
            c = Compress(q, b)
            y = Neg(c)
        }"""
    )
    session = infera_gpu.load(model, device="cpu")
    rng = np.random.default_rng(0)
    for _ in range(3 * MAX_STAGES):
        n = int(rng.integers(1, 60))
        x, a = rng.standard_normal(n).astype(np.float32), rng.random(n) < 0.5
        np.testing.assert_allclose(session.run({"x": x, "a": a})["y"], -np.exp(x[a]), rtol=1e-6)
    alive, todo = 0, list(session._stages._first.values())
    while todo:
        stage = todo.pop()
        alive += 1
        todo += stage.next.values()
    assert alive == len(session._stages) <= MAX_STAGES


def test_closing_twice_is_closing_once() -> None:
    with infera_gpu.load(parse(CHAIN), device="cpu") as session:
        session.run(feeds("x", "z"))
        session.close()
    with pytest.raises(DeviceError, match="closed"):
        session.plan_for({"x": (3, 4), "z": (3, 4)})


@pytest.mark.parametrize("given", [[1, 2], (1.0, 2.0), [1, 2.5], np.array([1, 2], ">f4")])
def test_numbers_that_fit_are_taken(given: object) -> None:
    session = infera_gpu.load(parse("g (float[N] x) => (float[N] y) { y = Neg(x) }"), device="cpu")
    np.testing.assert_array_equal(session.run({"x": given})["y"], -np.asarray(given, np.float32))


@pytest.mark.parametrize(
    "given", [[1.9, 2.0], ["3", "4"], [None, 1], [True, False], np.float64(1.5), 1 << 70, [[1], []]]
)
def test_numbers_that_would_change_are_refused(given: object) -> None:
    session = infera_gpu.load(parse("g (int32[N] x) => (int32[N] y) { y = Neg(x) }"), device="cpu")
    with pytest.raises(InputError, match="'x'"):
        session.run({"x": given})


@pytest.mark.parametrize(
    ("op", "index"), [("Gather", 5), ("Gather", -6), ("GatherElements", 7), ("GatherND", 5), ("Gather", 1 << 40)]
)
def test_an_index_out_of_range_names_the_node(op: str, index: int) -> None:
    model = parse(f"g (float[5, 1] t, int64[N, 1] ids) => (float[A, B] y) {{ y = {op}(t, ids) }}")
    session = infera_gpu.load(model, device="cpu")
    table = np.arange(5, dtype=np.float32).reshape(5, 1)
    with pytest.raises(InputError, match=rf"{op} 'y': index {index} is out of range for an axis of 5"):
        session.run({"t": table, "ids": np.array([[1], [index]])})
    assert session.run({"t": table, "ids": np.array([[-5], [4]])})["y"].reshape(-1).tolist() == [0, 4]


def test_names_of_outputs_are_no_arrays_to_write_to() -> None:
    session: Any = infera_gpu.load(parse(CHAIN), device="cpu")
    with pytest.raises(InputError, match="out is a list, expected the arrays to write to, by output name"):
        session.run(feeds("x", "z"), ["y"])


def test_an_out_that_does_not_fit_is_named() -> None:
    session = infera_gpu.load(parse(CHAIN), device="cpu")
    with pytest.raises(InputError, match=r"out\['y'\] is float64"):
        session.run(feeds("x", "z"), out={"y": np.zeros((3, 4))})
    swapped = np.zeros((3, 4), np.dtype(np.float32).newbyteorder())
    with pytest.raises(
        InputError, match=r"out\['y'\] is float32\[3, 4\] of the other byte order, the output is float32"
    ):
        session.run(feeds("x", "z"), out={"y": swapped})
    with pytest.raises(InputError, match=r"out\['q'\] is not an output"):
        session.run(feeds("x", "z"), out={"q": np.zeros((3, 4))})
    fixed = np.zeros((3, 4), np.float32)
    fixed.flags.writeable = False
    with pytest.raises(InputError, match=r"out\['y'\] is read-only"):
        session.run(feeds("x", "z"), out={"y": fixed})


def test_all_unsupported_operators_are_listed() -> None:
    model = parse(
        "g (float[N] x) => (float[N] y) { a = com.microsoft.Foo(x) b = com.microsoft.Bar(a) y = com.microsoft.Foo(b) }"
    )
    with pytest.raises(UnsupportedOperatorError) as caught:
        infera_gpu.load(model, device="cpu")
    assert [op for op, _ in caught.value.missing] == ["com.microsoft.Foo", "com.microsoft.Bar", "com.microsoft.Foo"]
    assert str(caught.value).startswith(
        "g: 2 unsupported operators: com.microsoft.Foo, nodes 'a', 'y'; com.microsoft.Bar, node 'b'; `infera ops`"
    )


@pytest.mark.parametrize("data", [b"", b"not a model", parse(CHAIN).SerializeToString()[:-20]])
def test_what_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(ModelError):
        infera_gpu.load(data, device="cpu")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ModelError, match=r"nowhere\.onnx: No such file or directory$"):
        infera_gpu.load("nowhere.onnx", device="cpu")


def test_shapes_that_do_not_fit_name_the_node() -> None:
    session = infera_gpu.load(parse("g (float[N] x, float[M] z) => (float[N] y) { y = Add(x, z) }"), device="cpu")
    with pytest.raises(PlanError, match="Add 'y'"):
        session.run({"x": np.zeros(3, np.float32), "z": np.zeros(4, np.float32)})


def test_memory_that_is_not_there_is_refused_with_the_bytes() -> None:
    model = parse(
        "g (float[N] x) => (float[M] y) <int64[1] s = {40000000000000}> { a = ConstantOfShape(s)  y = Add(a, x) }"
    )
    session = infera_gpu.load(model, device="cpu")
    with pytest.raises(OutOfMemoryError, match="the arena needs 160,000,000,000,"):
        session.run({"x": np.zeros(1, np.float32)})


def test_an_output_too_large_for_memory_is_refused_with_the_bytes() -> None:
    model = parse("g (float[1] x) => (float[M] y) <int64[1] s = {35184372088832}> { y = Expand(x, s) }")
    with pytest.raises(OutOfMemoryError, match="output 'y' needs 140,737,488,355,328 bytes"):
        infera_gpu.load(model, device="cpu").run({"x": np.zeros(1, np.float32)})


def test_an_unknown_device_is_refused() -> None:
    for name in ("tpu", "CPU", "", "cuda:", "cuda:-1", "cuda:²", "cuda: 0", "cuda:0:1", f"cuda:{'9' * 5000}"):
        with pytest.raises(DeviceError, match=f"unknown device '{name}'; expected auto, cpu, cuda"):
            infera_gpu.load(parse(CHAIN), device=name)


def test_all_gpus_are_for_servers() -> None:
    with pytest.raises(DeviceError, match=r"'cuda:all' is for `infera serve --device`, .*; expected one of auto"):
        infera_gpu.load(parse(CHAIN), device="cuda:all")


def test_batch_invariance_is_for_gpus_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { y = Exp(x) }")
    with pytest.raises(DeviceError, match="batch_invariant=True is for GPUs: products on the CPU are BLAS's"):
        infera_gpu.load(model, device="cpu", batch_invariant=True)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="batch_invariant=True needs Triton's kernels"):
        infera_gpu.load(model, device="recording", batch_invariant=True)


def test_an_output_that_is_declared_as_another_type_is_named() -> None:
    model = parse("g (float[N] x) => (int64[N] y) { y = Relu(x) }")
    with pytest.raises(PlanError, match="output 'y' is float32, the model declares it as int64"):
        infera_gpu.load(model, device="cpu").run({"x": np.ones(2, np.float32)})


@pytest.mark.parametrize("shape", ["N", 2, (-1,), ("N",), (1.5,)])
def test_shapes_to_plan_for_are_checked(shape: object) -> None:
    session = infera_gpu.load(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }"), device="cpu")
    with pytest.raises(InputError, match="input 'x' is"):
        session.plan_for({"x": shape})
    assert session.plan_for({"x": (np.int64(3),)}).outputs["y"].shape == (3,)
    assert repr(session.profile({"x": np.ones(3, np.float32)})[0]).startswith("<Relu")


@pytest.mark.parametrize("inputs", [[{"x": (2,)}], "x", (2,), None])
def test_inputs_to_plan_for_are_a_mapping(inputs: Any) -> None:
    session = infera_gpu.load(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }"), device="cpu")
    for asked in (session.plan_for, session.reserve):
        with pytest.raises(InputError, match="expected a mapping from input names to shapes or arrays"):
            asked(inputs)


@pytest.mark.parametrize("device", [0, None, b"cpu"])
def test_devices_are_named(device: Any) -> None:
    with pytest.raises(DeviceError, match=r"device is .*, expected a name: auto, cpu, cuda, cuda:N or recording"):
        infera_gpu.load(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }"), device=device)


@pytest.mark.parametrize("value", ["yes", "no", 1, 0, [], 1.0])
@pytest.mark.parametrize("name", ["fuse", "jit", "graphs", "batch_invariant", "mapped"])
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"{name} is .*, expected True or False"):
        infera_gpu.load(parse(CHAIN), device="recording", **{name: value})


@pytest.mark.parametrize("device", ["cpu", "recording"])
@pytest.mark.parametrize("tune", ["60s", "60", -1, -0.5, float("nan"), None, [60]])
def test_times_to_tune_are_seconds(tune: Any, device: str) -> None:
    with pytest.raises(InputError, match=r"tune is .*, expected True, False, or a number of seconds as 60"):
        infera_gpu.load(parse(CHAIN), device=device, tune=tune)


@pytest.mark.parametrize("threads", [0, -1, "2", 1.5])
def test_threads_are_a_positive_number(threads: object) -> None:
    with pytest.raises(InputError, match="threads"):
        infera_gpu.load(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }"), device="cpu", threads=threads)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("op", "opset", "hint"),
    [
        ("Gelu", 13, "Gelu of opset 13, node .* there is Gelu from opset 20 on"),
        ("relu", 17, "there is Relu"),
        ("Frobnicate", 17, "CONTRIBUTING"),
    ],
)
def test_unsupported_operators_come_with_advice(op: str, opset: int, hint: str) -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }", opset)
    model.graph.node[0].op_type = op
    with pytest.raises(UnsupportedOperatorError, match=hint):
        infera_gpu.load(model, device="cpu")

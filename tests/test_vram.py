"""Limits on GPU memory, and GPUs that are lost: over a stand-in for CuPy, and on the recording device."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import infera_gpu
from bench.build import bert
from infera_gpu import constants, lease, opening
from infera_gpu.budget import VramBudget, bytes_of
from infera_gpu.devices import cuda
from infera_gpu.dry import least_bytes, missing
from infera_gpu.errors import DeviceError, DeviceLostError, InputError, OutOfMemoryError
from infera_gpu.memory import ALIGN
from tests import fake_cupy
from tests.text import parse

WEIGHTS = 64 * 64 * 4
MODEL = parse(
    f"""
    g (float[N, 64] x) => (float[N, 64] y) <float[64, 64] w = {{{", ".join(["0.01"] * 64 * 64)}}}> {{
        a = MatMul(x, w)
        y = Exp(a)
    }}"""
)

W = [", ".join([f"0.0{i}"] * 64 * 64) for i in (1, 2, 3)]
LAYERS = parse(
    f"""
    g (float[N, 64] x) => (float[N, 64] y)
    <float[64, 64] u = {{{W[0]}}}, float[64, 64] v = {{{W[1]}}}, float[64, 64] w = {{{W[2]}}}> {{
        a = MatMul(x, u)
        b = Exp(a)
        c = MatMul(b, v)
        d = Tanh(c)
        y = MatMul(d, w)
    }}"""
)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_cupy.install(monkeypatch)


def rows(n: int) -> dict[str, np.ndarray]:
    return {"x": np.ones((n, 64), np.float32)}


@pytest.mark.parametrize(
    ("size", "want"),
    [
        (0, 0),
        (123, 123),
        (np.int64(123), 123),
        ("123", 123),
        ("4GiB", 4 << 30),
        (" 1.5 gb ", 1_500_000_000),
        ("2 KiB", 2048),
        ("7b", 7),
    ],
)
def test_amounts_of_memory(size: int | str, want: int) -> None:
    assert bytes_of(size) == want


@pytest.mark.parametrize(
    "size", ["", "GiB", "4 G", "-1", "1e9", "4 GiBs", "0x10", -1, True, 1.5, 4e9, None, b"4GiB", ["4GiB"], "9" * 400]
)
def test_what_is_no_amount_is_refused(size: Any) -> None:
    with pytest.raises(InputError, match="no amount of memory"):
        bytes_of(size)


@pytest.mark.parametrize("device", ["cpu", "cuda", "recording"])
def test_limits_are_looked_at_on_every_device(device: str, cupy: Any) -> None:
    for limit in (4e9, 1.5, -1, True, b"4GiB", ["4GiB"], VramBudget):
        with pytest.raises(InputError, match="no amount of memory; expected bytes as a whole number, or a string as"):
            infera_gpu.load(MODEL, device=device, vram_limit=limit)  # type: ignore[arg-type]
    with infera_gpu.load(MODEL, device=device, vram_limit=np.int64(1 << 30)) as session:
        assert session.run(rows(1))["y"].shape == (1, 64)


@pytest.mark.parametrize("device", ["cuda", "recording"])
def test_a_model_whose_weights_do_not_fit_is_refused_before_anything_is_allocated(device: str, cupy: Any) -> None:
    with pytest.raises(
        OutOfMemoryError, match=r"the weights of .* needs 16,\d\d\d bytes, 10,000 of a vram_limit"
    ) as caught:
        infera_gpu.load(MODEL, device=device, vram_limit=10_000)
    assert (caught.value.limit, caught.value.available) == (10_000, 10_000)
    assert WEIGHTS <= caught.value.needed < WEIGHTS + 1000
    assert cupy.vram.used == 0


@pytest.mark.parametrize("device", ["cuda", "recording"])
def test_a_plan_that_does_not_fit_beside_the_weights_is_refused_and_smaller_ones_run(device: str, cupy: Any) -> None:
    budget = VramBudget(WEIGHTS + 60_000)
    session = infera_gpu.load(MODEL, device=device, vram_limit=budget)
    with pytest.raises(OutOfMemoryError, match=r"a run \(16,\d+ bytes of weights, an arena of \d+,\d+\) on "):
        session.run(rows(1000))
    assert budget.used == cupy.vram.used == 0  # not even the weights
    want = np.exp(np.full((5, 64), 0.64, np.float32))
    np.testing.assert_allclose(session.run(rows(5))["y"], want, rtol=1e-5)
    used = budget.used
    assert WEIGHTS < used <= budget.limit
    with pytest.raises(OutOfMemoryError, match="missing"):
        session.run(rows(1000))
    assert WEIGHTS < budget.used <= used  # temporaries that were kept for later have made room
    np.testing.assert_allclose(session.run(rows(5))["y"], want, rtol=1e-5)
    session.close()
    del session
    gc.collect()
    assert budget.used == cupy.vram.used == 0


@pytest.mark.parametrize("device", ["cuda", "recording"])
def test_sessions_share_a_budget(device: str, cupy: Any) -> None:
    budget = VramBudget(2 * WEIGHTS)
    first = infera_gpu.load(MODEL, device=device, vram_limit=budget)
    first.run(rows(1))
    with pytest.raises(OutOfMemoryError, match="the weights of"):
        infera_gpu.load(MODEL, device=device, vram_limit=budget)
    first.close()
    gc.collect()
    second = infera_gpu.load(MODEL, device=device, vram_limit=budget)
    assert second.run(rows(1))["y"].shape == (1, 64)
    assert repr(budget).endswith(f"of {2 * WEIGHTS:,} bytes used>")


def test_weights_lie_in_one_block(cupy: Any) -> None:
    device = cuda.CudaDevice(0)
    hosts = [np.arange(n, dtype=np.float32) for n in (64, 1, 300, 7)]
    sizes = [256, 256, 1280, 256]
    with device.weights(sum(sizes[:3])):
        inside = [device.constant(host, "device", lasting=True) for host in hosts[:3]]
        assert cupy.vram.taken == 1
        beyond = device.constant(hosts[3], "device", lasting=True)
        assert cupy.vram.taken == 2
    places = [a.data.ptr - inside[0].data.ptr for a in inside]
    assert places == [0, 256, 512]
    for host, array in zip(hosts, [*inside, beyond], strict=True):
        np.testing.assert_array_equal(array.view(np.ndarray), host)
    later = device.constant(hosts[0], "device", lasting=True)
    assert cupy.vram.taken == 3
    inside.clear()
    del array, beyond, later
    gc.collect()
    assert cupy.vram.used == 0


def test_a_sessions_weights_are_one_block_and_given_back(cupy: Any) -> None:
    with infera_gpu.load(LAYERS, device="cuda") as session:
        session.run(rows(2))
        blocks = [memory.nbytes for memory in cupy.vram.blocks]
        assert blocks.count(3 * WEIGHTS) == 1
        assert WEIGHTS not in blocks
    del session
    gc.collect()
    assert cupy.vram.used == 0


def test_temporaries_of_portable_operators_count(cupy: Any) -> None:
    budget = VramBudget(100_000)
    device = cuda.CudaDevice(0, budget=budget)
    with device.running():
        held = cupy.empty((80_000,), np.uint8)
        assert budget.used == 80_000
        with pytest.raises(OutOfMemoryError, match="a temporary array needs 30,000 bytes, 20,000 of a vram_limit"):
            cupy.empty((30_000,), np.uint8)
        del held
        assert budget.used == 80_000  # the pool keeps it for later
        assert cupy.empty((30_000,), np.uint8).nbytes == 30_000
    device.close()
    assert budget.used == 0


def test_memory_that_the_garbage_collector_gives_back_waits_for_nobody() -> None:
    """It may run while the same thread is counting."""

    class Collecting(int):
        def __gt__(self, other: int) -> bool:
            budget.give_back(7)
            return int(self) > other

    budget = VramBudget(20)
    budget.take("a block", 7)
    thread = threading.Thread(target=budget.take, args=("another", Collecting(9)), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert (budget.used, budget.available) == (9, 11)


def test_what_the_driver_refuses_is_not_counted(monkeypatch: pytest.MonkeyPatch, cupy: Any) -> None:
    budget = VramBudget("1GiB")
    device = cuda.CudaDevice(0, budget=budget)
    monkeypatch.setattr(cupy.cuda, "Memory", lambda nbytes: (_ for _ in ()).throw(fake_cupy.CUDARuntimeError(2)))
    with pytest.raises(OutOfMemoryError):
        device.alloc(1000, "device")
    assert budget.used == 0


# ---- what is announced, and what is taken


def node(op: str, x: tuple[int, ...], y: tuple[int, ...], *weights: Any, kind: int = 1, **attrs: Any) -> Any:
    """A model of one node, whose inputs but the first are constant."""
    given = [helper.make_tensor_value_info("x", kind, x)]
    made = [helper.make_tensor_value_info("y", kind, y)]
    names = [f"w{i}" if w is not None else "" for i, w in enumerate(weights)]
    domain = "com.microsoft" if op == "MatMulNBits" else ""
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *names], ["y"], domain=domain, **attrs)],
        *(op, given, made),
        [numpy_helper.from_array(w, name) for w, name in zip(weights, names, strict=True) if w is not None],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def drawn(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def codes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


SIZES: dict[str, Any] = {
    "layers": (lambda: LAYERS, {"x": np.ones((5, 64), np.float32)}),
    "float16 LSTM": (
        lambda: node(
            *("LSTM", (4, 1, 64), (4, 1, 1, 64), drawn(1, 256, 64, dtype=np.float16)),
            *(drawn(1, 256, 64, dtype=np.float16),),
            kind=TensorProto.FLOAT16,
            hidden_size=64,
        ),
        {"x": drawn(4, 1, 64, dtype=np.float16)},
    ),
    "convolution": (
        lambda: node("Conv", (1, 5, 9, 9), (1, 7, 7, 7), drawn(7, 5, 3, 3), drawn(7)),
        {"x": drawn(1, 5, 9, 9)},
    ),
    "4 bits": (
        lambda: node(
            *("MatMulNBits", (3, 64), (3, 40), codes(40, 2, 16), np.abs(drawn(80)), codes(40)),
            K=64,
            N=40,
            bits=4,
            block_size=32,
        ),
        {"x": drawn(3, 64)},
    ),
    "bert": (
        lambda: bert(layers=2, hidden=64, heads=4, inner=128, vocabulary=100),
        dict(zip(("input_ids", "attention_mask", "token_type_ids"), [np.ones((1, 7), np.int64)] * 3, strict=True)),
    ),
}
"""Models, and what they are fed. All but the first have weights that kernels pack."""


@pytest.fixture(params=["recording", pytest.param("cuda", marks=pytest.mark.kernels)])
def kernels(request: pytest.FixtureRequest, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device that runs what kernels there are, or does as if it did."""
    if request.param == "cuda":
        from infera_kernels.launch import RecordingLauncher

        monkeypatch.setattr(cuda, "find_spec", lambda name: object())
        monkeypatch.setattr(cuda.CudaDevice, "launcher", property(lambda _: RecordingLauncher()))
    return str(request.param)


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of fixed shapes are planned when they run, as others are."""
    monkeypatch.setattr(opening, "_fixed", lambda session: None)


@pytest.mark.parametrize("name", SIZES)
def test_what_is_announced_is_enough_and_less_takes_nothing(
    name: str, kernels: str, cupy: Any, unplanned: None
) -> None:
    make, feeds = SIZES[name]
    model, asked = make().SerializeToString(), list[int]()
    budget = VramBudget("1GiB")
    with infera_gpu.load(model, device=kernels, vram_limit=budget) as session:
        require = session.device.require

        def noted(what: str, nbytes: int) -> None:
            if what.startswith("a run"):
                asked.append(nbytes)
            require(what, nbytes)

        session.device.require = noted  # type: ignore[method-assign]
        session.run(feeds)
        (announced,) = asked
        assert budget.used <= announced
        if kernels == "cuda":  # weights lie in one block, each aligned
            assert budget.used == cupy.vram.used
            assert budget.used >= announced - (constants.POOLED if name == "bert" else 0)  # whose pool does not round
    del session
    gc.collect()
    assert cupy.vram.used == 0

    budget = VramBudget("1GiB")
    with infera_gpu.load(model, device=kernels, vram_limit=budget) as session:
        budget.limit = announced
        for _ in range(2):
            session.run(feeds)
        assert budget.used <= announced
    del session
    gc.collect()
    assert budget.used == cupy.vram.used == 0

    budget = VramBudget("1GiB")
    with infera_gpu.load(model, device=kernels, vram_limit=budget) as session:
        budget.limit = announced - ALIGN
        with pytest.raises(OutOfMemoryError, match=r"a run \([\d,]+ bytes of weights, an arena of") as caught:
            session.run(feeds)
        assert (caught.value.needed, caught.value.available) == (announced, announced - ALIGN)
        assert budget.used == cupy.vram.used == 0


@pytest.mark.parametrize("name", [n for n in SIZES if n not in ("layers", "bert")])
def test_of_fixed_shapes_everything_is_taken_at_load_or_the_model_refused(name: str, kernels: str, cupy: Any) -> None:
    make, feeds = SIZES[name]
    model, budget = make().SerializeToString(), VramBudget("1GiB")
    with infera_gpu.load(model, device=kernels, vram_limit=budget) as session:
        used, taken = budget.used, cupy.vram.taken
        assert used > 0
        session.run(feeds)
        assert (budget.used, cupy.vram.taken) == (used, taken)
    del session
    gc.collect()
    with pytest.raises(OutOfMemoryError, match=r"a run \([\d,]+ bytes of weights, an arena of"):
        infera_gpu.load(model, device=kernels, vram_limit=used - ALIGN)
    gc.collect()
    assert cupy.vram.used == 0


@pytest.mark.parametrize("device", ["cpu", "cuda", "recording"])
def test_an_arena_for_given_shapes_is_taken_at_load_and_does_not_grow(device: str, cupy: Any) -> None:
    with infera_gpu.load(MODEL, device=device, shapes=[{"x": (20, 64)}, {"x": (8, 64)}], max_concurrency=2) as session:
        assert (nbytes := session._arena.nbytes) > 0
        for n in (8, 20, 3):
            assert session.run(rows(n))["y"].shape == (n, 64)
        with pytest.raises(
            OutOfMemoryError, match=r"a run of '.*' with x\[500, 64\], larger than the shapes that it was"
        ):
            session.run(rows(500))
        assert session._arena.nbytes == nbytes
        with session._arena._lock:  # the memory of another run at the same time is as large from its beginning
            session._arena._memories[0].claim = (session, None)
        session.run(rows(1))
        assert [m.nbytes for m in session._arena._memories] == [nbytes, nbytes]
        session._arena.give_back(None)
        assert session.reserve({"x": (500, 64)}) > nbytes
        assert session.run(rows(500))["y"].shape == (500, 64)


def test_shapes_to_load_for_are_looked_at(cupy: Any) -> None:
    with infera_gpu.load(MODEL, device="cuda", shapes={"x": (20, 64)}) as session:
        assert session.run(rows(20))["y"].shape == (20, 64)
    with pytest.raises(InputError, match="x"):
        infera_gpu.load(MODEL, device="cuda", shapes={"x": (20, 63)})
    with pytest.raises(InputError, match="x"):
        infera_gpu.load(MODEL, device="cuda", shapes=[{}])
    with pytest.raises(InputError, match="tune measures in the first runs"):
        infera_gpu.load(MODEL, device="cuda", shapes={"x": (20, 64)}, tune=True)
    gc.collect()
    assert cupy.vram.used == 0


def test_what_no_plan_uploads_is_not_asked_for_at_load(cupy: Any) -> None:
    graph = parse(
        """
        shaped (float[N, 4] x) => (float[N, 4] y)
        {
            dims = Shape (big)
            ones = ConstantOfShape (dims)
            one = ReduceMean <keepdims = 0> (ones)
            z = Add (x, one)
            y = MatMul (z, w)
        }
        """
    )
    for name, array in (("big", np.zeros((1000, 100), np.float32)), ("w", np.eye(4, dtype=np.float32))):
        graph.graph.initializer.append(numpy_helper.from_array(array, name))
    with infera_gpu.load(graph, device="cuda", fuse=False) as session:
        assert session.constant_bytes >= 400_000
        assert least_bytes(session.graph) == 64
    with infera_gpu.load(graph, device="cuda", fuse=False, vram_limit=100_000) as session:
        got = session.run({"x": np.full((2, 4), 2, np.float32)})["y"]
    np.testing.assert_array_equal(got, np.full((2, 4), 2, np.float32))


@pytest.mark.kernels
def test_a_form_that_is_packed_counts_as_large_as_it_is(kernels: str, cupy: Any, unplanned: None) -> None:
    make, feeds = SIZES["float16 LSTM"]
    session = infera_gpu.load(make(), device=kernels)
    plan = session.plan_for(feeds)
    absent = missing(session.device, session._constants, plan)
    # both matrices in float32; as they are for the operator's own function alone, which stands in for the kernel
    assert absent == 2 * 256 * 64 * (4 if kernels == "cuda" else 4 + 2)
    session.run(feeds)
    assert missing(session.device, session._constants, plan) == 0
    assert session._constants.nbytes == absent


def test_packed_forms_beyond_what_is_kept_are_packed_again(
    kernels: str, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, feeds = SIZES["convolution"]
    want = infera_gpu.load(make(), device="recording").run(feeds)
    monkeypatch.setattr(constants, "MAX_AHEAD", 0)
    monkeypatch.setattr(constants, "host_memory", lambda: None)
    with infera_gpu.load(make(), device=kernels) as session:
        got = session.run(feeds)
        assert not session._constants._ahead
    if kernels == "recording":
        np.testing.assert_array_equal(got["y"], want["y"])


@pytest.mark.parametrize("device", ["cuda", "recording"])
def test_where_binding_fails_all_that_was_taken_is_given_back(
    device: str, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = VramBudget("1MiB")
    session = infera_gpu.load(LAYERS, device=device, vram_limit=budget)
    upload, made = session.device.constant, list[int]()

    def fail(host: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(host.nbytes)
        if len(made) == 3:
            raise OutOfMemoryError("a constant", needed=1, available=0)
        return upload(host, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(session.device, "constant", fail)
        with pytest.raises(OutOfMemoryError):
            session.run(rows(3))
    gc.collect()
    assert budget.used == cupy.vram.used == 0
    assert session._constants.nbytes == 0
    assert session.run(rows(3))["y"].shape == (3, 64)


@pytest.mark.parametrize("device", ["cuda", "recording"])
def test_where_binding_fails_what_is_reserved_is_taken_again(
    device: str, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = infera_gpu.Arena()
    session = infera_gpu.load(LAYERS, device=device, arena=arena)
    nbytes = session.reserve({"x": (3, 64)})

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OutOfMemoryError("a view", needed=1, available=0)

    with monkeypatch.context() as patch:
        patch.setattr(session.device, "ports", fail)
        with pytest.raises(OutOfMemoryError):
            session.run(rows(300))
    assert arena.nbytes == nbytes
    assert session.run(rows(3))["y"].shape == (3, 64)
    assert arena.nbytes == nbytes


def test_plans_that_are_reserved_together_are_announced_together(cupy: Any) -> None:
    """Their constants once, the largest arena."""
    session = infera_gpu.load(LAYERS, device="cuda")
    large, small = (session.plan_for({"x": (n, 64)}) for n in (300, 3))
    both, held = missing(session.device, session._constants, large, small), 3 * WEIGHTS
    assert (missing(session.device, session._constants, large), both) == (held, held)
    budget = VramBudget(held + large.arenas["device"])
    session = infera_gpu.load(LAYERS, device="cuda", vram_limit=budget)
    session.reserve({"x": (3, 64)}, {"x": (300, 64)})
    assert budget.used == budget.limit


# ---- what is reserved


@pytest.mark.parametrize("device", ["cuda", "recording"])
def test_what_is_reserved_is_neither_planned_nor_allocated_again(
    device: str, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = infera_gpu.load(MODEL, device=device)
    nbytes = session.reserve({"x": (1, 64)}, {"x": (300, 64)}, {"x": np.ones((4, 64))})
    assert nbytes >= session.plan_for({"x": (300, 64)}).arena_bytes

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it asks for memory")

    monkeypatch.setattr(session.device, "alloc", refuse)
    monkeypatch.setattr(session.device, "constant", refuse)
    for n in (300, 1, 4) * 50:
        np.testing.assert_allclose(session.run(rows(n))["y"], np.exp(np.full((n, 64), 0.64)), rtol=1e-5)
    session.run(rows(17))  # smaller: planned, without an arena of its own


def test_what_cannot_be_reserved_takes_nothing(cupy: Any) -> None:
    budget = VramBudget(WEIGHTS + 60_000)
    session = infera_gpu.load(MODEL, device="cuda", vram_limit=budget)
    with pytest.raises(OutOfMemoryError):
        session.reserve({"x": (3, 64)}, {"x": (5000, 64)})
    assert budget.used == 0


def test_what_fails_half_way_is_not_reserved(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = infera_gpu.load(MODEL, device="cuda")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OutOfMemoryError("a constant", needed=1, available=0)

    with monkeypatch.context() as patch:
        patch.setattr(session.device, "constant", fail)
        with pytest.raises(OutOfMemoryError):
            session.reserve({"x": (300, 64)})
    assert cupy.vram.used == 0
    assert session.run(rows(1))["y"].shape == (1, 64)


@pytest.mark.parametrize("device", ["cuda", "recording"])
def test_what_is_reserved_outlasts_a_huge_run(device: str, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SHRINK_ABOVE", 1)
    arena = infera_gpu.Arena()
    session = infera_gpu.load(MODEL, device=device, arena=arena)
    nbytes = session.reserve({"x": (30, 64)})
    session.run(rows(3000))
    assert arena.nbytes > 4 * nbytes
    for _ in range(2 * lease.SHRINK_AFTER):
        session.run(rows(1))
    assert arena.nbytes == nbytes


@pytest.mark.parametrize("device", ["cuda", "recording"])
def test_runs_that_give_constants_are_reserved_too(device: str, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse("""
        g (float[N, 2] x, float[2, 2] w) => (float[N, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}, float[2, 2] v = {1, 0, 0, 2}> {
            a = MatMul(x, w)
            y = MatMul(a, v)
        }""")
    session = infera_gpu.load(model, device=device)
    session.reserve({"x": (3, 2)}, {"x": (3, 2), "w": (2, 2)})

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it asks for memory")

    monkeypatch.setattr(session.device, "alloc", refuse)
    monkeypatch.setattr(session.device, "constant", refuse)
    x, w = np.ones((3, 2), np.float32), np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(session.run({"x": x})["y"], [[4, 12]] * 3)
    np.testing.assert_allclose(session.run({"x": x, "w": w})["y"], [[1, 2]] * 3)


# ---- GPUs that are lost


def test_a_gpu_on_which_a_kernel_faulted_is_lost_to_the_process_and_says_so(cupy: Any) -> None:
    session = infera_gpu.load(parse("g (float[N] x) => (float[N] y) { [boom] y = Exp(x) }"), device="cuda")
    other = infera_gpu.load(MODEL, device="cuda")
    cpu = infera_gpu.load(MODEL, device="cpu")
    other.run(rows(2))
    healthy, cupy.exp = cupy.exp, lambda *_: (_ for _ in ()).throw(fake_cupy.CUDARuntimeError(700))
    with pytest.raises(DeviceLostError, match="cuda:0 is lost to this process: a run met 'cudaError 700'") as caught:
        session.run({"x": np.ones(3, np.float32)})
    assert "boom" in caught.value.__notes__[0]
    cupy.exp = healthy
    for lost in (session, other):
        assert "restart the process" in lost.device.lost
        with pytest.raises(DeviceLostError, match="restart the process"):
            lost.run(rows(2) if lost is other else {"x": np.ones(3, np.float32)})
        lost.close()
    with pytest.raises(DeviceLostError):
        infera_gpu.load(MODEL, device="cuda")
    assert cpu.device.lost == ""
    assert cpu.run(rows(2))["y"].shape == (2, 64)


def test_other_failures_leave_the_gpu_usable(cupy: Any) -> None:
    session = infera_gpu.load(parse("g (float[N] x) => (float[N] y) { y = Exp(x) }"), device="cuda")
    healthy, cupy.exp = cupy.exp, lambda *_: (_ for _ in ()).throw(fake_cupy.CUDADriverError(701))
    with pytest.raises(DeviceError, match="cuda:0 failed in a run: cudaError 701"):
        session.run({"x": np.ones(3, np.float32)})
    cupy.exp = healthy
    assert session.device.lost == ""
    np.testing.assert_allclose(session.run({"x": np.zeros(3, np.float32)})["y"], 1)


def test_a_fault_that_shows_when_results_are_waited_for_loses_the_gpu(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = infera_gpu.load(MODEL, device="cuda")
    session.run(rows(2))

    def fault(self: Any) -> None:
        raise fake_cupy.CUDARuntimeError(719)

    monkeypatch.setattr(fake_cupy.Event, "synchronize", fault)
    monkeypatch.setattr(fake_cupy.Stream, "synchronize", fault)
    with pytest.raises(DeviceLostError, match="cudaError 719"):
        session.run(rows(2))
    session.close()

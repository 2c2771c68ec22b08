"""`infera inspect`."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import infera_gpu
from tests.commandline import assert_fails, infera, model, save, save_relu
from tests.text import parse


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    return save_relu(tmp_path)


def test_inspect_shows_model_plan_and_times(relu: Path) -> None:
    status, out, err = infera("inspect", relu, "--shape", "x=4,3", "--time", "--device", "cpu")
    assert (status, err) == (0, "")
    assert "opset ai.onnx 17" in out
    assert "float32[N, 3]" in out
    plan = infera_gpu.load(relu, device="cpu").plan_for({"x": (4, 3)})
    assert str(plan) in out
    assert f"arena {plan.arena_bytes:,} bytes (lower bound {plan.lower_bound:,}, 1.000 of it)" in out
    assert "100.0%" in out
    assert "packed for these kernels, beside the constants: 0 bytes" in out


def test_inspect_calls_a_model_by_its_name_in_the_catalogue(relu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert infera("inspect", relu, "--device", "cpu")[1].startswith(f"{relu.name}: opset")
    monkeypatch.setattr("infera_gpu.fetch.fetch", lambda source, **options: relu)
    assert infera("inspect", "magika", "--device", "cpu")[1].startswith("magika: opset")


@pytest.mark.parametrize("shape", [("--shape", "x=4,3"), ()])
def test_what_is_shown_of_a_gpu_without_its_kernels_says_so(
    shape: tuple[str, ...], relu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stdout, where the plan is; and where dimensions are free, and there is none yet."""
    monkeypatch.setattr("infera_gpu.devices.recording.find_spec", lambda name: None)
    status, out, _ = infera("inspect", relu, *shape, "--device", "recording")
    assert status == 0
    assert out.count("Triton is not installed") == 1
    assert "pip install 'infera-gpu[kernels]'" in out.partition("plan on recording")[0]
    assert "Triton" not in infera("inspect", relu, *shape, "--device", "cpu")[1]


@pytest.mark.kernels
def test_nothing_is_said_of_kernels_that_are_there(relu: Path) -> None:
    assert "Triton" not in infera("inspect", relu, "--shape", "x=4,3", "--device", "recording")[1]


def test_inspect_names_the_free_dimensions(relu: Path) -> None:
    status, out, err = infera("inspect", relu)
    assert status == 0
    assert "Relu" in out
    assert "plan on" not in out
    assert "x[0] 'N'" in err
    assert "--shape x=1,3" in err


def test_inspect_fails_where_a_plan_is_asked_for_and_dimensions_are_free(relu: Path, tmp_path: Path) -> None:
    drawing = tmp_path / "memory.svg"
    status, _, err = infera("inspect", relu, "--time", "--svg", drawing)
    assert status == 2
    assert "--shape x=1,3" in err
    assert "--time and --svg" in err
    assert not drawing.exists()


@pytest.mark.parametrize(
    ("name", "says"), [("memory.png", "the drawing is SVG; name it memory.svg"), ("none/memory.svg", "no folder")]
)
def test_inspect_sees_first_what_cannot_be_drawn_to(relu: Path, tmp_path: Path, name: str, says: str) -> None:
    result = infera("inspect", relu, "--shape", "4,3", "--device", "cpu", "--svg", tmp_path / name)
    assert_fails(result, says, "--svg", status=2)
    assert result[1] == ""
    assert [*tmp_path.iterdir()] == [relu]


def test_inspect_says_whose_times_a_recording_has(relu: Path) -> None:
    arguments = "inspect", relu, "--shape", "4,3", "--time", "--device"
    said = "of NumPy on this CPU, which stands in for the kernels"
    assert said in infera(*arguments, "recording")[1]
    assert said not in infera(*arguments, "cpu")[1]


def test_what_cannot_be_planned_is_blamed_on_values_only_where_they_are_random(tmp_path: Path) -> None:
    onnx.save(parse("g (float[N] x, int64[M] s) => (float[A,B] y) { y = Reshape(x, s) }"), tmp_path / "m.onnx")
    x, s = save(tmp_path / "x.npy", np.ones(7, np.float32)), save(tmp_path / "s.npy", np.array([2, 3]))
    asked = "inspect", tmp_path / "m.onnx", "--device", "cpu", "-i", f"x={x}"
    status, _, err = infera(*asked, "--shape", "s=2")
    assert status == 0
    assert "the rest cannot be planned: Reshape" in err
    assert "are random; give sensible ones" in err
    status, _, err = infera(*asked, "-i", f"s={s}")
    assert "the rest cannot be planned: Reshape" in err
    assert "random" not in err


def test_a_plan_without_memory_has_no_bound(tmp_path: Path) -> None:
    onnx.save(parse("g (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }"), tmp_path / "m.onnx")
    out = infera("inspect", tmp_path / "m.onnx", "--shape", "0,2", "--device", "cpu")[1]
    assert "transfers, arena 0 bytes\n" in out
    assert "lower bound" not in out


def test_inspect_counts_nodes_of_subgraphs(tmp_path: Path) -> None:
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["x"], [name])], name, [], [helper.make_tensor_value_info(name, 1, [3])]
        )
        for name, op in (("then", "Relu"), ("else", "Neg"))
    }
    made = model([helper.make_node("If", ["c"], ["y"], **branches)], {"x": [3]}, {"y": [3]})
    made.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    onnx.save(made, tmp_path / "if.onnx")
    status, out, _ = infera("inspect", tmp_path / "if.onnx", "--device", "cpu")
    assert status == 0
    assert "nodes after optimisation: 3" in out


def save_nonzero(folder: Path) -> Path:
    """Where x is positive, and what is in it: the shapes of both depend on data."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("NonZero", ["a"], ["n"]),
        helper.make_node("Unique", ["x"], ["u"]),
        helper.make_node("Neg", ["u"], ["y"]),
    ]
    made = model(nodes, {"x": [4, 3]}, {"y": ["k"]})
    made.graph.output.append(helper.make_tensor_value_info("n", TensorProto.INT64, [2, "m"]))
    onnx.save(made, folder / "nonzero.onnx")
    return folder / "nonzero.onnx"


def test_inspect_shows_what_runs_on_numpy_between_two_plans(tmp_path: Path) -> None:
    path = save_nonzero(tmp_path)
    status, out, _ = infera("inspect", path, "--device", "recording")
    assert status == 0
    assert "1 steps, 0 transfers, then 2 nodes on NumPy, with 2 copies to the host, arena" in out
    rows = [line.strip() for line in out.splitlines()]
    assert "NonZero 'n'  NumPy (copies 'a' to the host and 'n' back)" in rows
    assert "Unique 'u'   NumPy (copies 'x' to the host and 'u' back)" in rows
    out = infera("inspect", path, "--device", "cpu")[1]
    assert "1 steps, 0 transfers, then 2 nodes on NumPy, arena" in out
    assert "NonZero 'n'  NumPy" in [line.strip() for line in out.splitlines()]


def save_loop(folder: Path, trips: int) -> Path:
    """A body of three nodes, so many times."""
    text = f"""
        g (float[4] x) => (float[4] y) <int64 n = {{{trips}}}, float[4] w = {{1, 2, 3, 4}}> {{
            y = Loop (n, , x) <body = each (int64 i, bool c, float[4] s) => (bool go, float[4] t) {{
                go = Identity (c) p = MatMul (s, w) t = Add (s, p)
            }}>
        }}"""
    onnx.save(parse(text), folder / "loop.onnx")
    return folder / "loop.onnx"


@pytest.mark.parametrize("device", ["cpu", "recording"])
def test_inspect_shows_what_bodies_run_as(device: str, tmp_path: Path) -> None:
    status, out, _ = infera("inspect", save_loop(tmp_path, 3), "--device", device)
    assert status == 0
    assert "0 steps, 0 transfers, then 1 node with subgraphs" in out
    assert "Loop 'y'  body of " in out
    assert "planned when run" in out
    last = out.splitlines()[-1]
    assert last.startswith("Loop 'y': with these values its body has ")
    assert f" in 1 plan on {device}: " in last


def test_inspect_says_so_where_a_body_does_not_run(tmp_path: Path) -> None:
    out = infera("inspect", save_loop(tmp_path, 0), "--device", "cpu")[1]
    assert out.splitlines()[-1] == "Loop 'y': with these values its body does not run, and has no plan"


def test_inspect_shows_bodies_within_bodies(tmp_path: Path) -> None:
    text = """
        g (float[4] x) => (float[4] y) <int64 n = {2}> {
            y = Loop (n, , x) <body = outer (int64 i, bool c, float[4] s) => (bool go, float[4] t) {
                go = Identity (c)
                a = Neg (s)
                t = Loop (n, , a) <body = inner (int64 j, bool d, float[4] u) => (bool on, float[4] v) {
                    on = Identity (d) v = Exp (u)
                }>
            }>
        }"""
    onnx.save(parse(text), tmp_path / "loops.onnx")
    out = infera("inspect", tmp_path / "loops.onnx", "--device", "cpu")[1]
    assert [line.partition(" has ")[2] for line in out.splitlines()[-3::2]] == [
        "1 step, in 2 plans on cpu: 1 cpu",
        "1 step, in 1 plan on cpu: 1 cpu",
    ]


def test_inspect_names_the_branches_that_an_if_may_take(tmp_path: Path) -> None:
    text = """
        g (float[4] x, bool c) => (float[4] y) {
            y = If (c) <
                then_branch = yes () => (float[4] p) { p = Exp (x) },
                else_branch = no () => (float[4] q) { r = Tanh (x) q = MatMul (r, r) }
            >
        }"""
    onnx.save(parse(text), tmp_path / "if.onnx")
    out = infera("inspect", tmp_path / "if.onnx", "--device", "recording")[1]
    assert "0 steps, 0 transfers, then 1 node with subgraphs, with 1 copy to the host" in out
    assert "then_branch of 1 node" in out
    assert "else_branch of 2 nodes" in out


def test_inspect_counts_what_the_host_reads_before_it_plans_on(tmp_path: Path) -> None:
    made = model([helper.make_node("Reshape", ["x", "s"], ["y"])], {"x": [4, 3]}, {"y": ["a", "b"]})
    made.graph.input.append(helper.make_tensor_value_info("s", TensorProto.INT64, [2]))
    onnx.save(made, tmp_path / "reshape.onnx")
    status, out, _ = infera("inspect", tmp_path / "reshape.onnx", "--device", "recording", "-i", "s=3,4")
    assert status == 0
    assert "0 transfers, then 1 copy to the host, arena" in out


def test_inspect_lists_what_passes_did(tmp_path: Path) -> None:
    weights = [
        helper.make_tensor(name, TensorProto.FLOAT, shape, [0.5] * math.prod(shape))
        for name, shape in (("w", (3, 2)), ("b", (2,)))
    ]
    nodes = [
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["t"]),
        helper.make_node("Add", ["t", "b"], ["s"]),
        helper.make_node("Relu", ["s"], ["y"]),
    ]
    made = model(nodes, {"x": [2, 3]}, {"y": [2, 2]})
    made.graph.initializer.extend(weights)
    onnx.save(made, tmp_path / "dense.onnx")
    status, out, err = infera("inspect", tmp_path / "dense.onnx", "--passes", "--device", "cpu")
    assert (status, err) == (0, "")
    assert "passes: 4 nodes become 1" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["remove_identities", "1", "4", "3", "1", "Identity"] in rows
    assert ["matmul_bias", "1", "3", "2", "1", "Add,", "1", "MatMul", "1", "infera.FusedMatMul"] in rows
    assert ["matmul_activation", "1", "2", "1", "1", "Relu"] in rows


def test_inspect_says_nothing_of_passes_unasked(relu: Path) -> None:
    assert "passes:" not in infera("inspect", relu, "--device", "cpu")[1]


def test_inspect_shows_the_plan_of_the_accuracy_and_the_kernels_asked_for(tmp_path: Path) -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    made = model([conv], {"x": [1, 16, 30, 30]}, {"y": [1, 16, 30, 30]})
    made.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, (16, 16, 3, 3), [0.5] * 2304))
    onnx.save(made, tmp_path / "conv.onnx")
    given = ("inspect", tmp_path / "conv.onnx", "--device", "cpu", "--threads", "1", "--no-jit")
    fast, strict = (infera(*given, "--accuracy", accuracy) for accuracy in ("fast", "strict"))
    assert (fast[0], strict[0]) == (0, 0)
    assert fast[1] != strict[1]  # Winograd takes other scratch than windows
    status, _, err = infera(*given, "--accuracy", "exact")
    assert status != 0
    assert "accuracy is 'exact', expected 'fast' or 'strict'" in err

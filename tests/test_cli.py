"""The command line: what it prints, its exit status, and that every failure is one line without a traceback."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import infera_gpu
from infera_gpu.cli import extensions, main
from infera_gpu.cli.feeds import random_feeds
from infera_gpu.spec import TensorSpec, spec_of

Result = tuple[int, str, str]


@pytest.fixture
def infera(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command line and returns (status, stdout, stderr)."""

    def call(*arguments: object) -> Result:
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def model(nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    """x [N,3] -> y [N,3]"""
    path = tmp_path / "relu.onnx"
    onnx.save(model([helper.make_node("Relu", ["x"], ["y"], name="cut")], {"x": ["N", 3]}, {"y": ["N", 3]}), path)
    return path


@pytest.fixture
def add(tmp_path: Path) -> Path:
    """a [2,3] + b [2,3] -> y"""
    path = tmp_path / "add.onnx"
    onnx.save(model([helper.make_node("Add", ["a", "b"], ["y"])], {"a": [2, 3], "b": [2, 3]}, {"y": [2, 3]}), path)
    return path


def save(path: Path, array: np.ndarray[Any, Any]) -> Path:
    np.save(path, array)
    return path


def assert_fails(result: Result, *words: str, status: int = 1) -> None:
    got, _, err = result
    assert got == status
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err


# ---- run


def test_run_shows_every_output(infera: Callable[..., Result], relu: Path, tmp_path: Path) -> None:
    x = save(tmp_path / "x.npy", np.array([[-1, 2, -3]], np.float32))
    status, out, err = infera("run", relu, "-i", x, "--device", "cpu")
    assert (status, err) == (0, "")
    assert "float32[1, 3]" in out
    assert "0, 2, 0" in out


def test_run_writes_npz(infera: Callable[..., Result], add: Path, tmp_path: Path) -> None:
    a, b = (np.arange(6, dtype=np.float32).reshape(2, 3) * k for k in (1, 10))
    pairs = (f"a={save(tmp_path / 'a.npy', a)}", f"b={save(tmp_path / 'b.npy', b)}")
    status, out, _ = infera("run", add, "-i", pairs[0], "-i", pairs[1], "-o", tmp_path / "out.npz", "--device", "cpu")
    assert (status, out) == (0, "")
    with np.load(tmp_path / "out.npz") as written:
        assert written.files == ["y"]
        np.testing.assert_array_equal(written["y"], a + b)


def test_run_takes_inputs_by_name_from_npz(infera: Callable[..., Result], add: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", a=np.ones((2, 3), np.float32), b=np.full((2, 3), 4, np.float32))
    status, out, _ = infera("run", add, "-i", tmp_path / "in.npz", "--device", "cpu")
    assert status == 0
    assert "5, 5, 5, 5, ..." in out


def test_run_random_is_seeded_and_says_what_it_chose(infera: Callable[..., Result], relu: Path) -> None:
    status, first, err = infera("run", relu, "--random", "--device", "cpu")
    assert status == 0
    assert "x[0] 'N'" in err
    assert "x float32[1, 3]" in err
    assert infera("run", relu, "--random", "--device", "cpu")[1] == first
    assert infera("run", relu, "--random", "--seed", 1, "--device", "cpu")[1] != first
    status, out, err = infera("run", relu, "--random", "--shape", "5,3", "--device", "cpu")
    assert (status, err) == (0, "")
    assert "float32[5, 3]" in out


def test_run_fails_in_one_line(infera: Callable[..., Result], relu: Path, add: Path, tmp_path: Path) -> None:
    x = save(tmp_path / "x.npy", np.ones((1, 3), np.float32))
    wide = save(tmp_path / "wide.npy", np.ones((1, 4), np.float32))
    double = save(tmp_path / "double.npy", np.ones((1, 3)))
    (tmp_path / "text.npy").write_text("not an array")
    assert_fails(infera("run", relu), "input 'x' is missing")
    assert_fails(infera("run", relu, "-i", f"z={x}"), "'z' is not an input", "'x' float32[N, 3]")
    assert_fails(infera("run", relu, "-i", wide), "'x' has shape [1, 4]", "float32[N, 3]")
    assert_fails(infera("run", relu, "-i", double), "'x' is float64", "float32")
    assert_fails(infera("run", relu, "-i", tmp_path / "none.npy"), "none.npy: no such file")
    assert_fails(infera("run", relu, "-i", tmp_path / "text.npy"), "text.npy: not a .npy or .npz file")
    assert_fails(infera("run", add, "-i", x), "which input?", "'a' float32[2, 3]")
    assert_fails(infera("run", relu, "-i", x, "--shape", "1,3"), "--shape is for random inputs")
    assert_fails(infera("run", relu, "--random", "--shape", "1,a"), "'1,a' is not a list of integers")
    assert_fails(infera("run", relu, "--random", "--shape", "q=1,3"), "'q' is not an input")
    assert_fails(infera("run", relu, "-i", x, "-o", tmp_path / "no" / "out.npz"), "No such file or directory")
    assert_fails(infera("run", relu, "-i", x, "--device", "abacus"), "unknown device 'abacus'")


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_, object])
def test_random_feeds_fit_their_specs(dtype: Any) -> None:
    inputs = {"x": TensorSpec(("N", 2, None), np.dtype(dtype)), "y": TensorSpec(("N",), np.dtype(dtype))}
    feeds = random_feeds(inputs, {}, {"x": (4, 2, 0)})
    assert [spec_of(a) for a in feeds.values()] == [TensorSpec(s, np.dtype(dtype)) for s in ((4, 2, 0), (4,))]
    given = {"y": np.zeros(7, dtype)}
    assert random_feeds(inputs, given, {})["x"].shape == (7, 2, 1)
    assert random_feeds({"s": TensorSpec((), np.dtype(dtype))}, {}, {})["s"].shape == ()


# ---- models that are none


def test_missing_file(infera: Callable[..., Result]) -> None:
    assert_fails(infera("run", "silero-vat"), "neither a file nor a name in the catalogue", "silero-vad")


def test_not_onnx(infera: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "page.onnx"
    path.write_text("<html>404 not found</html>")
    assert_fails(infera("inspect", path), "page.onnx: not an ONNX model")


def test_truncated(infera: Callable[..., Result], relu: Path) -> None:
    relu.write_bytes(relu.read_bytes()[:-7])
    assert_fails(infera("inspect", relu), "relu.onnx", "truncated")


def test_empty(infera: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "empty.onnx"
    path.touch()
    assert_fails(infera("run", path), "empty.onnx: the file is empty")


def test_unsupported_operator(infera: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    nodes = [helper.make_node("Frobnicate", ["x"], ["y"], name="knob", domain="example")]
    made = model(nodes, {"x": [1]}, {"y": [1]})
    made.opset_import.append(helper.make_opsetid("example", 1))
    onnx.save(made, path)
    assert_fails(infera("run", path, "--random"), "unsupported operator", "Frobnicate", "knob")


# ---- inspect, verify


def test_inspect_shows_model_plan_and_times(infera: Callable[..., Result], relu: Path) -> None:
    status, out, err = infera("inspect", relu, "--shape", "x=4,3", "--time", "--device", "cpu")
    assert (status, err) == (0, "")
    assert "opset ai.onnx 17" in out
    assert "float32[N, 3]" in out
    plan = infera_gpu.load(relu, device="cpu").plan_for({"x": (4, 3)})
    assert str(plan) in out
    assert f"arena {plan.arena_bytes:,} bytes (lower bound {plan.lower_bound:,})" in out
    assert "100.0%" in out


def test_inspect_names_the_free_dimensions(infera: Callable[..., Result], relu: Path) -> None:
    status, out, err = infera("inspect", relu)
    assert status == 0
    assert "Relu" in out
    assert "plan on" not in out
    assert "x[0] 'N'" in err
    assert "--shape x=1,3" in err


def test_inspect_counts_nodes_of_subgraphs(infera: Callable[..., Result], tmp_path: Path) -> None:
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


def test_verify_against_onnxruntime(infera: Callable[..., Result], add: Path) -> None:
    status, out, _ = infera("verify", add, "--device", "cpu")
    assert status == 0
    assert "cpu against onnxruntime" in out
    assert "ok" in out


def test_verify_reports_a_difference(infera: Callable[..., Result], add: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infera_gpu.cli import verify

    monkeypatch.setattr(verify, "_run", lambda path, reference, threads, feeds: {"y": feeds["a"]})
    status, out, err = infera("verify", add, "--device", "cpu")
    assert_fails((status, out, err), "1 of 1 outputs differ", "y: error")
    assert "differs" in out


def test_verify_refuses_to_compare_a_device_with_itself(infera: Callable[..., Result], add: Path) -> None:
    assert_fails(infera("verify", add, "--device", "cpu", "--against", "cpu"), "compared with itself")


# ---- pull, doctor


def test_pull_copies_and_checks(infera: Callable[..., Result], relu: Path, tmp_path: Path) -> None:
    assert infera("pull", relu) == (0, f"{relu}\n", "")
    folder = tmp_path / "models"
    folder.mkdir()
    assert infera("pull", relu, "-o", folder) == (0, f"{folder / 'relu.onnx'}\n", "")
    assert infera("pull", relu, "-o", tmp_path / "b.onnx")[0] == 0
    assert (folder / "relu.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes() == relu.read_bytes()
    assert_fails(infera("pull", relu, "--sha256", "0" * 64), "SHA-256", "expected 0000")
    assert_fails(infera("pull", "ftp://host/x.onnx"), "cannot fetch from 'ftp://'")


def test_pull_lists_the_catalogue(infera: Callable[..., Result]) -> None:
    from infera_gpu.catalogue import CATALOGUE

    status, out, _ = infera("pull")
    assert status == 0
    assert all(name in out for name in CATALOGUE)


def test_doctor_covers_every_subject(infera: Callable[..., Result]) -> None:
    status, out, err = infera("doctor")
    assert err == ""
    for subject in ("Python", "BLAS", "NVIDIA driver", "CuPy", "Triton", "Device 'auto'", "Cache", "onnxruntime"):
        assert subject in out
    assert status == (1 if "problem" in out else 0)


def test_doctor_says_unknown_where_a_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from infera_gpu import doctor

    def broken() -> Any:
        raise OSError("no such bus")
        yield

    monkeypatch.setattr(doctor, "_CHECKS", (("Bus", broken),))
    assert list(doctor.examine()) == [doctor.Finding("Bus", "unknown", "could not be determined: OSError: no such bus")]


def test_doctor_tells_unknown_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    from infera_gpu import doctor, telemetry

    full = telemetry.GpuReading(0, "H200", "570.1", 0, 2_000_000_000, 0, 2_000_000_000, 30, 70_000)
    readings = (full, telemetry.GpuReading(1))
    monkeypatch.setattr(telemetry, "snapshot", lambda: (readings, "GPU 1 cannot be opened"))
    found = {f.subject: f for f in doctor._driver()}
    assert found["NVIDIA driver"] == doctor.Finding("NVIDIA driver", "ok", "570.1")
    assert (found["GPU 0"].state, found["GPU 1"].state, found["NVML"].state) == ("ok", "unknown", "problem")
    assert found["GPU 0"].detail == "H200: 2 GB of 2 GB memory free, 30 °C, 70 W, busy 0 %"
    assert found["GPU 1"].detail.count("unknown") == 6
    monkeypatch.setattr(telemetry, "snapshot", lambda: ((), "no NVIDIA driver library"))
    assert [f.state for f in doctor._driver()] == ["absent"]


# ---- the frame


def test_version_and_help(infera: Callable[..., Result]) -> None:
    assert infera("--version") == (0, f"infera {infera_gpu.__version__}\n", "")
    status, out, _ = infera()
    assert status == 0
    for name in ("run", "inspect", "verify", "pull", "doctor", "serve"):
        assert f" {name} " in out


@pytest.mark.parametrize(
    "arguments", [("nope",), ("run",), ("run", "--nope"), ("--nope",), ("run", "x", "--seed", "a")]
)
def test_usage_errors_are_one_line(infera: Callable[..., Result], arguments: tuple[str, ...]) -> None:
    assert_fails(infera(*arguments), "--help", status=2)


def test_debug_shows_the_traceback(infera: Callable[..., Result]) -> None:
    with pytest.raises(infera_gpu.FetchError):
        infera("--debug", "run", "nothing.onnx")


def test_an_unexpected_error_is_one_line_too(
    infera: Callable[..., Result], relu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("infera_gpu.session.Session.run", broken)
    assert_fails(infera("run", relu, "--random", "--shape", "1,3"), "ZeroDivisionError: by zero", "--debug")


def provide(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    found = EntryPoints(points)
    monkeypatch.setattr(extensions, "entry_points", found.select)


def greet(name: str, loud: bool = False) -> None:
    """Greet someone."""
    print(f"hello {name}{'!' if loud else ''}")


def test_entry_points_become_commands(infera: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, EntryPoint("greet", f"{__name__}:greet", extensions.GROUP))
    assert " greet " in infera("--help")[1]
    assert infera("greet", "Ada", "--loud") == (0, "hello Ada!\n", "")
    assert "Greet someone." in infera("greet", "--help")[1]
    assert_fails(infera("greet"), "Missing argument", status=2)


def test_a_command_without_its_extra_says_what_to_install(
    infera: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    provide(monkeypatch, EntryPoint("serve", "needs_more:serve", extensions.GROUP))
    assert_fails(infera("serve"), "a_package_that_is_not_there", "pip install 'infera-gpu[server]'")
    provide(monkeypatch)
    assert_fails(infera("serve"), "not installed", "pip install 'infera-gpu[server]'")


def test_extras_exist() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert {extra.name for extra in extensions.EXTRAS.values()} <= project["optional-dependencies"].keys()


def python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_as_a_process(relu: Path, tmp_path: Path) -> None:
    done = python("-m", "infera_gpu.cli", "run", relu, "--random", "--shape", "2,3", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    done = python("-m", "infera_gpu.cli", "run", tmp_path / "none.onnx")
    assert_fails((done.returncode, done.stdout, done.stderr), "none.onnx")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from infera_gpu.cli import main; main(['--help']);"
        "print([m for m in ('onnx', 'onnxruntime', 'cupy', 'triton', 'fastapi', 'infera_server') if m in sys.modules])"
    )
    assert python("-c", code).stdout.endswith("[]\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "infera_gpu.cli", "pull"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1

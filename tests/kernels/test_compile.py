"""Every kernel compiled for every architecture: parameters, registers and instructions, without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from infera_kernels.launch import CompileLauncher, Inspection, LaunchError, nominal_target
from infera_kernels.launch.abi import ptx_parameter_sizes
from tests.kernels.support import EVERY_ARCH, FakeArray, multiplication, tensor_cores, wide_loads

pytest.importorskip("triton")

from infera_kernels.triton import elementwise, gated, layout, matmul, norm, softmax, tiles
from infera_kernels.triton.terms import Term

pytestmark = pytest.mark.kernels

BARRIER = 16
"""Bytes of shared memory beside a tile's buffers where sums lie in tensor memory: a barrier, and where they lie."""


@pytest.fixture(params=EVERY_ARCH)
def launcher(request: pytest.FixtureRequest) -> CompileLauncher:
    return CompileLauncher(request.param)


def compiled(launcher: CompileLauncher) -> Inspection:
    """The one kernel that was compiled, without spills."""
    (result,) = launcher.compiled
    assert result.binary.spec.arch == launcher.target.arch
    assert result.spilled_bytes == 0
    return result


@pytest.mark.parametrize("op", elementwise.UNARY)
def test_unary(op: str, launcher: CompileLauncher) -> None:
    entry = elementwise.UNARY[op]
    dtype = next(t for t in ("float32", "int32", "bool") if t in entry.dtypes)
    elementwise.unary(op, FakeArray((1000, 1024), dtype), FakeArray((1000, 1024), entry.result or dtype), launcher)
    result = compiled(launcher)
    if dtype == "float32":
        assert result.count("LDG.E.128") > 0
    if dtype == (entry.result or dtype) == "float32":
        assert result.count("STG.E.128") > 0


@pytest.mark.parametrize("op", elementwise.BINARY)
def test_binary_with_broadcasting(op: str, launcher: CompileLauncher) -> None:
    entry = elementwise.BINARY[op]
    dtype = next(t for t in ("float16", "uint8", "bool") if t in entry.dtypes)
    out = FakeArray((8, 12, 64), entry.result or dtype)
    elementwise.binary(op, FakeArray((8, 12, 64), dtype), FakeArray((12, 1), dtype), out, launcher)
    compiled(launcher)


def test_rows_keep_wide_loads_under_broadcasting(launcher: CompileLauncher) -> None:
    x, bias = FakeArray((1000, 1024), "float16"), FakeArray((1024,), "float16")
    elementwise.binary("add", x, bias, FakeArray((1000, 1024), "float16"), launcher)
    result = compiled(launcher)
    assert result.count("LDG.E.128") >= 2
    assert result.count("STG.E.128") >= 1


def test_misaligned_arrays_get_narrow_loads(launcher: CompileLauncher) -> None:
    x, out = FakeArray((4096,), "float32", address=0x7F0000000004), FakeArray((4096,), "float32")
    elementwise.unary("relu", x, out, launcher)
    result = compiled(launcher)
    assert result.count("LDG.E.128") == 0
    assert result.count("LDG.E") > 0
    assert result.count("STG.E.128") > 0


def test_where(launcher: CompileLauncher) -> None:
    condition, x = FakeArray((5, 7), "bool"), FakeArray((5, 7), "bfloat16")
    operands, out = (condition, x, FakeArray((), "bfloat16")), FakeArray((5, 7), "bfloat16")
    elementwise.expression((Term("where", (0, 1, 2)),), operands, out, launcher)
    compiled(launcher)


@pytest.mark.parametrize("inputs", [3, 12])
def test_chains_keep_wide_loads(inputs: int, launcher: CompileLauncher) -> None:
    x = FakeArray((1000, 1024), "float32")
    terms = [Term("add", (0, 1)), *(Term("mul", (inputs + i, i + 2)) for i in range(inputs - 2))]
    terms += [Term("cast", (2 * inputs - 2,), dtype="float16"), Term("gelu", (2 * inputs - 1,))]
    elementwise.expression(terms, [x] * inputs, FakeArray((1000, 1024), "float16"), launcher)
    result = compiled(launcher)
    assert result.count("LDG.E.128") >= inputs
    assert result.count("STG.E.128") + result.count("STG.E.64") > 0
    assert launcher.launches[0].grid[0] >= 1000


def test_transpose_goes_through_shared_memory(launcher: CompileLauncher) -> None:
    x = FakeArray((512, 512), "float32", transposed=True)
    elementwise.copy(x, FakeArray((512, 512), "float32"), launcher)
    result = compiled(launcher)
    assert result.binary.spec.shared_bytes >= 32 * 32 * 4
    assert result.count("LDG.E.128") > 0
    assert result.count("STG.E.128") > 0


@pytest.mark.parametrize("target", sorted(layout.STORED))
def test_cast_from_float32(target: str) -> None:
    launcher = CompileLauncher(80)
    elementwise.copy(FakeArray((777,), "float32"), FakeArray((777,), target), launcher)
    compiled(launcher)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("cols", [7, 1000, 16384, 20000])
def test_softmax(cols: int, log: bool, launcher: CompileLauncher) -> None:
    softmax.softmax(FakeArray((64, cols), "float16"), FakeArray((64, cols), "float16"), launcher, log=log)
    compiled(launcher)


def scratch(shape: Sequence[int], dtype: Any = "float32") -> FakeArray:
    return FakeArray(shape, dtype)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("cols", [64, 768, 16384, 20000])
def test_norm(cols: int, centred: bool, launcher: CompileLauncher) -> None:
    x, out, weight = FakeArray((64, cols), "float16"), FakeArray((64, cols), "float16"), FakeArray((cols,), "float16")
    if centred:
        norm.layer_norm(x, weight, weight, out, launcher, scratch)
    else:
        norm.rms_norm(x, weight, out, launcher, scratch)
    assert all(result.spilled_bytes == 0 for result in launcher.compiled)
    if cols <= 16384:
        assert compiled(launcher).count("LDG.E.128") > 0


def square(dtype: str, *, transposed: bool = False) -> FakeArray:
    return FakeArray((1024, 1024), dtype, transposed=transposed)


def multiply(launcher: CompileLauncher, dtype: str, **options: Any) -> Inspection:
    bias = FakeArray((1024,), dtype)
    operands = square(dtype), square(dtype, transposed=options.pop("turned", False)), square(dtype)
    matmul.matmul(*operands, launcher, bias=bias, activation="relu", **options)
    return compiled(launcher)


CASES = [
    *[("float16", "ieee", tile) for tile in tiles.TILES["half"]],
    ("bfloat16", "ieee", tiles.TILES["half"][-1]),
    *[("float32", kind, tile) for kind in ("tf32", "tf32x3", "ieee") for tile in tiles.TILES[kind]],
]


@pytest.mark.parametrize(("dtype", "precision", "tile"), CASES, ids=[f"{d}-{p}-{t.m}x{t.n}x{t.k}" for d, p, t in CASES])
def test_matmul(dtype: str, precision: str, tile: tiles.Tile, launcher: CompileLauncher) -> None:
    result = multiply(launcher, dtype, precision=precision, tile=tile)
    kind = precision if dtype == "float32" else "half"
    assert result.count("LDGSTS") > 0, "loads are not pipelined"
    beside = BARRIER if launcher.target.arch == 100 else 0
    assert result.binary.spec.shared_bytes <= max(tile.shared_bytes(kind), 48 * 1024) + beside
    expected = set() if kind == "ieee" else {multiplication(launcher.target.arch, tile.m)}
    assert tensor_cores(result).keys() == expected


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_one_row_reads_a_matrix_in_whole_words(dtype: str, turned: bool, launcher: CompileLauncher) -> None:
    a, b = FakeArray((1, 4096), dtype), FakeArray((4096, 1024), dtype, transposed=turned)
    out = FakeArray((1, 1024), dtype)
    matmul.matmul(a, b, out, launcher, bias=FakeArray((1024,), dtype), activation="gelu")
    result = compiled(launcher)
    assert wide_loads(result) >= (4 if dtype == "float16" else 8)
    assert result.count("LDGSTS") >= 8 or launcher.launches[0].constexprs["STAGES"] == 1


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(("rows", "dtype"), [(1, "float16"), (16, "float16"), (512, "bfloat16"), (1, "float32")])
def test_gated_products(rows: int, dtype: str, turned: bool, launcher: CompileLauncher) -> None:
    """What a step of Llama 3.2 1B, and a prompt, launch. Of matrices whose columns are contiguous the assembler may
    save registers for one block more, and spills two once."""
    a, out = FakeArray((rows, 2048), dtype), FakeArray((rows, 8192), dtype)
    gate, up = (FakeArray((2048, 8192), dtype, transposed=turned) for _ in range(2))
    gated.gated(a, gate, up, out, launcher, activation="silu")
    (result,), made = launcher.compiled, launcher.launches[0].constexprs
    assert result.spilled_bytes <= (8 if turned and rows > 16 else 0)
    assert wide_loads(result) >= 4
    assert result.count("LDGSTS") >= 6 or made.get("STAGES") == 1
    assert tensor_cores(result).keys() == ({multiplication(launcher.target.arch, made["BM"])} if rows > 1 else set())


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("columns", [576, 3072, 8192, 128256])
def test_a_row_is_normalised_by_its_product(columns: int, dtype: str, turned: bool, launcher: CompileLauncher) -> None:
    """Of Llama 3.2 1B the heads, both halves of the feed-forward, and the last product. The assembler may save two
    registers for one block more."""
    x, gain, out = FakeArray((1, 2048), dtype), FakeArray((2048,), dtype), FakeArray((1, columns), dtype)
    one, other = (FakeArray((2048, columns), dtype, transposed=turned) for _ in range(2))
    matmul.matmul(x, one, out, launcher, gain=gain, epsilon=1e-5)
    gated.gated(x, one, other, out, launcher, activation="silu", gain=gain, epsilon=1e-5)
    for result in launcher.compiled:
        assert result.spilled_bytes <= 8
        assert wide_loads(result) >= 4


@pytest.mark.parametrize("refused", ["rows", "parts", "a tile", "a long gain", "integers"])
def test_what_no_product_normalises_is_refused(refused: str) -> None:
    rows, launcher = 2 if refused == "rows" else 1, CompileLauncher(80)
    x, w, out = FakeArray((rows, 64), "float16"), FakeArray((64, 64), "float16"), FakeArray((rows, 64), "float16")
    gain = FakeArray((65 if refused == "a long gain" else 64,), "int32" if refused == "integers" else "float16")
    how: dict[str, Any] = {"tile": tiles.TILES["half"][0] if refused == "a tile" else None}
    partial = FakeArray((2, 64), "float32") if refused == "parts" else None
    with pytest.raises(ValueError, match=r"^matmul: (normalises one row|gain is)"):
        matmul.matmul(x, w, out, launcher, gain=gain, partial=partial, **how)
    if partial is None:
        with pytest.raises(ValueError, match=r"^gated: (normalises one row|gain is)"):
            gated.gated(x, w, w, out, launcher, gain=gain, **how)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "tanh", "sigmoid", "silu", None])
@pytest.mark.parametrize("kind", ["half", "tf32"])
def test_gates_of_every_activation_stay_in_registers(kind: str, activation: str | None) -> None:
    """In the largest tiles that are predicted."""
    for arch in (80, 90):
        tile = max((t for t in gated.GATED_TILES[kind] if tiles.keeps(t, "", nominal_target(arch))), key=lambda t: t.n)
        launcher, dtype = CompileLauncher(arch), "float16" if kind == "half" else "float32"
        how: dict[str, Any] = {"activation": activation, "precision": "ieee" if kind == "half" else kind, "tile": tile}
        a, gate, up, out = (square(dtype) for _ in range(4))
        gated.gated(a, gate, up, out, launcher, **how)
        compiled(launcher)


@pytest.mark.parametrize("rows", [1, 16])
def test_parts_of_sums(rows: int, launcher: CompileLauncher) -> None:
    a, b, out = FakeArray((rows, 4096), "float16"), FakeArray((4096, 512), "float16"), FakeArray((rows, 512), "float16")
    partial = FakeArray((4, rows * 512), "float32")
    matmul.matmul(a, b, out, launcher, residual=out, activation="silu", partial=partial)
    assert [launch.kernel for launch in launcher.launches][1:] == ["parts_kernel"]
    assert not sum(result.spilled_bytes for result in launcher.compiled)
    assert launcher.compiled[0].count("LDGSTS") > 0


def test_matmul_of_a_transposed_matrix(launcher: CompileLauncher) -> None:
    result = multiply(launcher, "float16", turned=True)
    assert result.count("LDGSTS") > 0
    assert tensor_cores(result)


@pytest.mark.parametrize("activation", [*elementwise.UNARY, None])
def test_every_activation_fits_in_the_epilogue(activation: str | None) -> None:
    x = square("float16")
    if activation in ("bitwise_not", "isinf", "isnan", "logical_not"):
        assert not matmul.supports_matmul(x, x, x, activation=activation)
        return
    launcher = CompileLauncher(80)
    a, b, out = (FakeArray((64, 64), "float16") for _ in range(3))
    matmul.matmul(a, b, out, launcher, residual=out, activation=activation, tile=tiles.TILES["half"][0])
    compiled(launcher)


def test_unit_strides_are_compiled_in_and_others_are_not() -> None:
    launcher = CompileLauncher(80)
    multiply(launcher, "float16")
    spec = launcher.compiled[0].binary.spec
    sizes = ptx_parameter_sizes(launcher.compiled[0].binary.ptx)
    # a, b, out, bias; M, N, K; one stride of a, b and out each; two scratch areas.
    assert spec.types == ("*fp16", "*fp16", "*fp16", "*fp16", *["i32"] * 6)
    assert sizes == [8] * 4 + [4] * 6 + [8, 8]


def test_an_unknown_option_is_refused(launcher: CompileLauncher) -> None:
    with pytest.raises(TypeError, match="unknown compiler option 'warps'"):
        launcher.launch(softmax.softmax_kernel, (1,), {}, {}, warps=4)


def test_what_triton_cannot_compile_is_named() -> None:
    args = {"x": FakeArray((4,), "float32"), "out": FakeArray((4,), "float32"), "rows": 1, "cols": 4}
    args |= {"x_stride": 4, "out_stride": 4}
    with pytest.raises(LaunchError, match=r"softmax_kernel: Triton .* cannot compile it for sm_80"):
        CompileLauncher(80).launch(softmax.softmax_kernel, (1,), args, {"LOG": False, "ROWS": 1, "COLS": 3})

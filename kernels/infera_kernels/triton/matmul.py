"""Matrix products, batched and with any strides, with what usually follows one computed before it is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from infera_kernels.calls import Call
from infera_kernels.launch import Const, Launcher, Typed, library_of, target_of
from infera_kernels.launch.cublaslt import Product
from infera_kernels.triton.ahead import ahead
from infera_kernels.triton.blas import product_of
from infera_kernels.triton.elementwise import UNARY
from infera_kernels.triton.invariance import of_batch, rows_seen
from infera_kernels.triton.layout import (
    FLOATS,
    INT32_MAX,
    MAX_DIMS,
    broadcast_strides,
    ceil_div,
    coalesce,
    element_strides,
    fold,
    fold_one,
    name_of,
    next_power_of_two,
)
from infera_kernels.triton.matmul_kernel import matmul_kernel
from infera_kernels.triton.parts import part_depth, parts_kernel
from infera_kernels.triton.products import GROUP
from infera_kernels.triton.skinny import ALONG_K, ALONG_N, MATVEC, matvec_kernel
from infera_kernels.triton.tiles import (
    DESCRIBED,
    EITHER,
    HALF,
    IEEE,
    LIBRARY,
    SIZES,
    TF32,
    TF32X3,
    Tile,
    TmaTile,
    candidates,
    cycles,
    ending,
    predicted,
)
from infera_kernels.triton.tma import Factors, factors_of, multiply
from infera_kernels.triton.tma_kernel import tma_kernel
from infera_kernels.tuning import Family, Tuned, choose
from infera_kernels.tuning.cost import ITEMSIZE, ROW_WARPS

MATMUL = Family("matmul", SIZES, 2, TmaTile, candidates, predicted, (matmul_kernel, tma_kernel), cycles)
"""`layout` says whether it is EITHER's, whether its factors are DESCRIBED, which of their axes are contiguous (rows
"m", sums "k", columns "n" or none) and the `ending`."""


def supports_matmul(
    a: Typed,
    b: Typed,
    out: Typed,
    bias: Typed | None = None,
    residual: Typed | None = None,
    activation: str | None = None,
) -> bool:
    """a (..., M, K) @ b (..., K, N) -> out (..., M, N), all of one type out of float32, float16 and bfloat16.

    At least two dimensions each, leading ones broadcasting to `out`'s, of which there are at most four; bias of shape
    (N,), residual of a shape that broadcasts to `out`, both of the same type; an activation of UNARY on that type.
    """
    given = [x for x in (a, b, out, bias, residual) if x is not None]
    if len({name_of(x) for x in given}) != 1 or name_of(a) not in FLOATS:
        return False
    if min(len(a.shape), len(b.shape), len(out.shape)) < 2 or len(out.shape) > MAX_DIMS:
        return False
    (m, k), (k2, n), shape = tuple(a.shape[-2:]), tuple(b.shape[-2:]), tuple(out.shape)
    try:
        leading = np.broadcast_shapes(tuple(a.shape[:-2]), tuple(b.shape[:-2]))
        stretched = shape if residual is None else np.broadcast_shapes(shape, tuple(residual.shape))
    except ValueError:
        return False
    return (
        k == k2
        and shape == (*leading, m, n)
        and tuple(stretched) == shape
        and (bias is None or tuple(bias.shape) == (n,))
        and max(m, n, k) <= INT32_MAX - 256
        and (activation is None or (activation in UNARY and name_of(a) in UNARY[activation].dtypes))
        and (activation is None or UNARY[activation].result is None)
    )


def normalizes(out: Typed, *, invariant: bool = False) -> bool:
    """Whether a product is of one row, which its kernel can normalise: all of the row passes through each program."""
    return math.prod(out.shape[:-1]) == 1 and not invariant


def check_gain(name: str, gain: Any, a: Any, can: bool) -> None:
    """Raises ValueError where a product cannot normalise a with `gain`."""
    if not can:
        raise ValueError(f"{name}: normalises one row, whose sums are whole, not {name_of(a)}{list(a.shape)}")
    if tuple(gain.shape) != (a.shape[-1],) or name_of(gain) not in FLOATS:
        raise ValueError(f"{name}: gain is {name_of(gain)}{list(gain.shape)}, expected {a.shape[-1]} floats")


def normalizing(gain: Any, epsilon: float) -> dict[str, Any]:
    """The arguments of kernels of one row that say how it is normalised, None without `gain` or elements."""
    if gain is None or 0 in gain.shape:
        return dict.fromkeys(("gain", "gain_k", "epsilon"))
    return {"gain": gain, "gain_k": fold_one(element_strides(gain)[0]), "epsilon": float(epsilon)}


def matmul(
    a: Any,
    b: Any,
    out: Any,
    launcher: Launcher,
    *,
    bias: Any = None,
    residual: Any = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    activation: str | None = None,
    act_alpha: float | None = None,
    act_beta: float | None = None,
    gain: Any = None,
    epsilon: float = 0.0,
    precision: str = IEEE,
    tile: Tile | None = None,
    partial: Any = None,
    workspace: Any = None,
    invariant: bool = False,
    tuned: Tuned | None = None,
) -> list[Call]:
    """out = activation(alpha * a @ b + bias + beta * residual), summed in float32.

    Strides are arbitrary; `bias` must be contiguous; residual may stretch. `precision` is for float32 inputs: "ieee"
    (exact products), "tf32" (about 3 digits, tensor cores) or "tf32x3" (nearly exact, tensor cores). `tile` overrides
    what is `tuned`, or predicted. K of 0 gives the epilogue of zeros. `partial`, float32 scratch of shape
    (`parts.parts_of(a, b, out)`, out.size), cuts the sums into so many parts. With a `workspace`, scratch of
    `blas.library_bytes`, the product may be cuBLASLt's. `invariant` rows are the same bits however many there are;
    nothing is tuned for them. With `gain` (K,), the row a of a product that `normalizes` is multiplied by it and
    divided by sqrt(mean(a^2) + epsilon) first.
    """
    if not supports_matmul(a, b, out, bias, residual, activation):
        given = ", ".join(f"{name_of(x)}{list(x.shape)}" for x in (a, b, out, bias, residual) if x is not None)
        raise ValueError(f"matmul: no kernel for {given} with activation {activation}")
    if precision not in (IEEE, TF32, TF32X3):
        raise ValueError(f"matmul: precision '{precision}' is none of {IEEE}, {TF32}, {TF32X3}")
    if bias is not None:
        (bias_stride,) = element_strides(bias)
        if bias_stride != 1 and bias.shape[0] > 1:
            raise ValueError(f"matmul: bias must be contiguous, its stride is {bias_stride}")
    if gain is not None:
        check_gain("matmul", gain, a, partial is None and tile is None and normalizes(out, invariant=invariant))
    shape = tuple(out.shape)
    if 0 in shape:
        return []
    (m, n), k = shape[-2:], a.shape[-1]
    leading = shape[:-2]
    # Stretched leading dimensions are walked with stride 0; the matrices' own two are as they are.
    a_strides = broadcast_strides(a, (*leading, m, k))
    b_strides = broadcast_strides(b, (*leading, k, n))
    out_strides = element_strides(out)
    residual_strides = (0,) * len(shape) if residual is None else broadcast_strides(residual, shape)
    if not any(b_strides[:-2]):  # one matrix b: rows that follow each other make taller products
        others = a_strides, out_strides, residual_strides
        rows, down = coalesce(shape[:-1], [s[:-1] for s in others], ones=invariant)
        m, leading = rows[0], rows[:0:-1]
        b_strides = (*(0,) * len(leading), *b_strides[-2:])
        a_strides, out_strides, residual_strides = ((*step[::-1], s[-1]) for step, s in zip(down, others, strict=True))
    lead = [s[:-2] for s in (a_strides, b_strides, out_strides, residual_strides)]
    batch, walked = coalesce(leading, lead, ones=invariant)

    entry = UNARY[activation] if activation else None
    products = math.prod(leading)
    turned = {
        "M": m,
        "N": n,
        "batch": batch if products > 1 or (invariant and leading) else None,
        **dict(zip(("a_batch", "b_batch", "out_batch", "residual_batch"), map(fold, walked), strict=True)),
        **dict(zip(("out_m", "out_n"), fold(out_strides[-2:]), strict=True)),
        **dict(zip(("residual_m", "residual_n"), fold(residual_strides[-2:]), strict=True)),
    }
    sums = {
        "a": a,
        "b": b,
        "K": k,
        "depth": None,
        "out_split": None,
        **normalizing(gain, epsilon),
        **dict(zip(("a_m", "a_k"), fold(a_strides[-2:]), strict=True)),
        **dict(zip(("b_k", "b_n"), fold(b_strides[-2:]), strict=True)),
    }
    epilogue = {
        "out": out,
        "bias": bias,
        "residual": residual,
        "alpha": None if alpha == 1.0 else float(alpha),
        "beta": None if beta == 1.0 else float(beta),
        "act_alpha": entry and (entry.alpha if act_alpha is None else float(act_alpha)),
        "act_beta": entry and (entry.beta if act_beta is None else float(act_beta)),
    }
    act = entry.fn if entry else None
    how: dict[str, Any] = {"invariant": invariant, "tuned": None if invariant else tuned}
    end = ending(residual, activation)
    if partial is None:
        args = {**turned, **sums, **epilogue}
        product, strides = None, [s[-2:] for s in (a_strides, b_strides, out_strides, residual_strides)]
        if workspace is not None and tile is None and not invariant and precision in (IEEE, TF32):
            product = product_of(args, strides, walked, activation=activation, tf32=precision == TF32)
        how["factors"] = None if invariant else factors_of(args, strides, walked, launcher)
        return [_sums(args, 1, act, launcher, precision, tile, end=end, product=product, workspace=workspace, **how)]
    parts, size = partial.shape[0], products * m * n
    steps = tuple(m * n * math.prod(batch[:i]) for i in range(len(batch)))
    first = {
        **turned,
        **sums,
        **dict.fromkeys(epilogue),
        "out": partial,
        "depth": part_depth(k, parts),
        "out_split": size,
        "out_batch": fold(steps) if turned["batch"] else turned["out_batch"],
        **dict(zip(("out_m", "out_n"), fold((n, 1)), strict=True)),
    }
    return [
        _sums(first, parts, None, launcher, precision, tile, end="", **how),
        _added({**turned, **epilogue, "parts": partial, "size": size}, parts, act, launcher, invariant=invariant),
    ]


def launched(
    launcher: Launcher,
    kernel: Any,
    grid: tuple[int, ...],
    args: dict[str, Any],
    known: Any,
    *,
    invariant: bool = False,
    **options: Any,
) -> Call:
    """A launch with those of the arguments that the kernel has."""
    given = of_batch(args, "M", "batch", "out_split", "size", invariant=invariant)
    return launcher.launch(kernel, grid, {k: given[k] for k in kernel.arg_names if k in given}, known, **options)


def _sums(
    args: dict[str, Any],
    parts: int,
    act: Any,
    launcher: Launcher,
    precision: str,
    tile: Tile | None,
    *,
    end: str,
    invariant: bool,
    tuned: Tuned | None,
    product: Product | None = None,
    workspace: Any = None,
    factors: Factors | None = None,
) -> Call:
    """One launch. A `product` may be the library's, where the launcher has one; TMA may read `factors`."""
    m, n, k, batch = args["M"], args["N"], args["K"], args["batch"]
    products, rows, deep = math.prod(batch or (1,)), rows_seen(m, invariant=invariant), args["depth"] or k
    kind = precision if name_of(args["a"]) == "float32" else HALF
    target, axes, item = target_of(launcher), layout_of(args, "b"), ITEMSIZE[kind]
    if rows == 1 and tile is None:
        layout = ALONG_K if args["b_k"] == Const(1) and n > 1 else ALONG_N
        row = MATVEC.problem(kind, {"programs": products * parts, "n": n, "k": deep}, layout)
        strip = choose(MATVEC, row, target, tuned)
        grid = products * ceil_div(n, strip.n), parts
        fetched = ahead(launcher, math.prod(grid), strip.n, item, axes[-1])
        known = {"ACT": act, "BN": strip.n, "BK": strip.k, "STAGES": strip.stages, "AHEAD": fetched}
        return launched(launcher, matvec_kernel, grid, args, known, num_warps=ROW_WARPS)
    if tile is None:
        sizes = {"m": rows, "batch": parts if invariant else products * parts, "n": n, "k": deep}
        layout = (DESCRIBED if factors else "") + axes + end
        library = None if product is None else library_of(launcher)
        call: Call | None = library and library.call(product, workspace)
        if call is not None:
            tile = choose(MATMUL, MATMUL.problem(kind, sizes, EITHER + layout), target, tuned)
            if tile == LIBRARY:
                return call
        if tile is None:
            tile = choose(MATMUL, MATMUL.problem(kind, sizes, layout), target, tuned)
    if isinstance(tile, TmaTile):
        if factors is None:
            raise ValueError("matmul: TMA does not read these factors")
        return multiply(args, factors, tile, act, launcher)
    grid = (products * ceil_div(m, tile.m) * ceil_div(n, tile.n), parts)
    known = {
        "ACT": act,
        "PRECISION": precision,
        "GROUP": GROUP,
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "WHOLE_K": k % tile.k == 0,
        "AHEAD": ahead(launcher, math.prod(grid), tile.n, item, axes[-1], rows=m, invariant=invariant),
    }
    how = {"num_warps": tile.warps, "num_stages": tile.stages}
    return launched(launcher, matmul_kernel, grid, args, known, invariant=invariant, **how)


def layout_of(args: Mapping[str, Any], *factors: str) -> str:
    """Which axes are contiguous, of a and of all the right `factors`: see MATMUL."""
    left, right = (
        next((axis for axis in axes if all(args[f"{x}_{axis}"] == Const(1) for x in named)), "-")
        for axes, named in (("km", "a"), ("kn", factors))
    )
    return left + right


def _added(args: dict[str, Any], parts: int, act: Any, launcher: Launcher, *, invariant: bool) -> Call:
    m, n = args["M"], args["N"]
    wide = min(next_power_of_two(n), 128)
    known = {"ACT": act, "PARTS": parts, "GROUP": GROUP, "BM": 1, "BN": wide}
    grid = (math.prod(args["batch"] or (1,)) * m * ceil_div(n, wide),)
    return launched(launcher, parts_kernel, grid, args, known, invariant=invariant, num_warps=1)

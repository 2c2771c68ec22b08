"""`batch_invariant`: what a kernel makes of one entry of a batch is the same bits alone and among others, interpreted.

The interpreter adds along a row as NumPy does, whatever the tile; on a GPU a tile's shape and what the compiler knows
of strides decide too. So launches are compared as well: with the option those of any batch have the same binaries.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest

from infera_gpu.graph import HostArray
from infera_gpu.op import Case, Op, Site
from infera_gpu.ops import registry
from infera_gpu.spec import TensorSpec
from infera_kernels.launch import InterpreterLauncher
from tests.cases import assert_close, compute, covered, inputs_of, run, site_of, wrong
from tests.kernels.buffers import LaunchingBuffers
from tests.kernels.support import Facts, Noting, shard

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before kernels are imported", allow_module_level=True)

pytestmark = pytest.mark.kernels

BATCHES = (1, 2, 17, 33, 64)
"""On both sides of what kernels choose by: products of one row, few rows, rows of a tile, programs that fill a GPU."""

Ins = Sequence[HostArray | None]


def results(
    op: Op, site: Site, ins: Ins, launcher: InterpreterLauncher, *, invariant: bool
) -> tuple[list[HostArray], list[Facts]]:
    """The outputs of the operator's kernel, and what its launches are compiled for."""
    site = replace(site, batch_invariant=invariant)
    kernel = op.kernels["triton"]
    assert kernel.supports(site)
    noting = Noting(launcher)
    buffers = LaunchingBuffers(noting, ins, site.outs, site.values)
    calls = list(kernel.bind(site, buffers))
    buffers.check_workspace(kernel, site)
    buffers.prepare([wrong(np.zeros(s.dims, s.dtype)) for s in site.outs])
    run(calls)
    buffers.check()
    return [np.array(out) for out in buffers.outs], noting.noted


def same_bits(a: HostArray, b: HostArray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- families, at sizes that cross what their kernels choose by

B: Literal["B"] = "B"
HALF, BRAIN = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
Given = tuple[int | Literal["B"], ...] | HostArray | None


@dataclass(frozen=True)
class Family:
    """An operator whose inputs have the batch where a shape says B; `without` the option so much of it depends on the
    batch. Inputs without a batch are known."""

    id: str
    name: str
    ins: tuple[Given, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    domain: str = ""
    dtype: Any = np.float32
    without: Literal["bits", "launches", "nothing"] = "launches"
    batches: tuple[int, ...] = BATCHES
    axis: int = 0
    """Of the batch in the output."""

    @property
    def op(self) -> Op:
        op = registry().find(self.domain, self.name, 24)
        assert op is not None
        return op

    def drawn(self) -> Ins:
        """Inputs of the largest batch."""
        largest, dtype = max(self.batches), np.dtype(self.dtype)
        ins = (
            TensorSpec(tuple(largest if d == B else d for d in x), dtype) if isinstance(x, tuple) else x
            for x in self.ins
        )
        return inputs_of(self.op, Case(self.id, tuple(ins)))

    def site(self, ins: Ins) -> Site:
        site = site_of(self.op, Case(self.id, (), self.attrs), ins)
        return replace(site, values=tuple(None if self.batched(i) else x for i, x in enumerate(ins)))

    def batched(self, i: int) -> bool:
        x = self.ins[i]
        return isinstance(x, tuple) and B in x

    def cut(self, ins: Ins, rows: slice) -> Ins:
        """The entries of such rows."""
        return [self._cut(i, x, rows) if self.batched(i) else x for i, x in enumerate(ins)]

    def _cut(self, i: int, x: Any, rows: slice) -> HostArray:
        given: Any = self.ins[i]
        return np.ascontiguousarray(x[(*(slice(None),) * given.index(B), rows)])


MS, OURS = "com.microsoft", "infera"
AXES = np.array([1], np.int64)
BITS = np.random.default_rng(0).integers(0, 256, (24, 3, 16), np.uint8)
SCALES = np.random.default_rng(1).uniform(0.1, 1, (24, 3)).astype(np.float32)
HEADS = {"scale": 0.25, "swap_keys": 1}

FAMILIES = (
    Family("rows", "MatMul", ((B, 1024), (1024, 40)), without="bits"),
    Family("rows-half", "MatMul", ((B, 1024), (1024, 40)), dtype=HALF),
    Family("products", "MatMul", ((B, 3, 130), (B, 130, 5))),
    Family("vectors", "MatMul", ((B, 1, 130), (B, 130, 5))),
    Family("transposed", "Gemm", ((B, 300), (24, 300), (24,)), {"transB": 1}, without="bits"),
    Family("epilogue", "FusedMatMul", ((B, 300), (300, 24), (24,)), {"activation": "gelu"}, OURS, BRAIN),
    Family("terms", "FusedMatMul", ((B, 64), (64, 24), (B, 24), (B, 24)), {}, OURS, HALF, without="bits"),
    Family("gated", "GatedMatMul", ((B, 3, 300), (300, 24), (300, 24)), {}, OURS, HALF),
    Family("gated-normalized", "GatedMatMul", ((B, 300), (300, 24), (300, 24), (300,)), {}, OURS, HALF, "bits"),
    Family("normalized", "NormalizedMatMul", ((B, 300), (300, 24), (300,), (24,)), {}, OURS, without="bits"),
    Family(
        "few-bits",
        "MatMulNBits",
        ((B, 96), BITS, SCALES),
        {"K": 96, "N": 24, "bits": 4, "block_size": 32},
        MS,
        without="bits",
    ),
    Family(
        "few-bits-fused",
        "FusedMatMulNBits",
        ((B, 96), BITS, SCALES, None, None, (24,), (B, 24), (96,)),
        {"K": 96, "N": 24, "bits": 4, "block_size": 32},
        OURS,
        without="bits",
    ),
    Family("split", "Conv", ((B, 64, 64), (8, 64, 9)), {"pads": (4, 4)}, without="bits", batches=(1, 33)),
    Family("pointwise", "Conv", ((B, 70, 2, 2), (8, 70, 1, 1), (8,))),
    Family("grouped", "Conv", ((B, 40, 3, 3), (8, 20, 2, 2)), {"group": 2}, without="nothing", batches=(1, 17, 33)),
    Family("depthwise", "Conv", ((B, 8, 5, 5), (8, 1, 3, 3)), {"group": 8}, without="nothing"),
    Family(
        "transposed",
        "ConvTranspose",
        ((B, 36, 3, 3), (36, 4, 2, 2)),
        {"strides": (2, 2)},
        "",
        without="nothing",
        batches=(1, 33),
    ),
    Family("rows", "Softmax", ((B, 300),), {"axis": -1}),
    Family("long", "Softmax", ((B, 16500),), {"axis": -1}, batches=(17, 130), without="bits"),
    Family("channels", "Softmax", ((B, 600, 3),), {"axis": 1}),
    Family("rows", "LayerNormalization", ((B, 300), (300,), (300,))),
    Family("sequences", "LayerNormalization", ((B, 3, 100), (100,), (100,)), dtype=HALF),
    Family("long", "LayerNormalization", ((B, 17000), (17000,)), batches=(1, 2, 33)),
    Family("rows", "RMSNormalization", ((B, 300), (300,))),
    Family("rows", "SkipLayerNormalization", ((B, 3, 70), (B, 3, 70), (70,), (70,)), {}, MS),
    Family("images", "GroupNormalization", ((B, 8, 5, 5), (8,), (8,)), {"num_groups": 2}),
    Family("last", "GroupNorm", ((B, 50, 50, 6), (6,), (6,)), {"groups": 6, "activation": 0}, MS, without="bits"),
    Family("images", "InstanceNormalization", ((B, 3, 12, 12), (3,), (3,))),
    Family("rows", "LpNormalization", ((B, 300),), {"axis": 1}),
    Family("rows", "ReduceMean", ((B, 5000), AXES)),
    Family("planes", "ReduceSum", ((B, 3, 12, 12), np.array([2, 3]))),
    Family("columns", "ReduceSum", ((B, 1500, 6), AXES), without="bits"),
    Family("channels", "ReduceL2", ((B, 9, 9, 40), np.array([1, 2]))),
    Family("exponentials", "ReduceLogSumExp", ((B, 2500), AXES)),
    Family("rows", "CumSum", ((B, 5000), np.array(1))),
    Family("first", "GlobalAveragePool", ((B, 3, 40, 60),), batches=(1, 2, 64), without="bits"),
    Family("last", "GlobalAveragePoolNHWC", ((B, 40, 60, 6),), {}, OURS, batches=(1, 2, 64), without="bits"),
    Family("windows", "AveragePool", ((B, 3, 6, 6),), {"kernel_shape": (3, 3)}, without="nothing"),
    Family(
        "keys", "Attention", ((B, 2, 5, 16), *((B, 2, 270, 16),) * 2), HEADS, OURS, batches=(1, 2, 40), without="bits"
    ),
    Family(
        "query", "Attention", ((B, 2, 1, 16), *((B, 2, 270, 16),) * 2), HEADS, OURS, batches=(1, 2, 40), without="bits"
    ),
    Family("no-heads", "Attention", ((B, 5, 16), *((B, 70, 16),) * 2), HEADS, OURS),
    Family("shared-keys", "Attention", ((B, 2, 16), *((1, 70, 16),) * 2), HEADS, OURS),
    Family(
        "heads",
        "MultiHeadAttention",
        ((B, 3, 32), *((B, 270, 32),) * 2),
        {"num_heads": 2},
        MS,
        batches=(1, 40),
        without="bits",
    ),
    Family("small", "LSTM", ((2, B, 20), (1, 32, 20), (1, 32, 8)), {"hidden_size": 8}, axis=2),
    Family(
        "large",
        "GRU",
        ((1, B, 6), (1, 504, 6), (1, 504, 168)),
        {"hidden_size": 168},
        batches=(1, 17),
        without="bits",
        axis=2,
    ),
)


@pytest.mark.parametrize("family", shard(FAMILIES), ids=lambda family: f"{family.name}-{family.id}")
def test_an_entry_is_the_same_bits_in_every_batch(family: Family, interpreter: InterpreterLauncher) -> None:
    ins, axis = family.drawn(), family.axis

    def batch(rows: slice, *, invariant: bool = True) -> tuple[HostArray, list[Facts]]:
        given = family.cut(ins, rows)
        (out, *_), launches = results(family.op, family.site(given), given, interpreter, invariant=invariant)
        return out, launches

    whole, launches = batch(slice(None))
    for count in family.batches[:-1]:
        out, made = batch(slice(count))
        assert same_bits(out, np.take(whole, range(count), axis)), f"a batch of {count}"
        assert made == launches or family.id == "shared-keys", f"a batch of {count} has other kernels"
    turned, _ = batch(slice(16, None, -1))
    assert same_bits(np.flip(turned, axis), np.take(whole, range(turned.shape[axis]), axis)), (
        "it matters where it stands"
    )

    whole, launches = batch(slice(None), invariant=False)
    out, made = batch(slice(family.batches[0]), invariant=False)
    same = same_bits(out, np.take(whole, range(family.batches[0]), axis))
    assert ("nothing" if made == launches else "launches" if same else "bits") == family.without


# ---- every operator, at the sizes of its cases

OTHERS = 17
"""Entries of a batch that is made of a case's own, again and again."""


def entries(op: Op, case: Case, ins: Ins) -> tuple[int, list[int]] | None:
    """How many entries a case has, and which inputs have them; None where the operator is none of entries.

    It is if, as its plain definition has it, entries alone are entries of the whole.
    """
    first = ins[0]
    if first is None or first.ndim == 0 or not 2 <= first.shape[0] <= OTHERS // 2:
        return None
    count = first.shape[0]
    same = [i for i, x in enumerate(ins) if x is not None and x.shape[:1] == (count,) and i not in op.values]
    whole = compute(op, site_of(op, case, ins), ins)[: case.n_outs]
    if not all(w.shape[:1] == (count,) and w.size and w.dtype.kind not in "OUS" for w in whole):
        return None
    for chosen in (same, [0]):
        try:
            for at in (0, count - 1):
                alone = taken(ins, chosen, [at])
                for got, want in zip(compute(op, site_of(op, case, alone), alone), whole, strict=False):
                    assert_close(got, want[at : at + 1], max(case.tol, 1e-5), op.name)
        except Exception:  # shapes do not fit, or results differ: these are not entries
            continue
        return count, chosen
    return None


def taken(ins: Ins, chosen: Sequence[int], rows: Sequence[int]) -> Ins:
    return [np.ascontiguousarray(x[rows]) if i in chosen and x is not None else x for i, x in enumerate(ins)]


EXPENSIVE = 2**12
"""Elements of an input or output of which a batch takes too long here."""


def operators() -> Iterator[Any]:
    """One case for every kernel, known inputs where it wants them."""
    seen = set[int]()
    for op, case, found in covered("triton", most=300):
        kernel, (site, ins) = op.kernels["triton"], found[-1]
        large = max(s.size for s in (*site.ins, *site.outs) if s is not None) > EXPENSIVE
        if id(kernel) in seen or large or not kernel.supports(replace(site, batch_invariant=True)):
            continue
        about = entries(op, case, ins)
        if about is not None:
            seen.add(id(kernel))
            yield pytest.param(op, case, ins, *about, id=f"{op.qualified}-{case.id}")


@pytest.mark.parametrize(("op", "case", "ins", "count", "chosen"), shard(list(operators())))
def test_every_operator_that_has_entries(
    op: Op, case: Case, ins: Ins, count: int, chosen: list[int], interpreter: InterpreterLauncher
) -> None:
    def made(rows: Sequence[int]) -> list[HostArray]:
        given = taken(ins, chosen, rows)
        site = site_of(op, case, given, constant=True)
        known = tuple(None if i in chosen else v for i, v in enumerate(site.values))
        return results(op, replace(site, values=known), given, interpreter, invariant=True)[0]

    many = made([i % count for i in range(OTHERS)])
    for alone, together in zip(made([1]), many, strict=True):
        for at in (1, 1 + count):
            assert same_bits(alone, together[at : at + 1])

"""Operators on a GPU against NumPy: every Triton kernel, and every portable function through CuPy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from bench.gpu_report import CheckFailed, Context, Section
from infera_gpu.doctor import examine
from infera_gpu.graph import HostArray
from infera_gpu.layout import dense
from infera_gpu.memory import aligned
from infera_gpu.op import Call, Case, Kernel, Op, Site
from infera_gpu.ops import registry
from infera_gpu.spec import TensorSpec, spec_of
from infera_kernels.launch import library_of
from infera_kernels.launch.cublaslt import Product
from tests.cases import Variant, assert_close, compute, covered, inputs_of, run, site_of

Result = tuple[str, Mapping[str, Any]]
Array = Any

GUARD, PATTERN, POISON = 256, 0xA5, 0xFF

SECONDS = 20.0
"""That a case may take: kernels are compiled before, see `bench.gpu_ahead`."""

LOSSES = 2
"""Cases of an operator that may take their process down; no other one of it is run then."""


def facts(context: Context) -> Result:
    """What `infera doctor` says."""
    found = [asdict(finding) for finding in examine()]
    problems = [f"{f['subject']}: {f['detail']}" for f in found if f["state"] == "problem"]
    if problems:
        raise CheckFailed("; ".join(problems), {"findings": found})
    return f"{len(found)} findings, no problem", {"findings": found}


# ---- operators


def fetch(device: Any, array: Array) -> HostArray:
    """A copy on the host, when everything before it has happened."""
    host = np.empty(array.shape, array.dtype)
    copy, args = device.transfer(array, host)
    copy(*args)
    device.synchronize()
    return host


class GuardedOutput:
    """An output in a block of its own: NaN, or all bits set, between guard bytes."""

    def __init__(self, device: Any, spec: TensorSpec) -> None:
        size = spec.nbytes + 2 * GUARD
        block = device.alloc(size, "device")
        self._device = device
        self._whole = device.view(block, dense("whole", "device", TensorSpec((size,), np.dtype(np.uint8))))
        self.array = device.view(block, dense("output", "device", spec).moved(GUARD))
        host = np.full(size, PATTERN, np.uint8)
        host[GUARD:-GUARD] = POISON
        copy, args = device.transfer(host, self._whole)
        copy(*args)

    def check(self) -> None:
        """Raises AssertionError where a byte outside of the output was written."""
        host = fetch(self._device, self._whole)
        assert (host[:GUARD] == PATTERN).all(), "the kernel wrote before the array"
        assert (host[-GUARD:] == PATTERN).all(), "the kernel wrote after the array"


class DeviceBuffers:
    """`infera_gpu.op.Buffers` on the device; `site.values` are what kernels may pack."""

    def __init__(
        self,
        device: Any,
        site: Site,
        ins: Sequence[HostArray | None],
        specs: Sequence[TensorSpec],
        *,
        strided: bool,
        inplace: int,
    ) -> None:
        self.xp, self.launcher = device.xp, device.launcher
        self.threads, self.least_ns, self.strict, self.tf32 = 1, 0.0, False, False
        self._device, self._site = device, site
        self.scratch_bytes = 0
        self.guarded_scratch: list[GuardedOutput] = []
        self.guarded = [GuardedOutput(device, spec) for spec in specs]
        self.outs = tuple(g.array for g in self.guarded)
        given: list[Array | None] = []
        for i, x in enumerate(ins):
            if i == inplace and x is not None:
                copy, args = device.transfer(x, self.outs[0])
                copy(*args)
                given.append(self.outs[0])
            elif strided and x is not None and x.ndim:
                given.append(device.constant(np.repeat(x, 2, axis=-1), "device")[..., ::2])
            else:
                given.append(None if x is None else device.constant(x, "device"))
        self.ins: tuple[Any, ...] = tuple(given)

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        raise AssertionError("a Triton kernel splits its work among threads")

    def scratch(self, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        """Filled with bytes that make NaN: a kernel must not rely on what lies there."""
        spec = TensorSpec(tuple(shape), np.dtype(dtype))
        self.scratch_bytes += aligned(spec.nbytes)
        guarded = GuardedOutput(self._device, spec)
        self.guarded_scratch.append(guarded)
        return guarded.array

    def pack(self, i: int, tag: str, build: Callable[[HostArray], HostArray]) -> Array:
        value = self._site.value(i)
        assert value is not None, f"pack('{tag}') of input {i}, which is not constant"
        return self._device.constant(np.ascontiguousarray(build(value)), "device")

    def constant(self, value: HostArray) -> Array:
        return self._device.constant(np.ascontiguousarray(value), "device")


def bindings(kernel: Kernel, site: Site) -> Iterator[dict[str, Any]]:
    """The ways in which a planner may bind it: contiguous, strided, over an input's memory (-1: none)."""
    yield {"strided": False, "inplace": -1}
    if kernel.strided:
        yield {"strided": True, "inplace": -1}
    for i in kernel.inplace:
        if site.has(i) and site.value(i) is None and site.ins[i] == site.outs[0]:
            yield {"strided": False, "inplace": i}


def bound(
    device: Any, op: Op, site: Site, ins: Sequence[HostArray | None], specs: Sequence[TensorSpec]
) -> Iterator[tuple[dict[str, Any], DeviceBuffers, list[Call]]]:
    """The Triton kernel in every binding, with what it is bound to and its calls."""
    kernel = op.kernels["triton"]
    for options in bindings(kernel, site):
        buffers = DeviceBuffers(device, site, ins, specs, **options)
        yield options, buffers, list(kernel.bind(site, buffers))


def check_kernel(device: Any, op: Op, case: Case, site: Site, ins: Sequence[HostArray | None]) -> int:
    """Runs the Triton kernel in every binding against `compute`; the number of launches. Raises AssertionError."""
    kernel = op.kernels["triton"]
    want = compute(op, site, ins)[: case.n_outs]
    launches = 0
    for options, buffers, calls in bound(device, op, site, ins, [spec_of(w) for w in want]):
        assert kernel.workspace is not None
        assert buffers.scratch_bytes == kernel.workspace(site), "more or less scratch than `workspace` announces"
        run(calls)
        launches += len(calls)
        for i, (guarded, w) in enumerate(zip(buffers.guarded, want, strict=True)):
            assert_close(fetch(device, guarded.array), w, case.tol, f"output {i} {options}")
            guarded.check()
        for guarded in buffers.guarded_scratch:
            guarded.check()
    return launches


Checked = tuple[Op, str, Callable[[], int]]
"""An operator, the name of one of its cases, and what checks that and gives a number to add up."""


def by_turns(cases: Iterable[Checked]) -> list[Checked]:
    """The first case of every operator, then the second of each: where time runs out, all were looked at."""
    turns: Counter[str] = Counter()
    ordered = []
    for checked in cases:
        turns[checked[0].qualified] += 1
        ordered.append((turns[checked[0].qualified], checked))
    return [checked for _, checked in sorted(ordered, key=lambda pair: pair[0])]


def swept(context: Context, what: str, cases: Iterable[Checked], idle: str) -> tuple[str, dict[str, Any]]:
    """Checks case after case. One for which there was no time is counted, and is no failure; so is one of an operator
    that is given up, see LOSSES, and, under the name `idle`, one of which there was nothing to check, whose number is
    0. Raises CheckFailed."""
    ran: Counter[str] = Counter()
    lost: Counter[tuple[str, str]] = Counter()
    failed: dict[str, str] = {}
    numbers: Counter[str] = Counter()
    for op, name, check in by_turns(cases):
        tried = context.cases.known(name)
        if tried is None:
            if context.left() <= 0 or lost[op.domain, op.name] >= LOSSES:
                numbers["no_time_for" if context.left() <= 0 else "given_up"] += 1
                continue
            tried = context.cases.run(name, check, SECONDS)
        lost[op.domain, op.name] += tried.lost
        if tried.problem:
            failed[name] = tried.problem
        elif tried.found:
            ran[op.qualified] += 1
            numbers["done"] += tried.found
        else:
            numbers[idle] += 1
    found = {"cases": ran.total(), "operators": dict(ran), "failed": failed, "no_time_for": 0, "given_up": 0}
    found |= {idle: 0, **numbers}
    summary = f"{ran.total()} {what} of {len(ran)} operators agree with NumPy"
    if numbers["no_time_for"]:
        summary += f", no time for {numbers['no_time_for']}"
    if numbers["given_up"]:
        summary += f", {numbers['given_up']} given up"
    if failed or not ran:
        name, problem = next(iter(failed.items()), ("", "nothing ran"))
        raise CheckFailed(f"{summary}, {len(failed)} fail: {name}: {problem}", found)
    return summary, found


def kernels(context: Context, wanted: Callable[[Op], bool] = lambda op: True) -> Result:
    """Every Triton kernel on every case that it supports."""
    device = context.open()
    device.launcher.library = None

    def check(op: Op, case: Case, variants: Sequence[Variant]) -> int:
        return sum(check_kernel(device, op, case, site, ins) for site, ins in variants)

    with device.running():
        summary, found = swept(context, "cases", _checked(check, wanted), "without_a_launch")
    return summary, {**found, "compiled": getattr(device.launcher, "compiled", None)}


def _checked(check: Callable[[Op, Case, Sequence[Variant]], int], wanted: Callable[[Op], bool]) -> Iterator[Checked]:
    for op, case, variants in covered("triton"):
        if wanted(op):
            yield op, f"{op.qualified} {case.id}", partial(check, op, case, variants)


class _Counted:
    """A library, and how many products it was given."""

    def __init__(self, library: Any) -> None:
        self._library, self.count = library, 0

    def call(self, product: Product, workspace: Any) -> Call | None:
        made: Call | None = self._library.call(product, workspace)
        self.count += made is not None
        return made


_MULTIPLY = re.compile("MatMul|Gemm|Conv|Attention|LSTM|GRU|RNN")


def library(context: Context, wanted: Callable[[Op], bool] = lambda op: True) -> Result:
    """Every product that cuBLASLt is given, of the cases of operators that multiply matrices."""
    device = context.open()
    there = library_of(device.launcher)
    if there is None:
        return "cuBLASLt is not installed here", {}
    counted = device.launcher.library = _Counted(there)

    def check(op: Op, case: Case, variants: Sequence[Variant]) -> int:
        before = counted.count
        for site, ins in variants:
            check_kernel(device, op, case, replace(site, tuned=device.tuned), ins)
        return counted.count - before

    multiplying = _checked(check, lambda op: wanted(op) and bool(_MULTIPLY.search(op.name)))
    with device.running():
        return swept(context, "cases with products of cuBLASLt", multiplying, "without_a_product")


def _has_type(device: Any, dtype: Any) -> bool:
    """Whether the device's array library has arrays of the type; CuPy has them of few of ml_dtypes' types."""
    try:
        device.xp.empty((0,), dtype)
    except (TypeError, ValueError):
        return False
    return True


def check_portable(device: Any, op: Op, case: Case) -> int:
    """Runs `compute` on the device against NumPy; how many outputs. 0 where it cannot: text, shapes from data, types of
    the host."""
    ins = inputs_of(op, case)
    site = site_of(op, case, ins)
    want = compute(op, site, ins)
    dtypes = {a.dtype for a in (*ins, *want) if a is not None}
    if len(site.outs) < case.n_outs or any(d.hasobject or not _has_type(device, d) for d in dtypes):
        return 0
    given = [None if x is None else device.constant(x, "device") for x in ins]
    for i, (got, w) in enumerate(zip(op.outputs(device.xp, site, given), want[: case.n_outs], strict=False)):
        assert_close(fetch(device, got), w, case.tol, f"output {i}")
    return case.n_outs


def portable(context: Context, wanted: Callable[[Op], bool] = lambda op: True) -> Result:
    """Every portable operator's own function through CuPy: what runs where there is no kernel."""
    device = context.open()
    cases = (
        (op, f"{op.qualified} {case.id}", partial(check_portable, device, op, case))
        for op in registry()
        for case in (op.cases if op.portable and op.pure and wanted(op) else ())
    )
    with device.running():
        return swept(context, "cases through CuPy", cases, "on_the_host")


SECTIONS: Mapping[str, Section] = {"facts": facts, "kernels": kernels, "library": library, "portable": portable}

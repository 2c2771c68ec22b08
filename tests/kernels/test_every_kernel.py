"""Every kernel of the package compiled for every architecture, with each set of element types that operators' cases
launch it with: as the first case does that has them. `tests/kernels/test_compile*.py` say what is in the result."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from infera_gpu.op import Op
from infera_kernels.calls import Call
from infera_kernels.launch import CompileLauncher, RecordingLauncher, nominal_target
from tests.cases import Variant, covered, variants
from tests.kernels.buffers import LaunchingBuffers
from tests.kernels.support import EVERY_ARCH, Family, family_of
from tests.kernels.test_operators import chosen

pytest.importorskip("triton")

import infera_kernels.triton as package

pytestmark = pytest.mark.kernels


MEASURED = ("tma_kernel",)
"""Launched where measurements say so alone: tests/kernels/test_compile_tma.py compiles it."""


def _kernels() -> Iterator[str]:
    """The names of what the package launches, whatever was measured."""
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        for name, value in vars(module).items():
            if name in MEASURED:
                continue
            if name.endswith("_kernel") and hasattr(value, "cache_key") and value.__module__ == module.__name__:
                yield name


KERNELS = tuple(_kernels())


class FirstOfFamily(RecordingLauncher):
    """Notes what the first launch of each family was asked for."""

    def __init__(self, arch: int) -> None:
        super().__init__(nominal_target(arch))
        self.first: dict[Family, tuple[Any, ...]] = {}

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: Mapping[str, Any],
        constexprs: Mapping[str, Any],
        **options: Any,
    ) -> Call:
        self.first.setdefault(family_of(kernel, args, constexprs), (kernel, grid, args, constexprs, options))
        return super().launch(kernel, grid, args, constexprs, **options)


def _sites() -> Iterator[tuple[Op, int, Variant]]:
    """Operators at the sites of their cases, with the number of outputs: first those that test_operators.py compiles,
    whose binaries are there already."""
    for param in chosen():
        op, case = param.values
        for variant in reversed(variants(op, case, "triton")):
            yield op, case.n_outs, variant
    for op, case, found in covered("triton"):
        for variant in found:
            yield op, case.n_outs, variant


@cache
def launches(arch: int) -> Mapping[Family, tuple[Any, ...]]:
    """Of each family, one. Some kernels are launched where nothing may depend on the batch, and else for many rows."""
    launcher = FirstOfFamily(arch)
    for op, outputs, (site, ins) in _sites():
        kernel, among_any = op.kernels["triton"], replace(site, batch_invariant=True)
        for asked in (site, among_any) if kernel.supports(among_any) else (site,):
            for _ in kernel.bind(asked, LaunchingBuffers(launcher, ins, site.outs[:outputs], site.values)):
                pass
    return launcher.first


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_for_all_types_of_its_cases(name: str, arch: int) -> None:
    launcher = CompileLauncher(arch)
    for (kernel, _), (*asked, options) in launches(arch).items():
        if kernel == name:
            launcher.launch(*asked, **options)
    assert launcher.compiled, "no operator's case launches it"
    assert [result.spilled_bytes for result in launcher.compiled] == [0] * len(launcher.compiled)
    if launcher.target.pdl:
        assert all(result.waits_first for result in launcher.compiled)


def test_launches_are_of_known_kernels() -> None:
    assert {name for name, _ in launches(90)} <= set(KERNELS)

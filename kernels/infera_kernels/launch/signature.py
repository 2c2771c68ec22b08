"""From a kernel and its arguments to what the compiler and the launch need: types, alignment, constants, values."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from infera_kernels.launch.descriptors import Descriptor
from infera_kernels.launch.types import Const, LaunchError, Unhinted, address_of

ALIGNMENT = 16
"""The one alignment that Triton's hints speak of: addresses in bytes, integers in units."""

CONSTEXPR = "constexpr"

_ELEMENTS = {
    "bool": "i1",
    **{f"{sign}int{bits}": f"{sign or 'i'}{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
}

Path = tuple[int, ...]
"""Where an argument stands: (parameter,), or (parameter, element) inside a tuple."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One scalar, pointer or descriptor of the signature. `aligned` is true only where `value` is a multiple of
    ALIGNMENT.

    `value` is an address, a number, a Descriptor, or a constant; `array` is what the address belongs to.
    """

    path: Path
    type: str
    value: Any
    aligned: bool = False
    array: Any = None


@dataclass(frozen=True, slots=True)
class Binding:
    """A kernel's parameters, in order, each bound to one leaf, or to a tuple of leaves."""

    kernel: str
    names: tuple[str, ...]
    leaves: tuple[Leaf | tuple[Leaf, ...], ...]
    annotated: frozenset[str] = field(default_factory=frozenset)
    """Parameters that the kernel itself declares as tl.constexpr."""

    def flat(self) -> Iterator[Leaf]:
        for leaf in self.leaves:
            if isinstance(leaf, tuple):
                yield from leaf
            else:
                yield leaf

    def runtime(self) -> tuple[Leaf, ...]:
        """The leaves that have a slot in the launch, in order."""
        return tuple(leaf for leaf in self.flat() if leaf.type != CONSTEXPR)

    def constants(self) -> dict[Path, Any]:
        return {leaf.path: leaf.value for leaf in self.flat() if leaf.type == CONSTEXPR}

    def types(self) -> dict[str, str | tuple[str, ...]]:
        """Triton's signature: parameter -> type, a tuple of types for a tuple."""
        return {
            name: tuple(e.type for e in leaf) if isinstance(leaf, tuple) else leaf.type
            for name, leaf in zip(self.names, self.leaves, strict=True)
        }

    def aligned(self) -> tuple[Path, ...]:
        return tuple(leaf.path for leaf in self.flat() if leaf.aligned)


def _leaf(path: Path, value: Any, where: str, *, hinted: bool = True) -> Leaf:
    if isinstance(value, Const):
        return Leaf(path, CONSTEXPR, value.value)
    if isinstance(value, Unhinted):
        value, hinted = value.value, False
    if value is None:
        return Leaf(path, CONSTEXPR, None)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return Leaf(path, "i1", value)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise LaunchError(f"{where}: {value} does not fit in 64 bits")
        aligned = hinted and value % ALIGNMENT == 0
        return Leaf(path, "i32" if -(2**31) <= value < 2**31 else "i64", value, aligned)
    if isinstance(value, float):
        with np.errstate(over="ignore"):  # beyond float32 is infinity, as in a cast
            return Leaf(path, "fp32", float(np.float32(value)))
    if isinstance(value, Descriptor):
        pointer = _leaf(path, value.array, where)
        block = ", ".join(map(str, value.block))
        return Leaf(path, f"tensordesc<{pointer.type[1:]}[{block}]>", value, array=value.array)
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        raise TypeError(f"{where}: expected an array, a number, None or a tuple of these, got {type(value).__name__}")
    element = _ELEMENTS.get(np.dtype(dtype).name)
    if element is None:
        raise TypeError(f"{where}: no Triton type for dtype {np.dtype(dtype).name}; known are {', '.join(_ELEMENTS)}")
    address = address_of(value)
    return Leaf(path, "*" + element, address, address % ALIGNMENT == 0, value)


def pointer_to(array: Any) -> Leaf:
    """The leaf of an array by itself."""
    return _leaf((0,), array, "an array")


def kernel_name(kernel: Any) -> str:
    return str(getattr(kernel, "__name__", kernel))


def bind(kernel: Any, args: Mapping[str, Any], constexprs: Mapping[str, Any]) -> Binding:
    """The kernel's parameters bound to `args` and `constexprs`, defaults filled in.

    Integers of parameters that the kernel lists as `do_not_specialize_on_alignment` give no hint: launches that differ
    in nothing else share a binary.

    Raises TypeError naming the first parameter that is missing, unknown, given twice or of a type without meaning.
    """
    name = kernel_name(kernel)
    parameters = inspect.signature(getattr(kernel, "fn", kernel)).parameters
    unknown = [k for k in (*args, *constexprs) if k not in parameters]
    if unknown:
        raise TypeError(f"{name}: no parameter '{unknown[0]}'; it has {', '.join(parameters)}")
    annotated = frozenset(p.name for p in parameters.values() if CONSTEXPR in str(p.annotation))
    unhinted = frozenset(getattr(kernel, "do_not_specialize_on_alignment", None) or ())
    leaves: list[Leaf | tuple[Leaf, ...]] = []
    for i, p in enumerate(parameters.values()):
        where, hinted = f"{name}: '{p.name}'", p.name not in unhinted
        if p.name in args and p.name in constexprs:
            raise TypeError(f"{where} is in both args and constexprs")
        if p.name in args and p.name in annotated:
            raise TypeError(f"{where} is declared tl.constexpr: pass it in constexprs")
        if p.name in args:
            value = args[p.name]
            if isinstance(value, tuple):
                items = enumerate(value)
                leaves.append(tuple(_leaf((i, j), v, f"{where}[{j}]", hinted=hinted) for j, v in items))
            else:
                leaves.append(_leaf((i,), value, where, hinted=hinted))
        elif p.name in constexprs:
            leaves.append(Leaf((i,), CONSTEXPR, constexprs[p.name]))
        elif p.default is not inspect.Parameter.empty:
            leaves.append(Leaf((i,), CONSTEXPR, p.default))
        else:
            raise TypeError(f"{where} is missing")
    return Binding(name, tuple(parameters), tuple(leaves), annotated)

"""Kernels run by Triton's interpreter on NumPy arrays: numerics without a GPU.

The interpreter computes bfloat16 on its 16-bit storage, silently wrong; kernels therefore widen to float32 before
they compute (and before `tl.dot` where `INTERPRETED`). It ignores `input_precision`, and knows no races: tests look for
them in the addresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from infera_kernels.calls import Call
from infera_kernels.launch.descriptors import FIRST_ARCH, Descriptor
from infera_kernels.launch.recording import Launch, launch_of
from infera_kernels.launch.signature import CONSTEXPR, Leaf, bind, pointer_to
from infera_kernels.launch.types import LaunchError, Target, nominal_target

_SCALARS = {"i1": np.bool_, "i32": np.int32, "i64": np.int64, "fp32": np.float32}


def _tensor(leaf: Leaf, annotated: bool) -> Any:
    """What the interpreter passes for a leaf: a Triton tensor or descriptor, or a plain value for a constant."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_semantic

    if leaf.type == CONSTEXPR:
        if annotated or type(leaf.value) is not int:
            return leaf.value
        leaf = Leaf(leaf.path, "i32" if -(2**31) <= leaf.value < 2**31 else "i64", leaf.value)
    if isinstance(leaf.value, Descriptor):
        given = leaf.value
        base = _tensor(pointer_to(given.array), False)
        sizes = [_tensor(Leaf(leaf.path, "i32", size), False) for size in given.shape]
        steps = [_tensor(Leaf(leaf.path, "i64", step), False) for step in given.strides[:-1]]
        return interpreter_semantic.make_tensor_descriptor(
            base, sizes, [*steps, tl.constexpr(1)], [tl.constexpr(n) for n in given.block], "zero"
        )
    if leaf.type.startswith("*"):
        kind, data = tl.pointer_type(tl.str_to_ty(leaf.type[1:], None)), np.array([leaf.value], np.uint64)
    else:
        kind, data = tl.str_to_ty(leaf.type, None), np.array([leaf.value], _SCALARS[leaf.type])
    return tl.tensor(TensorHandle(data, kind), kind)


def _bound_of(tensor: Any) -> int:
    """A loop's bound."""
    return int(tensor.handle.data.item())


def _bfloat16(builder: Any, value: float) -> Any:
    """A constant."""
    import triton.language as tl

    return builder.create_fp_trunc(builder.get_fp32(value), tl.bfloat16)


@contextmanager
def _patching_once() -> Iterator[None]:
    """Triton patches its language anew for every call of a function in a kernel, which takes longer than the function;
    once for each module of functions does. Triton 3.6 makes loop bounds with `int(array of shape (1,))`, which NumPy
    2.4 refuses: they are made here, until Triton undoes its patches."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, seen = interpreter._patch_lang, set()

    def once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module not in seen:
            seen.add(module)
            undone = patch(fn)
            tl.tensor.__index__ = _bound_of
            return undone
        return None

    interpreter._patch_lang = once
    try:
        yield
    finally:
        interpreter._patch_lang = patch


class InterpreterLauncher:
    """Executing a Call interprets the kernel, program after program, and appends its Launch to `launches`.

    TRITON_INTERPRET=1 must be set before any module with kernels is imported. Raises LaunchError otherwise.
    """

    def __init__(self, target: Target | None = None) -> None:
        from triton.runtime import interpreter

        # Watching every sum of integers for an overflow takes half of the time, and tensors here are small.
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
        if not hasattr(interpreter.InterpreterBuilder, "get_bf16"):  # Triton 3.6
            interpreter.InterpreterBuilder.get_bf16 = _bfloat16
        self.target = target or nominal_target(90)
        self.launches: list[Launch] = []

    @property
    def describes(self) -> bool:
        return self.target.arch >= FIRST_ARCH

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: Mapping[str, Any],
        constexprs: Mapping[str, Any],
        **options: Any,
    ) -> Call:
        from triton.runtime.interpreter import InterpretedFunction

        launch = launch_of(kernel, grid, args, constexprs, options)
        if not isinstance(kernel, InterpretedFunction):
            raise LaunchError(
                f"{launch.kernel} was imported for compilation; set TRITON_INTERPRET=1 before importing kernels"
            )
        binding = bind(kernel, args, constexprs)
        values = [
            tuple(_tensor(e, False) for e in leaf)
            if isinstance(leaf, tuple)
            else _tensor(leaf, name in binding.annotated)
            for name, leaf in zip(binding.names, binding.leaves, strict=True)
        ]
        return self._run, (kernel[launch.grid], values, launch)

    def _run(self, kernel: Any, values: list[Any], launch: Launch) -> None:
        with np.errstate(all="ignore"), _patching_once():
            kernel(*values)
        self.launches.append(launch)

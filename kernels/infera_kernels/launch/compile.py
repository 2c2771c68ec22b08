"""Triton kernels compiled ahead of time, for any architecture, without a GPU, a driver or torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from infera_kernels.launch.abi import check_abi
from infera_kernels.launch.dependent import compiled_waiting, waits
from infera_kernels.launch.descriptors import FIRST_ARCH, Encoding, rank_of
from infera_kernels.launch.signature import Binding
from infera_kernels.launch.types import LaunchError, Target

_OPTIONS = {"num_warps": 4, "num_stages": 3, "maxnreg": None, "enable_fp_fusion": True, "pdl": False}
"""With `pdl` a kernel begins as `dependent` says; the others are Triton's."""

_TOOLCHAIN = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "PTXAS_OPTIONS")
"""Environment that changes the binary and nothing else in the key."""


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """What launching a cubin needs to know. `types` are the run-time parameters', in order."""

    name: str
    types: tuple[str, ...]
    threads: int
    shared_bytes: int
    arch: int
    triton: str
    encodings: tuple[Encoding, ...] = ()
    """Of the descriptors among the parameters, in order."""
    pdl: bool = False
    """Whether it may be launched before the kernel in front of it is done, for which it waits."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> KernelSpec:
        """Raises ValueError, TypeError or KeyError for anything that `to_json` did not write."""
        fields = json.loads(text)
        encodings = tuple(Encoding(tuple(e["box"]), e["swizzle"]) for e in fields.get("encodings", ()))
        return cls(**{**fields, "types": tuple(fields["types"]), "encodings": encodings})


@dataclass(frozen=True, slots=True)
class Binary:
    """A kernel compiled for one architecture."""

    spec: KernelSpec
    cubin: bytes
    ptx: str = ""
    """Empty where the binary comes from a cache."""


def installed() -> str:
    """The release of Triton."""
    import triton

    return str(triton.__version__)


def compiler_options(options: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """The options with defaults, for a target. Raises TypeError for an unknown one.

    Fusing a * b + c is asked for explicitly: Triton's default for it changes in 3.10.
    """
    unknown = [k for k in options if k not in _OPTIONS]
    if unknown:
        raise TypeError(f"unknown compiler option '{unknown[0]}'; known are {', '.join(_OPTIONS)}")
    return {**_OPTIONS, "pdl": target.pdl, **options}


def _require_jit(kernel: Any, name: str) -> None:
    if not hasattr(kernel, "cache_key"):
        raise LaunchError(
            f"{name} is not a compilable Triton kernel ({type(kernel).__name__}); where TRITON_INTERPRET is set when "
            "kernels are imported, they can only be interpreted: unset it and start again"
        )


def _constant_key(value: Any) -> str:
    import triton.language as tl

    if hasattr(value, "cache_key"):
        return f"{value.__module__}.{value.__name__}:{value.cache_key}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant_key, value))})"
    if value is None or isinstance(value, bool | int | float | str | tl.dtype):
        return repr(value)
    if type(value).__module__.startswith("triton.language"):  # an element type
        return str(value)
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be a kernel constant")


def cache_key(kernel: Any, binding: Binding, options: Mapping[str, Any], arch: int) -> str:
    """A name for the binary: kernel source with everything it calls, signature, constants, options, toolchain."""
    import triton

    _require_jit(kernel, binding.kernel)
    facts = [
        triton.__version__,
        arch,
        binding.kernel,
        kernel.cache_key,
        [(name, types) for name, types in binding.types().items()],
        binding.aligned(),
        [(path, _constant_key(v)) for path, v in binding.constants().items()],
        sorted(options.items()),
        [os.environ.get(name) for name in _TOOLCHAIN],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def compile_kernel(kernel: Any, binding: Binding, options: Mapping[str, Any], arch: int) -> Binary:
    """Compiles `kernel` for sm_<arch>. Raises LaunchError naming the kernel where Triton cannot, or where the result
    needs what a plain cuLaunchKernel does not give (clusters, cooperative grids, scratch memory)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _require_jit(kernel, binding.kernel)
    types = tuple(leaf.type for leaf in binding.runtime())
    descriptors = sum(1 for type in types if rank_of(type))
    if descriptors and arch < FIRST_ARCH:
        raise LaunchError(f"{binding.kernel}: takes tensor descriptors, which sm_{arch} does not have")
    source = ASTSource(
        fn=kernel,
        signature=binding.types(),
        constexprs=binding.constants(),
        attrs={path: [["tt.divisibility", 16]] for path in binding.aligned()},
    )
    # Triton keeps binaries too, under a name that knows functions inside of tuples by their names alone.
    source.hash = partial(cache_key, kernel, binding, options, arch)
    given = {k: v for k, v in options.items() if v is not None and k != "pdl"}
    try:
        with compiled_waiting() if options["pdl"] else nullcontext():
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=given)
    except Exception as e:
        raise LaunchError(f"{binding.kernel}: Triton {triton.__version__} cannot compile it for sm_{arch}: {e}") from e
    meta = compiled.metadata
    extras = {
        "clusters": meta.num_ctas != 1,
        "a cooperative grid": meta.launch_cooperative_grid,
        "Triton's own programmatic dependent launch": meta.launch_pdl,
        "global scratch memory": meta.global_scratch_size,
        "profiling memory": meta.profile_scratch_size,
    }
    for what, needed in extras.items():
        if needed:
            raise LaunchError(f"{binding.kernel}: needs {what}, which this launcher does not provide")
    encodings = tuple(map(Encoding.of, meta.tensordesc_meta or ())) if descriptors else ()
    if len(encodings) != descriptors:
        raise LaunchError(f"{binding.kernel}: {len(encodings)} encodings of {descriptors} tensor descriptors")
    ptx = compiled.asm["ptx"]
    spec = KernelSpec(
        meta.name, types, 32 * meta.num_warps, meta.shared, arch, triton.__version__, encodings, waits(ptx)
    )
    check_abi(spec.name, spec.types, spec.threads, ptx)
    return Binary(spec, compiled.asm["cubin"], ptx)

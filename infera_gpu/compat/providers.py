"""Execution providers: which device a list of them asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from infera_gpu.devices.cuda import why_unavailable
from infera_gpu.errors import InputError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

Provider: TypeAlias = str | tuple[str, Mapping[str, Any]]


def get_all_providers() -> list[str]:
    """The providers that infera_gpu has, the preferred one first."""
    return [CUDA, CPU]


def get_available_providers() -> list[str]:
    """The providers that work on this machine, the preferred one first."""
    return [CPU] if why_unavailable() else [CUDA, CPU]


def get_device() -> str:
    """ "GPU" or "CPU"."""
    return "CPU" if why_unavailable() else "GPU"


def preload_dlls(cuda: bool = True, cudnn: bool = True, msvc: bool = True, directory: str | None = None) -> None:
    """Nothing: what CuPy needs of CUDA it loads itself."""


def device_of(
    providers: Sequence[Provider] | None, options: Sequence[Mapping[str, Any]] | None
) -> tuple[str, list[str]]:
    """The device of the first provider that works, and a warning for each one passed over.

    None and an empty list mean the best device there is. A list of which nothing works means the CPU, as in
    onnxruntime. Of a provider's options only CUDA's `device_id` has an effect. Raises InputError for anything that is
    no list of providers.
    """
    device: str | None = None if providers else "auto"
    warnings: list[str] = []
    seen: set[str] = set()
    for name, settings in _normalized(providers, options):
        if name in seen:
            warnings.append(f"provider '{name}' is given twice; the second is ignored")
            continue
        seen.add(name)
        reason = _why_not(name)
        if reason:
            warnings.append(f"{name} is not available ({reason}); the next provider is used, {CPU} after the last")
        elif device is None:
            device = f"cuda:{_device_id(settings)}" if name == CUDA else "cpu"
    return device or "cpu", warnings


def _why_not(name: str) -> str | None:
    if name == CUDA:
        return why_unavailable()
    return None if name == CPU else f"infera_gpu has {CUDA} and {CPU}"


def _device_id(settings: Mapping[str, Any]) -> int:
    given = settings.get("device_id", 0)
    if not str(given).isdecimal():
        raise InputError(f"{CUDA}: device_id is {given!r}, expected the number of a GPU")
    return int(given)


def _normalized(
    providers: Sequence[Provider] | None, options: Sequence[Mapping[str, Any]] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, options) of every provider, given either as tuples or in two lists of one length."""
    given = providers or ()
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise InputError(f"providers is {providers!r}, expected a list of names or of (name, options)")
    if providers and options is not None and len(options) != len(given):
        raise InputError(f"{len(options)} provider_options are given for {len(given)} providers")
    for i, provider in enumerate(given):
        match provider:
            case str(name):
                yield name, (options[i] if options is not None else {})
            case (str(name), Mapping() as settings) if not (options and options[i]):
                yield name, settings
            case (str(name), Mapping()):
                raise InputError(f"options of '{name}' are given both in providers and in provider_options")
            case _:
                raise InputError(f"providers[{i}] is {provider!r}, expected a name or (name, options)")

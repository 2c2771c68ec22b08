"""Every exception that infera_gpu raises on purpose.

::

    InferaError
    ├── ModelError                    the model cannot be run
    │   ├── InvalidModel              it is damaged, or breaks the rules of its format
    │   └── UnsupportedOperatorError  operators without a declaration, all of them listed
    ├── InputError                    a feed is missing, unknown, of the wrong type or shape
    ├── PlanError                     a node cannot be planned at these shapes
    │   └── InvarianceError           it would not give the same bits in every batch, which was asked for
    ├── DeviceError                   the device is absent, unsupported or failed
    │   ├── DeviceLostError           nothing works on it any more in this process
    │   └── OutOfMemoryError          a plan needs more memory than there is; nothing was allocated
    └── FetchError                    a model could not be brought here
        └── UnreachableError          nothing answered: no network, no registry, a proxy or certificate in the way

A message names the thing (node, input, file), what was expected, what came and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class InferaError(Exception):
    """Base of all errors raised on purpose."""


class ModelError(InferaError):
    """The model cannot be run."""


class InvalidModel(ModelError):
    """It is damaged, no model at all, or breaks the rules of its format."""


class UnsupportedOperatorError(ModelError):
    """The model uses operators that have no declaration.

    `missing` holds one `(operator, node name)` pair for each such node, in graph order.
    """

    def __init__(
        self,
        missing: Sequence[tuple[str, str]],
        *,
        opset: int,
        hints: Mapping[str, str] | None = None,
        model: str = "",
    ) -> None:
        self.missing = tuple(missing)
        by_op: dict[str, list[str]] = {}
        for op, node in missing:
            by_op.setdefault(op, []).append(node)
        lines = "; ".join(
            f"{op}{'' if '.' in op else f' of opset {opset}'}, "  # which is not that of other domains
            f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(repr, nodes[:3]))}"
            f"{f' and {len(nodes) - 3} more' if len(nodes) > 3 else ''}"
            for op, nodes in by_op.items()
        )
        advice = "; `infera ops` lists what there is, CONTRIBUTING.md says how to add an operator"
        super().__init__(
            f"{f'{model}: ' if model else ''}{len(by_op)} unsupported operator{'s' if len(by_op) > 1 else ''}: {lines}"
            + "".join(f"; {hint}" for hint in dict.fromkeys((hints or {}).values()))
            + ("" if len(hints or {}) == len(by_op) else advice)
        )


class InputError(InferaError, ValueError):
    """A feed is missing, unknown, of the wrong type or of the wrong shape."""


class PlanError(InferaError):
    """A node cannot be planned at these shapes."""


class InvarianceError(PlanError):
    """A node has no kernel that gives the same bits in every batch, and the session is to be batch invariant."""


class planning:
    """Whatever goes wrong in here beside errors raised on purpose is a PlanError that names `what`.

    Entered once where there are many nodes, with `what` set to each of them in turn: they come in thousands.
    """

    __slots__ = ("what",)

    def __init__(self, what: object = None) -> None:
        self.what = what

    def __enter__(self) -> planning:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, InferaError):
            raise PlanError(f"{self.what}: {str(error) or type(error).__name__}") from error


class DeviceError(InferaError):
    """The device is absent, unsupported or failed."""


class DeviceLostError(DeviceError):
    """A GPU on which nothing works any more in this process: a kernel faulted, or the GPU or its driver is gone."""


class OutOfMemoryError(DeviceError):
    """`what` needs `needed` bytes, 0 where that is not known, and only `available` are there, of a `limit` if one was
    set; nothing was allocated."""

    def __init__(self, what: str, *, needed: int, available: int, limit: int | None = None) -> None:
        self.needed, self.available, self.limit = needed, available, limit
        within = "" if limit is None else f" of a vram_limit of {limit:,}"
        if not needed:
            super().__init__(f"{what} needs more memory than CUDA gives; {available:,} bytes{within} are available")
            return
        missing = needed - available
        lack = f"({missing:,} missing)" if missing > 0 else "but not to this process, or not in one piece"
        super().__init__(f"{what} needs {needed:,} bytes, {available:,}{within} are available {lack}")


class FetchError(InferaError):
    """A model could not be brought here."""


class UnreachableError(FetchError):
    """Nothing answered: no network, no registry, a proxy or a certificate in the way."""

"""How much memory all models have together, and who goes where one more does not fit."""

from __future__ import annotations

from infera_gpu.budget import VramBudget
from infera_gpu.errors import InferaError, OutOfMemoryError
from infera_server.models.loaded import Loaded
from infera_server.models.model import Model


class NoRoomError(InferaError):
    """A model does not fit beside the others; `device` is where, and `hopeless` where it would not fit alone either."""

    def __init__(self, error: OutOfMemoryError, device: str, limit: int | None = None) -> None:
        super().__init__(str(error))
        self.device = device
        limit = error.limit if limit is None else limit
        self.hopeless = limit is not None and error.needed > limit

    def concerns(self, loaded: Loaded) -> bool:
        """Whether unloading this would make room."""
        devices = loaded.device.split(", ")
        return self.device == "auto" or any(d == self.device or d.startswith(f"{self.device}:") for d in devices)


class HostRoom:
    """The host memory that models on the CPU have together, by what their plans say: weights, and the largest arena."""

    def __init__(self, limit: str) -> None:
        self._budget = VramBudget(limit)

    def take(self, name: str, nbytes: int) -> None:
        """Count a model. Raises NoRoomError, counting nothing."""
        try:
            self._budget.take(f"model '{name}'", nbytes)
        except OutOfMemoryError as error:
            limit = self._budget.limit
            what = f"model '{name}', with a memory_limit of {limit:,},"
            refusal = OutOfMemoryError(what, needed=error.needed, available=error.available)
            raise NoRoomError(refusal, "cpu", limit) from None

    def give_back(self, nbytes: int) -> None:
        self._budget.give_back(nbytes)


def planned_bytes(model: Model) -> int:
    """Weights and the largest arena that is planned for."""
    return model.session.facts().weight_bytes + max(model.batching.arena_bytes.values(), default=0)

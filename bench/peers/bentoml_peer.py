"""BentoML with its adaptive batching."""

from typing import Any

import bentoml
import numpy as np
from model import Session


@bentoml.service(workers=1, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Model:
    def __init__(self) -> None:
        self.session = Session()

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=64, max_latency_ms=1000)
    def predict(self, rows: np.ndarray) -> np.ndarray:
        found: Any = self.session.run(rows)
        return found

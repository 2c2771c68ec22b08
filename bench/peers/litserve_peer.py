"""LitServe with its batching."""

import sys
from typing import Any

import litserve
import numpy as np
from model import Session


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.session = Session()

    def decode_request(self, request):  # without a type, or it is taken for a parameter of the URL
        return np.asarray(request["rows"], np.float32)

    def batch(self, inputs: Any) -> Any:
        return np.concatenate(inputs)

    def predict(self, x: Any) -> Any:
        return self.session.run(x)

    def unbatch(self, output: Any) -> Any:
        return list(output)

    def encode_response(self, output: Any) -> Any:
        return np.atleast_2d(output).tolist()


if __name__ == "__main__":
    api = Api(max_batch_size=64, batch_timeout=0.001)
    litserve.LitServer(api, accelerator="cpu", track_requests=False).run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning"
    )

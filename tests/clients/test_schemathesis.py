"""schemathesis on the OpenAPI document: requests right and wrong, none of which is the server's fault."""

from __future__ import annotations

import subprocess

import pytest

from tests.clients.support import schemathesis
from tests.server.support import FakeSession, doubler, serving, until

pytestmark = pytest.mark.clients

LIMIT_S = 1200


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("examples", [20, pytest.param(100, marks=pytest.mark.large)])
def test_no_request_is_the_servers_fault(examples: int) -> None:
    plain = doubler()
    session = FakeSession(plain.inputs, plain.outputs, lambda feeds: {"y": feeds["x"] * 2})
    with serving({"double": session}) as server:
        command = [
            schemathesis(), "run", f"http://{server.address}/openapi.json", "--checks", "not_a_server_error",
            "--seed", "1", "--max-examples", str(examples), "--phases", "examples,coverage,fuzzing", "--no-color",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        until(lambda: not server.host.service.connections)
        assert server.host.service.intake.held == 0
        assert server.host.repository.get("double").queued == 0

"""Settings of all servers that these tests start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def free_grpc_port() -> Iterator[None]:
    """Several servers run at a time, in one test or in several runs of them: gRPC takes a free port."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFERA_GRPC_PORT", "0")
        yield

"""A budget for request bodies that have not arrived completely."""

from __future__ import annotations

from dataclasses import dataclass

from infera_server.errors import Overloaded

RETRY_AFTER = 1.0
"""Seconds after which a refused upload is worth another try: bodies come and go faster than a queue."""


@dataclass(slots=True)
class Intake:
    """Bytes received of bodies that are not in a queue yet, over all connections, and how many they may be."""

    limit: int
    held: int = 0

    def check(self, nbytes: int) -> None:
        """Raises Overloaded where so many more do not fit."""
        if self.held + nbytes > self.limit:
            raise Overloaded(
                f"{self.held:,} bytes of request bodies are being received, at most {self.limit:,} are held; "
                "send the request again later",
                RETRY_AFTER,
            )

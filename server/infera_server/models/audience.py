"""Who else must know what a repository serves."""

from __future__ import annotations


class Audience:
    """Who is told when a repository serves otherwise than before, and counts replies elsewhere: nobody."""

    def changed(self) -> None:
        """Something is otherwise now. May be called in any thread."""

    async def informed(self) -> None:
        """Return once everybody knows of what has changed so far, and nobody sends requests to what was there."""

    async def counted(self) -> None:
        """Return once the models' statistics have all replies so far."""

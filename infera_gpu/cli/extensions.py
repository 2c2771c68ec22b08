"""Commands from other packages: entry points of the group `infera.commands`, each a function as typer takes it.

A command is imported when it is called: `infera --help` stays fast and works without what a command needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from infera_gpu.errors import InferaError

GROUP = "infera.commands"


@dataclass(frozen=True, slots=True)
class Extra:
    """A command of this distribution that needs more than it installs by default."""

    name: str
    help: str


EXTRAS: Mapping[str, Extra] = MappingProxyType(
    {
        "serve": Extra("server", "Serve models over HTTP to any of the usual clients."),
        "key": Extra("server", "Make an API key for `infera serve`."),
    }
)


class LazyCommand(TyperCommand):
    """Stands for an entry point, and becomes its command when one is needed."""

    def __init__(self, name: str, point: EntryPoint | None) -> None:
        extra = EXTRAS.get(name)
        summary = extra.help if extra else f"From {point.value}." if point else ""
        super().__init__(name, help=summary)
        self._point = point

    def load(self) -> Any:
        """The command itself. Raises InferaError naming what to install where it cannot be imported."""
        extra = EXTRAS.get(self.name or "")
        install = f"pip install 'infera-gpu[{extra.name}]'" if extra else f"reinstall what provides '{self.name}'"
        if self._point is None:
            raise InferaError(f"`infera {self.name}` is not installed: {install}")
        try:
            function = self._point.load()
        except ModuleNotFoundError as error:
            raise InferaError(f"`infera {self.name}` needs the package '{error.name}': {install}") from error
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(name=self.name)(function)
        return typer.main.get_command(single)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.load().make_context(info_name, args, parent=parent, **extra)


class ExtensibleGroup(TyperGroup):
    """The commands declared here, and those of the entry points after them."""

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return own + sorted({*EXTRAS, *entry_points(group=GROUP).names} - set(own))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        point = next(iter(entry_points(group=GROUP, name=cmd_name)), None)
        return LazyCommand(cmd_name, point) if point or cmd_name in EXTRAS else None

"""`infera doctor`: what this machine offers."""

from __future__ import annotations

import typer

from infera_gpu.cli.console import table, working


def command() -> None:
    """Show what this machine offers and what infera will use; exit 1 where something needs attention."""
    from infera_gpu.doctor import examine

    with working("looking around"):
        findings = list(examine())
    table(("", "state", "detail"), [(f.subject, f.state, f.detail) for f in findings])
    if any(f.state == "problem" for f in findings):
        raise typer.Exit(1)

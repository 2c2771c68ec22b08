"""`infera pull`: bring a model here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from infera_gpu.cli import options
from infera_gpu.cli.console import table, working
from infera_gpu.errors import FetchError


def command(
    source: Annotated[
        str | None,
        typer.Argument(help="A catalogue name, https://, pypi:// or a path; the catalogue is listed without one."),
    ] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", help="Refuse anything else.")] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Copy it here: a file or a folder; FOLDER/ is made.")
    ] = None,
) -> None:
    """Bring a model here and print its path."""
    from infera_gpu.catalogue import CATALOGUE

    if source is None:
        rows = [(e.name, f"{sum(f.size for f in e.files) / 1e6:.1f}", e.licence, e.about) for e in CATALOGUE.values()]
        table(("name", "MB", "licence", ""), rows, right=("MB",))
        return
    path = options.locate(source, sha256)
    if output is not None:
        target = Path(output)
        if output.endswith(os.sep):
            target.mkdir(parents=True, exist_ok=True)
        with working(f"copying to {output}"):
            path = _copy(source, path, target)
    print(path)


def _copy(source: str, path: Path, output: Path) -> Path:
    """Copies the model to a file, or with what belongs beside it into a folder. Returns the model's new path."""
    from infera_gpu.catalogue import CATALOGUE
    from infera_gpu.fetch import fetch_files

    beside = fetch_files(source)[1:] if source in CATALOGUE else ()
    if not output.is_dir():
        if any(file.parent == path.parent for file in beside):
            raise FetchError(
                f"{source} is {1 + len(beside)} files; give -o a folder, not '{output}'; '{output}{os.sep}' is made"
            )
        return Path(shutil.copyfile(path, output))
    for file in beside:
        shutil.copyfile(file, output / file.name)
    return Path(shutil.copyfile(path, output / path.name))

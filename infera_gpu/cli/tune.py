"""`infera tune`: tiles of kernels measured on a GPU for a model, kept for every later load; and what is known."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from infera_gpu.cli import options
from infera_gpu.cli.console import advancing, note, table, working
from infera_gpu.cli.feeds import gather, on_random
from infera_gpu.devices import open_device, tiles_of
from infera_gpu.devices.cuda import why_unavailable
from infera_gpu.errors import DeviceError, InputError
from infera_gpu.session import Session
from infera_gpu.tuning import Choice, facts
from infera_kernels.tuning import Measured, Problem, Store
from infera_kernels.tuning.store import import_file, write_file

COLUMNS = ("family", "kind", "problem", "steps", "predicted", "faster", "gain", "by")


def command(
    model: Annotated[
        str | None,
        typer.Argument(help="A file, a catalogue name (see `infera pull`), https:// or pypi://.", show_default=False),
    ] = None,
    input: options.Input = None,
    shape: options.Shape = None,
    device: options.Device = "cuda",
    precision: options.Compute = "fp32",
    budget: Annotated[str, typer.Option("--budget", help="How long to measure: 60s, 5m.")] = "60s",
    again: Annotated[bool, typer.Option("--again", help="Measure what has been measured, too.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Measure nothing; show what is known.")] = False,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write what is measured on this kind of GPU to a file.")
    ] = None,
    take: Annotated[
        Path | None, typer.Option("--import", help="Take over a file that was exported on the same kind of GPU.")
    ] = None,
    seed: options.Seed = 0,
) -> None:
    """Measure which tiles are fastest for a model's kernels on this GPU.

    Sessions loaded later use them: of this model, and of others where
    shapes are near those measured. Inputs are random unless given.

    Without a GPU, --show --device recording MODEL tells what is predicted
    for an H100.
    """
    seconds = duration(budget)
    if show and device == "cuda" and (reason := why_unavailable()):
        raise DeviceError(
            f"no GPU is available ({reason}); --device recording MODEL shows what is predicted for an H100"
        )
    if take is not None:
        _take(take, device)
    if model is None:
        if not (show or export or take):
            raise InputError("which model? `infera tune MODEL` measures, `infera tune --show` shows what is known")
        _show_device(device, export) if show or export else None
        return
    with options.opened(model, options.locate(model), device, None, precision) as session:
        session.tunable()
        feeds = gather(session.tensor_inputs, input, shape, seed)
        with on_random(session.tensor_inputs, input):
            if not show:
                with advancing("measuring") as progress:
                    found = session.tune(feeds, seconds=seconds, again=again, progress=progress)
                gained = sum(m.choice != m.predicted for m in found)
                note(f"{len(found)} choices measured, {gained} of them are faster than predicted")
            with working("planning"):
                made = session.choices(feeds)
        if made:
            table(COLUMNS, [_row(c) for c in made], right=("steps", "gain"))
        else:
            note("no step of this plan runs a kernel that has tiles: there is nothing to tune")
        if export is not None:
            known = session.tunable().tuned.measured
            _export(session, export, [known[c.problem] for c in made if c.measured])


def duration(text: str) -> float:
    """Seconds of "90", "90s" or "2m". Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|)", text.strip())
    if found is None:
        raise InputError(f"--budget is '{text}', expected a time such as 60s or 5m")
    return float(found[1]) * (60 if found[2] == "m" else 1)


def _row(choice: Choice) -> tuple[str, ...]:
    known, family, measured = choice.problem, choice.family, choice.measured
    gain = f"{measured.predicted_seconds / measured.seconds:.2f}x" if measured else ""
    used = "" if choice.numbers == choice.predicted else family.described(choice.numbers)
    return (
        *(family.name, known.kind, _described(known, family.sizes), str(choice.steps)),
        *(family.described(choice.predicted), used, gain),
        "measured" if measured else "predicted",
    )


def _described(problem: Problem, names: Iterable[str]) -> str:
    return " ".join([*(f"{name} {size}" for name, size in zip(names, problem.sizes, strict=True)), problem.layout])


def _store(device: str) -> Store:
    opened = open_device(device)
    try:
        if (store := tiles_of(opened).store) is None:
            raise DeviceError(f"{opened.name} keeps no measurements")
        return store
    finally:
        opened.close()


def _take(path: Path, device: str) -> None:
    try:
        count = import_file(path, _store(device))
    except ValueError as error:
        raise InputError(str(error)) from None
    note(f"{count} measurements taken over from {path}")


def _show_device(device: str, export: Path | None) -> None:
    """All that is measured on a kind of GPU."""
    store = _store(device)
    from infera_kernels.triton.families import FAMILIES

    known = store.load().values()
    rows = []
    for m in sorted(known, key=lambda m: -m.predicted_seconds):
        family = FAMILIES.get(m.problem.family)
        if family is not None:
            rows.append(_row(Choice(family, m.problem, m.choice, m.predicted, m, 0)))
    if rows:
        table(COLUMNS, [(*row[:3], "", *row[4:]) for row in rows], title=f"{store.device}, Triton {store.triton}")
    else:
        note(f"nothing is measured on {store.device} with Triton {store.triton}: tiles are those predicted")
    if export is not None:
        write_file(store, export, list(known), store.runs())
        note(f"{len(rows)} measurements written to {export}")


def _export(session: Session, path: Path, measured: list[Measured]) -> None:
    store = session.tunable().store
    if store is None:
        raise DeviceError(f"{session.device.name} keeps no measurements")
    write_file(store, path, measured, [facts(session.device)])
    note(f"{len(measured)} measurements written to {path}")

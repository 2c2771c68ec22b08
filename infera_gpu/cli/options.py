"""Arguments and options that several commands take, and what they open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, cast

import typer

from infera_gpu.cli.console import downloading, working
from infera_gpu.opening import load
from infera_gpu.passes import Precision
from infera_gpu.session import Session

Model: TypeAlias = Annotated[
    str, typer.Argument(help="A file, a catalogue name (see `infera pull`), https:// or pypi://.", show_default=False)
]
Input: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "-i", "--input", help="name=x.npy, x.npy for the only input, all.npz, or name=1,2.5 for numbers. Repeatable."
    ),
]
Shape: TypeAlias = Annotated[
    list[str] | None, typer.Option("--shape", help="name=1,3,640,640; without a name for the only input. Repeatable.")
]
Device: TypeAlias = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or recording.")]
Threads: TypeAlias = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of a run on the CPU.", show_default="one for every core")
]
Compute: TypeAlias = Annotated[
    str,
    typer.Option("--precision", help="In what a float32 model is computed: fp32, tf32, fp16, bf16 or int8."),
]
Invariant: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="On a GPU: an entry has the same bits in every batch, at a cost in speed. The recording device shows "
        "whether there are kernels for it, no bits: it computes on NumPy.",
    ),
]
Accuracy: TypeAlias = Annotated[
    str, typer.Option("--accuracy", help="fast, or strict: the order of operations that the model writes.")
]
Jit: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--jit/--no-jit", help="Whether the CPU runs what numba compiles.", show_default="where numba is installed"
    ),
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", min=0, help="Of random inputs.")]


def locate(model: str, sha256: str | None = None) -> Path:
    """The model's file, downloaded with a progress bar where it is not here yet. Raises FetchError."""
    from infera_gpu.fetch import fetch

    with downloading(model) as progress:
        return fetch(model, sha256=sha256, progress=progress)


@contextmanager
def opened(
    model: str,
    path: Path,
    device: str,
    threads: int | None,
    precision: str = "fp32",
    batch_invariant: bool = False,
    accuracy: str = "fast",
    jit: bool | None = None,
) -> Iterator[Session]:
    """A session of a `model` that was located, closed at the end. Its name is that of the catalogue, or its file's.

    Raises ModelError, DeviceError and their kind.
    """
    from infera_gpu.catalogue import CATALOGUE

    name = model if model in CATALOGUE else path.name
    with working(f"loading {name}"):
        session = load(
            path,
            device=device,
            threads=threads,
            precision=cast(Precision, precision),
            batch_invariant=batch_invariant,
            accuracy=cast(Literal["fast", "strict"], accuracy),
            jit=jit,
        )
        session.name = name
    with session:
        yield session

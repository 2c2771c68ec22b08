"""`infera run`: one run, its outputs shown or written."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from infera_gpu.cli import options
from infera_gpu.cli.archive import write_npz
from infera_gpu.cli.console import note, table, working
from infera_gpu.cli.feeds import gather, on_random, read_feeds
from infera_gpu.errors import InputError
from infera_gpu.graph import HostArray
from infera_gpu.spec import spec_of


def command(
    model: options.Model,
    input: options.Input = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write every output to this .npz file.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Random values for the inputs not given.")] = False,
    shape: options.Shape = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    precision: options.Compute = "fp32",
    batch_invariant: options.Invariant = False,
    accuracy: options.Accuracy = "fast",
    jit: options.Jit = None,
    seed: options.Seed = 0,
) -> None:
    """Run a model once."""
    if output and output.suffix == ".npy":
        raise typer.BadParameter(
            f"{output}: outputs go to one .npz file, by their names; name it {output.with_suffix('.npz').name}",
            param_hint="--output",
        )
    if shape and not random:
        raise InputError("--shape is for random inputs; give --random too, or the arrays themselves with -i")
    path = options.locate(model)
    with options.opened(model, path, device, threads, precision, batch_invariant, accuracy, jit) as session:
        feeds = (
            gather(session.tensor_inputs, input, shape, seed)
            if random
            else read_feeds(input or [], session.tensor_inputs)
        )
        with working("running"), on_random(session.tensor_inputs, input) if random else nullcontext():
            outputs = session.run(feeds)
    if output:
        write_npz(output, outputs)
        note(f"{len(outputs)} output{'s' if len(outputs) != 1 else ''} written to {output}")
        return
    rows = [(name, str(spec_of(array)), *_statistics(array)) for name, array in outputs.items()]
    table(("output", "type", "min", "max", "mean", "first values"), rows, right=("min", "max", "mean"))


def _statistics(array: HostArray) -> tuple[str, str, str, str]:
    first = ", ".join(_number(v) for v in array.reshape(-1)[:4]) + (", ..." if array.size > 4 else "")
    if not array.size or array.dtype.kind in "OcS":
        return "", "", "", first
    wide = array.astype(np.float64)
    return _number(wide.min()), _number(wide.max()), _number(wide.mean()), first


def _number(value: object) -> str:
    return f"{float(value):.6g}" if np.isscalar(value) and not isinstance(value, (str, complex)) else str(value)

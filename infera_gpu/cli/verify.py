"""`infera verify`: whether two devices, or infera and onnxruntime, give the same answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from infera_gpu.cli import options
from infera_gpu.cli.console import table, working
from infera_gpu.cli.feeds import gather
from infera_gpu.errors import InferaError
from infera_gpu.graph import HostArray
from infera_gpu.verify import TOLERANCE, Difference, OnnxRuntime, compare

Outputs = Mapping[str, HostArray]
ONNXRUNTIME = "onnxruntime"
RESOLUTION = 2e-7
"""What onnxruntime's Sigmoid is off by at most (1.6e-7 measured), which shows where a whole output is close to zero."""


def command(
    model: options.Model,
    against: Annotated[
        str | None,
        typer.Option("--against", help="The reference: a device or onnxruntime. [cpu for a GPU, else onnxruntime]"),
    ] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", min=0, help="Of each output's peak.")] = TOLERANCE,
    input: options.Input = None,
    shape: options.Shape = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
) -> None:
    """Compare a model's outputs with a reference; exit 1 where they differ by more than the tolerance."""
    path = options.locate(model)
    with options.opened(path, device, threads) as session:
        feeds = gather(session.inputs, input, shape, seed)
        tested = session.device.name
        with working(f"running on {tested}"):
            got = session.run(feeds)
    reference = against or ("cpu" if tested.startswith("cuda") else ONNXRUNTIME)
    if reference == tested:
        raise InferaError(f"'{tested}' would be compared with itself; choose another --device or --against")
    with working(f"running on {reference}"):
        want = _run(path, reference, threads, feeds)
    found = compare(got, want)
    table(
        ("output", "max error / peak", "peak", ""),
        [_row(d, tolerance, reference) for d in found],
        title=f"{tested} against {reference}, tolerance {tolerance:g} of the peak",
        right=("max error / peak", "peak"),
    )
    if not all(d.within(tolerance) for d in found):
        wrong = [d for d in found if not d.within(tolerance)]
        raise InferaError(f"{len(wrong)} of {len(found)} outputs differ: {'; '.join(map(str, wrong[:3]))}")


def _run(path: Path, reference: str, threads: int | None, feeds: Mapping[str, HostArray]) -> Outputs:
    if reference == ONNXRUNTIME:
        return OnnxRuntime(path, threads=threads).run(feeds)
    with options.opened(path, reference, threads) as session:
        return session.run(feeds)


def _row(d: Difference, tolerance: float, reference: str) -> tuple[str, str, str, str]:
    verdict = "ok" if d.within(tolerance) else d.problem or "differs"
    if verdict == "differs" and reference == ONNXRUNTIME and d.error * d.peak < RESOLUTION:
        verdict = f"differs by less than {RESOLUTION:.1g}: onnxruntime's own Sigmoid is no closer"
    error = "equal" if d.error == 0 else f"{d.error:.3g}"
    return d.name, error, f"{d.peak:.6g}", verdict

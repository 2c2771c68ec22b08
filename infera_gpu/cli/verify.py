"""`infera verify`: whether two devices, or infera and a reference, give the same answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, cast

import typer

from infera_gpu.cli import options
from infera_gpu.cli.console import note, say, table, working
from infera_gpu.cli.feeds import gather, on_random
from infera_gpu.departures import departures
from infera_gpu.devices import check_name
from infera_gpu.errors import DeviceError, InferaError, InputError
from infera_gpu.graph import HostArray
from infera_gpu.passes import Precision
from infera_gpu.verify import (
    TOLERANCES,
    Difference,
    NotInstalledError,
    OnnxRuntime,
    compare,
    run_in_float64,
    widened,
)

Outputs = Mapping[str, HostArray]
ONNXRUNTIME, FLOAT64 = "onnxruntime", "float64"


def command(
    model: options.Model,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="The reference: a device, onnxruntime or float64; cpu for a GPU, else onnxruntime."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="Of each output's peak.", show_default="as the precision allows"),
    ] = None,
    first: Annotated[
        bool, typer.Option("--first", help="Show the first node whose output differs from the CPU's in float32.")
    ] = False,
    input: options.Input = None,
    shape: options.Shape = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    precision: options.Compute = "fp32",
    batch_invariant: options.Invariant = False,
    seed: options.Seed = 0,
) -> None:
    """Compare a model's outputs with a reference; exit 1 where they differ by more than the tolerance.

    onnxruntime is another implementation: it shows an operator that is wrong.

    float64 is infera's own plain operators in double precision: it shows which
    side rounds worse, with infera's error beside onnxruntime's where that is
    installed. The exit status is infera's. A model may ask for more than
    float32 can give, and then both differ.

    With another --precision than fp32 the reference is the CPU in float32.
    """
    if against is not None:
        _require_reference(against)
    path = options.locate(model)
    with options.opened(model, path, device, threads, precision, batch_invariant) as session:
        tested = session.device.name
        reference = against or ("cpu" if tested.startswith("cuda") or precision != "fp32" else ONNXRUNTIME)
        if reference == tested and precision == "fp32":
            raise InferaError(f"'{tested}' would be compared with itself; choose another --device or --against")
        feeds = gather(session.tensor_inputs, input, shape, seed)
        with working(f"running on {tested}"), on_random(session.tensor_inputs, input):
            got: Outputs = session.run(feeds)
    if tolerance is None:
        tolerance = TOLERANCES[cast(Precision, precision)]
    try:
        want = _run(path, reference, threads, feeds)
    except NotInstalledError as error:
        raise InferaError(f"{error}; or compare with infera's own operators: --against {FLOAT64}") from error
    peer: Mapping[str, Difference] = {}
    if reference == FLOAT64:
        got = widened(got)
        peer = {d.name: d for d in _errors_of_onnxruntime(path, threads, feeds, want)}
    found = compare(got, want)
    errors = "max error / peak"
    columns = ("output", errors, *((ONNXRUNTIME,) if peer else ()), "peak", "")
    table(
        columns,
        [_row(d, peer.get(d.name), tolerance) for d in found],
        title=f"{tested}{_computed(tested, precision)} against {reference}, tolerance {tolerance:g} of the peak",
        right=(errors, ONNXRUNTIME, "peak"),
    )
    if first:
        _show_first(path, feeds, device, threads, cast(Precision, precision), batch_invariant, tolerance)
    wrong = [d for d in found if not d.within(tolerance)]
    if wrong:
        hint = (
            f"; `infera verify {model} --against {FLOAT64}` tells whose rounding it is"
            if reference == ONNXRUNTIME
            else ""
        )
        raise InferaError(f"{len(wrong)} of {len(found)} outputs differ: {'; '.join(map(str, wrong[:3]))}{hint}")


def _require_reference(name: str) -> None:
    """Raises InputError for what is no reference, whether or not it is here."""
    if name in (ONNXRUNTIME, FLOAT64):
        return
    try:
        check_name(name)
    except DeviceError as error:
        raise InputError(f"--against: {error}, or {ONNXRUNTIME} or {FLOAT64}") from None


def _show_first(
    path: Path,
    feeds: Outputs,
    device: str,
    threads: int | None,
    precision: Precision,
    batch_invariant: bool,
    tolerance: float,
) -> None:
    """The first value inside the model that is not within the tolerance of the CPU's in float32."""
    seen = made = 0
    with working("comparing every value"):
        for departure in departures(
            path, feeds, device=device, threads=threads, precision=precision, batch_invariant=batch_invariant
        ):
            if not departure.difference.within(tolerance):
                unknown = f" and {departure.at - seen} that cannot be compared" if departure.at > seen else ""
                say(f"first to differ, after {seen} that agree{unknown}: {departure.node}: {departure.difference}")
                return
            seen, made = seen + 1, departure.made
    if 2 * seen > made:
        print(f"no value before the outputs differs, of {seen} that both sides compute")
    else:
        print(f"little could be compared: {seen} values, which agree{_of(made)}; what is wrong in others is not shown")


def _of(made: int) -> str:
    return f", of {made} that are made" if made else ""


def _computed(tested: str, precision: str) -> str:
    """In what the model is computed, for a title."""
    if precision == "fp32":
        return ""
    if precision == "tf32" and not tested.startswith("cuda"):
        return f" in float32 (only a GPU rounds to {precision}: what that changes is not shown)"
    return f" in {precision}"


def _run(path: Path, reference: str, threads: int | None, feeds: Outputs) -> Outputs:
    if reference in (ONNXRUNTIME, FLOAT64):
        with working(f"running in {reference}"):
            if reference == FLOAT64:
                return run_in_float64(path, feeds)
            return OnnxRuntime(path, threads=threads).run(feeds)
    with options.opened(path.name, path, reference, threads) as session, working(f"running on {reference}"):
        return session.run(feeds)


def _errors_of_onnxruntime(path: Path, threads: int | None, feeds: Outputs, want: Outputs) -> tuple[Difference, ...]:
    """onnxruntime's differences from the float64 outputs; none, with a note, where it cannot run the model."""
    try:
        outputs = _run(path, ONNXRUNTIME, threads, feeds)
    except InferaError as error:
        note(f"{error}; its errors are left out")
        return ()
    return compare(widened(outputs), want)


def _row(d: Difference, peer: Difference | None, tolerance: float) -> tuple[str, ...]:
    verdict = "ok" if d.within(tolerance) else d.problem or "differs"
    if peer is not None and not peer.within(tolerance):
        verdict += f"; {ONNXRUNTIME} differs" + ("" if d.within(tolerance) else " too")
    return d.name, _error(d), *(() if peer is None else (_error(peer),)), f"{d.peak:.6g}", verdict


def _error(d: Difference) -> str:
    return "equal" if d.error == 0 else f"{d.error:.3g}"

"""`infera inspect`: what a model is, and how it will run."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from infera_gpu.between import counted
from infera_gpu.cli import options
from infera_gpu.cli.console import note, say, table, working
from infera_gpu.cli.feeds import advice, free_dimensions, random_feeds, read_feeds, read_shapes
from infera_gpu.errors import InferaError
from infera_gpu.graph import HostArray
from infera_gpu.passes import Fired
from infera_gpu.picture import memory_svg
from infera_gpu.plan import Plan, Step
from infera_gpu.running import optimized
from infera_gpu.session import Session

PROFILE_RUNS = 5


def command(
    model: options.Model,
    shape: options.Shape = None,
    input: options.Input = None,
    time: Annotated[
        bool,
        typer.Option(
            "--time",
            help=f"Time every step, over {PROFILE_RUNS} runs. On the recording device NumPy on this CPU is timed, no "
            "kernel.",
        ),
    ] = False,
    svg: Annotated[Path | None, typer.Option("--svg", help="Draw memory over the steps to this .svg file.")] = None,
    passes: Annotated[bool, typer.Option("--passes", help="List what every pass did to the model.")] = False,
    device: options.Device = "auto",
    threads: options.Threads = None,
    precision: options.Compute = "fp32",
    batch_invariant: options.Invariant = False,
    accuracy: options.Accuracy = "fast",
    jit: options.Jit = None,
    seed: options.Seed = 0,
) -> None:
    """Show a model's inputs, outputs and operators, and its plan: kernels, offsets, bytes, times."""
    if svg is not None:
        _require_drawable(svg)
    path = options.locate(model)
    with options.opened(model, path, device, threads, precision, batch_invariant, accuracy, jit) as session:
        given = read_feeds(input or [], session.tensor_inputs)
        shapes = read_shapes(shape or [], session.tensor_inputs)
        _show_model(session)
        if passes:
            _show_passes(session)
        if session.device.space == "device" and session.device.tiles is None:
            print(f"{NO_KERNELS}\n")
        free = free_dimensions(session.tensor_inputs, {**shapes, **given})
        if free:
            name = free[0].split(" ")[0].rpartition("[")[0]
            example = ",".join(str(d) if isinstance(d, int) else "1" for d in session.tensor_inputs[name].shape)
            note(f"free dimensions: {', '.join(free)}. Give them to see the plan, as in --shape {name}={example}")
            if asked := [option for option, wanted in (("--time", time), ("--svg", svg)) if wanted]:
                raise typer.BadParameter("there is no plan without these dimensions", param_hint=" and ".join(asked))
            return
        feeds = random_feeds(session.tensor_inputs, given, shapes, seed)
        plans = _show_plans(session, feeds, given)
        if svg is not None:
            _draw(plans, svg)
        if time:
            _show_times(session, feeds)


NO_KERNELS = (
    "This is not what a GPU runs with its kernels: Triton is not installed, and without it most steps are CuPy's "
    "functions, which allocate and no CUDA graph holds. pip install 'infera-gpu[kernels]' shows the plans of a GPU; "
    "cuda12 and cuda13 bring it too"
)


def _show_model(session: Session) -> None:
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in session.graph.opsets.items())
    say(f"{session.name}: opset {opsets}, {session.constant_bytes:,} bytes of constants")
    sides = (("input", session.inputs), ("output", session.outputs))
    table(("", "name", "type"), [(side, name, str(spec)) for side, specs in sides for name, spec in specs.items()])
    counts = Counter(node.qualified for graph in session.graph.walk() for node in graph.nodes)
    table(
        ("operator", "count"),
        [(op, str(n)) for op, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))],
        title=f"nodes after optimisation: {counts.total()}",
        right=("count",),
    )


def _show_passes(session: Session) -> None:
    """What every pass that changed something did, to the model and its subgraphs together."""
    times, less, more = Counter[str](), defaultdict[str, Counter[str]](Counter), defaultdict[str, Counter[str]](Counter)

    def add(fired: Fired) -> None:
        times[fired.name] += fired.times
        less[fired.name] += fired.before - fired.after
        more[fired.name] += fired.after - fired.before

    optimized(session.loaded, session.device, add, session.precision)
    total = before = sum(len(graph.nodes) for graph in session.loaded.walk())
    rows = []
    for name, count in times.items():
        after = before + more[name].total() - less[name].total()
        rows.append((name, str(count), str(before), str(after), _named(less[name]), _named(more[name])))
        before = after
    columns = ("pass", "fired", "nodes before", "after", "went", "came")
    table(columns, rows, title=f"passes: {total} nodes become {before}", right=columns[1:4])


def _named(ops: Counter[str]) -> str:
    """Operators and how many of each, the most first."""
    ordered = sorted(ops.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {op}" for op, count in ordered)


def _require_drawable(path: Path) -> None:
    """Raises BadParameter, before anything is done, for what a drawing should not or cannot be written to."""
    if path.suffix.lower() not in ("", ".svg"):
        named = path.with_suffix(".svg").name
        raise typer.BadParameter(f"{path}: the drawing is SVG; name it {named}", param_hint="--svg")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{path}: there is no folder {path.parent}", param_hint="--svg")


def _draw(plans: Sequence[Plan], path: Path) -> None:
    """The memory of the plan with the largest arena."""
    plan = max(plans, key=lambda p: p.arena_bytes)
    try:
        path.write_text(memory_svg(plan))
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint="--svg") from None
    note(f"memory over {len(plan.steps)} steps: {path}")


def _show_plans(session: Session, feeds: Mapping[str, HostArray], given: Mapping[str, HostArray]) -> Sequence[Plan]:
    """Every segment's plan. What follows the first depends on values, so it is shown for these feeds, which are random
    but for those `given`."""
    problem = None
    with working("planning"):
        plans: tuple[Plan, ...] = (session.plan_for(feeds),)
        if not plans[0].segment.is_last:
            try:
                plans = session.plans(feeds)
            except InferaError as error:  # random values need not make sense to the model
                problem = error
    print("\n\n".join(map(str, plans)))
    _show_bodies(session)
    if problem is not None:
        note(f"the rest cannot be planned: {problem}{advice(problem, session.tensor_inputs, given)}")
    return plans


def _show_bodies(session: Session) -> None:
    """How many steps the subgraphs of Loop and its kind have had in runs, and what they are run by."""
    found: defaultdict[str, list[Plan]] = defaultdict(list)
    for body in session.inside():
        found[f"{body.node}: with these values its {body.name}"] += body.plans
    for body_of, plans in found.items():
        print(f"\n{body_of} {_steps(plans) if plans else 'does not run, and has no plan'}")


def _steps(plans: Sequence[Plan]) -> str:
    via = Counter(step.via for plan in plans for step in plan.steps)
    steps = via.total()
    via["on NumPy between plans"] += sum(not e.node.subgraphs for plan in plans for e in plan.segment.eager)
    ways = _named(+via)
    return f"has {counted(steps, 'step')}, in {counted(len(plans), 'plan')} on {plans[0].device}{ways and f': {ways}'}"


def _show_times(session: Session, feeds: Mapping[str, HostArray]) -> None:
    with working("timing"):
        session.profile(feeds)
        runs = [session.profile(feeds) for _ in range(PROFILE_RUNS)]
    steps = [timing.step for timing in runs[0]]
    medians = [statistics.median(run[i].seconds for run in runs) for i in range(len(steps))]
    total = sum(medians) or 1.0
    columns = ("#", "step", "via", "ms", "share")
    table(
        columns,
        [_timed(i, step, seconds, total) for i, (step, seconds) in enumerate(zip(steps, medians, strict=True))],
        title=f"steps: {len(steps)}, {1e3 * total:.3f} ms in all; medians of {PROFILE_RUNS} runs{_of_what(session)}",
        right=("#", "ms", "share"),
    )
    print(f"\npacked for these kernels, beside the constants: {session.packed_bytes:,} bytes")


def _of_what(session: Session) -> str:
    """Whose times they are, where that is not the kernels that the plan names."""
    if session.device.name != "recording":
        return ""
    return "\nof NumPy on this CPU, which stands in for the kernels: they say nothing of a GPU"


def _timed(index: int, step: Step, seconds: float, total: float) -> tuple[str, ...]:
    return str(index), step.label, step.how, f"{1e3 * seconds:.4f}", f"{100 * seconds / total:.1f}%"

"""What was derived for a model and why, for a human."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from infera_server.models.loaded import Loaded
from infera_server.models.model import threads_of
from infera_server.models.repository import Entry
from infera_server.pipelines.generator import Generator
from infera_server.pipelines.response_cache import Cached
from infera_server.pipelines.sequence_model import SequenceModel
from infera_server.scheduling.goal import told
from infera_server.scheduling.signature import Signature, Tensor
from infera_server.settings import Settings


def bytes_text(n: int) -> str:
    """1536 -> '1.5 KiB'."""
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def lines(entry: Entry, settings: Settings) -> Iterator[str]:
    """Lines about a loaded or failed model, each of which says which."""
    title = str(entry.source)
    if entry.loaded is None:
        yield f"error: {title}: cannot be served: {' '.join(entry.reason.split())}"
        return
    for what, text in _facts(entry.loaded, settings, str(entry.source.path)):
        yield f"{title}: {what}: {text}"


def panel(entry: Entry, settings: Settings) -> Panel:
    """A panel about a loaded or failed model."""
    title = f"{entry.source.name} version {entry.source.version}"
    if entry.loaded is None:
        return Panel(escape(entry.reason), title=f"[red]{escape(title)}: cannot be served", title_align="left")
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()
    for what, text in _facts(entry.loaded, settings, str(entry.source.path)):
        rows.add_row(what, escape(text))
    return Panel(rows, title=f"[green]{escape(title)}", title_align="left")


def _facts(loaded: Loaded, settings: Settings, path: str) -> list[tuple[str, str]]:
    model = loaded.model
    head = [("file", path), *(("ignored", note) for note in loaded.notes)]
    if model is None:
        return [*head, *_tensors(loaded.front.signature)]
    signature, batching = model.signature, model.batching
    settings = loaded.definition.tuned(settings)
    threads, why = threads_of(settings)
    on_cpu = model.device == "cpu"
    device = f"{model.device}, {threads} thread{'s' if threads > 1 else ''}: {why}" if on_cpu else model.device
    facts = [*head, ("device", device), *_tensors(signature)]
    if batching.refusal:
        facts.append(("warning", f"no request that was tried can be run: {batching.refusal}"))
    facts.append(("batching", batching.reason))
    if batching.padding:
        facts.append(("padding", batching.padding))
    if signature.layout:
        buckets = ", ".join(map(str, signature.layout.buckets))
        facts.append(("buckets", f"{buckets}: a batch runs in the one that takes the least time a row"))
    at = f" at {', '.join(f'{k}={v}' for k, v in batching.sizes.items())}" if batching.sizes else ""
    if batching.arena_bytes:
        arenas = "; ".join(f"batch {rows}: {bytes_text(n)}" for rows, n in batching.arena_bytes.items())
        facts.append(("arena", arenas + at))
    else:
        facts.append(("arena", "depends on the request's shape"))
    front = loaded.front.model if isinstance(loaded.front, Cached) else loaded.front
    if isinstance(front, SequenceModel):
        facts.append(("sequences", front.recurrence.reason))
    if isinstance(front, Generator):
        facts.append(("generates", front.how.described))
    if front is not loaded.front:
        facts.append(("cache", "equal requests are answered once"))
    if model.measured:
        times = "; ".join(f"batch {rows}: {told(seconds)}" for rows, seconds in model.measured.items())
        facts.append(("run times", times + at))
    if (goal := model.stats.goal) is not None:
        facts.append(("goal", goal.state))
    limits = (
        f"{settings.max_queue} waiting requests, {bytes_text(settings.max_queue_bytes)} of them, "
        f"{bytes_text(settings.max_body_bytes)} a body, {model.timeout:g} s a request"
    )
    facts.append(("limits", limits))
    return facts


def _tensors(signature: Signature) -> list[tuple[str, str]]:
    layout = signature.layout
    return [
        (kind, _tensor(tensor, axes.get(tensor.name)))
        for kind, tensors, axes in (
            ("input", signature.inputs, layout.inputs if layout else {}),
            ("output", signature.outputs, layout.outputs if layout else {}),
        )
        for tensor in tensors.values()
    ]


def _tensor(tensor: Tensor, batch_axis: int | None) -> str:
    dims = ["batch" if axis == batch_axis else "any" if d < 0 else str(d) for axis, d in enumerate(tensor.shape)]
    return f"{tensor.name}: {tensor.datatype} [{', '.join(dims)}]"

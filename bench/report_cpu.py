"""What results on a CPU say, as tables and a chart: one renderer for each topic of bench/results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench.charts import bars
from bench.cpu_targets import OLDER, TARGETS, Target, mean, trained

Result = Mapping[str, Any]
"""The contents of a results file."""

OURS, COMPILED, PEER = "infera", "infera[jit]", "onnxruntime"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; all columns but the first are numbers."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def time_of(ms: float) -> str:
    """Milliseconds with three digits."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def whole_models(result: Result) -> str:
    """Medians of wall time; the ratio is ours over onnxruntime's."""

    def cells(row: Mapping[str, Any]) -> list[str]:
        times = {name: s["wall_ms"] for name, s in row["summaries"].items()}
        made = [f"{row['model']} {row['example']}", str(row["threads"])]
        made += [time_of(times[name]) if name in times else "" for name in (OURS, COMPILED, PEER)]
        return [*made, *(f"{times[n] / times[PEER]:.2f}" if n in times else "" for n in (OURS, COMPILED))]

    header = ("model", "threads", "infera, ms", "with numba", "onnxruntime", "ratio", "with numba")
    return table(header, (cells(row) for row in result["rows"] if not row["failure"]))


def speeds(result: Result) -> str:
    """A chart: how many times as fast as onnxruntime each model is, the first example with one thread."""
    shown: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        if row["threads"] == 1 and not row["failure"] and row["model"] not in shown:
            times = {name: s["wall_ms"] for name, s in row["summaries"].items()}
            shown[row["model"]] = {n: times[PEER] / times[n] for n in (OURS, COMPILED) if n in times}
    return bars("CPU, one thread: speed against onnxruntime", shown, unit="times as fast as onnxruntime", one=True)


def means(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Geometric means of the ratios over the trained models' first examples, by the number of threads."""
    for threads in sorted({row["threads"] for row in rows}):
        for key, what in (("wall", "infera"), ("compiled_wall", "jit")):
            if (found := mean(threads, key)(rows)) is not None:
                where = f"{what}, {threads} thread{'s' if threads > 1 else ''}"
                yield f"{where}: {found:.2f}, mean of {len(trained(rows, threads, key))} trained models"


def targets(newest: Mapping[str, Result]) -> str:
    """What is to be reached, held against the newest files of one processor by topic, and why what is missed is."""
    rows, reasons, older = [], dict[str, list[str]](), dict[str, str]()
    for target in TARGETS:
        if (found := _judged(target, newest)) is None:
            continue
        value, topic = found
        if not (met := target.met(value)):
            reasons.setdefault(target.why, []).append(target.work)
            commit = newest[topic].get("environment", {}).get("commit", "")[:10]
            if commit in OLDER:
                title, _ = SECTIONS[topic]
                older[title] = f"measured at {commit}, before {OLDER[commit]}; not again since, for want of the machine"
        bound = "at most" if target.at_most else "at least"
        rows.append([target.work, f"{bound} {target.goal:g}", f"{value:.3g}", "met" if met else "**missed**"])
    said = [f"- {'; '.join(works)}: {why}" for why, works in reasons.items() if why]
    said += [f"- All that is missed of *{title}*: {what}." for title, what in older.items()]
    return "\n\n".join([table(("work", "target", "measured", ""), rows), "\n".join(said)]).rstrip()


def _judged(target: Target, newest: Mapping[str, Result]) -> tuple[float, str] | None:
    """What was measured, and the topic whose file says so; None where none does."""
    for topic in target.topics:
        if topic in newest and (value := target.judge(newest[topic]["rows"])) is not None:
            return value, topic
    return None


def first(result: Result) -> str:
    """Load and first inference in a fresh process, one thread, without imports. Where there is more than one ratio, the
    first is that of a model which was loaded on the machine twice before: small ones keep their optimised graph, since
    0dc414ca7a their plan and since 085fdffc7c how that was bound; the last is with numba, which has compiled its
    functions before."""

    rows = [row for row in result["rows"] if not row["failure"]]
    columns = {"ratio": "ratio", "new_ratio": "without that", "compiled_ratio": "with numba"}
    given = [key for key in columns if all(key in row for row in rows)]

    def cells(row: Mapping[str, Any]) -> list[str]:
        ours, peer = row["milliseconds"][OURS], row["milliseconds"][PEER]
        times = (ours["load"], ours["run"], ours["first"], peer["first"])
        return [row["model"], *map(time_of, times), *(f"{row[key]:.2f}" for key in given)]

    header = ("model", "load, ms", "first run", "both", "onnxruntime", *map(columns.__getitem__, given))
    return table(header, map(cells, rows))


def shapes(result: Result) -> str:
    """Each run in a shape that is new, and in shapes seen before: medians, and the slowest of new ones."""

    def cells(row: Mapping[str, Any]) -> list[str]:
        made = [row["model"] + (", numba" if row.get("runtime") == COMPILED else "")]
        for which, shown in (("new", ("median", "worst")), ("again", ("median",))):
            times = row[which]["milliseconds"]
            made += [time_of(times[name][what]) for what in shown for name in (OURS, PEER)]
            made.append(f"{row[which]['ratio']:.2f}")
        made += [f"{row['new']['planning_micros_a_node'][what]:.0f}" for what in ("median", "worst")]
        onnx = row["new"].get("onnx_micros_a_node")
        return [*made, "" if onnx is None else f"{onnx:.1f}"]

    header = (
        *("model", "new shape, ms", "onnxruntime", "slowest, ms", "onnxruntime", "ratio"),
        *("seen shape, ms", "onnxruntime", "ratio", "planning, µs a node", "slowest", "onnx's inference, µs a node"),
    )
    return table(header, (cells(row) for row in result["rows"] if not row["failure"]))


def resident(result: Result) -> str:
    """Memory of a process, in MB: after loading, and at its peak."""
    found = {(r["model"], r["threads"], r["runtime"]): r for r in result["rows"]}
    keys = dict.fromkeys((model, threads) for model, threads, _ in found)
    names = [name for name in (OURS, COMPILED, PEER) if any(name == runtime for _, _, runtime in found)]

    def cells(model: str, threads: int) -> list[str]:
        sizes = [found[model, threads, name][what] / 1e6 for what in ("loaded", "peak") for name in names]
        return [model, str(threads), *(f"{size:.0f}" for size in sizes)]

    header = ("model", "threads", *(f"{name}, {what} MB" for what in ("loaded", "peak") for name in names))
    return table(header, (cells(*key) for key in keys))


def dispatch(result: Result) -> str:
    """A chain of small nodes: microseconds each."""
    rows = ([name, f"{t:.3f}"] for row in result["rows"] for name, t in row["micros_a_node"].items())
    return table(("who runs it", "µs a node"), rows)


def serving(result: Result) -> str:
    """Requests a second over HTTP, and their latencies."""

    def cells(row: Mapping[str, Any]) -> list[str]:
        made = [row["server"], row["body"], str(row["connections"]), f"{row['rps']:,.0f}"]
        return [*made, f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}", f"{row['cpu_us']:.0f}"]

    header = ("server", "body", "connections", "requests/s", "median, ms", "p99, ms", "CPU, µs")
    return table(header, (cells(row) for row in result["rows"]))


def serving_grpc(result: Result) -> str:
    """Requests a second over gRPC from callers that wait for each answer; aio, threads and processes only echo.

    `handler` does what `pick` does, in ten lines of one handler.
    """

    def cells(row: Mapping[str, Any]) -> list[str]:
        made = [row["server"], str(row["callers"]), f"{row['rps']:,.0f}"]
        return [*made, f"{row['p50_ms']:.2f}", f"{row['cpu_us']:.0f}"]

    header = ("server", "callers", "requests/s", "median, ms", "CPU, µs")
    return table(header, (cells(row) for row in result["rows"]))


_OVERLOAD = {
    "peak_rps": "requests/s at its peak",
    "asked_rps": "asked for while overloaded",
    "goodput_rps": "answered of these",
    "goodput": "of the peak",
    "busy_at_peak": "processor of the thread that runs the model, at the peak",
    "busy": "while overloaded",
    "answer_p99_ms": "p99 of answers, ms",
    "refusal_p50_ms": "median of refusals, ms",
    "refusal_p99_ms": "p99 of refusals, ms",
    "memory_before_mb": "memory before, MB",
    "memory_end_mb": "at the end, MB",
    "lost": "lost",
    "recovery_s": "until answers are as before, s",
}


def overload(result: Result) -> str:
    """Ten times what the server can do, by where the model runs."""
    known = [(key, text) for key, text in _OVERLOAD.items() if key in result["rows"][0]]  # older results have fewer
    lasted = ["seconds of overload", *(f"{result['options']['seconds']:g}" for _ in result["rows"])]
    rows = ([text, *(f"{row[key]:,.3g}" for row in result["rows"])] for key, text in known)
    return table(["", *(f"in {row['engine']}" for row in result["rows"])], [lasted, *rows])


def trees(result: Result) -> str:
    """As whole models."""
    return whole_models(result)


def quantized(result: Result) -> str:
    """How far models that quantise on the way are from each other: runs in which no rounding fell another way."""
    rows = ([r["model"], r["pair"], f"{r['same']} of {r['runs']}", f"{r['largest']:.1e}"] for r in result["rows"])
    return table(("model", "between", "the same", "largest difference, of the peak"), rows)


SECTIONS: Mapping[str, tuple[str, Callable[[Result], str]]] = {
    "": ("Whole models", whole_models),
    "first": ("Load and first inference", first),
    "shapes": ("A new shape in every run", shapes),
    "resident": ("Memory", resident),
    "dispatch": ("Small nodes", dispatch),
    "trees": ("Ensembles of trees", trees),
    "quantized": ("Models that quantise on the way", quantized),
    "serving": ("Serving", serving),
    "serving-peers": ("Serving, beside Python servers", serving),
    "serving-grpc": ("Serving over gRPC", serving_grpc),
    "overload": ("Overload", overload),
}
"""By topic, as results files are named: the title, and what renders it."""
CHARTED = "quick"
"""The topic with all models, of which the chart is made."""

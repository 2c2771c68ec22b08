"""`python -m bench.report`: docs/performance.md, its charts and the README's tables, from bench/results alone.

Measurements are under "Measured", predictions under "Predicted"; no table or chart has both.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path

from bench import report_cpu, report_gpu, report_readme
from bench.environment import RESULTS
from bench.report_cpu import CHARTED, SECTIONS, Result

DOCUMENT = "performance.md"
DOCS = Path(__file__).parents[1] / "docs"
README = DOCS.parent / "README.md"
PREDICTED_CHART = "performance-predicted.svg"
SHOWN = "H200"
"""The card whose predicted rows are drawn."""

TUNED = (
    "Targets go by infera as it is: by tiles that were measured on the machine where any were, before rows were timed, "
    "else by predicted ones. What tuning gains shows against *infera, predicted tiles*."
)
_DATE = re.compile(r"-\d{4}-\d\d-\d\d$")


def read(directory: Path = RESULTS) -> dict[str, Result]:
    """The results files by name, without their suffix."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def on_cpus(results: Mapping[str, Result]) -> dict[tuple[str, str], tuple[str, Result]]:
    """Processor and topic -> the newest file's name and contents."""
    found: dict[tuple[str, str], tuple[str, Result]] = {}
    for name, result in results.items():
        if "environment" not in result:
            continue
        host = result["environment"]["host_class"]
        topic = _DATE.sub("", name).removeprefix(host).strip("-")
        had = found.get((host, topic))
        if had is None or had[1]["environment"]["time"] <= result["environment"]["time"]:
            found[host, topic] = name, result
    return found


def on_gpus(results: Mapping[str, Result]) -> dict[str, list[Result]]:
    """GPU -> the files measured on it that have rows."""
    found: dict[str, list[Result]] = {}
    for result in results.values():
        if "gpu" in result and report_gpu.rows_of([result]):
            found.setdefault(result["gpu"]["name"], []).append(result)
    return found


def predicted(results: Mapping[str, Result]) -> list[Result]:
    """The files of predictions, the card with the fastest memory first."""
    found = [result for result in results.values() if result.get("predicted")]
    return sorted(found, key=lambda result: -float(result["card"]["bytes_per_s"]))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def render(results: Mapping[str, Result]) -> dict[str, str]:
    """File name -> contents: the document and its charts."""
    files: dict[str, str] = {}
    gpus, guesses = on_gpus(results), predicted(results)
    parts = ["# Performance", _opening(gpus), "Made by `make report` from the files in bench/results; a test compares."]
    parts.append("## Measured on GPUs")
    if not gpus:
        parts += [
            "Nothing yet. What is to be reached, of which `make gpu-speed` measures every line:",
            report_gpu.targets([]),
        ]
    cards = {result["card"]["name"]: result["card"] for result in guesses}
    for name, found in gpus.items():
        parts += _gpu(name, found, cards, files)
    parts.append("## Measured on CPUs")
    parts.append("Against onnxruntime in the same process or in turn with it; a ratio is our time over its time.")
    parts += _cpus(results, files)
    if guesses:
        parts += _predictions(guesses, files)
    files[DOCUMENT] = "\n\n".join(parts) + "\n"
    return files


def _opening(gpus: Mapping[str, object]) -> str:
    if not gpus:
        return (
            "**No GPU measurement exists yet.** What is said of GPUs below is a target, or predicted by a model that "
            "no measurement has confirmed, and says so. What is said of CPUs is measured."
        )
    return f"Measured on CPUs and on {', '.join(gpus)}. What is predicted is in a section of its own, at the end."


def _gpu(name: str, found: list[Result], cards: Mapping[str, Mapping[str, object]], files: dict[str, str]) -> list[str]:
    rows = report_gpu.rows_of(found)
    right = report_gpu.right(rows)
    parts = [f"### {name}", report_gpu.provenance(found)]
    if any(row.get("tuned") for row in rows):
        parts.append(TUNED)
    parts += [part for part in (report_gpu.targets(rows), report_gpu.tuning(found)) if part]
    if any(report_gpu.others(row) and row["set"] in ("networks", "decoder") for row in right):
        chart = f"performance-{slug(name)}-networks.svg"
        files[chart] = report_gpu.throughput(name, right)
        parts.append(f"![networks on {name}, measured]({chart})")
    card = next((card for known, card in cards.items() if re.search(rf"\b{known.split()[0]}\b", name)), None)
    points = report_gpu.points(right, "seconds")
    if card is not None and points:
        chart = f"performance-{slug(name)}-roofline.svg"
        files[chart] = report_gpu.chart_of(f"{name}: measured", points, card)
        parts.append(f"![roofline of {name}, measured]({chart})")
    return [*parts, report_gpu.measured(rows)]


COMMANDS: Mapping[str, str] = {
    "": "python -m bench",
    "quick": "python -m bench --quick",
    "serving-peers": "python -m bench.serving",
}
"""By topic, what made its results where that is no module of the topic's name."""


def _cpus(results: Mapping[str, Result], files: dict[str, str]) -> list[str]:
    parts = []
    newest = on_cpus(results)
    for host in dict.fromkeys(host for host, _ in newest):
        parts += [f"### {host}", report_cpu.targets({t: result for (h, t), (_, result) in newest.items() if h == host})]
        if charted := newest.get((host, CHARTED)):
            chart = f"performance-{slug(host)}.svg"
            files[chart] = report_cpu.speeds(charted[1])
            parts.append(f"![speed of all models against onnxruntime on {host}]({chart})")
            parts.append(_source("The chart is of fewer rounds than the table below.", CHARTED, *charted))
            means = "; ".join(report_cpu.means(charted[1]["rows"]))
            parts.append(f"Geometric means of the ratios over the first examples of these models: {means}.")
        for topic, (title, section) in SECTIONS.items():
            if entry := newest.get((host, topic)):
                said = " ".join((section.__doc__ or "").split())
                parts += [f"#### {title}", _source(said, topic, *entry), section(entry[1])]
    return parts


def _source(said: str, topic: str, name: str, result: Result) -> str:
    command = COMMANDS.get(topic, f"python -m bench.{topic.replace('-', '_')}")
    versions = result["environment"]["packages"]
    peers = ", ".join(f"{p} {versions[p]}" for p in ("numpy", "numba", "onnxruntime") if p in versions)
    commit = result["environment"]["commit"][:10]
    return f"{said} By `{command}`: bench/results/{name}.json, commit {commit}, {peers}."


def _predictions(guesses: list[Result], files: dict[str, str]) -> list[str]:
    assumed = guesses[0]["assumed"]
    said = (
        "Nothing in this section has run. Operations and bytes are counted from plans, launches by binding them; of a "
        f"card's peaks {assumed['operations']:.0%} of the operations and {assumed['memory']:.0%} of the bandwidth are "
        f"taken for reached, and {assumed['launch_seconds'] * 1e6:g} µs for the least that a launch takes. The "
        "prediction is that for all launches, and for each step the larger of the two times: it knows nothing of tiles "
        "that do not fill the card, of registers or of caches, and is a bound more than a forecast."
    )
    parts = ["## Predicted for GPUs, not measured", said, report_gpu.predictions(guesses)]
    shown = next((r for r in guesses if r["card"]["name"] == SHOWN), None)
    if shown is not None:
        files[PREDICTED_CHART] = report_gpu.chart_of(
            f"{SHOWN}: PREDICTED, not measured", report_gpu.points(shown["rows"], "predicted_seconds"), shown["card"]
        )
        parts.append(f"![roofline of the {SHOWN}, predicted and not measured]({PREDICTED_CHART})")
    cards = ", ".join(f"{r['card']['name']} ({r['card']['source']})" for r in guesses)
    return [*parts, f"Peaks: {cards}. Rows of single operators: bench/results/predictions-*.json."]


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS, metavar="DIR", help="where the document goes (docs)")
    options = parser.parse_args()
    results = read()
    files = {options.out / name: text for name, text in render(results).items()}
    if options.out == DOCS:
        files[README] = report_readme.filled(README.read_text(), on_cpus(results))
    for path, text in files.items():
        path.write_text(text)
        print(path)


if __name__ == "__main__":
    main()

"""What results on GPUs say, and apart from them what is predicted for GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench.charts import Point, bars, roofline
from bench.environment import CHANGED
from bench.gpu_targets import TARGETS, mean_gain
from bench.report_cpu import Result, table, time_of

Row = Mapping[str, Any]

_ROOFS = {"half": "float16", "tf32": "tf32", "ieee": "float32"}


def rows_of(results: Iterable[Result]) -> list[Row]:
    """The measured rows of results of one GPU, the newest of each, and of one commit and packages those that were tuned
    before others. What that does not have, as peers that it was not timed beside, it has from others of them; so one
    that was wrong there is so still."""
    found: dict[tuple[str, ...], tuple[object, Row]] = {}
    for result in sorted(results, key=lambda r: str(r["time"])):
        commit = result["commit"]
        certain = commit != "unknown" and not commit.endswith(CHANGED)
        made_by = (commit, result["packages"]) if certain else result["time"]
        for section in result["sections"]:
            for row in section["facts"].get("rows", ()):
                if "seconds" not in row:
                    continue
                same, earlier = found.get(_key(row), (None, row))
                found[_key(row)] = made_by, _both(earlier, row) if same == made_by else row
    return [row for _, row in found.values()]


def _both(earlier: Row, later: Row) -> Row:
    """The later row with the earlier one's peers; the other way round where only the earlier one was tuned."""
    if earlier.get("tuned") and not later.get("tuned"):
        earlier, later = later, earlier
    return {**earlier, **later, "peers": {**earlier["peers"], **later["peers"]}}


def right(rows: Iterable[Row]) -> list[Row]:
    """Those whose answers were."""
    return [row for row in rows if "wrong" not in row]


def targets(rows: Sequence[Row]) -> str:
    """Every target, and what was measured of it; where tiles were tuned, of how many of its rows."""
    any_tuned = any(row.get("tuned") for row in rows)

    def cells() -> Iterator[list[str]]:
        for target in TARGETS:
            goal = f"{'at most' if target.at_most else 'at least'} {target.goal:g}{target.unit}"
            reached = target.reached(rows)
            shown = "not measured" if reached.value is None else f"{reached.value:.3g}{target.unit}"
            tuned = [f"{reached.tuned} of {reached.rows}" if reached.tuned else ""]
            yield [target.work, goal, shown, target.verdict(reached), *(tuned if any_tuned else [])]

    return table(("work", "target", "measured", "", *(["rows tuned"] if any_tuned else [])), cells())


def tuning(results: Iterable[Result]) -> str:
    """What tuning has found, set by set; empty where nothing was tuned. Of a row the last time that it was measured."""
    found: dict[str, Row] = {}
    for result in sorted(results, key=lambda r: str(r["time"])):
        for section in result["sections"]:
            found |= {row["row"]: row for row in section["facts"].get("tuned", ()) if row["measured"]}

    def cells(name: str) -> list[str]:
        rows = [row for row in found.values() if row["set"] == name]
        counts = (sum(row[column] for row in rows) for column in ("measured", "better_than_predicted"))
        return [
            name,
            *map(str, (len(rows), *counts)),
            f"{mean_gain(rows):.2f}x",
            str(sum(len(row["rejected"]) for row in rows)),
        ]

    header = ("tuned", "rows", "choices measured", "better than predicted", "mean gain", "candidates rejected")
    return table(header, (cells(name) for name in dict.fromkeys(row["set"] for row in found.values()))) if found else ""


def measured(rows: Sequence[Row]) -> str:
    """All measured rows, set by set; of wrong ones why, and no figures. Rates are of the time with a flushed L2 cache
    where there is one."""

    def cells(row: Row) -> list[str]:
        name = f"{row['name']} {row['precision']}".strip()
        if "wrong" in row:
            return [name, *[""] * 6, f"wrong: {row['wrong']}"]
        cold = row.get("cold", {})
        ours = cold.get("infera")
        beside = [
            f"{t / row['seconds']:.2f}x {peer}" + (f" ({cold[peer] / ours:.2f}x cold)" if ours and peer in cold else "")
            for peer, t in row["peers"].items()
        ]
        if "error_against_float32" in row:
            beside.append(f"error {row['error_against_float32']:.1e} against float32")
        rate = f"{row['operations_per_s'] / 1e12:.1f}" if row.get("operations") else ""
        moved = f"{row['bytes_per_s'] / 1e9:,.0f}" if "bytes_per_s" in row else ""
        share = f"{row['fraction']:.0%}" if "fraction" in row else ""
        return [
            name,
            time_of(row["seconds"] * 1e3) + (f", {time_of(ours * 1e3)} cold" if ours else ""),
            _spread(row),
            rate,
            moved,
            share,
            f"{row['tuned']} of {row['choices']}" if row.get("tuned") else "",
            ", ".join(beside),
        ]

    header = ("row", "ms", "least to most", "TFLOP/s", "GB/s", "of the roofline", "choices tuned", "against")
    sets = dict.fromkeys(row["set"] for row in rows)
    return "\n\n".join(f"#### {name}\n\n{table(header, (cells(r) for r in rows if r['set'] == name))}" for name in sets)


def _spread(row: Row) -> str:
    """Of our rounds, in milliseconds."""
    least, most = row.get("spread", {}).get("infera", (None, None))
    return "" if least is None else f"{time_of(least * 1e3)} to {time_of(most * 1e3)}"


def provenance(results: Sequence[Result]) -> str:
    """Commit, device, driver and versions of each file."""
    lines = []
    for result in results:
        gpu, packages = result["gpu"], result["packages"]
        versions = ", ".join(f"{name} {packages[name]}" for name in packages)
        lines.append(
            f"- {result['time']}: {gpu['name']}, driver {gpu['driver']}, commit {result['commit'][:10]}, {versions}"
        )
    return "\n".join(lines)


def others(row: Row) -> Mapping[str, float]:
    """The seconds of peers that are not infera in another way."""
    return {peer: seconds for peer, seconds in row["peers"].items() if not peer.startswith("infera")}


def throughput(name: str, rows: Sequence[Row]) -> str:
    """A chart: networks against their peers."""
    shown = {
        f"{row['name']} {row['precision']}": {peer: t / row["seconds"] for peer, t in others(row).items()}
        for row in rows
        if others(row) and row["set"] in ("networks", "decoder")
    }
    return bars(f"{name}, measured: speed against PyTorch", shown, unit="times as fast as the peer", one=True)


def points(rows: Iterable[Row], seconds: str) -> list[Point]:
    """Rows with operations, at the rate that a column of seconds gives, or the time with a flushed L2 cache."""
    return [
        Point(
            row["set"],
            row["operations"] / row["bytes"],
            row["operations"] / row.get("cold", {}).get("infera", row[seconds]),
        )
        for row in rows
        if row.get("operations")
    ]


def chart_of(title: str, found: Sequence[Point], card: Mapping[str, Any]) -> str:
    """A roofline chart of a card, whose numbers are as a predictions file has them."""
    roofs = {text: card["operations_per_s"][kind] for kind, text in _ROOFS.items()}
    return roofline(title, found, roofs, card["bytes_per_s"])


def predictions(results: Sequence[Result]) -> str:
    """Networks on every card."""
    by_card = {r["card"]["name"]: {_key(row): row for row in r["rows"]} for r in results}
    first = next(iter(by_card.values()))
    chosen = [key for key, row in first.items() if row["set"] in ("networks", "decoder", "int8")]

    def cells(key: tuple[str, ...]) -> list[str]:
        row = first[key]
        made = [
            f"{row['name']} {row['precision']}",
            str(row["steps"]),
            str(row["launches"]),
            f"{row['operations'] / 1e9:,.0f}",
        ]
        made.append(f"{row['bytes'] / 1e6:,.0f}")
        for rows in by_card.values():
            made += [time_of(rows[key]["predicted_seconds"] * 1e3) if key in rows else ""]
        return made

    header = ("network", "steps", "launches", "GFLOP", "MB", *(f"{name}, ms" for name in by_card))
    return table(header, (cells(key) for key in chosen))


def _key(row: Row) -> tuple[str, ...]:
    return row["set"], row["name"], row["precision"]

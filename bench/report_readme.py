"""The README's tables of measurements, from the newest files of each processor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bench.cpu_targets import mean, ratio
from bench.report_cpu import Result, table

BEGIN, END = "<!-- {}: made by `make report` -->", "<!-- end -->"

_MODELS = (
    ("ResNet-50", "resnet50"),
    ("VGG-19", "vgg19"),
    ("SqueezeNet", "squeezenet"),
    ("MobileNetV2", "mobilenetv2-zoo"),
    ("BERT-base, 128 tokens", "bert-base"),
    ("GPT-2, one token after 255", "gpt2-step"),
)
_KINDS = (("NumPy", "wall"), ("numba", "compiled_wall"))
_SERVERS = (
    ("infera", "infera"),
    ("infera, `--isolate`", "infera --isolate"),
    ("tritonserver", "triton"),
    ("TorchServe", "torchserve"),
    ("FastAPI", "fastapi"),
    ("MLServer", "mlserver"),
    ("BentoML", "bentoml"),
    ("LitServe", "litserve"),
)

Newest = Mapping[tuple[str, str], tuple[str, Result]]
"""Processor and topic -> the newest file's name and contents."""


def _hosts(newest: Newest, topic: str) -> dict[str, Result]:
    """Processor, as it is called, -> the newest file of a topic."""
    return {
        " ".join(
            word.upper() if len(word) < 5 and word != "xeon" else word.title() for word in host.split("-")[:2]
        ): result
        for (host, which), (_, result) in newest.items()
        if which == topic
    }


def speed(newest: Newest) -> str:
    """Time over onnxruntime's at batch 1, with 1 and 2 threads."""
    hosts = [(name, result, _hosts(newest, "quick")[name]) for name, result in _hosts(newest, "").items()]

    def cells(model: str | None) -> Iterator[str]:
        for _, result, every in hosts:
            for _, key in _KINDS:
                judges = [ratio(model, n, key=key) if model else mean(n, key) for n in (1, 2)]
                found = [judge((result if model else every)["rows"]) for judge in judges]
                yield " / ".join("-" if value is None else f"{value:.2f}" for value in found)

    header = ["1 / 2 threads", *(f"{name}, {kind}" for name, _, _ in hosts for kind, _ in _KINDS)]
    rows = [[title, *cells(model)] for title, model in _MODELS]
    return table(header, [*rows, ["geometric mean of the trained models", *cells(None)]])


def serving(newest: Newest) -> str:
    """Requests a second and processor time at 64 connections, in binary and in JSON; the median latency at one."""
    hosts = _hosts(newest, "serving")
    peers = _hosts(newest, "serving-peers")
    rows: dict[tuple[str, str], list[str]] = {}
    for title, server in _SERVERS:
        for body in ("binary", "json"):
            cells = []
            for name, result in hosts.items():
                found = {}
                for row in [*peers.get(name, {"rows": ()})["rows"], *result["rows"]]:
                    if row["server"] == server and row["body"].replace("rows", "json") == body:
                        found[row["connections"]] = row
                cells += [f"{found[64]['rps']:,.0f}", f"{found[64]['cpu_us']:.0f}"] if 64 in found else ["", ""]
                cells.append(f"{found[1]['p50_ms']:.2f}" if 1 in found else "")
            if any(cells):
                rows[title, "JSON" if body == "json" else body] = cells
    what = ("requests/s", "CPU, µs", "alone: p50, ms")
    header = ["", "body", *(f"{name}: {w}" for name in hosts for w in what)]
    return table(header, ([*key, *cells] for key, cells in rows.items()))


BLOCKS = {"speed": speed, "serving": serving}


def filled(text: str, newest: Newest) -> str:
    """The README with its tables as the files give them. Raises ValueError where a place for one is missing."""
    for name, made in BLOCKS.items():
        begin = BEGIN.format(name)
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(END)
        if not (found and ended):
            raise ValueError(f"README.md has no place for the table '{name}', expected {begin} ... {END}")
        text = f"{before}{begin}\n{made(newest)}\n{END}{after}"
    return text

"""`python -m bench.tile_predictions`: the tiles that are predicted for the benchmarks' networks, on every listed GPU.

Writes `kernels/infera_kernels/tuned/<device>.predicted.json`. Nothing is measured, and nothing reads these files but
people and the tests, which hold the estimate against them: whoever changes it sees in the diff what it changes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from bench.build import bert, gpt2_step, resnet50
from bench.build_vit import vit
from bench.gpu_models import bert_feeds, images
from bench.gpu_network_sets import decoder, token_feeds
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.graph import Graph, HostArray
from infera_gpu.loader import load_graph
from infera_gpu.passes import Precision
from infera_gpu.session import Session
from infera_kernels.launch import Target
from infera_kernels.launch.descriptors import FIRST_ARCH
from infera_kernels.launch.devices import DEVICES, Device
from infera_kernels.triton.tiles import DESCRIBED
from infera_kernels.tuning import Family, Problem, numbers
from infera_kernels.tuning.store import SHIPPED, class_of

BATCHES = (1, 8, 32)
PRECISIONS: tuple[Precision, ...] = ("fp16", "fp32", "tf32")
NETWORKS: Mapping[str, tuple[Callable[[], onnx.ModelProto], Callable[[int], Mapping[str, HostArray]]]] = {
    "resnet50": (resnet50, images),
    "bert-base": (bert, lambda batch: bert_feeds(batch, 128, 30522)),
    "vit-b16": (vit, images),
    "gpt2-step": (gpt2_step, token_feeds),
}


def target_for(device: Device) -> Target:
    """The target that a device would be; its pattern is its name."""
    names = {"A100 80GB": "NVIDIA A100-SXM4-80GB", "A100 40GB": "NVIDIA A100-SXM4-40GB", "H100 SXM": "H100 80GB HBM3"}
    return Target(device.arch, device.multiprocessors, device.shared_bytes, names.get(device.name, device.name))


Asked = Iterator[tuple[str, Family[Any], Problem]]
"""Where, the family, the class of problems."""


def problems() -> Asked:
    """What the networks ask for, and a decoder with weights that are holes in a file."""
    for name, (build, feeds_of) in NETWORKS.items():
        graph = load_graph(build())
        for precision in PRECISIONS:
            for batch in BATCHES:
                yield from asked(f"{name} {precision} b{batch}", graph, precision, feeds_of(batch))
    for row in decoder():
        if row.outline is not None:
            source, feeds = row.outline()
            yield from asked(f"{row.name} {row.precision}", load_graph(source), row.precision, feeds)


def asked(where: str, graph: Graph, precision: Precision, feeds: Mapping[str, HostArray]) -> Asked:
    device = RecordingDevice(tf32=precision == "tf32")
    with Session(graph, device, precision=precision) as session:
        for choice in session.choices(feeds):
            yield where, choice.family, choice.problem


def lines(found: Mapping[Problem, tuple[Family[Any], list[str]]], device: Device) -> Iterator[str]:
    target, known = target_for(device), found.items()
    if device.arch < FIRST_ARCH:  # what plans ask for there
        known = {replace(p, layout=p.layout.replace(DESCRIBED, "")): entry for p, entry in known}.items()
    for problem, (family, where) in sorted(known, key=lambda item: repr(item[0])):
        choice = family.predict(problem, target)
        entry: dict[str, Any] = {
            "family": problem.family,
            "kind": problem.kind,
            "sizes": problem.sizes,
            "layout": problem.layout,
            "predicted": numbers(choice),
        }
        if family.estimate is not None and math.isfinite(cycles := family.estimate(problem, choice, target)):
            entry["cycles"] = round(cycles)
        yield json.dumps({**entry, "where": where[0]})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tile_predictions", description="write the tiles that are predicted, anew"
    )
    parser.add_argument(
        "--output", type=Path, default=SHIPPED, metavar="DIR", help="where the files go (default: %(default)s)"
    )
    folder: Path = parser.parse_args(argv).output
    found: dict[Problem, tuple[Family[Any], list[str]]] = {}
    for where, family, problem in problems():
        found.setdefault(problem, (family, []))[1].append(where)
    folder.mkdir(parents=True, exist_ok=True)
    for device in DEVICES:
        name = class_of(target_for(device))
        head = json.dumps({"format": 1, "device": name, "measured": False})
        content = ",\n ".join(lines(found, device))
        (folder / f"{name}.predicted.json").write_text(f'{head[:-1]}, "entries": [\n {content}\n]}}\n')
        print(f"{name}: {len(found)} problems")


if __name__ == "__main__":
    main()

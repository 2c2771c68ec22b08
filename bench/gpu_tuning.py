"""Tiles measured on a GPU, and what that gains; `python -m bench.gpu_tuning RESULTS.json` makes of it a file that comes
with the package."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx

from bench.build import bert, resnet50
from bench.gpu_models import bert_feeds, images
from bench.gpu_report import CheckFailed, Context, Section
from bench.gpu_rows import bound_run
from bench.gpu_timings import gpu_seconds
from infera_gpu.graph import HostArray
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from infera_gpu.tuning import facts
from infera_gpu.verify import TOLERANCES, compare
from infera_kernels.tuning import DeviceTiles, Store
from infera_kernels.tuning.store import SHIPPED, import_file

Result = tuple[str, Mapping[str, Any]]

SECONDS = 50.0
"""Of measuring, for each network: most of it is compiling."""

SPARE = 30.0
"""For what comes before and after that."""

NETWORKS: Mapping[str, tuple[Callable[[], onnx.ModelProto], dict[str, HostArray]]] = {
    "resnet50 fp16 b32": (resnet50, images(32)),
    "bert-base fp16 b32": (bert, bert_feeds(32, 128, 30522)),
}


def tuning(context: Context) -> Result:
    """Networks before and after their tiles are measured. Nothing of this machine is read or kept."""
    found: dict[str, Any] = {}
    measured: dict[Any, Any] = {}
    device = context.open()
    if device.tiles is None:
        raise CheckFailed("Triton is not installed: there are no tiles", found)
    target, store = device.tiles.target, device.tiles.store
    for name, (build, feeds) in NETWORKS.items():
        if context.left() < SECONDS + SPARE:
            break
        device = context.open()
        device.tiles = DeviceTiles(target)
        with Session(load_graph(build()), device, precision="fp16") as session:
            before, want = _seconds(device, session, feeds)
            made = session.tune(feeds, seconds=SECONDS)
            after, got = _seconds(device, session, feeds)
        (worst,) = sorted((d.error for d in compare(got, want)), reverse=True)[:1]
        ratios = [m.predicted_seconds / m.seconds for m in made]
        found[name] = {
            "seconds_before": before,
            "seconds_after": after,
            "choices": len(made),
            "better_than_predicted": sum(m.choice != m.predicted for m in made),
            "mean_gain": math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0,
            "error_against_untuned": worst,
        }
        measured |= {m.problem: m for m in made}
        if worst > TOLERANCES["fp16"]:
            raise CheckFailed(f"{name} gives other answers when tuned: off by {worst:.2g} of the peak", found)
    if not found:
        raise CheckFailed("no time for any network", found)
    if store is not None:
        found["file"] = store.dump(list(measured.values()), [facts(device)]).decode()
    shown = {name: row for name, row in found.items() if name != "file"}
    gains = [f"{n} {r['seconds_before'] * 1e3:.2f} -> {r['seconds_after'] * 1e3:.2f} ms" for n, r in shown.items()]
    return ", ".join([*gains, *(f"no time for {name}" for name in NETWORKS if name not in found)]), found


def _seconds(device: Any, session: Session, feeds: Mapping[str, HostArray]) -> tuple[float, Mapping[str, HostArray]]:
    """Of the GPU for one run, and the answers."""
    answers = session.run(feeds)
    call, _ = bound_run(device, session, feeds)
    with device.running():
        return gpu_seconds(device, call), answers


def ship(results: Path, folder: Path = SHIPPED) -> Path:
    """Write the measurements of a results file of `bench.gpu_check` to where those of the package are."""
    sections = json.loads(results.read_text())["sections"]
    (facts_of,) = (s["facts"] for s in sections if s["section"] == "tuning")
    content = json.loads(facts_of["file"])
    store = Store(content["device"], content["triton"], shipped=None, own=folder)
    temporary = results.with_suffix(".tiles")
    temporary.write_text(facts_of["file"])
    try:
        import_file(temporary, store)
    finally:
        temporary.unlink()
    store.path.with_suffix(".lock").unlink(missing_ok=True)
    return store.path


SECTIONS: Mapping[str, Section] = {"tuning": tuning}

if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(ship(Path(argument)))

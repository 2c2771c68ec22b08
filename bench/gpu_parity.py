"""What a model's outputs on a GPU are held against: infera's CPU, and onnxruntime on the CPU where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx

from bench.inputs import EXAMPLES
from bench.reference import final_operators, with_logits
from infera_gpu.catalogue import CATALOGUE
from infera_gpu.devices import open_device
from infera_gpu.errors import InferaError
from infera_gpu.fetch import _kept_member, cache_dir
from infera_gpu.graph import Graph, HostArray
from infera_gpu.loader import load_graph
from infera_gpu.session import Session
from infera_gpu.verify import Difference, NotInstalledError, OnnxRuntime, compare

Outputs = Mapping[str, HostArray]

OURS, PEER = "infera's CPU", "onnxruntime"
ABSENT = f"onnxruntime is not installed: compared with {OURS} alone"


@dataclass(frozen=True)
class Expected:
    """A model, and what its outputs are to be by OURS and by PEER; `alone` says why there are none by the latter."""

    graph: Graph
    wanted: Mapping[str, Outputs]
    alone: str = ""

    def differences(self, got: Outputs) -> Mapping[str, tuple[Difference, ...]]:
        """By who expects the outputs."""
        return {by: compare(got, want) for by, want in self.wanted.items()}


def expected(model: onnx.ModelProto, feeds: Outputs) -> Expected:
    """In float32; what goes into a last Softmax or Sigmoid is an output, too. Edits `model`."""
    if final_operators(model):
        model = with_logits(model)
    graph = load_graph(model)
    with Session(graph, open_device("cpu")) as cpu:
        wanted: dict[str, Outputs] = {OURS: cpu.run(feeds)}
    try:
        wanted[PEER] = OnnxRuntime(model.SerializeToString()).run(feeds)
    except NotInstalledError:
        return Expected(graph, wanted, ABSENT)
    except InferaError as error:
        return Expected(graph, wanted, f"{error}: compared with {OURS} alone")
    return Expected(graph, wanted)


def errors(found: Mapping[str, tuple[Difference, ...]]) -> dict[str, dict[str, float]]:
    """Of the peak, by who expects the outputs and by their names."""
    return {by: {d.name: d.error for d in differences} for by, differences in found.items()}


def wrong(found: Mapping[str, tuple[Difference, ...]], tolerance: float) -> list[str]:
    """What is not within the tolerance, and whom it departs from."""
    return [f"{d} from {by}" for by, differences in found.items() for d in differences if not d.within(tolerance)]


def told(alone: Mapping[str, str]) -> str:
    """Why models, by name, were compared with OURS alone, for the end of a line; empty where none was."""
    reasons = dict.fromkeys(reason for reason in alone.values() if reason)
    return "".join(f"; {reason}" for reason in reasons)


# ---- trained weights

TRAINED = ("magika", "mobilenetv2-zoo", "paraphrase-minilm-l3")
"""Names in the catalogue: a classifier of bytes, a convolutional network, a transformer."""


def kept(name: str) -> Path | None:
    """The model's file where the catalogue keeps it; None where it was never fetched. Nothing is fetched."""
    entry = CATALOGUE[name]
    path = _kept_member(cache_dir(), entry.requirement, entry.model.member)
    return path if path.is_file() else None


def _loaded(path: Path) -> onnx.ModelProto:
    return with_logits(onnx.load(path))


def trained() -> dict[str, tuple[Callable[[], onnx.ModelProto], dict[str, HostArray]]]:
    """name -> how to load it, what to feed it, of TRAINED those that are here."""
    here = {name: path for name in TRAINED if (path := kept(name)) is not None}
    return {name: (partial(_loaded, path), EXAMPLES[name][0].feeds()) for name, path in here.items()}

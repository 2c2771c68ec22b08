"""`python -m bench.exporters_report DIR`: what exporters wrote, against onnxruntime and their framework, as tables.

NAME-EXPORTER.npz, which `bench.exporting` writes, holds the arrays of every example, `0/in/input_ids`, `0/out/logits`,
`1/in/...`, and under `about` a text in JSON: framework, versions (of it and its exporter), model, exporter, summary,
the sizes of each example.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.progress import track

import infera_gpu
from infera_gpu.graph import HostArray
from infera_gpu.verify import TOLERANCE, Difference, OnnxRuntime, compare

HEAD = """# What exporters write

{models} models as the exporters of {frameworks} write them, run by infera on the CPU and
compared with onnxruntime (optimisations off) and with the framework that they come from, at every size; an encoder, a
decoder and its later steps are models of their own. `make exports` exports them and runs the comparison as
a test; this page is written by `python -m bench.exporters_report DIR --out docs/exporters.md`.

Weights are random, from a fixed seed; `bench/architectures_*.py` have every configuration. The dimensions named under
Sizes are free in the file, and the first size is the one exported with. A difference is the largest over all outputs
and sizes, as a part of the output's peak.
"""
TABLE = """| Model | Exporter | Opset | Nodes | From onnxruntime | From {framework} |
|---|---|--:|--:|--:|--:|
"""
EXPORTERS = {
    "PyTorch": "`torchscript` is `torch.onnx.export(dynamo=False)` of attention written out, `torchscript-sdpa` of "
    "`scaled_dot_product_attention`; `dynamo` and `dynamo23` are `dynamo=True`, at opset 23 with the operators "
    "Attention, RMSNormalization and RotaryEmbedding.",
    "TensorFlow": "`tf2onnx` with the opset's number is `tf2onnx.convert.from_function`, 15 where there is none, "
    "`tf2onnx-nchw` the same with `--inputs-as-nchw`. `tflite` is `--tflite` of what TFLite's converter made, compared "
    "with its interpreter; `tflite-int8` was quantised by it. What rounds to eight bits may be a step apart.",
    "PaddlePaddle": "`paddle` with the opset's number is paddle2onnx of what `paddle.jit.save` wrote, 17 where there "
    "is none, `paddle-folded` the same with constants folded by Polygraphy, as paddle2onnx does unless told otherwise; "
    "`paddle-program` is of a `.pdmodel`, the format of Paddle 2, at opset 16.",
}
"""By framework, what the exporters' names stand for."""


MASKED = (
    "A row of a left-padded batch that attends to nothing: PyTorch answers zero and the file, whose mask is float32's "
    "lowest number, the mean of the values. No other row reads it, and onnxruntime answers as infera does"
)
UNFAITHFUL = {"gpt2-dynamo": MASKED, "llama-dynamo": MASKED}
"""Files that mean something else than the model that they are written from, and what."""


STEP = 1 / 127
"""Of the output's peak: what a value moves that comes out on the other side of a rounding to eight bits."""


@dataclass(frozen=True)
class Export:
    """One exported model with its examples."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def about(self) -> dict[str, Any]:
        with np.load(self.path.with_suffix(".npz")) as stored:
            return dict(json.loads(str(stored["about"])))

    @cached_property
    def examples(self) -> tuple[tuple[dict[str, HostArray], dict[str, HostArray]], ...]:
        """Feeds and the framework's outputs."""
        found: list[tuple[dict[str, HostArray], dict[str, HostArray]]] = [({}, {}) for _ in self.about["sizes"]]
        with np.load(self.path.with_suffix(".npz")) as stored:
            for key in stored.files:
                if key != "about":
                    i, side, name = key.split("/", 2)
                    found[int(i)][side == "out"][name] = stored[key]
        return tuple(found)

    @cached_property
    def quantised(self) -> bool:
        """Whether values are rounded to eight bits on the way."""
        nodes = onnx.load(self.path, load_external_data=False).graph.node
        return any(node.op_type == "QuantizeLinear" for node in nodes)

    @property
    def sizes(self) -> str:
        return "; ".join(", ".join(f"{k} {v}" for k, v in sizes.items()) for sizes in self.about["sizes"])


def exports(folder: Path) -> list[Export]:
    """Every model in the folder that has examples."""
    found = [Export(path) for path in folder.glob("*.onnx") if path.with_suffix(".npz").exists()]
    return sorted(found, key=lambda export: [export.about[key] for key in ("framework", "model", "exporter")])


def differences(export: Export, *, fuse: bool = True) -> tuple[list[Difference], list[Difference]]:
    """Every output at every size: from onnxruntime, and from the framework."""
    reference = OnnxRuntime(export.path, threads=1)
    from_peer: list[Difference] = []
    from_framework: list[Difference] = []
    with infera_gpu.load(export.path, device="cpu", fuse=fuse) as session:
        for feeds, wanted in export.examples:
            given = {name: feeds[name] for name in session.inputs}  # tracing drops inputs that nothing reads
            got = session.run(given)
            from_peer += compare(got, reference.run(given))
            from_framework += compare(got, wanted)
    return from_peer, from_framework


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `problem` says why there are no figures."""

    export: Export
    opset: int
    nodes: int
    peer: float = math.inf
    framework: float = math.inf
    problem: str = ""

    def __str__(self) -> str:
        mark = " \\*" if self.export.name in UNFAITHFUL else ""
        figures = self.problem or f"{self.peer:.0e} | {self.framework:.0e}{mark}"
        about = self.export.about
        return f"| {about['model']} | {about['exporter']} | {self.opset} | {self.nodes} | {figures} |"


def measured(export: Export) -> Row:
    model = onnx.load(export.path, load_external_data=False)
    opset = next(o.version for o in model.opset_import if not o.domain)
    nodes = len(model.graph.node)
    try:
        peer, framework = (max(d.error for d in found) for found in differences(export))
    except infera_gpu.InferaError as error:
        return Row(export, opset, nodes, problem=f"{error} |")
    return Row(export, opset, nodes, peer, framework)


def page(rows: Sequence[Row]) -> str:
    """The page in Markdown, one part for each framework."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.export.about["framework"], []).append(row)
    models = {(row.export.about["framework"], row.export.about["model"]) for row in rows}
    head = HEAD.format(models=len(models), frameworks=listed(list(parts)))
    return "\n".join([head, *(part(framework, found) for framework, found in parts.items())])


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def part(framework: str, rows: Sequence[Row]) -> str:
    """What was exported by which versions, the table, then what each model is and its sizes."""
    notes = dict.fromkeys(UNFAITHFUL[row.export.name] for row in rows if row.export.name in UNFAITHFUL)
    models = {row.export.about["model"]: row.export for row in rows}
    about = f"{len(models)} models, by {rows[0].export.about['versions']}. {EXPORTERS[framework]}"
    lines = [
        f"## {framework}\n",
        textwrap.fill(about, 120, break_on_hyphens=False) + "\n",
        TABLE.format(framework=framework) + "\n".join(map(str, rows)) + "\n",
        *(textwrap.fill(f"\\* {note}.", 120) + "\n" for note in notes),
        "| Model | What | Sizes |",
        "|---|---|---|",
        *(f"| {name} | {export.about['summary']} | {export.sizes} |" for name, export in models.items()),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every model agrees with onnxruntime, else 1."""
    parser = argparse.ArgumentParser("python -m bench.exporters_report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, help="write the page there instead of printing it")
    options = parser.parse_args(argv)
    found = exports(options.folder)
    if not found:
        parser.error(
            f"{options.folder} has no models with examples; `make exports EXPORTS={options.folder}` makes them"
        )
    console = Console(stderr=True)
    rows = [measured(export) for export in track(found, "comparing", console=console, transient=True)]
    text = page(rows)
    if options.out:
        options.out.write_text(text)
    else:
        print(text, end="")
    wrong = [row.export.name for row in rows if row.peer > (STEP if row.export.quantised else TOLERANCE)]
    if wrong:
        console.print(f"different from onnxruntime, or not run: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

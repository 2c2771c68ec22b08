"""`python -m bench.exporters_paddle OUT_DIR [names...]`: architectures as paddle2onnx writes them.

Writes OUT_DIR/NAME-EXPORTER.onnx and, beside it, NAME-EXPORTER.npz with inputs of two or three shapes and Paddle's own
outputs; `bench.exporters_report` says how that file is laid out and reads it. Needs a Python with PaddlePaddle 3 and
paddle2onnx: `make exports` makes one. An export that fails is reported, and does not stop the others; where it was
written before, it is left out of the folder.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import paddle
import paddle2onnx

from bench import exporting
from bench.architecture import Architecture
from bench.architectures_paddle import ARCHITECTURES
from bench.exporting import SEED, Arrays, Framework


class Adapter(paddle.nn.Layer):
    """An architecture with a list of tensors in and out, in the order of its table."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.model = architecture.build()

    def forward(self, tensors: list[Any]) -> list[Any]:
        named = {name: tensors[i] for i, name in enumerate(self.architecture.inputs)}
        made = self.architecture.call(self.model, named)
        return [made[name] for name in self.architecture.outputs]


@dataclass(frozen=True, slots=True)
class Exporter:
    """`program` saves a .pdmodel, what Paddle 2 wrote, instead of Paddle 3's .json; `folded` is paddle2onnx' default of
    folding constants with Polygraphy, and what its command line does."""

    opset: int
    folded: bool = False
    program: bool = False


EXPORTERS: Mapping[str, Exporter] = {
    "paddle11": Exporter(11),
    "paddle13": Exporter(13),
    "paddle": Exporter(17),
    "paddle-folded": Exporter(17, folded=True),
    "paddle-program": Exporter(16, program=True),
}


def randomize(model: Any) -> None:
    """Weights that use the whole network: initialised ones leave attention flat and biases zero."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        shape = value.shape
        if name.endswith("_variance"):
            value.set_value(paddle.uniform(shape, min=0.5, max=1.5))
        elif len(shape) > 1:
            depth = shape[0] if len(shape) == 2 else math.prod(shape[1:])
            value.set_value(paddle.randn(shape) * depth**-0.5)
        else:
            value.set_value(value + 0.1 * paddle.randn(shape))


def written(model: Adapter, how: Exporter, path: Path, feeds: Arrays) -> None:
    """Saves the model as Paddle does, and the ONNX file of it with the outputs' names of the table."""
    inputs = model.architecture.inputs
    specs = [
        paddle.static.InputSpec([d if isinstance(d, int) else -1 for d in value.dims], str(feeds[name].dtype), name)
        for name, value in inputs.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        saved = f"{folder}/model"
        with paddle.pir_utils.DygraphOldIrGuard() if how.program else nullcontext():
            static = paddle.jit.to_static(model, input_spec=[specs], full_graph=True)
            paddle.jit.save(static, saved)
        convert(saved, how, path)
    rename(path, list(model.architecture.outputs))


def convert(saved: str, how: Exporter, path: Path) -> None:
    """paddle2onnx in a process of its own: it aborts where it does not know an operator."""
    options = {
        "save_file": path,
        "model_dir": os.path.dirname(saved),
        "model_filename": "model.pdmodel" if how.program else "model.json",
        "params_filename": "model.pdiparams",
        "opset_version": how.opset,
        "optimize_tool": "polygraphy" if how.folded else "None",
    }
    command = [sys.executable, "-c", "from paddle2onnx.command import main; main()"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not path.exists():
        lines = (done.stdout + done.stderr).splitlines()
        said = [line for line in lines if "Paddle2ONNX" in line and line.split("]")[-1].strip()]
        raise RuntimeError("; ".join(said[1:]) or f"paddle2onnx ended with {done.returncode}")


def rename(path: Path, names: Sequence[str]) -> None:
    """Gives the outputs these names: Paddle's are numbers."""
    model = onnx.load(path)
    new = dict(zip((value.name for value in model.graph.output), names, strict=True))
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [new.get(value, value) for value in values]
    for value in model.graph.output:
        value.name = new[value.name]
    onnx.save(model, path)


def export(
    architecture: Architecture, exporter: str, path: Path, feeds: Sequence[Arrays]
) -> list[tuple[Arrays, Arrays]]:
    """Writes the model and gives its inputs and Paddle's outputs."""
    paddle.seed(SEED)
    model = Adapter(architecture)
    randomize(model)
    model.eval()
    made: list[tuple[Arrays, Arrays]] = []
    with paddle.no_grad():
        for given in feeds:
            outputs = model([paddle.to_tensor(v) for v in given.values()])
            named = zip(architecture.outputs, outputs, strict=True)
            made.append((given, {name: value.numpy() for name, value in named}))
    written(model, EXPORTERS[exporter], path, feeds[0])
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was exported, else 1."""
    versions = f"PaddlePaddle {paddle.__version__} and paddle2onnx {paddle2onnx.__version__}"
    framework = Framework("PaddlePaddle", versions, ARCHITECTURES, EXPORTERS, export)
    return exporting.main(framework, "python -m bench.exporters_paddle", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.exporters_tf OUT_DIR [names...]`: architectures as tf2onnx writes them.

Writes OUT_DIR/NAME-EXPORTER.onnx and, beside it, NAME-EXPORTER.npz with inputs of two or three shapes and TensorFlow's
own outputs; `bench.exporters_report` says how that file is laid out and reads it. Needs a Python with TensorFlow 2.15
and tf2onnx: `make exports` makes one. An export that fails is reported, and does not stop the others; where it was
written before, it is left out of the folder.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf2onnx

from bench import exporting
from bench.architecture import Architecture
from bench.architectures_tf import ARCHITECTURES
from bench.exporting import SEED, Arrays, Framework

Pairs = list[tuple[Arrays, Arrays]]
LAST_TO_FIRST = (0, 3, 1, 2)
"""Axes of images: channels last to channels first."""


@dataclass(frozen=True, slots=True)
class Exporter:
    opset: int
    export: Callable[[Any, Path, int, Sequence[Arrays]], Pairs]


def as_it_is(run: Any, path: Path, opset: int, feeds: Sequence[Arrays]) -> Pairs:
    """The graph of a tf.function."""
    tf2onnx.convert.from_function(run, run.input_signature, opset=opset, output_path=str(path))
    return [(given, outputs(run, given)) for given in feeds]


def channels_first(run: Any, path: Path, opset: int, feeds: Sequence[Arrays]) -> Pairs:
    """With `--inputs-as-nchw` for images."""
    images = [spec.name for spec in run.input_signature if spec.shape.rank == 4]
    made = as_it_is(run, path, opset, feeds)
    tf2onnx.convert.from_function(
        run, run.input_signature, opset=opset, output_path=str(path), inputs_as_nchw=[f"{name}:0" for name in images]
    )
    moved = [{k: v.transpose(LAST_TO_FIRST) if k in images else v for k, v in given.items()} for given in feeds]
    return [(given, wanted) for given, (_, wanted) in zip(moved, made, strict=True)]


def outputs(run: Any, given: Arrays) -> Arrays:
    return {k: v.numpy() for k, v in run(*(tf.constant(v) for v in given.values())).items()}


def by_tflite(run: Any, path: Path, opset: int, feeds: Sequence[Arrays], quantised: bool = False) -> Pairs:
    """The graph as TFLite's converter fuses it, of floats or of eight-bit integers, run by TFLite's interpreter."""
    converter = tf.lite.TFLiteConverter.from_concrete_functions([run.get_concrete_function()])
    if quantised:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([tf.constant(v) for v in given.values()] for given in feeds)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    content = converter.convert()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.tflite"
        file.write_bytes(content)
        tf2onnx.convert.from_tflite(str(file), opset=opset, output_path=str(path))
    return [interpreted(content, given) for given in feeds]


def by_tflite_int8(run: Any, path: Path, opset: int, feeds: Sequence[Arrays]) -> Pairs:
    """Quantised after training, on the feeds themselves: weights a channel, activations a tensor, floats outside."""
    return by_tflite(run, path, opset, feeds, quantised=True)


def interpreted(content: bytes, given: Arrays) -> tuple[Arrays, Arrays]:
    """What goes in and comes out by the names that TFLite gave them."""
    interpreter = tf.lite.Interpreter(model_content=content, num_threads=1)
    taken = {
        about["name"].split(":")[0].removeprefix("serving_default_"): about for about in interpreter.get_input_details()
    }
    for name, about in taken.items():
        interpreter.resize_tensor_input(about["index"], given[name].shape)
    interpreter.allocate_tensors()
    for name, about in taken.items():
        interpreter.set_tensor(about["index"], given[name])
    interpreter.invoke()
    made = {about["name"]: interpreter.get_tensor(about["index"]) for about in interpreter.get_output_details()}
    return {about["name"]: given[name] for name, about in taken.items()}, made


EXPORTERS: Mapping[str, Exporter] = {
    "tf2onnx13": Exporter(13, as_it_is),
    "tf2onnx": Exporter(15, as_it_is),
    "tf2onnx18": Exporter(18, as_it_is),
    "tf2onnx-nchw": Exporter(15, channels_first),
    "tflite": Exporter(15, by_tflite),
    "tflite-int8": Exporter(15, by_tflite_int8),
}


def randomize(model: Any) -> None:
    """Weights that use the whole network: initialised ones leave attention flat and biases zero."""
    rng = np.random.default_rng(SEED)
    for variable in model.variables:
        shape, name = tuple(variable.shape), variable.name
        if not variable.dtype.is_floating:
            continue
        if "variance" in name:
            variable.assign(rng.uniform(0.5, 1.5, shape))
        elif len(shape) > 1:
            depth = math.prod(shape[:2] if "depthwise" in name else shape[:-1])
            variable.assign(rng.normal(0, depth**-0.5, shape))
        else:
            variable.assign_add(rng.normal(0, 0.1, shape))


def export(architecture: Architecture, exporter: str, path: Path, feeds: Sequence[Arrays]) -> Pairs:
    """Writes the model and gives its inputs and TensorFlow's outputs."""
    tf.keras.backend.clear_session()
    tf.keras.utils.set_random_seed(SEED)
    model = architecture.build()
    randomize(model)

    def call(*tensors: Any) -> Any:
        made = architecture.call(model, dict(zip(architecture.inputs, tensors, strict=True)))
        return {name: made[name] for name in architecture.outputs}

    signature = [
        tf.TensorSpec([d if isinstance(d, int) else None for d in value.dims], feeds[0][name].dtype, name)
        for name, value in architecture.inputs.items()
    ]
    how = EXPORTERS[exporter]
    return how.export(tf.function(call, input_signature=signature), path, how.opset, feeds)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was exported, else 1."""
    versions = f"TensorFlow {tf.__version__} and tf2onnx {tf2onnx.__version__}"
    framework = Framework("TensorFlow", versions, ARCHITECTURES, EXPORTERS, export)
    return exporting.main(framework, "python -m bench.exporters_tf", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())

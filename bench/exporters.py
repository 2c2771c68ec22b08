"""`python -m bench.exporters OUT_DIR [names...]`: architectures as PyTorch's exporters write them.

Writes OUT_DIR/NAME-EXPORTER.onnx and, beside it, NAME-EXPORTER.npz with inputs of two or three shapes and PyTorch's own
outputs; `bench.exporters_report` says how that file is laid out and reads it. Needs a Python with PyTorch, transformers
and diffusers: `make exports` makes one. An export that fails is reported, and does not stop the others; where it was
written before, it is left out of the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.architecture import Architecture, Tensors, choose_attention
from bench.architectures import ARCHITECTURES

SEED = 0


class Adapter(torch.nn.Module):
    """An architecture with positional tensors in and out, in the order of its table."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.model = architecture.build()

    def forward(self, *tensors: Any) -> tuple[Any, ...]:
        named = dict(zip(self.architecture.inputs, tensors, strict=True))
        made = self.architecture.call(self.model, named)
        return tuple(made[name] for name in self.architecture.outputs)


@dataclass(frozen=True, slots=True)
class Exporter:
    """`attention` is transformers' name of the implementation that is traced."""

    opset: int
    attention: str
    export: Callable[..., None]


def by_tracing(model: Adapter, args: tuple[Any, ...], path: Path, opset: int) -> None:
    """TorchScript: the calls that one run makes."""
    architecture = model.architecture
    named = {**{k: v.dims for k, v in architecture.inputs.items()}, **architecture.outputs}
    axes = {name: {i: _axis(d) for i, d in enumerate(dims) if isinstance(d, str)} for name, dims in named.items()}
    torch.onnx.export(model, args, path, **_names(architecture), dynamo=False, opset_version=opset, dynamic_axes=axes)


def by_dynamo(model: Adapter, args: tuple[Any, ...], path: Path, opset: int) -> None:
    """torch.export: symbolic shapes, functions decomposed by onnxscript."""
    architecture = model.architecture
    shapes = tuple({i: _axis(d) for i, d in value.free().items()} for value in architecture.inputs.values())
    torch.onnx.export(
        model,
        args,
        path,
        **_names(architecture),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=(shapes,),
        external_data=False,
        verbose=False,
    )


def _names(architecture: Architecture) -> dict[str, Any]:
    return {"input_names": list(architecture.inputs), "output_names": list(architecture.outputs)}


def _axis(dim: str) -> str:
    return dim.replace("+", "_")


EXPORTERS: Mapping[str, Exporter] = {
    "torchscript13": Exporter(13, "eager", by_tracing),
    "torchscript": Exporter(17, "eager", by_tracing),
    "torchscript-sdpa": Exporter(17, "sdpa", by_tracing),
    "dynamo": Exporter(18, "sdpa", by_dynamo),
    "dynamo23": Exporter(23, "sdpa", by_dynamo),
}


def randomize(model: Any) -> None:
    """Weights that use the whole network: initialised ones leave attention flat and biases zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


def applies(name: str, exporter: str) -> bool:
    """Whether the exporter writes anything of its own for this architecture."""
    return ARCHITECTURES[name].attention or exporter != "torchscript-sdpa"


def export(name: str, exporter: str, folder: Path) -> None:
    """Writes one model and its examples. Raises what the exporter raises."""
    architecture, how = ARCHITECTURES[name], EXPORTERS[exporter]
    torch.manual_seed(SEED)
    adapter = Adapter(architecture).eval()
    randomize(adapter)
    if architecture.attention:
        choose_attention(adapter.model, how.attention)
    rng = np.random.default_rng(SEED)
    feeds = [{k: v.array(rng, sizes) for k, v in architecture.inputs.items()} for sizes in architecture.sizes]
    stored: dict[str, Any] = {}
    with torch.no_grad():
        for i, arrays in enumerate(feeds):
            outputs = adapter(*_tensors(arrays).values())
            stored |= {f"{i}/in/{k}": v for k, v in arrays.items()}
            stored |= {f"{i}/out/{k}": v.numpy() for k, v in zip(architecture.outputs, outputs, strict=True)}
        path = folder / f"{name}-{exporter}.onnx"
        examples = path.with_suffix(".npz")
        for file in (path, examples):
            file.unlink(missing_ok=True)
        how.export(adapter, tuple(_tensors(feeds[0]).values()), path, how.opset)
    about = {
        "model": name,
        "exporter": exporter,
        "summary": architecture.summary,
        "sizes": [dict(sizes) for sizes in architecture.sizes],
        "torch": torch.__version__,
    }
    np.savez(examples, about=np.array(json.dumps(about)), **stored)


def _tensors(arrays: Mapping[str, np.ndarray[Any, Any]]) -> Tensors:
    return {k: torch.from_numpy(v.copy()) for k, v in arrays.items()}


def reason(error: BaseException) -> str:
    """The first line of what is at the bottom of it: the exporters wrap errors in advice."""
    while error.__cause__:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was exported, else 1."""
    parser = argparse.ArgumentParser("python -m bench.exporters", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}; all unless given")
    parser.add_argument("--exporters", nargs="+", choices=list(EXPORTERS), default=list(EXPORTERS))
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"there is no architecture {unknown[0]}; the table has {', '.join(ARCHITECTURES)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    todo = [(name, e) for name in options.names or ARCHITECTURES for e in options.exporters if applies(name, e)]
    failures = 0
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    for i, (name, exporter) in enumerate(todo, 1):
        print(f"[{i}/{len(todo)}] {name} by {exporter} ... ", end="", flush=True)
        started, said = time.monotonic(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                export(name, exporter, options.folder)
        except Exception as error:  # every exporter has exceptions of its own
            failures += 1
            print(f"failed after {time.monotonic() - started:.1f} s: {reason(error)}")
        else:
            print(f"{time.monotonic() - started:.1f} s")
    print(f"{len(todo) - failures} of {len(todo)} exported to {options.folder}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

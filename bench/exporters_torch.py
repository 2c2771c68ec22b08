"""`python -m bench.exporters_torch OUT_DIR [names...]`: architectures as PyTorch's exporters write them.

Writes OUT_DIR/NAME-EXPORTER.onnx and, beside it, NAME-EXPORTER.npz with inputs of two or three shapes and PyTorch's own
outputs; `bench.exporters_report` says how that file is laid out and reads it. Needs a Python with PyTorch, transformers
and diffusers: `make exports` makes one. An export that fails is reported, and does not stop the others; where it was
written before, it is left out of the folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import exporting
from bench.architecture import Architecture
from bench.architectures_torch import ARCHITECTURES
from bench.calls_torch import choose_attention
from bench.exporting import SEED, Arrays, Framework


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


def export(
    architecture: Architecture, exporter: str, path: Path, feeds: Sequence[Arrays]
) -> list[tuple[Arrays, Arrays]]:
    """Writes the model and gives its inputs and PyTorch's outputs."""
    how = EXPORTERS[exporter]
    torch.manual_seed(SEED)
    adapter = Adapter(architecture).eval()
    randomize(adapter)
    if "torchscript-sdpa" in (architecture.exporters or EXPORTERS):
        choose_attention(adapter.model, how.attention)
    given = [tuple(torch.from_numpy(v.copy()) for v in arrays.values()) for arrays in feeds]
    with torch.no_grad():
        made = [adapter(*tensors) for tensors in given]
        how.export(adapter, given[0], path, how.opset)
    named = [{k: v.numpy() for k, v in zip(architecture.outputs, outputs, strict=True)} for outputs in made]
    return list(zip(feeds, named, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was exported, else 1."""
    framework = Framework("PyTorch", f"PyTorch {torch.__version__}", ARCHITECTURES, EXPORTERS, export)
    return exporting.main(framework, "python -m bench.exporters_torch", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())

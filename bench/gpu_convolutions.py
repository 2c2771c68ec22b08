"""First timings of convolutions on a GPU: layers of networks, against torch's (cuDNN) where that is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bench.gpu_report import CheckFailed, Context, Section
from bench.gpu_timings import PRECISIONS, Result, distance, gpu_seconds, normal, torch_seconds, torch_tensors
from infera_kernels.portable.conv import convolution
from tests.cases import run


@dataclass(frozen=True)
class Layer:
    """A square convolution of `n` images, padded to keep their size but for the stride."""

    n: int
    side: int
    channels: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        where = f"{self.n}x{self.side}x{self.side}x{self.channels}"
        return f"{where} {self.kernel}x{self.kernel}/{self.stride} -> {self.outputs}" + (
            f" in {self.groups} groups" if self.groups > 1 else ""
        )

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        pixels = self.n * (-(-self.side // self.stride)) ** 2
        return 2 * pixels * self.outputs * self.channels // self.groups * self.kernel**2


LAYERS = (
    Layer(8, 224, 3, 64, 7, stride=2),
    Layer(8, 56, 64, 64, 3),
    Layer(8, 14, 256, 256, 3),
    Layer(1, 7, 512, 512, 3),
    Layer(32, 28, 128, 128, 3),
    Layer(8, 56, 144, 144, 3, groups=144),
)
"""Of ResNet-50 at several batches, and a depthwise one of MobileNetV2."""


def _calls(device: Any, layer: Layer, x: Any, w: Any, out: Any, precision: str) -> list[Any]:
    """The launches, with the weights as a plan would have packed them."""
    from infera_kernels.triton.conv import conv, geometry, parts_shape
    from infera_kernels.triton.depthwise import depthwise

    pad = layer.kernel // 2
    where = geometry((layer.kernel,) * 2, (layer.stride,) * 2, (1, 1), ((pad, pad),) * 2)
    if layer.groups > 1:
        packed = device.xp.ascontiguousarray(w.transpose(1, 2, 3, 0)).transpose(3, 1, 2, 0)
        return depthwise(x, packed, out, device.launcher, where)
    packed = device.xp.ascontiguousarray(w.transpose(0, 2, 3, 1))
    shape = parts_shape(out, packed, 1)
    parts = None if shape is None else device.xp.empty(shape, np.float32)
    return conv(x, packed, out, device.launcher, where, parts=parts, precision=precision)


def convolutions(context: Context) -> Result:
    """Convolutions with channels last, compared with CuPy first."""
    device = context.open()
    xp = device.xp
    found: dict[str, Any] = {}
    wrong: list[str] = []
    with device.running():
        for layer in LAYERS:
            for dtype, precisions in PRECISIONS.items():
                if context.left() <= 0:
                    break
                x = normal(device, layer.n, layer.side, layer.side, layer.channels, dtype=dtype)
                w = normal(
                    device, layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel, dtype=dtype
                )
                side, pad = -(-layer.side // layer.stride), layer.kernel // 2
                out = xp.empty((layer.n, side, side, layer.outputs), dtype)
                first = convolution(
                    xp, xp.ascontiguousarray(x.transpose(0, 3, 1, 2)), w, None, (side, side), group=layer.groups,
                    strides=(layer.stride,) * 2, pads=((pad, pad),) * 2, dilations=(1, 1),
                )  # fmt: skip
                want = first.transpose(0, 2, 3, 1)
                row: dict[str, Any] = {}
                tensors = torch_tensors(x, w)
                if tensors:
                    torch, tx, tw = tensors
                    call = partial(
                        torch.nn.functional.conv2d, tx.permute(0, 3, 1, 2),
                        tw.contiguous(memory_format=torch.channels_last),
                        stride=layer.stride, padding=pad, groups=layer.groups,
                    )  # fmt: skip
                    row["torch"] = torch_seconds(device, torch, call)
                for precision, tolerance in precisions[: 1 if layer.groups > 1 else None]:
                    calls = _calls(device, layer, x, w, out, precision)
                    run(calls)
                    error = distance(xp, out, want)
                    row[f"triton_{precision}"] = gpu_seconds(device, partial(run, calls))
                    row[f"triton_{precision}_error"] = error
                    if not error <= tolerance:
                        wrong.append(f"{layer} {dtype} {precision} is off by {error:.2g}")
                found[f"{layer} {dtype}"] = row
    if wrong:
        raise CheckFailed("; ".join(wrong), found)
    rates = {
        name: layer.operations / found[name]["triton_ieee"] for layer in LAYERS if (name := f"{layer} float16") in found
    }
    best = max(rates, key=rates.__getitem__, default=None)
    return f"{len(found)} convolutions" if best is None else f"{best}: {rates[best] / 1e12:.1f} TFLOP/s", found


SECTIONS: Mapping[str, Section] = {"convolutions": convolutions}

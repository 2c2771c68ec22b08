"""Which convolutions cuDNN may compute, and by which of its plans: one that was measured to be faster than kernels of
ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from infera_kernels.calls import Call
from infera_kernels.launch import Launcher, LaunchError, Target, Typed, cudnn_of
from infera_kernels.launch.cudnn import TYPES, Graph, Tensor
from infera_kernels.launch.cudnn_graphs import ACTIVATIONS, Convolution
from infera_kernels.triton.conv import Finish, Geometry
from infera_kernels.triton.conv_kernel import conv_kernel
from infera_kernels.triton.images import SPATIAL, Image, image_of
from infera_kernels.triton.layout import Dims, name_of
from infera_kernels.triton.matmul_kernel import matmul_kernel
from infera_kernels.triton.tiles import HALF, SIZES
from infera_kernels.tuning import Family, Problem, Tuned, choose, tries

WAYS = 6
"""Plans of cuDNN that are tried, those that it takes to be fastest."""


@dataclass(frozen=True, slots=True)
class Way:
    """One of cuDNN's plans, from 1; 0 stands for kernels of ours."""

    plan: int


OURS = Way(0)


def ways(problem: Problem, target: Target) -> tuple[Way, ...]:
    return tuple(map(Way, range(WAYS + 1)))


def ours(problem: Problem, target: Target) -> Way:
    return OURS


WAY = Family("conv_way", SIZES, 2, Way, ways, ours, (conv_kernel, matmul_kernel), zeros="ours", last=True)
"""`k` is the depth, all channels of all taps; `batch` counts groups; `layout` begins with the release of cuDNN, whose
plans another may number otherwise, and goes on with the window, its strides and dilations, for which plans are others,
and with what follows the sums. Where plans have to be compiled, which takes longer than thousands of runs, it ends in
`m`: what is measured goes for that alone."""

READY = (None, "relu")
"""Activations for which the library has kernels that are compiled."""


def asked(
    made: Graph | None, way: int, launcher: Launcher, workspace: Any, family: Family[Way], tuned: Tuned | None
) -> Call | None:
    """The call of one of cuDNN's plans, in scratch of `cudnn.WORKSPACE`, None where it has none. Raises LaunchError
    instead where that way is to be tried: kernels of ours would be measured in its name."""
    library = cudnn_of(launcher)
    call: Call | None = None if library is None or made is None else library.call(made, way, workspace)
    if call is None and tries(tuned, family):
        raise LaunchError(f"cuDNN has no plan {way} here")
    return call


def way_of(
    w: Typed,
    out: Typed,
    where: Geometry,
    groups: int,
    *,
    terms: Sequence[str],
    activation: str | None,
    parameters: Sequence[float],
    tuned: Tuned | None,
) -> int:
    """Which of cuDNN's plans computes a convolution, from 1; 0 where kernels of ours do. `terms` are added to its sums,
    "residual" and "bias", and `parameters` are the activation's."""
    has = activation is None or (activation in ACTIVATIONS and {*parameters} <= {1.0})
    if tuned is None or not tuned.target.cudnn or not has or name_of(w) not in TYPES or not math.prod(out.shape):
        return 0
    sizes = {
        "m": math.prod(out.shape[:-1]),
        "batch": groups,
        "n": out.shape[-1] // groups,
        "k": math.prod(w.shape[1:]),
    }
    axes = max(len(w.shape) - 2, 2)
    window = ("x".join(map(str, n[SPATIAL - axes :])) for n in (where.kernel, where.strides, where.dilations))
    end = ([activation] if activation else []) + ([] if activation in READY else [str(sizes["m"])])
    layout = " ".join([tuned.target.cudnn, *window, *terms, *end])
    return choose(WAY, WAY.problem(HALF, sizes, layout), tuned.target, tuned).plan


def by_cudnn(
    x: Any,
    w: Any,
    out: Any,
    launcher: Launcher,
    where: Geometry,
    finish: Finish,
    way: int,
    workspace: Any,
    tuned: Tuned | None = None,
) -> Call | None:
    """The convolution by one of cuDNN's plans: see `asked`."""
    return asked(convolution_of(x, w, out, where, finish), way, launcher, workspace, WAY, tuned)


def convolution_of(x: Any, w: Any, out: Any, where: Geometry, finish: Finish) -> Convolution | None:
    """A convolution of arrays with channels last as the library takes it; None where one of them lies otherwise."""
    axes = max(len(x.shape) - 2, 2)
    arrays = {"x": x, "w": w, "out": out, "residual": finish.residual}
    made = {name: _tensor(a, axes) for name, a in arrays.items() if a is not None}
    tensors = {name: tensor for name, tensor in made.items() if tensor is not None}
    bias = finish.bias
    if len(tensors) < len(made) or (bias is not None and bias.shape[0] > 1 and bias.strides != (bias.dtype.itemsize,)):
        return None
    kernel, strides, dilations, before = (
        values[SPATIAL - axes :] for values in (where.kernel, where.strides, where.dilations, where.pads)
    )
    sizes = zip(tensors["x"].sizes[2:], tensors["out"].sizes[2:], kernel, strides, dilations, before, strict=True)
    after = tuple(max((o - 1) * s + d * (k - 1) + 1 - i - p, 0) for i, o, k, s, d, p in sizes)
    return Convolution(
        name_of(x),
        **tensors,
        pads=tuple(zip(before, after, strict=True)),
        strides=strides,
        dilations=dilations,
        bias=bias,
        activation=finish.activation,
    )


def _tensor(array: Any, axes: int) -> Tensor | None:
    """The array with so many spatial axes, channels second; None where channels are no neighbours, or pixels overlap
    or are out of order."""
    image = image_of(array)
    sizes, strides = _inner(image, axes)
    for (n, step), (_, beyond) in pairwise(zip(sizes, strides, strict=True)):
        if beyond < n * step:
            return None
    if strides[0] != 1:
        return None
    channels, *space, count = sizes
    apart = (strides[-1], strides[0], *strides[-2:0:-1])
    return Tensor(array, (count, channels, *reversed(space)), apart)


def _inner(image: Image, axes: int) -> tuple[Dims, Dims]:
    """Sizes and strides from the innermost axis on: channels, lines, ..., images. What has one element counts as next
    to what is within it."""
    order: Sequence[int] = (4, *range(3, 3 - axes, -1), 0)
    sizes = tuple(image.dims[i] for i in order)
    strides = [1 if image.dims[4] == 1 else image.strides[4]]
    for i, inner in zip(order[1:], sizes, strict=False):
        strides.append(image.strides[i] if image.dims[i] > 1 else strides[-1] * inner)
    return sizes, tuple(strides)

"""Fourier transforms, windows and mel filters."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site, f32
from infera_gpu.ops._families import element_type, normalized, plain, single
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import signal as portable


def _dft_axis(site: Site) -> int:
    x = site.spec(0)
    given = site.attrs["axis"] if "axis" in site.attrs else single(site, 2, "axis")
    (axis,) = normalized(site, [-2 if given is None else int(given)], x.ndim)
    if axis == x.ndim - 1 or x.dims[-1] not in (1, 2):
        raise site.fail(f"axis {axis} of {x}: the last axis holds real and imaginary parts, 1 or 2 of them")
    return axis


def _dft_length(site: Site, axis: int) -> int:
    n = site.spec(0).dims[axis]
    whole = 2 * (n - 1) if site.attrs["inverse"] and site.attrs["onesided"] else n
    length = single(site, 1, "dft_length")
    length = whole if length is None else length
    if length < 1:
        raise site.fail(f"dft_length is {length}, expected a positive number")
    return length


def _infer_dft(site: Site) -> tuple[TensorSpec]:
    axis = _dft_axis(site)
    length = _dft_length(site, axis)
    dims = list(site.spec(0).dims)
    onesided, inverse = bool(site.attrs["onesided"]), bool(site.attrs["inverse"])
    if onesided and not inverse and dims[-1] != 1:
        raise site.fail(f"a one-sided transform takes real input, this is {site.spec(0)}")
    dims[axis] = length // 2 + 1 if onesided and not inverse else length
    dims[-1] = 1 if onesided and inverse else 2
    return (TensorSpec(tuple(dims), site.spec(0).dtype),)


def _dft(xp: Any, site: Site, x: Array, *_: Array | None) -> Array:
    axis = _dft_axis(site)
    return portable.dft(
        xp,
        x,
        axis,
        _dft_length(site, axis),
        inverse=bool(site.attrs["inverse"]),
        onesided=bool(site.attrs["onesided"]),
    )


def _dft_op(since: int, attrs: dict[str, Any], values: tuple[int, ...], cases: tuple[Case, ...]) -> Op:
    return Op("DFT", since, infer=_infer_dft, compute=plain(_dft), attrs=attrs, values=values, cases=cases)


_SIDES = {"inverse": 0, "onesided": 0}
_DFT = (
    _dft_op(
        17,
        {"axis": 1, **_SIDES},
        (1,),
        (
            Case("real", (f32(2, 8, 1),)),
            Case("complex", (f32(2, 5, 2),)),
            Case("onesided", (f32(2, 9, 1),), {"onesided": 1}),
            Case("inverse", (f32(2, 5, 2),), {"inverse": 1}),
            Case("padded", (f32(2, 5, 1), np.array(8))),
            Case("cut", (f32(2, 3, 7, 1), np.array(4)), {"axis": 2}),
        ),
    ),
    _dft_op(
        20,
        _SIDES,
        (1, 2),
        (
            Case("real", (f32(2, 8, 1),)),
            Case("axis", (f32(2, 8, 3, 1), None, np.array(1)), {"onesided": 1}),
            Case("inverse", (f32(2, 5, 2), None, np.array(-2)), {"inverse": 1}),
        ),
    ),
)


def _stft_frames(site: Site) -> tuple[int, int, int]:
    """Frame length, step and how many frames there are."""
    x = site.spec(0)
    step = single(site, 1, "frame_step")
    length = single(site, 3, "frame_length")
    if x.ndim not in (2, 3) or (x.ndim == 3 and x.dims[2] not in (1, 2)):
        raise site.fail(f"signal is {x}, expected (batch, length, 1 or 2)")
    if length is None:
        length = site.spec(2).size if site.has(2) else x.dims[1]
    if step is None or step < 1 or not 1 <= length <= x.dims[1]:
        raise site.fail(f"frame_step {step} and frame_length {length} do not fit a signal of {x.dims[1]}")
    if site.has(2) and site.spec(2).dims != (length,):
        raise site.fail(f"window is {site.spec(2)}, expected {length} elements")
    return length, step, 1 + (x.dims[1] - length) // step


def _infer_stft(site: Site) -> tuple[TensorSpec]:
    length, _, frames = _stft_frames(site)
    x = site.spec(0)
    if site.attrs["onesided"] and x.ndim == 3 and x.dims[2] == 2:
        raise site.fail(f"a one-sided transform takes real input, this is {x}")
    bins = length // 2 + 1 if site.attrs["onesided"] else length
    return (TensorSpec((x.dims[0], frames, bins, 2), x.dtype),)


def _stft(xp: Any, site: Site, x: Array, _: Array, window: Array | None = None, *__: Array | None) -> Array:
    length, step, frames = _stft_frames(site)
    return portable.stft(xp, x, window, length, step, frames, onesided=bool(site.attrs["onesided"]))


_STFT = Op(
    "STFT",
    17,
    infer=_infer_stft,
    compute=plain(_stft),
    attrs={"onesided": 1},
    values=(1, 3),
    cases=(
        Case("window", (f32(2, 32, 1), np.array(4), f32(8))),
        Case("length", (f32(1, 21, 1), np.array(5), None, np.array(9))),
        Case("both_sides", (f32(1, 16, 1), np.array(8), f32(8)), {"onesided": 0}),
        Case("complex", (f32(2, 16, 2), np.array(3), f32(8)), {"onesided": 0}),
    ),
)


def _window_size(site: Site) -> int:
    size = single(site, 0, "size")
    if size is None or size < 0:
        raise site.fail(f"size is {size}, expected a number of samples")
    return size


def _window(name: str) -> Op:
    def compute(xp: Any, site: Site, *_: Array) -> Array:
        made = portable.window(xp, name, _window_size(site), periodic=bool(site.attrs["periodic"]))
        return made.astype(element_type(site, "output_datatype"))

    return Op(
        f"{name}Window",
        17,
        infer=lambda site: (TensorSpec((_window_size(site),), element_type(site, "output_datatype")),),
        compute=plain(compute),
        attrs={"output_datatype": 1, "periodic": 1},
        values=(0,),
        cases=(
            Case("periodic", (np.array(10),)),
            Case("symmetric", (np.array(9, np.int32),), {"periodic": 0}),
            Case("double", (np.array(7),), {"output_datatype": 11}),
        ),
    )


_MEL_INPUTS = ("num_mel_bins", "dft_length", "sample_rate")


def _mel_sizes(site: Site) -> tuple[int, int, int]:
    given = [single(site, i, name) for i, name in enumerate(_MEL_INPUTS)]
    if any(n is None or n < 1 for n in given):
        raise site.fail(f"{', '.join(_MEL_INPUTS)} are {given}, expected positive numbers")
    return given[0] or 0, given[1] or 0, given[2] or 0


def _mel(xp: Any, site: Site, *ins: Array) -> Array:
    bins, length, rate = _mel_sizes(site)
    low, high = (float(np.asarray(x).reshape(-1)[0]) for x in ins[3:5])
    points = portable.mel_points(bins, length, rate, low, high)
    if not 0 <= points[0] <= points[-1] <= length // 2:
        raise site.fail(f"the edges {low} and {high} Hz do not lie within 0 and {rate / 2} Hz")
    return xp.asarray(portable.mel_filters(points, length // 2 + 1)).astype(element_type(site, "output_datatype"))


_MEL = Op(
    "MelWeightMatrix",
    17,
    infer=lambda site: (
        TensorSpec((_mel_sizes(site)[1] // 2 + 1, _mel_sizes(site)[0]), element_type(site, "output_datatype")),
    ),
    compute=plain(_mel),
    attrs={"output_datatype": 1},
    values=(0, 1, 2, 3, 4),
    cases=(
        Case("small", (*map(np.array, (8, 16, 8192)), np.array(0, np.float32), np.array(4096, np.float32))),
        Case("speech", (*map(np.array, (40, 512, 16000)), np.array(20, np.float32), np.array(7600, np.float32))),
    ),
    portable=False,
)

OPS = (*_DFT, _STFT, *(_window(name) for name in ("Hann", "Hamming", "Blackman")), _MEL)

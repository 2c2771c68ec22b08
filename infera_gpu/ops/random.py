"""Random numbers, drawn on the host: with a `seed` every run draws the same ones, without it new ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from infera_gpu.graph import FOLD_LIMIT
from infera_gpu.op import REQUIRED, Case, Op, Site, f32
from infera_gpu.ops._families import element_type, is_native, plain
from infera_gpu.spec import Array, DType, TensorSpec

FLOAT = {"dtype": 1, "seed": None}


def generator(seed: float | None) -> np.random.RandomState:
    """NumPy's Mersenne twister, seeded as ONNX's reference seeds it."""
    return np.random.RandomState(None if seed is None else int(seed) & 0xFFFFFFFF)


def _uniform(site: Site, shape: tuple[int, ...], dtype: DType) -> Array:
    low, high = site.attrs["low"], site.attrs["high"]
    return generator(site.attrs["seed"]).rand(*shape) * (high - low) + low


def _normal(site: Site, shape: tuple[int, ...], dtype: DType) -> Array:
    return generator(site.attrs["seed"]).randn(*shape) * site.attrs["scale"] + site.attrs["mean"]


def _like(site: Site) -> DType:
    return element_type(site, "dtype", site.spec(0).dtype)


def _float_like(site: Site) -> DType:
    """Raises PlanError where neither `dtype` nor the input's type is a float's."""
    dtype = _like(site)
    if not (is_native(dtype) and dtype.kind == "f") and dtype.name != "bfloat16":
        raise site.fail(f"cannot draw {dtype.name} for {site.spec(0)}, expected a `dtype` of floating point")
    return dtype


def _shape(site: Site) -> tuple[int, ...]:
    shape = tuple(site.attrs["shape"])
    spec = TensorSpec(shape, element_type(site, "dtype"))
    if any(d < 0 for d in shape) or spec.nbytes > FOLD_LIMIT:
        raise site.fail(f"shape {list(shape)} is negative, or larger than {FOLD_LIMIT:,} bytes")
    return shape


def _family(name: str, draw: Callable[[Site, tuple[int, ...], DType], Array], attrs: dict[str, Any]) -> tuple[Op, Op]:
    """The operator whose shape is an attribute, and the one that takes another tensor's."""

    def made(site: Site, shape: tuple[int, ...], dtype: DType) -> Array:
        return np.asarray(draw(site, shape, dtype)).astype(dtype)

    cases = (Case("new", (), {"shape": (3, 4)}), Case("seeded", (), {"shape": (5,), "seed": 3.0, "dtype": 11}))
    return (
        Op(
            name,
            1,
            infer=lambda site: (TensorSpec(_shape(site), element_type(site, "dtype")),),
            compute=plain(lambda xp, site: made(site, _shape(site), element_type(site, "dtype"))),
            attrs={"shape": REQUIRED, **FLOAT, **attrs},
            cases=cases,
            portable=False,
            pure=False,
        ),
        Op(
            f"{name}Like",
            1,
            infer=lambda site: (TensorSpec(site.spec(0).dims, _float_like(site)),),
            compute=plain(lambda xp, site, x: made(site, site.spec(0).dims, _float_like(site))),
            attrs={"dtype": None, "seed": None, **attrs},
            cases=(Case("same", (f32(2, 3),)), Case("double", (f32(2, 0),), {"dtype": 11, "seed": 1.0})),
            portable=False,
            pure=False,
        ),
    )


def _bernoulli(xp: Any, site: Site, x: Array) -> Array:
    chances = np.asarray(x, np.float64)
    if not ((chances >= 0) & (chances <= 1)).all():
        raise site.fail("its input has elements that are no probabilities, expected 0 to 1")
    return np.asarray(generator(site.attrs["seed"]).binomial(1, p=chances)).astype(_like(site))


def _multinomial(xp: Any, site: Site, x: Array) -> Array:
    """Classes drawn by their unnormalised log probabilities: where a uniform number falls in the running sum."""
    rows, classes = x.shape
    n = int(site.attrs["sample_size"])
    total = np.asarray(x, np.float64)
    chances = np.exp(total - total.max(axis=1, keepdims=True))
    edges = np.cumsum(chances / chances.sum(axis=1, keepdims=True), axis=1)
    drawn = generator(site.attrs["seed"]).rand(rows, n)
    picked = [np.searchsorted(e, d, side="right") for e, d in zip(edges, drawn, strict=True)]
    return np.minimum(np.reshape(picked, (rows, n)), classes - 1).astype(element_type(site, "dtype"))


def _infer_multinomial(site: Site) -> tuple[TensorSpec]:
    x, n = site.spec(0), int(site.attrs["sample_size"])
    dtype = element_type(site, "dtype")
    if x.ndim != 2 or not x.dims[1] or n < 0 or dtype.kind != "i":
        raise site.fail(f"{n} samples of {dtype.name} from {x}: expected (batch, classes), int32 or int64")
    spec = TensorSpec((x.dims[0], n), dtype)
    if spec.nbytes > FOLD_LIMIT:
        raise site.fail(f"sample_size {n} asks for {spec.nbytes:,} bytes, at most {FOLD_LIMIT:,} are drawn")
    return (spec,)


OPS = (
    *_family("RandomUniform", _uniform, {"high": 1.0, "low": 0.0}),
    *_family("RandomNormal", _normal, {"mean": 0.0, "scale": 1.0}),
    Op(
        "Bernoulli",
        15,
        infer=lambda site: (TensorSpec(site.spec(0).dims, _like(site)),),
        compute=plain(_bernoulli),
        attrs={"dtype": None, "seed": None},
        cases=(Case("chances", (f32(3, 4),), low=0, high=1), Case("bool", (f32(3, 4),), {"dtype": 9}, low=0, high=1)),
        portable=False,
        pure=False,
    ),
    Op(
        "Multinomial",
        7,
        infer=_infer_multinomial,
        compute=plain(_multinomial),
        attrs={"dtype": 6, "sample_size": 1, "seed": None},
        cases=(Case("one", (f32(3, 4),)), Case("many", (f32(1, 7),), {"sample_size": 50, "dtype": 7, "seed": 2.0})),
        portable=False,
        pure=False,
    ),
)

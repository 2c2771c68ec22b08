"""ai.onnx.ml: maps to tensors and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site, f32
from infera_gpu.ops._ml import ml_op, table
from infera_gpu.ops.text import strings
from infera_gpu.spec import Array


def _zip_map(xp: Any, site: Site, x: Array) -> tuple[list[dict[Any, float]]]:
    """A map from labels to scores for each row."""
    labels = list(site.attrs["classlabels_strings"] or site.attrs["classlabels_int64s"] or ())
    if x.shape[-1] != len(labels):
        raise site.fail(f"{len(labels)} labels for {x.shape[-1]} columns")
    return ([dict(zip(labels, row, strict=True)) for row in table(x).tolist()],)


def _dict_vector(xp: Any, site: Site, given: dict[Any, Any]) -> tuple[Array]:
    words = list(site.attrs["string_vocabulary"] or site.attrs["int64_vocabulary"] or ())
    values = [given.get(w, "" if any(isinstance(v, str) for v in given.values()) else 0) for w in words]
    if any(isinstance(v, str) for v in values):
        return (strings(values, (1, len(values))),)
    whole = all(isinstance(v, int) for v in given.values()) and bool(given)
    return (np.asarray([values], np.int64 if whole else np.float32),)


def _cast_map(xp: Any, site: Site, given: dict[Any, Any]) -> tuple[Array]:
    """A map from integers to values as one row, in the order of its keys; SPARSE puts each at its key's place."""
    to: dict[str, Callable[[Any], Any]] = {"TO_FLOAT": float, "TO_INT64": lambda v: int(float(v)), "TO_STRING": str}
    if site.attrs["cast_to"] not in to or site.attrs["map_form"] not in ("DENSE", "SPARSE"):
        raise site.fail(f"cast_to '{site.attrs['cast_to']}' or map_form '{site.attrs['map_form']}' is unknown")
    change = to[site.attrs["cast_to"]]
    if site.attrs["map_form"] == "DENSE":
        values = [change(given[k]) for k in sorted(given)]
    else:
        n = int(site.attrs["max_map"])
        if not 0 < n <= 1 << 24 or any(not 0 <= k < n for k in given):
            raise site.fail(f"max_map is {n}, expected a number above every key")
        values = [change(given.get(k, 0 if site.attrs["cast_to"] != "TO_STRING" else "")) for k in range(n)]
    if site.attrs["cast_to"] == "TO_STRING":
        return (strings(values, (1, len(values))),)
    return (np.asarray([values], np.float32 if site.attrs["cast_to"] == "TO_FLOAT" else np.int64),)


OPS: tuple[Op, ...] = (
    ml_op(
        "DictVectorizer",
        1,
        lambda site: (None,),
        _dict_vector,
        {"int64_vocabulary": None, "string_vocabulary": None},
        (Case("words", ({"a": 1.5, "c": 2.0},), {"string_vocabulary": ("a", "b", "c")}),),
        host=True,
    ),
    ml_op(
        "CastMap",
        1,
        lambda site: (None,),
        _cast_map,
        {"cast_to": "TO_FLOAT", "map_form": "DENSE", "max_map": 1},
        (
            Case("dense", ({1: 0.5, 3: 2.5},)),
            Case("sparse", ({1: 0.5, 3: 2.5},), {"map_form": "SPARSE", "max_map": 5, "cast_to": "TO_INT64"}),
        ),
        host=True,
    ),
    ml_op(
        "ZipMap",
        1,
        lambda site: (None,),
        _zip_map,
        {"classlabels_int64s": None, "classlabels_strings": None},
        (
            Case("ints", (f32(2, 3),), {"classlabels_int64s": (10, 20, 30)}),
            Case("words", (f32(2, 2),), {"classlabels_strings": ("a", "b")}),
        ),
        host=True,
    ),
)

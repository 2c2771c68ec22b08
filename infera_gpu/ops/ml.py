"""ai.onnx.ml: encoders, scalers, and what prepares features."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site, f32
from infera_gpu.ops._ml import floats, ml_op
from infera_gpu.ops.text import strings, text
from infera_gpu.spec import Array, TensorSpec

F32, I64, TEXT = np.dtype(np.float32), np.dtype(np.int64), np.dtype(object)

_KINDS = ("int64s", "strings", "floats", "tensor")
_KEYED: dict[str, Any] = {
    **{f"{side}_{k}": None for side in ("keys", "values") for k in _KINDS[:3]},
    "default_float": -0.0,
    "default_int64": -1,
    "default_string": "_Unused",
}


def _side(site: Site, side: str) -> tuple[Array, str]:
    """The keys or the values, and which attribute holds them."""
    for kind in _KINDS:
        given = site.attrs.get(f"{side}_{kind}")
        if given is not None and len(given):
            dtype = {"int64s": I64, "strings": TEXT, "floats": F32}.get(kind)
            return np.asarray(given, dtype).reshape(-1), kind
    raise site.fail(f"it has no {side}: expected one of {', '.join(f'{side}_{k}' for k in _KINDS)}")


def _encoded_dtype(site: Site) -> np.dtype[Any]:
    dtype: np.dtype[Any] = _side(site, "values")[0].dtype
    return dtype


def _encode(xp: Any, site: Site, x: Array) -> Array:
    """Each element's value where it is a key, else the default. From version 4 on, NaN is a key like any other."""
    (keys, _), (values, kind) = _side(site, "keys"), _side(site, "values")
    if len(keys) != len(values):
        raise site.fail(f"{len(keys)} keys for {len(values)} values")
    given = site.attrs.get("default_tensor")
    names = {"int64s": "default_int64", "strings": "default_string", "floats": "default_float"}
    if given is not None:
        default = given.reshape(-1)[0]
    elif kind in names:
        default = site.attrs[names[kind]]
    else:
        default = {"O": "_Unused", "i": -1}.get(values.dtype.kind, -0.0)
    made = np.empty(x.shape, values.dtype)
    if x.dtype == TEXT or keys.dtype == TEXT:
        pairs = dict(zip(keys.tolist(), values.tolist(), strict=True))
        made.reshape(-1)[:] = [pairs.get(k, default) for k in x.reshape(-1).tolist()]
        return made
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    at = np.minimum(np.searchsorted(ordered, x), len(keys) - 1)
    hit = ordered[at] == x
    if x.dtype.kind == "f" and site.opset >= 4:
        hit = hit | (np.isnan(x) & np.isnan(ordered[at]))
    return np.where(hit, values[order][at], np.asarray(default, values.dtype)).astype(values.dtype)


def _label_infer(site: Site) -> tuple[TensorSpec]:
    return (TensorSpec(site.spec(0).shape, _encoded_dtype(site)),)


def _old_labels(xp: Any, site: Site, x: Array) -> tuple[Array]:
    """LabelEncoder-1 and CategoryMapper: between strings and their positions, or given numbers."""
    words = list(site.attrs.get("classes_strings") or site.attrs.get("cats_strings") or ())
    numbers = list(site.attrs.get("cats_int64s") or range(len(words)))
    if not words or len(words) != len(numbers):
        raise site.fail(f"{len(words)} strings for {len(numbers)} numbers, expected as many of each")
    if x.dtype == TEXT:
        numbered: dict[Any, Any] = dict(zip(words, numbers, strict=True))
        found = [numbered.get(s, site.attrs["default_int64"]) for s in x.reshape(-1)]
        return (np.asarray(found, np.int64).reshape(x.shape),)
    back = dict(zip(numbers, words, strict=True))
    return (strings((back.get(int(i), site.attrs["default_string"]) for i in x.reshape(-1)), x.shape),)


_INTS = np.array([3, 1, 9, 1])
_WORDS = text("b", "a", "z")
_OLD = {"default_int64": -1, "default_string": "_Unused"}
_ENCODERS = (
    ml_op(
        "LabelEncoder",
        1,
        lambda site: (None,),
        _old_labels,
        {"classes_strings": None, **_OLD},
        (Case("words", (_WORDS,), {"classes_strings": ("a", "b")}),),
        host=True,
    ),
    *(
        ml_op(
            "LabelEncoder",
            since,
            _label_infer,
            _encode,
            {**_KEYED, **extra},
            (
                Case("ints", (_INTS,), {"keys_int64s": (1, 3), "values_int64s": (10, 30)}),
                Case(
                    "floats",
                    (np.array([0.5, np.nan, 2], np.float32),),
                    {"keys_floats": (0.5, float("nan")), "values_floats": (7.0, 8.0), "default_float": 1.5},
                ),
                Case("to_floats", (_INTS,), {"keys_int64s": (3, 1), "values_floats": (0.25, 4.0)}),
            ),
        )
        for since, extra in ((2, {}), (4, {"default_tensor": None, "keys_tensor": None, "values_tensor": None}))
    ),
    ml_op(
        "CategoryMapper",
        1,
        lambda site: (None,),
        _old_labels,
        {"cats_int64s": None, "cats_strings": None, **_OLD},
        (Case("words", (_WORDS,), {"cats_strings": ("a", "b"), "cats_int64s": (5, 6)}),),
        host=True,
    ),
)


def _one_hot_classes(site: Site) -> int:
    return len(site.attrs["cats_strings"] or site.attrs["cats_int64s"] or ())


def _one_hot(xp: Any, site: Site, x: Array) -> tuple[Array]:
    words = site.attrs["cats_strings"]
    classes = np.asarray(words, object) if words else np.asarray(site.attrs["cats_int64s"] or (), np.int64)
    known = x if words else x.astype(np.int64)
    made = (known[..., None] == classes).astype(np.float32)
    if not site.attrs["zeros"] and not made.any(axis=-1).all():
        raise site.fail("an element is none of the categories, and zeros is 0")
    return (made,)


def _imputed(xp: Any, site: Site, x: Array) -> Array:
    whole = x.dtype.kind == "i"
    values = site.attrs["imputed_value_int64s" if whole else "imputed_value_floats"]
    wanted = site.attrs["replaced_value_int64" if whole else "replaced_value_float"]
    if not values or len(values) not in (1, x.shape[-1]):
        raise site.fail(f"{len(values or ())} imputed values for {x.shape[-1]} features")
    missing = np.isnan(x) if wanted != wanted else x == np.asarray(wanted, x.dtype)
    return np.where(missing, np.asarray(values, x.dtype), x).astype(x.dtype)


def _same(site: Site) -> tuple[TensorSpec]:
    return (site.spec(0),)


def _as_f32(site: Site) -> tuple[TensorSpec]:
    return (TensorSpec(site.spec(0).shape, F32),)


def _scaled(xp: Any, site: Site, x: Array) -> Array:
    offset, scale = floats(site, "offset"), floats(site, "scale")
    if not all(len(v) in (1, x.shape[-1]) for v in (offset, scale)):
        raise site.fail(f"{len(offset)} offsets and {len(scale)} scales for {x.shape[-1]} features")
    return ((x.astype(np.float32) - offset) * scale).astype(np.float32)


def _normalized(xp: Any, site: Site, x: Array) -> Array:
    """Rows divided by their norm; those whose norm is 0 stay."""
    wide = x.astype(np.float32)
    norms = {
        "MAX": lambda: wide.max(axis=-1, keepdims=True),
        "L1": lambda: np.abs(wide).sum(axis=-1, keepdims=True),
        "L2": lambda: np.sqrt((wide * wide).sum(axis=-1, keepdims=True)),
    }
    if site.attrs["norm"] not in norms:
        raise site.fail(f"norm is '{site.attrs['norm']}', expected one of {', '.join(norms)}")
    norm = norms[site.attrs["norm"]]()
    return (wide / np.where(norm == 0, 1, norm)).astype(np.float32)


def _features(xp: Any, site: Site, x: Array, at: Array) -> tuple[Array]:
    index = at.reshape(-1).astype(np.int64)
    if index.size and not 0 <= index.min() <= index.max() < x.shape[-1]:
        raise IndexError(f"a feature is out of range for {x.shape[-1]}")
    made = x[..., index]
    return (made.reshape(1, -1) if x.ndim == 1 else made,)


def _vector(xp: Any, site: Site, *ins: Array) -> tuple[Array]:
    sizes = site.attrs["inputdimensions"] or tuple(x.shape[-1] for x in ins)
    if len(sizes) != len(ins):
        raise site.fail(f"inputdimensions has {len(sizes)} values for {len(ins)} inputs")
    rows = [x.reshape(len(x) if x.ndim > 1 else 1, -1).astype(np.float32) for x in ins]
    if any(not 0 <= n <= x.shape[1] for x, n in zip(rows, sizes, strict=True)):
        raise site.fail(f"inputdimensions {list(sizes)} reach past inputs of {[x.shape[1] for x in rows]} features")
    return (np.concatenate([x[:, :n] for x, n in zip(rows, sizes, strict=True)], axis=1),)


_PREPARATION = (
    ml_op(
        "OneHotEncoder",
        1,
        lambda site: (TensorSpec((*site.spec(0).dims, _one_hot_classes(site)), F32),),
        _one_hot,
        {"cats_int64s": None, "cats_strings": None, "zeros": 1},
        (Case("ints", (_INTS,), {"cats_int64s": (1, 2, 3)}), Case("floats", (f32(2, 3),), {"cats_int64s": (0, 1)})),
    ),
    ml_op(
        "Imputer",
        1,
        _same,
        _imputed,
        {
            "imputed_value_floats": None,
            "imputed_value_int64s": None,
            "replaced_value_float": 0.0,
            "replaced_value_int64": 0,
        },
        (
            Case(
                "nan",
                (np.array([[1, np.nan], [0, 2]], np.float32),),
                {"imputed_value_floats": (5.0, 6.0), "replaced_value_float": float("nan")},
            ),
            Case("ints", (np.array([[1, 0], [0, 2]]),), {"imputed_value_int64s": (7,)}),
        ),
    ),
    ml_op(
        "Scaler",
        1,
        _as_f32,
        _scaled,
        {"offset": None, "scale": None},
        (
            Case("each", (f32(3, 2),), {"offset": (0.5, 1.0), "scale": (2.0, 3.0)}),
            Case("one", (f32(3, 2),), {"offset": (0.5,), "scale": (2.0,)}),
        ),
    ),
    ml_op(
        "Normalizer",
        1,
        _as_f32,
        _normalized,
        {"norm": "MAX"},
        [Case(n, (f32(3, 4),), {"norm": n}, low=0.1) for n in ("MAX", "L1", "L2")],
    ),
    ml_op(
        "Binarizer",
        1,
        _same,
        lambda xp, site, x: (x > site.attrs["threshold"]).astype(x.dtype),
        {"threshold": 0.0},
        (Case("half", (f32(3, 4),), {"threshold": 0.5}),),
    ),
    ml_op(
        "ArrayFeatureExtractor",
        1,
        lambda site: (None,),
        _features,
        {},
        (Case("columns", (f32(3, 5), np.array([4, 0, 4]))),),
        host=True,
    ),
    ml_op(
        "FeatureVectorizer",
        1,
        lambda site: (None,),
        _vector,
        {"inputdimensions": None},
        (Case("two", (f32(3, 2), f32(3, 4)), {"inputdimensions": (2, 4)}),),
        host=True,
    ),
)

OPS: tuple[Op, ...] = (*_ENCODERS, *_PREPARATION)

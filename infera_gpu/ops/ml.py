"""ai.onnx.ml: encoders, scalers, linear and support vector models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Op, Site, f32
from infera_gpu.ops.ml_post import labels_of, post_transform, winners
from infera_gpu.ops.text import strings, text
from infera_gpu.spec import Array, TensorSpec

F32, I64, TEXT = np.dtype(np.float32), np.dtype(np.int64), np.dtype(object)
DOMAIN = "ai.onnx.ml"


def _op(
    name: str,
    since: int,
    infer: Any,
    compute: Callable[..., Any],
    attrs: dict[str, Any],
    cases: Sequence[Case],
    *,
    host: bool = False,
) -> Op:
    return Op(name, since, infer, compute, tuple(cases), attrs, domain=DOMAIN, host=host, portable=False)


def _floats(site: Site, name: str) -> Array:
    return np.asarray(site.attrs[name] or (), np.float32)


# ---- encoders

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
    default = site.attrs[names[kind]] if kind in names and given is None else None
    if given is not None:
        default = given.reshape(-1)[0]
    elif default is None:
        default = {"O": "_Unused", "i": -1}.get(values.dtype.kind, -0.0)
    made = np.empty(x.shape, values.dtype)
    if x.dtype == TEXT or keys.dtype == TEXT:
        table = dict(zip(keys.tolist(), values.tolist(), strict=True))
        made.reshape(-1)[:] = [table.get(k, default) for k in x.reshape(-1).tolist()]
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
        table: dict[Any, Any] = dict(zip(words, numbers, strict=True))
        found = [table.get(s, site.attrs["default_int64"]) for s in x.reshape(-1)]
        return (np.asarray(found, np.int64).reshape(x.shape),)
    back = dict(zip(numbers, words, strict=True))
    return (strings((back.get(int(i), site.attrs["default_string"]) for i in x.reshape(-1)), x.shape),)


_INTS = np.array([3, 1, 9, 1])
_WORDS = text("b", "a", "z")
_OLD = {"default_int64": -1, "default_string": "_Unused"}
_ENCODERS = (
    _op(
        "LabelEncoder",
        1,
        lambda site: (None,),
        _old_labels,
        {"classes_strings": None, **_OLD},
        (Case("words", (_WORDS,), {"classes_strings": ("a", "b")}),),
        host=True,
    ),
    *(
        _op(
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
    _op(
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
    offset, scale = _floats(site, "offset"), _floats(site, "scale")
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
    _op(
        "OneHotEncoder",
        1,
        lambda site: (TensorSpec((*site.spec(0).dims, _one_hot_classes(site)), F32),),
        _one_hot,
        {"cats_int64s": None, "cats_strings": None, "zeros": 1},
        (Case("ints", (_INTS,), {"cats_int64s": (1, 2, 3)}), Case("floats", (f32(2, 3),), {"cats_int64s": (0, 1)})),
    ),
    _op(
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
    _op(
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
    _op(
        "Normalizer",
        1,
        _as_f32,
        _normalized,
        {"norm": "MAX"},
        [Case(n, (f32(3, 4),), {"norm": n}, low=0.1) for n in ("MAX", "L1", "L2")],
    ),
    _op(
        "Binarizer",
        1,
        _same,
        lambda xp, site, x: (x > site.attrs["threshold"]).astype(x.dtype),
        {"threshold": 0.0},
        (Case("half", (f32(3, 4),), {"threshold": 0.5}),),
    ),
    _op(
        "ArrayFeatureExtractor",
        1,
        lambda site: (None,),
        _features,
        {},
        (Case("columns", (f32(3, 5), np.array([4, 0, 4]))),),
        host=True,
    ),
    _op(
        "FeatureVectorizer",
        1,
        lambda site: (None,),
        _vector,
        {"inputdimensions": None},
        (Case("two", (f32(3, 2), f32(3, 4)), {"inputdimensions": (2, 4)}),),
        host=True,
    ),
)


# ---- models


def _matrix(site: Site, rows: int, features: int) -> Array:
    made = _floats(site, "coefficients")
    if made.size != rows * features:
        raise site.fail(f"{made.size} coefficients for {rows} x {features}")
    return made.reshape(rows, features)


def _table(x: Array) -> Array:
    return x.reshape(1, -1).astype(np.float32) if x.ndim == 1 else x.astype(np.float32)


def _rows(site: Site) -> int:
    return site.spec(0).dims[0] if site.spec(0).ndim == 2 else 1


def _linear(xp: Any, site: Site, x: Array) -> Array:
    rows, n = _table(x), int(site.attrs["targets"])
    made = rows @ _matrix(site, n, rows.shape[1]).T
    shift = _floats(site, "intercepts")
    return post_transform(site, (made + shift if shift.size else made).astype(np.float32))


def _classes_infer(name: str) -> Any:
    def infer(site: Site) -> tuple[TensorSpec, TensorSpec]:
        labels = labels_of(site, name)
        return TensorSpec((_rows(site),), labels.dtype), TensorSpec((_rows(site), len(labels)), F32)

    return infer


def _linear_classes(xp: Any, site: Site, x: Array) -> tuple[Array, Array]:
    rows, labels = _table(x), labels_of(site, "classlabels_ints")
    n = _floats(site, "coefficients").size // max(rows.shape[1], 1)
    shift = _floats(site, "intercepts")
    scores = rows @ _matrix(site, n, rows.shape[1]).T + (shift if shift.size else 0)
    if n == 1 and len(labels) == 2:
        pick = (scores[:, 0] > 0).astype(int)
        scores = np.concatenate((-scores, scores), axis=1)
    elif n == len(labels):
        pick = winners(scores)
    else:
        raise site.fail(f"coefficients for {n} classes, labels for {len(labels)}")
    return labels[pick], post_transform(site, scores.astype(np.float32))


def _kernel(site: Site, x: Array, vectors: Array) -> Array:
    """(rows, features), (vectors, features) -> (rows, vectors)"""
    kind = site.attrs["kernel_type"]
    gamma, coef0, degree = (*(site.attrs["kernel_params"] or ()), 0.0, 0.0, 0.0)[:3]
    if kind == "RBF":
        square = (x * x).sum(1)[:, None] + (vectors * vectors).sum(1) - 2 * (x @ vectors.T)
        return np.exp(-gamma * np.maximum(square, 0))
    product = x @ vectors.T
    made = {
        "LINEAR": lambda: product,
        "POLY": lambda: (gamma * product + coef0) ** degree,
        "SIGMOID": lambda: np.tanh(gamma * product + coef0),
    }
    if kind not in made:
        raise site.fail(f"kernel_type is '{kind}', expected LINEAR, POLY, RBF or SIGMOID")
    return made[kind]()


def _vectors(site: Site, count: int, features: int) -> Array:
    made = np.asarray(site.attrs["support_vectors"] or (), np.float64)
    if made.size != count * features:
        raise site.fail(f"{made.size} numbers for {count} support vectors of {features} features")
    return made.reshape(count, features)


def _svm_regress(xp: Any, site: Site, x: Array) -> Array:
    rows, n = _table(x).astype(np.float64), int(site.attrs["n_supports"])
    weights, rho = np.asarray(site.attrs["coefficients"] or (), np.float64), _floats(site, "rho")
    if n > 0:
        if len(weights) != n:
            raise site.fail(f"{len(weights)} coefficients for {n} support vectors")
        made = _kernel(site, rows, _vectors(site, n, rows.shape[1])) @ weights
    else:
        made = _kernel(site, rows, weights.reshape(1, -1))[:, 0]
    made = (made + (rho[0] if len(rho) else 0)).astype(np.float32)[:, None]
    return np.where(made > 0, 1, -1).astype(np.float32) if site.attrs["one_class"] else post_transform(site, made)


def _svm_params(rng: np.random.Generator, n: int, features: int) -> dict[str, Any]:
    return {
        "support_vectors": tuple(map(float, rng.uniform(-1, 1, n * features).astype(np.float32))),
        "coefficients": tuple(map(float, rng.uniform(-1, 1, n).astype(np.float32))),
        "rho": (0.25,),
        "kernel_params": (0.5, 0.3, 3.0),
        "n_supports": n,
    }


_RNG = np.random.default_rng(5)
_COEFFICIENTS = tuple(map(float, _RNG.uniform(-1, 1, 12).astype(np.float32)))
_THREE = {"coefficients": _COEFFICIENTS, "classlabels_ints": (0, 4, 7), "intercepts": (0.1, 0.2, 0.3)}
_MODELS = (
    _op(
        "LinearRegressor",
        1,
        lambda site: (TensorSpec((_rows(site), int(site.attrs["targets"])), F32),),
        _linear,
        {"coefficients": None, "intercepts": None, "post_transform": "NONE", "targets": 1},
        (Case("three", (f32(5, 4),), {"coefficients": _COEFFICIENTS, "targets": 3, "intercepts": (0.1, 0.2, 0.3)}),),
    ),
    _op(
        "LinearClassifier",
        1,
        _classes_infer("classlabels_ints"),
        _linear_classes,
        {
            "classlabels_ints": None,
            "classlabels_strings": None,
            "coefficients": REQUIRED,
            "intercepts": None,
            "multi_class": 0,
            "post_transform": "NONE",
        },
        tuple(
            Case(
                p.lower(),
                (f32(5, 4),),
                {
                    "coefficients": _COEFFICIENTS,
                    "classlabels_ints": (0, 4, 7),
                    "intercepts": (0.1, 0.2, 0.3),
                    "post_transform": p,
                },
                n_outs=2,
            )
            for p in ("NONE", "SOFTMAX", "LOGISTIC")
        ),
    ),
    _op(
        "SVMRegressor",
        1,
        lambda site: (TensorSpec((_rows(site), 1), F32),),
        _svm_regress,
        {
            **dict.fromkeys(("coefficients", "kernel_params", "rho", "support_vectors")),
            "kernel_type": "LINEAR",
            "n_supports": 0,
            "one_class": 0,
            "post_transform": "NONE",
        },
        [
            Case(k.lower(), (f32(4, 3),), {**_svm_params(_RNG, 5, 3), "kernel_type": k})
            for k in ("LINEAR", "POLY", "RBF", "SIGMOID")
        ],
    ),
)


# ---- maps


def _zip_map(xp: Any, site: Site, x: Array) -> tuple[list[dict[Any, float]]]:
    """A map from labels to scores for each row."""
    labels = list(site.attrs["classlabels_strings"] or site.attrs["classlabels_int64s"] or ())
    if x.shape[-1] != len(labels):
        raise site.fail(f"{len(labels)} labels for {x.shape[-1]} columns")
    return ([dict(zip(labels, row, strict=True)) for row in _table(x).tolist()],)


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


_MAPS = (
    _op(
        "DictVectorizer",
        1,
        lambda site: (None,),
        _dict_vector,
        {"int64_vocabulary": None, "string_vocabulary": None},
        (Case("words", ({"a": 1.5, "c": 2.0},), {"string_vocabulary": ("a", "b", "c")}),),
        host=True,
    ),
    _op(
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
    _op(
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

OPS = (*_ENCODERS, *_PREPARATION, *_MODELS, *_MAPS)

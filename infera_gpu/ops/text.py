"""Operators on text. Strings are arrays of `str`; all of this runs on the host."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from infera_gpu.graph import FOLD_LIMIT
from infera_gpu.op import REQUIRED, Case, Op, Site
from infera_gpu.spec import Array


def strings(values: Iterable[Any], shape: Sequence[int]) -> Array:
    """An array of str."""
    made = np.empty(tuple(shape), object)
    for i, v in enumerate(values):
        made.flat[i] = v
    return made


def _texts(site: Site, *arrays: Array) -> None:
    for i, a in enumerate(arrays):
        if a.dtype != object:
            raise site.fail(f"input {i} is {a.dtype.name}{list(a.shape)}, expected strings")


def _concat(xp: Any, site: Site, x: Array, y: Array) -> tuple[Array]:
    _texts(site, x, y)
    a, b = np.broadcast_arrays(x, y)
    return (strings((f"{s}{t}" for s, t in zip(a.flat, b.flat, strict=True)), a.shape),)


def _split(xp: Any, site: Site, x: Array) -> tuple[Array, Array]:
    """Each string's pieces along a new last axis, filled up with empty strings, and how many they are."""
    _texts(site, x)
    most = -1 if site.attrs["maxsplit"] is None else int(site.attrs["maxsplit"])
    pieces = [s.split(site.attrs["delimiter"] or None, most) for s in x.flat]
    width = max(map(len, pieces), default=0)
    filled = (p for each in pieces for p in (*each, *[""] * (width - len(each))))
    return strings(filled, (*x.shape, width)), np.array([len(p) for p in pieces], np.int64).reshape(x.shape)


@lru_cache(maxsize=64)
def compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _full_match(xp: Any, site: Site, x: Array) -> tuple[Array]:
    """Whether the whole of each string matches. The pattern is RE2's syntax, of which Python's is a superset."""
    _texts(site, x)
    try:
        pattern = compiled(site.attrs["pattern"] or "")
    except re.error as error:
        raise site.fail(f"pattern {site.attrs['pattern']!r} is not a regular expression: {error}") from None
    return (np.array([pattern.fullmatch(s) is not None for s in x.flat], np.bool_).reshape(x.shape),)


_CHANGES: dict[str, Callable[[str], str]] = {"NONE": str, "LOWER": str.lower, "UPPER": str.upper}


def _normalize(xp: Any, site: Site, x: Array) -> tuple[Array]:
    """Stop words removed, case changed; what becomes empty goes, and one empty string stays if nothing else does."""
    _texts(site, x)
    if x.ndim > 2 or x.ndim == 0 or (x.ndim == 2 and x.shape[0] != 1):
        raise site.fail(f"its input is string{list(x.shape)}, expected [C] or [1, C]")
    action = site.attrs["case_change_action"]
    if action not in _CHANGES:
        raise site.fail(f"case_change_action is '{action}', expected one of {', '.join(_CHANGES)}")
    change = _CHANGES[action]
    sensitive = bool(site.attrs["is_case_sensitive"])
    stop = set(site.attrs["stopwords"] or ())
    folded = {s.lower() for s in stop}
    kept = [s for s in x.flat if (s not in stop if sensitive else s.lower() not in folded)]
    made = [change(s) for s in kept if s] or [""]
    return (strings(made, (len(made),) if x.ndim == 1 else (1, len(made))),)


def _grams(site: Site) -> dict[tuple[Any, ...], int]:
    """Every n-gram of the pool that counts, and its column."""
    pool = site.attrs["pool_strings"] or site.attrs["pool_int64s"] or ()
    starts = [int(s) for s in site.attrs["ngram_counts"]]
    columns = site.attrs["ngram_indexes"]
    if (
        starts != sorted(starts)
        or (starts and not 0 <= starts[0] <= starts[-1] <= len(pool))
        or min(columns, default=0) < 0
    ):
        raise site.fail(f"ngram_counts {starts} are no positions in a pool of {len(pool)}, or a column is negative")
    found: dict[tuple[Any, ...], int] = {}
    seen = 0
    for n, (begin, end) in enumerate(zip(starts, [*starts[1:], len(pool)], strict=True), 1):
        for at in range(begin, end - n + 1, n):
            if seen >= len(columns):
                raise site.fail(f"ngram_indexes has {len(columns)} columns, the pool holds more n-grams")
            if site.attrs["min_gram_length"] <= n <= site.attrs["max_gram_length"]:
                found.setdefault(tuple(pool[at : at + n]), int(columns[seen]))
            seen += 1
    return found


def _tfidf(xp: Any, site: Site, x: Array) -> tuple[Array]:
    """How often each n-gram of the pool occurs in a row, with up to `max_skip_count` elements between its own."""
    grams = _grams(site)
    if x.ndim > 2:
        raise site.fail(f"its input has {x.ndim} axes, expected [C] or [N, C]")
    mode = site.attrs["mode"]
    if mode not in ("TF", "IDF", "TFIDF"):
        raise site.fail(f"mode is '{mode}', expected TF, IDF or TFIDF")
    width = max(site.attrs["ngram_indexes"], default=-1) + 1
    rows = x.reshape(1, -1) if x.ndim < 2 else x
    if 4 * len(rows) * width > FOLD_LIMIT:
        raise site.fail(f"{len(rows)} rows of {width:,} columns are more than {FOLD_LIMIT:,} bytes")
    counts = np.zeros((len(rows), width), np.float32)
    low, high = int(site.attrs["min_gram_length"]), int(site.attrs["max_gram_length"])
    longest = min(high, max(map(len, grams), default=0))
    for row, count in zip(rows.tolist(), counts, strict=True):
        for n in range(max(low, 1), longest + 1):
            for skip in range(1, (1 if n == 1 else int(site.attrs["max_skip_count"]) + 1) + 1):
                span = (n - 1) * skip
                if span >= len(row):
                    break
                for at in range(len(row) - span):
                    column = grams.get(tuple(row[at : at + span + 1 : skip]))
                    if column is not None:
                        count[column] += 1
    weights = site.attrs["weights"]
    if mode != "TF":
        factor = np.ones(width, np.float32)
        if weights is not None:
            if len(weights) != len(site.attrs["ngram_indexes"]):
                raise site.fail(f"{len(weights)} weights for {len(site.attrs['ngram_indexes'])} n-grams")
            factor[list(site.attrs["ngram_indexes"])] = weights
        counts = (counts if mode == "TFIDF" else (counts > 0)) * factor
    return (counts.astype(np.float32).reshape(width) if x.ndim < 2 else counts.astype(np.float32),)


def _op(name: str, since: int, compute: Any, attrs: dict[str, Any], cases: tuple[Case, ...], outs: int = 1) -> Op:
    return Op(
        name,
        since,
        infer=lambda site: (None,) * outs,
        compute=compute,
        attrs=attrs,
        cases=cases,
        host=True,
        portable=False,
    )


def text(*values: str, shape: tuple[int, ...] | None = None) -> Array:
    """An array of strings, for cases."""
    return strings(values, (len(values),) if shape is None else shape)


_WORDS = text("monday", "tuesday", "Wednesday", "under", "monday")
_POOL = {
    "mode": "TF",
    "min_gram_length": 1,
    "max_gram_length": 2,
    "max_skip_count": 0,
    "ngram_counts": (0, 4),
    "ngram_indexes": (0, 1, 2, 3, 4, 5, 6),
    "pool_int64s": (2, 3, 5, 4, 5, 6, 7, 8, 6, 7),
}
_IDS = np.array([[1, 1, 3, 3, 3, 7], [8, 6, 7, 5, 6, 8]], np.int32)

OPS = (
    _op(
        "StringConcat",
        20,
        _concat,
        {},
        (
            Case("same", (text("a", ""), text("c", "d"))),
            Case("broadcast", (text("a", "b", shape=(2, 1)), text("x", "y", "z"))),
        ),
    ),
    _op(
        "StringSplit",
        20,
        _split,
        {"delimiter": None, "maxsplit": None},
        (
            Case("words", (text("a b", " c  d e ", ""),), n_outs=2),
            Case("comma", (text("a,b,,c", "d", shape=(2, 1)),), {"delimiter": ",", "maxsplit": 2}, n_outs=2),
        ),
        2,
    ),
    _op(
        "RegexFullMatch",
        20,
        _full_match,
        {"pattern": None},
        (Case("sites", (text("www.google.com", "www.facebook.com", "x"),), {"pattern": r"www\.[\w.-]+\.\bcom\b"}),),
    ),
    _op(
        "StringNormalizer",
        10,
        _normalize,
        {"case_change_action": "NONE", "is_case_sensitive": 0, "locale": None, "stopwords": None},
        (
            Case("stop", (_WORDS,), {"stopwords": ("Monday",), "case_change_action": "UPPER"}),
            Case("sensitive", (_WORDS,), {"stopwords": ("Monday", "tuesday"), "is_case_sensitive": 1}),
            Case("nothing_left", (text("a", "A", shape=(1, 2)),), {"stopwords": ("a", "A")}),
        ),
    ),
    _op(
        "TfIdfVectorizer",
        9,
        _tfidf,
        {
            "max_gram_length": REQUIRED,
            "max_skip_count": REQUIRED,
            "min_gram_length": REQUIRED,
            "mode": REQUIRED,
            "ngram_counts": REQUIRED,
            "ngram_indexes": REQUIRED,
            "pool_int64s": None,
            "pool_strings": None,
            "weights": None,
        },
        (
            Case("counts", (_IDS,), _POOL),
            Case("int64", (_IDS.astype(np.int64),), _POOL),
            Case("row", (_IDS[1],), {**_POOL, "max_skip_count": 3, "min_gram_length": 2}),
            Case("weighted", (_IDS,), {**_POOL, "mode": "TFIDF", "weights": (0.5, 2.0, 1.5, 3.0, 1.0, 4.0, 0.25)}),
            Case(
                "strings",
                (text("a", "b", "a", "c"),),
                {
                    **{k: v for k, v in _POOL.items() if k != "pool_int64s"},
                    "mode": "IDF",
                    "ngram_counts": (0, 2),
                    "ngram_indexes": (0, 1, 2),
                    "pool_strings": ("a", "z", "a", "c"),
                },
            ),
        ),
    ),
)

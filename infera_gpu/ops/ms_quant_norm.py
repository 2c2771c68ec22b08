"""com.microsoft: a layer of embeddings whose tables are quantised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site
from infera_gpu.ops import ms
from infera_gpu.ops._families import integers
from infera_gpu.ops._ms import F32, ms_op
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable.quant import dequantize

_EMBED: Op = next(op for op in ms.OPS if op.name == "EmbedLayerNormalization")
_TABLES = {2: 8, 3: 9, 4: 10, 5: 11, 6: 12}
"""A quantised input -> its scale; the zero point is five inputs further."""


def _infer(site: Site) -> Sequence[TensorSpec | None]:
    for i, scale in _TABLES.items():
        given = [site.has(k) for k in (i, scale, scale + 5)]
        if any(given) != all(given) or (i == 4 and site.has(1) != site.has(4)):
            raise site.fail(f"input {i}, its scale (input {scale}) and zero point (input {scale + 5}) come together")
        for k in (scale, scale + 5):
            if site.has(k) and site.spec(k).size != 1:
                raise site.fail(f"input {k} is {site.spec(k)}, expected one value")
    wide = {i: TensorSpec(site.spec(i).shape, F32) for i in _TABLES if site.has(i)}
    ins = tuple(wide.get(i, spec) for i, spec in enumerate(site.ins[:8]))
    return _EMBED.infer(replace(site, ins=ins, attrs={**_EMBED.attrs, **site.attrs}))[:2]


def _compute(xp: Any, site: Site, *ins: Array | None) -> Sequence[Array]:
    def table(i: int) -> Array | None:
        q, scale, zero = ins[i], ins[_TABLES[i]], ins[_TABLES[i] + 5]
        if q is None or scale is None or zero is None:
            return None
        return dequantize(xp, q, scale.reshape(()), zero.reshape(()), F32)

    wide = [table(i) if i in _TABLES else x for i, x in enumerate(ins[:8])]
    return _EMBED.outputs(xp, replace(site, attrs={**_EMBED.attrs, **site.attrs}), wide)[:2]


_TOKENS, _SEEN = np.array([[1, 4, 2], [0, 3, 3]], np.int32), np.array([[1, 1, 0], [1, 1, 1]], np.int32)
_WORDS, _PLACES, _KINDS = integers(1, np.uint8, 6, 8), integers(2, np.uint8, 5, 8), integers(3, np.uint8, 2, 8)
_GAMMA, _BETA = integers(4, np.uint8, 8), integers(5, np.uint8, 8)
_SCALES = tuple(np.array(v, np.float32) for v in (0.011, 0.013, 0.007, 0.009, 0.017))
_ZEROS = tuple(np.array(v, np.uint8) for v in (120, 100, 128, 3, 90))

OPS: tuple[Op, ...] = (
    ms_op(
        "QEmbedLayerNormalization",
        _infer,
        _compute,
        (
            Case(
                "segments",
                (_TOKENS, _TOKENS % 2, _WORDS, _PLACES, _KINDS, _GAMMA, _BETA, _SEEN, *_SCALES, *_ZEROS),
                n_outs=2,
            ),
            Case(
                "plain",
                (
                    *(_TOKENS, None, _WORDS, _PLACES, None, _GAMMA, _BETA, None),
                    *(*_SCALES[:2], None, *_SCALES[3:], *_ZEROS[:2], None, *_ZEROS[3:]),
                ),
                n_outs=2,
            ),
        ),
        epsilon=1e-12,
        needs=(0, 2, 3, 5, 6, 8, 9, 11, 12, 13, 14, 16, 17),
    ),
)

"""com.microsoft: what onnxruntime's optimiser and the model builders write for transformers."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.op import REQUIRED, Case, Compute, Infer, Op, Site, f32, same_as
from infera_gpu.ops._families import plain, requiring
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable import activation
from infera_kernels.portable import attention as portable
from infera_kernels.portable.quant import dynamic_quantize

DOMAIN = "com.microsoft"
F32 = np.dtype(np.float32)


def ms_op(
    name: str,
    infer: Infer,
    compute: Any,
    cases: tuple[Case, ...],
    domain: str = DOMAIN,
    needs: tuple[int, ...] = (),
    **attrs: Any,
) -> Op:
    """A declaration of version 1. `needs` are the inputs that must be present."""
    wrapped: Compute = plain(compute)
    return Op(name, 1, requiring(infer, *needs), wrapped, cases, attrs, domain=domain)


def _wide(x: Array) -> Array:
    return x.astype(np.float32) if x.dtype.itemsize < 4 else x


# ---- activations

GELU_TANH = (0.7978845608028654, 0.044715)
"""√(2/π) and the cubic coefficient; arXiv 1606.08415."""


def _gelu(xp: Any, site: Site, x: Array, bias: Array | None = None) -> Array:
    wide = _wide(x if bias is None else x + bias)
    return (wide * 0.5 * (1 + activation.activation(xp, "erf", wide * wide.dtype.type(0.5**0.5)))).astype(x.dtype)


def _fast_gelu(xp: Any, site: Site, x: Array, bias: Array | None = None) -> Array:
    wide = _wide(x if bias is None else x + bias)
    return (0.5 * wide * (1 + xp.tanh(GELU_TANH[0] * (wide + GELU_TANH[1] * wide**3)))).astype(x.dtype)


def _quick_gelu(xp: Any, site: Site, x: Array) -> Array:
    wide = _wide(x)
    return (wide / (1 + xp.exp(-site.attrs["alpha"] * wide))).astype(x.dtype)


_ACTIVATIONS = (
    ms_op("Gelu", same_as(), _gelu, (Case("matrix", (f32(3, 5),)), Case("empty", (f32(0, 2),)))),
    ms_op("BiasGelu", same_as(), _gelu, (Case("bias", (f32(2, 3, 5), f32(5))),), needs=(1,)),
    ms_op("FastGelu", same_as(), _fast_gelu, (Case("plain", (f32(3, 5),)), Case("bias", (f32(2, 3, 5), f32(5))))),
    ms_op(
        "QuickGelu",
        same_as(),
        _quick_gelu,
        (Case("plain", (f32(3, 5),)), Case("one", (f32(3, 5),), {"alpha": 1.0})),
        alpha=1.702,
    ),
)


# ---- normalisation


def _normal(xp: Any, x: Array, scale: Array, shift: Array | None, epsilon: float, *, simple: bool) -> tuple[Array, ...]:
    """Over the last axis: the result, the mean and the inverse deviation. `simple` leaves the mean where it is."""
    wide = _wide(x)
    mean = xp.zeros((*x.shape[:-1], 1), wide.dtype) if simple else wide.mean(axis=-1, keepdims=True)
    centred = wide - mean
    inverse = 1 / xp.sqrt((centred * centred).mean(axis=-1, keepdims=True) + wide.dtype.type(epsilon))
    made = centred * inverse * _wide(scale)
    return (made if shift is None else made + _wide(shift)).astype(x.dtype), mean, inverse


def _infer_skip(site: Site) -> tuple[TensorSpec, ...]:
    x, skip = site.spec(0), site.spec(1)
    if x.ndim not in (2, 3) or skip.dims[-2:] != x.dims[-2:] or site.spec(2).dims != x.dims[-1:]:
        raise site.fail(f"input {x}, skip {skip} and gamma {site.spec(2)} do not fit each other")
    rows = TensorSpec((*x.dims[:-1], 1), F32)
    return x, rows, rows, x


def _skip(simple: bool) -> Any:
    def compute(xp: Any, site: Site, x: Array, skip: Array, gamma: Array, *rest: Array | None) -> tuple[Array, ...]:
        beta, bias = (None, *rest, None)[:2] if simple else (*rest, None, None)[:2]
        total = _wide(x) + _wide(skip)
        total = total if bias is None else total + _wide(bias)
        made, mean, inverse = _normal(xp, total, gamma, beta, site.attrs["epsilon"], simple=simple)
        return made.astype(x.dtype), mean.astype(np.float32), inverse.astype(np.float32), total.astype(x.dtype)

    return compute


def _infer_simplified(site: Site) -> tuple[TensorSpec, TensorSpec]:
    x = site.spec(0)
    if not x.ndim or not x.dims[-1] or site.spec(1).dims != x.dims[-1:]:
        raise site.fail(f"X {x} and scale {site.spec(1)} do not fit each other")
    return x, TensorSpec((*x.dims[:-1], 1), F32)


def _simplified(xp: Any, site: Site, x: Array, scale: Array) -> tuple[Array, Array]:
    if site.attrs["axis"] not in (-1, x.ndim - 1):
        raise site.fail(f"axis is {site.attrs['axis']}, only the last one is supported")
    made, _, inverse = _normal(xp, x, scale, None, site.attrs["epsilon"], simple=True)
    return made, inverse.astype(np.float32)


def _infer_embed(site: Site) -> tuple[TensorSpec, ...]:
    ids, words = site.spec(0), site.spec(2)
    if ids.ndim != 2 or words.ndim != 2 or {site.spec(i).dims for i in (5, 6)} != {words.dims[1:]}:
        raise site.fail(f"input_ids {ids} and word_embedding {words}: expected two axes each")
    made = TensorSpec((*ids.dims, words.dims[1]), words.dtype)
    return made, TensorSpec((ids.dims[0],), np.dtype(np.int32)), made


def _embed(
    xp: Any, site: Site, ids: Array, segments: Array | None, words: Array, places: Array, *rest: Array | None
) -> tuple[Array, ...]:
    kinds, gamma, beta, mask, at = (*rest, None, None, None, None, None)[:5]
    position = xp.arange(ids.shape[1])[None] if at is None else at
    for index, table in ((ids, words), (position, places), (segments, kinds)):
        if index is None or table is None:
            continue
        if xp is np and index.size and not 0 <= index.min() <= index.max() < len(table):
            raise IndexError(f"an index is out of range for {len(table)} embeddings")
    total = words[ids] + places[position]
    if segments is not None and kinds is not None:
        total = total + kinds[segments]
    made, _, _ = _normal(xp, total, gamma, beta, site.attrs["epsilon"], simple=False)
    counts = xp.zeros(ids.shape[0], np.int32) if mask is None else mask.sum(axis=1).astype(np.int32)
    return made, counts, total.astype(words.dtype)


_TOKENS = np.array([[1, 4, 2], [0, 3, 3]], np.int32)
_NORMS = (
    ms_op(
        "SkipLayerNormalization",
        _infer_skip,
        _skip(False),
        (
            Case("beta", (f32(2, 3, 8), f32(2, 3, 8), f32(8), f32(8))),
            Case("bias", (f32(2, 3, 8), f32(2, 3, 8), f32(8), f32(8), f32(8))),
            Case("shared", (f32(2, 3, 8), f32(3, 8), f32(8))),
        ),
        epsilon=1e-12,
        needs=(0, 1, 2),
    ),
    ms_op(
        "SkipSimplifiedLayerNormalization",
        _infer_skip,
        _skip(True),
        (
            Case("plain", (f32(2, 3, 8), f32(2, 3, 8), f32(8))),
            Case("bias", (f32(2, 3, 8), f32(2, 3, 8), f32(8), f32(8))),
        ),
        epsilon=1e-12,
        needs=(0, 1, 2),
    ),
    ms_op(
        "SimplifiedLayerNormalization",
        _infer_simplified,
        _simplified,
        (Case("plain", (f32(2, 3, 8), f32(8))),),
        domain="",
        axis=-1,
        epsilon=1e-5,
        stash_type=1,
    ),
    ms_op(
        "EmbedLayerNormalization",
        _infer_embed,
        _embed,
        (
            Case("plain", (_TOKENS, None, f32(6, 8), f32(5, 8), None, f32(8), f32(8)), n_outs=2),
            Case("segments", (_TOKENS, _TOKENS % 2, f32(6, 8), f32(5, 8), f32(2, 8), f32(8), f32(8)), n_outs=2),
        ),
        epsilon=1e-12,
        mask_index_type=0,
        needs=(0, 2, 3, 5, 6),
    ),
)


# ---- products


def _operands(site: Site, a: Array, b: Array) -> tuple[Array, Array]:
    if site.attrs["transBatchA"] or site.attrs["transBatchB"]:
        raise site.fail("transBatchA and transBatchB are not supported")
    a = a.swapaxes(-1, -2) if site.attrs["transA"] and a.ndim > 1 else a
    return a, b.swapaxes(-1, -2) if site.attrs["transB"] and b.ndim > 1 else b


def product_shape(site: Site, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix product. Raises PlanError."""
    try:
        if a[-1] != b[-2 if len(b) > 1 else 0]:
            raise ValueError
        batch = np.broadcast_shapes(a[:-2], b[:-2])
    except (ValueError, IndexError):
        raise site.fail(f"{list(a)} and {list(b)} cannot be multiplied") from None
    return (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))


def _infer_fused(site: Site) -> tuple[TensorSpec]:
    def dims(i: int, flag: str) -> tuple[int, ...]:
        d = site.spec(i).dims
        return (*d[:-2], d[-1], d[-2]) if site.attrs[flag] and len(d) > 1 else d

    return (TensorSpec(product_shape(site, dims(0, "transA"), dims(1, "transB")), site.spec(0).dtype),)


def _fused(xp: Any, site: Site, a: Array, b: Array) -> Array:
    return portable.matmul(xp, *_operands(site, a, b)) * a.dtype.type(site.attrs["alpha"])


def _infer_dynamic(site: Site) -> tuple[TensorSpec]:
    if site.spec(0).dtype != F32:
        raise site.fail(f"A is {site.spec(0)}, expected float32")
    return _infer_quantized(site)


def _infer_quantized(site: Site) -> tuple[TensorSpec]:
    return (TensorSpec(product_shape(site, site.spec(0).dims, site.spec(1).dims), F32),)


def _centred(xp: Any, q: Array, zero: Array | None) -> Array:
    return q.astype(np.int32) - (0 if zero is None else zero.astype(np.int32))


def _integer_to_float(
    xp: Any,
    site: Site,
    a: Array,
    b: Array,
    a_scale: Array,
    b_scale: Array,
    a_zero: Array | None = None,
    b_zero: Array | None = None,
    bias: Array | None = None,
) -> Array:
    made = xp.matmul(_centred(xp, a, a_zero), _centred(xp, b, b_zero)).astype(np.float32) * (a_scale * b_scale)
    return (made if bias is None else made + bias).astype(np.float32)


def _dynamic(
    xp: Any, site: Site, a: Array, b: Array, scale: Array, zero: Array | None = None, bias: Array | None = None
) -> Array:
    q, a_scale, a_zero = dynamic_quantize(xp, a)
    return _integer_to_float(xp, site, q, b, a_scale, scale, a_zero, zero, bias)


def _nbits_sizes(site: Site) -> tuple[int, int, int, int, int]:
    n, k, bits, block = (int(site.attrs[x]) for x in ("N", "K", "bits", "block_size"))
    if bits not in (2, 4, 8) or block < 16 or block & (block - 1) or n < 1 or k < 1:
        raise site.fail(f"N {n}, K {k}, bits {bits}, block_size {block} are not valid")
    blocks = -(-k // block)
    if site.spec(1).size != n * blocks * block * bits // 8 or site.spec(2).size != n * blocks:
        raise site.fail(f"B {site.spec(1)} and scales {site.spec(2)} do not hold {n} x {blocks} blocks")
    return n, k, bits, block, blocks


def _infer_nbits(site: Site) -> tuple[TensorSpec]:
    n, k, *_ = _nbits_sizes(site)
    if not site.spec(0).ndim or site.spec(0).dims[-1] != k:
        raise site.fail(f"A is {site.spec(0)}, expected {k} elements last")
    return (TensorSpec((*site.spec(0).dims[:-1], n), site.spec(0).dtype),)


def _unpacked(xp: Any, packed: Array, bits: int) -> Array:
    """(..., bytes) -> (..., values): the lowest bits of a byte come first."""
    per = 8 // bits
    shifts = xp.arange(per, dtype=np.uint8) * np.uint8(bits)
    made = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return made.reshape(*packed.shape[:-1], -1)


def _nbits(
    xp: Any, site: Site, a: Array, b: Array, scales: Array, zeros: Array | None = None, *rest: Array | None
) -> Array:
    n, k, bits, _, blocks = _nbits_sizes(site)
    group, bias = (*rest, None, None)[:2]
    if group is not None:
        raise site.fail("g_idx is not supported")
    q = _unpacked(xp, b.reshape(n, blocks, -1), bits).astype(np.float32)
    scale = scales.reshape(n, blocks, 1).astype(np.float32)
    if zeros is None:
        zero: Any = np.float32(1 << (bits - 1))
    elif zeros.dtype == np.uint8:
        zero = _unpacked(xp, zeros.reshape(n, -1), bits)[:, :blocks, None].astype(np.float32)
    else:
        zero = zeros.reshape(n, blocks, 1).astype(np.float32)
    w = ((q - zero) * scale).reshape(n, -1)[:, :k]
    made = _wide(a) @ w.T
    return (made if bias is None else made + _wide(bias)).astype(a.dtype)


_U8, _I8 = np.dtype(np.uint8), np.dtype(np.int8)
_SCALES = np.array([0.02, 0.05, 0.01], np.float32)
_B4 = np.random.default_rng(1).integers(0, 256, (5, 2, 16)).astype(np.uint8)
_S4 = np.random.default_rng(2).uniform(0.01, 0.1, (5, 2)).astype(np.float32)
_Z4 = np.random.default_rng(3).integers(0, 256, (5, 1)).astype(np.uint8)
_NB = {"N": 5, "K": 50, "bits": 4, "block_size": 32}
_PRODUCTS = (
    ms_op(
        "FusedMatMul",
        _infer_fused,
        _fused,
        (
            Case("plain", (f32(2, 3, 4), f32(4, 5)), {"alpha": 0.5}),
            Case("transposed", (f32(2, 4, 3), f32(2, 5, 4)), {"transA": 1, "transB": 1}),
        ),
        alpha=1.0,
        transA=0,
        transB=0,
        transBatchA=0,
        transBatchB=0,
        needs=(0, 1),
    ),
    ms_op(
        "MatMulIntegerToFloat",
        _infer_quantized,
        _integer_to_float,
        (
            Case(
                "columns",
                (
                    TensorSpec((2, 4), _U8),
                    TensorSpec((4, 3), _I8),
                    np.array(0.1, np.float32),
                    _SCALES,
                    np.array(7, np.uint8),
                    np.array([1, 0, -2], np.int8),
                    f32(3),
                ),
                low=-50,
                high=50,
            ),
        ),
        needs=(0, 1, 2, 3),
    ),
    ms_op(
        "DynamicQuantizeMatMul",
        _infer_dynamic,
        _dynamic,
        (
            Case(
                "tensor", (f32(2, 4), TensorSpec((4, 3), _I8), np.array(0.1, np.float32), np.array(3, np.int8)), low=-3
            ),
            Case("columns", (f32(2, 4), TensorSpec((4, 3), _U8), _SCALES, None, f32(3)), low=0, high=3),
        ),
        needs=(0, 1, 2),
    ),
    ms_op(
        "MatMulNBits",
        _infer_nbits,
        _nbits,
        (Case("symmetric", (f32(3, 50), _B4, _S4), _NB), Case("zeros", (f32(2, 1, 50), _B4, _S4, _Z4), _NB)),
        K=REQUIRED,
        N=REQUIRED,
        accuracy_level=0,
        bits=4,
        block_size=REQUIRED,
        weight_prepacked=0,
        needs=(0, 1, 2),
    ),
)


# ---- attention


def _infer_mha(site: Site) -> tuple[TensorSpec, ...]:
    q, heads = site.spec(0), int(site.attrs["num_heads"])
    if q.ndim != 3 or not site.has(1) or not site.has(2) or heads < 1 or q.dims[2] % heads:
        raise site.fail(f"query is {q}, expected (batch, sequence, {heads} heads), with key and value of their own")
    k, v = site.spec(1), site.spec(2)
    if any(site.has(i) for i in (8, 9)):
        raise site.fail("past_sequence_length and cache_indirection are not supported")
    size = q.dims[2] // heads
    if k.ndim == 4:
        keys, out = k.dims[2], v.dims[3] * heads
    else:
        if k.ndim != 3 or v.ndim != 3 or k.dims[:2] != v.dims[:2] or k.dims[2] != q.dims[2] or v.dims[2] % heads:
            raise site.fail(f"key {k} and value {v} do not fit query {q}")
        keys, out = k.dims[1], v.dims[2]
    total = keys + (site.spec(6).dims[2] if site.has(6) else 0)
    return (
        TensorSpec((*q.dims[:2], out), q.dtype),
        TensorSpec((q.dims[0], heads, total, size), q.dtype),
        TensorSpec((q.dims[0], heads, total, out // heads), q.dtype),
    )


def _filter_value(site: Site) -> float:
    given = site.attrs["mask_filter_value"]
    return -10000.0 if given is None else float(given)


def _key_bias(xp: Any, site: Site, mask: Array, batch: int, keys: int, dtype: Any) -> Array:
    """A padding mask as a bias: lengths (batch,), or ones where keys count, (batch, keys) or (batch, queries, keys)."""
    if mask.ndim == 1 and mask.shape[0] == batch:
        seen = xp.arange(keys) < mask.reshape(-1, 1, 1, 1)
    elif mask.ndim == 2 and mask.shape == (batch, keys):
        seen = mask[:, None, None, :] != 0
    elif mask.ndim == 3 and mask.shape[0] == batch and mask.shape[2] == keys:
        seen = mask[:, None] != 0
    else:
        raise site.fail(f"a mask of {list(mask.shape)} is not supported for {batch} rows of {keys} keys")
    return xp.where(seen, 0, _filter_value(site)).astype(dtype)


def _mha(
    xp: Any,
    site: Site,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    extra: Array | None = None,
    past_k: Array | None = None,
    past_v: Array | None = None,
    *_: Array | None,
) -> tuple[Array, ...]:
    heads = int(site.attrs["num_heads"])
    if bias is not None:
        n = q.shape[2]
        q = q + bias[:n]
        if k.ndim == 3:
            k, v = k + bias[n : 2 * n], v + bias[2 * n :]
    q = portable.split_heads(q, heads)
    if k.ndim == 3:
        k, v = portable.split_heads(k, heads), portable.split_heads(v, heads)
    if past_k is not None:
        k, v = xp.concatenate((past_k, k), axis=2), xp.concatenate((past_v, v), axis=2)
    total = None if mask is None else _key_bias(xp, site, mask, q.shape[0], k.shape[2], q.dtype)
    if extra is not None:
        total = extra if total is None else total + extra
    if site.attrs["unidirectional"]:
        seen = portable.within(xp, q.shape[2], k.shape[2], k.shape[2] - q.shape[2], left=-1, right=0)
        ahead = xp.where(seen, 0, _filter_value(site)).astype(q.dtype)
        total = ahead if total is None else total + ahead
    y, _scores = portable.attention(xp, q, k, v, total, scale=site.attrs["scale"] or None)
    return portable.merge_heads(y), k, v


def _infer_attention(site: Site) -> tuple[TensorSpec, ...]:
    x, w, heads = site.spec(0), site.spec(1), int(site.attrs["num_heads"])
    if (
        x.ndim != 3
        or w.ndim != 2
        or w.dims[0] != x.dims[2]
        or w.dims[1] % (3 * heads)
        or site.attrs["qkv_hidden_sizes"]
    ):
        raise site.fail(f"input {x} and weights {w} do not fit three times {heads} heads")
    if any(site.has(i) for i in (4, 6)) or site.attrs["do_rotary"]:
        raise site.fail("past, past_sequence_length and do_rotary are not supported")
    return (TensorSpec((*x.dims[:2], w.dims[1] // 3), x.dtype),)


def _attention(
    xp: Any, site: Site, x: Array, w: Array, bias: Array | None = None, mask: Array | None = None, *rest: Array | None
) -> Array:
    qkv = x @ w if bias is None else x @ w + bias
    q, k, v = xp.split(qkv, 3, axis=-1)
    return _mha(xp, site, q, k, v, None, mask, (*rest, None, None)[1])[0]


def _rotary(xp: Any, site: Site, x: Array, at: Array, cos: Array, sin: Array) -> Array:
    width = int(site.attrs["rotary_embedding_dim"]) or 2 * cos.shape[1]
    heads = int(site.attrs["num_heads"])
    if site.attrs["is_packed_batching"] or site.attrs["scale"] != 1.0:
        raise site.fail("is_packed_batching and scale are not supported")
    flat = x.ndim == 3
    if flat:
        size = x.shape[2] // heads if heads else width
        split = x.reshape(*x.shape[:2], -1, size)
    else:
        split = x.transpose(0, 2, 1, 3)
    place = at.reshape(-1, 1) + xp.arange(split.shape[1]) if at.size == 1 else at
    if xp is np and place.size and not 0 <= place.min() <= place.max() < len(cos):
        raise IndexError(f"a position is out of range for {len(cos)} in the caches")
    place = xp.broadcast_to(place, split.shape[:2])
    made = portable.rotary(xp, split, cos[place], sin[place], width=width, interleaved=bool(site.attrs["interleaved"]))
    return made.reshape(x.shape) if flat else made.transpose(0, 2, 1, 3)


_SEEN = np.array([[1, 1, 0], [1, 1, 1]], np.int32)
_QKV = (f32(2, 3, 16), f32(2, 5, 16), f32(2, 5, 16))
_ATTENTION = (
    ms_op(
        "MultiHeadAttention",
        _infer_mha,
        _mha,
        (
            Case("plain", _QKV, {"num_heads": 4}),
            Case("bias", (*_QKV, f32(48)), {"num_heads": 2, "scale": 0.3}),
            Case("mask", (*_QKV, None, np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)), {"num_heads": 4}),
            Case("added", (*_QKV, None, None, f32(1, 4, 3, 5)), {"num_heads": 4}),
            Case("past", (*_QKV, None, None, None, f32(2, 4, 6, 4), f32(2, 4, 6, 4)), {"num_heads": 4}, n_outs=3),
        ),
        mask_filter_value=None,
        num_heads=REQUIRED,
        scale=None,
        unidirectional=0,
    ),
    ms_op(
        "Attention",
        _infer_attention,
        _attention,
        (
            Case("plain", (f32(2, 3, 8), f32(8, 24), f32(24)), {"num_heads": 2}),
            Case("causal", (f32(2, 4, 8), f32(8, 24), f32(24)), {"num_heads": 4, "unidirectional": 1}),
            Case("mask", (f32(2, 3, 8), f32(8, 24), f32(24), _SEEN), {"num_heads": 2}),
        ),
        do_rotary=0,
        mask_filter_value=None,
        num_heads=REQUIRED,
        past_present_share_buffer=0,
        qkv_hidden_sizes=None,
        rotary_embedding_dim=0,
        scale=None,
        unidirectional=0,
    ),
    ms_op(
        "RotaryEmbedding",
        same_as(),
        _rotary,
        (
            Case("flat", (f32(2, 3, 16), np.array([[0, 1, 2], [4, 5, 6]]), f32(9, 4), f32(9, 4))),
            Case("offset", (f32(2, 4, 3, 8), np.array([2]), f32(9, 4), f32(9, 4)), {"interleaved": 1}),
        ),
        interleaved=0,
        is_packed_batching=0,
        num_heads=0,
        rotary_embedding_dim=0,
        scale=1.0,
        needs=(0, 1, 2, 3),
    ),
)

OPS = (*_ACTIVATIONS, *_NORMS, *_PRODUCTS, *_ATTENTION)
